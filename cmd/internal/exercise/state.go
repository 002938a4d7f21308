package exercise

import (
	"context"
	"time"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

// length is the command length.
func (s *Session) length(context.Context, []string) error {
	s.printf("%s\n", size(float64(s.disk.Size())))
	return nil
}

// info is the command info.
func (s *Session) info(context.Context, []string) error { return s.disk.Info(s.out) }

// allocated reports whether the image itself, and not what it lies over, says what
// the range is. All of a raw image is so.
func allocated(m qcow2.Mapping) bool { return m.Layer == 0 && m.Kind != qcow2.MapUnallocated }

// mapDisk is the command map.
func (s *Session) mapDisk(ctx context.Context, _ []string) error {
	s.settle()
	var run qcow2.Mapping // of neighbours that are alike
	show := func() {
		word := "not allocated"
		if allocated(run) {
			word = "    allocated"
		}
		if run.Length > 0 {
			s.printf("%s (0x%x) bytes %s at offset %s (0x%x)\n", size(float64(run.Length)), run.Length, word, size(float64(run.Offset)), run.Offset)
		}
	}
	for m, err := range s.disk.Map(0, s.disk.Size()) {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return quotef("Failed to get allocation status: %w", err)
		}
		if run.Length > 0 && allocated(m) == allocated(run) {
			run.Length += m.Length
			continue
		}
		show()
		run = m
	}
	show()
	return nil
}

// alloc is the command alloc.
func (s *Session) alloc(_ context.Context, words []string) error {
	off, err := parseNumber(words[1])
	if err != nil {
		return err
	}
	n := int64(sectorSize)
	if len(words) > 2 {
		if n, err = parseNumber(words[2]); err != nil {
			return err
		}
	}
	n = min(n, max(0, s.disk.Size()-off))
	sum := int64(0)
	for m, err := range s.disk.Map(min(off, s.disk.Size()), n) {
		if err != nil {
			return s.failure("is_allocated", err)
		}
		if allocated(m) {
			sum += m.Length
		}
	}
	s.printf("%d/%d bytes allocated at offset %s\n", sum, n, size(float64(off)))
	return nil
}

// discard is the command discard.
func (s *Session) discard(_ context.Context, words []string) error {
	t := &transfer{}
	rest, err := s.getopt(words, "Cq", t.set)
	if err == nil {
		err = t.place(rest)
	}
	switch {
	case err != nil:
		return err
	case t.length > maxTransfer:
		return answerf("length cannot exceed %d, given %s", maxTransfer, rest[1])
	}
	t.started = time.Now()
	if err = t.inside(s.disk); err == nil {
		err = s.disk.Discard(t.off, t.length)
	}
	t.took = time.Since(t.started)
	s.reportFinished()
	if err != nil {
		return s.failure("discard", err)
	}
	if !t.quiet {
		s.statistics("discard", t.off, t.length, t.took, t.machine)
	}
	return nil
}

// flushDisk is the command flush.
func (s *Session) flushDisk(context.Context, []string) error {
	err := s.disk.Flush()
	s.reportFinished()
	return err
}

// truncate is the command truncate.
func (s *Session) truncate(ctx context.Context, words []string) error {
	var mode qcow2.Preallocation
	rest, err := s.getopt(words, "m:", func(_ byte, value string) (err error) {
		if mode, err = image.ParsePreallocation(value); err != nil {
			err = quotef("Invalid preallocation mode '%s'", value)
		}
		return err
	})
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return errUsage
	}
	n, err := parseNumber(rest[0])
	if err != nil {
		return err
	}
	s.settle()
	err = s.disk.Resize(ctx, n, mode)
	if _, lost := err.(lostError); lost { //nolint:errorlint // it is never wrapped
		s.disk = nil
	}
	return err
}

package exercise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// read is the command read.
func (s *Session) read(ctx context.Context, words []string) error {
	t := &transfer{failing: "read", misalign: s.Misalign}
	var part, ranged, vmState bool
	var count int64
	rest, err := s.getopt(words, "bCl:pP:qs:v", func(letter byte, value string) (err error) {
		switch letter {
		case 'b':
			vmState = true
		case 'l':
			part, ranged = true, true
			count, err = parseNumber(value)
		case 's':
			ranged = true
			t.from, err = parseNumber(value)
		default:
			err = t.set(letter, value)
		}
		return err
	})
	if err == nil {
		err = t.place(rest)
	}
	switch {
	case err != nil:
		return err
	case t.length > maxTransfer:
		return answerf("length cannot exceed %d, given %s", maxTransfer, rest[1])
	case ranged && !t.verify:
		return errUsage
	}
	if !part {
		count = t.length - t.from
	}
	if count < 0 || count > t.length-t.from {
		return answer("pattern verification range exceeds end of read data")
	}
	t.to = t.from + count
	if vmState {
		return s.vmState(t)
	}
	if err := t.shown(); err != nil {
		return err
	}
	return s.transfer(ctx, t)
}

// write is the command write.
func (s *Session) write(ctx context.Context, words []string) error {
	t := &transfer{failing: "write", write: true, pattern: defaultPattern, misalign: s.Misalign}
	var patterned, vmState bool
	var source string
	rest, err := s.getopt(words, "bcCfnpP:qs:uz", func(letter byte, value string) error {
		switch letter {
		case 'b':
			vmState = true
		case 'c':
			t.compressed = true
		case 'n':
			t.fast = true
		case 's':
			source = value
		default:
			patterned = patterned || letter == 'P'
			return t.set(letter, value)
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case len(rest) != 2:
		return errUsage
	case vmState && t.zero:
		return answer("-b and -z cannot be specified at the same time")
	case t.stable && (vmState || t.compressed):
		return answer("-f and -b or -c cannot be specified at the same time")
	case t.fast && !t.zero:
		return answer("-n requires -z to be specified")
	case t.unmap && !t.zero:
		return answer("-u requires -z to be specified")
	case t.zero && (patterned || source != "") || patterned && source != "":
		return answer("Only one of -z, -P, and -s can be specified at the same time")
	}
	if err := t.place(rest); err != nil {
		return err
	}
	if t.length > maxTransfer && !t.fast {
		return answerf("length cannot exceed %d without -n, given %s", maxTransfer, rest[1])
	}
	if vmState {
		return s.vmState(t)
	}
	if t.compressed {
		if err := t.sectors(); err != nil {
			return err
		}
	}
	if source == "" {
		return s.transfer(ctx, t)
	}
	if t.source, err = openSource(source); err != nil {
		return err
	}
	defer t.source.Close() //nolint:errcheck // it was only read
	return s.transfer(ctx, t)
}

// openSource opens a file that fills what is written.
func openSource(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO's would wait
	if err != nil {
		if cause, ok := errors.AsType[*os.PathError](err); ok {
			err = sentence(cause.Err)
		}
		return nil, remarkf("%s: %s", path, err)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = remarkf("%s: it is not a regular file", path)
	case st.Size() == 0:
		err = remarkf("%s: file is empty", path)
	default:
		return f, nil
	}
	_ = f.Close() // nothing was done with it
	return nil, err
}

// set sets what most transfers have in common.
func (t *transfer) set(letter byte, value string) (err error) {
	switch letter {
	case 'C':
		t.machine = true
	case 'f':
		t.stable = true
	case 'P':
		t.verify = !t.write
		t.pattern, err = parsePattern(value)
	case 'q':
		t.quiet = true
	case 'u':
		t.unmap = true
	case 'v':
		t.verbose = true
	case 'z':
		t.zero = true
	}
	return err
}

// shown returns an error if the transfer is to show more than it may keep.
func (t *transfer) shown() error {
	if t.verbose && t.length > maxShown {
		return answerf("-v shows at most %d bytes, given %d", maxShown, t.length)
	}
	return nil
}

// place sets the range: the words are an offset and a length.
func (t *transfer) place(words []string) (err error) {
	if len(words) != 2 {
		return errUsage
	}
	if t.off, err = parseNumber(words[0]); err != nil {
		return err
	}
	t.length, err = parseNumber(words[1])
	t.sizes = []int64{t.length}
	return err
}

// placeVector sets the range: the words are an offset and the lengths of buffers.
func (t *transfer) placeVector(words []string) (err error) {
	if len(words) < 2 {
		return errUsage
	}
	if t.off, err = parseNumber(words[0]); err != nil {
		return err
	}
	for _, word := range words[1:] {
		n, err := parseNumber(word)
		switch {
		case err != nil:
			return err
		case n > maxTransfer:
			return answerf("Argument '%s' exceeds maximum size %d", word, maxTransfer)
		case n > maxTransfer-t.length:
			return answerf("The total number of bytes exceed the maximum size %d", maxTransfer)
		}
		t.sizes = append(t.sizes, n)
		t.length += n
	}
	t.to = t.length
	return t.shown()
}

// sectors returns an error unless the range consists of whole sectors.
func (t *transfer) sectors() error {
	if t.off%sectorSize != 0 {
		return answerf("%d is not a sector-aligned value for 'offset'", t.off)
	}
	if t.length%sectorSize != 0 {
		return answerf("%d is not a sector-aligned value for 'count'", t.length)
	}
	return nil
}

var errNoVMState = fmt.Errorf("-b is not supported, because calf uses no VM state: %w", syscall.EOPNOTSUPP)

// vmState refuses a transfer of the state of a machine, which images have room for
// and calf has no use.
func (s *Session) vmState(t *transfer) error {
	if err := t.sectors(); err != nil {
		return err
	}
	return s.failure(t.failing, errNoVMState)
}

// transfer does t and prints its report, after those of others that are over.
func (s *Session) transfer(ctx context.Context, t *transfer) error {
	t.started = time.Now()
	t.run(ctx, s.disk)
	s.reportFinished()
	return s.report(t)
}

// readv is the command readv.
func (s *Session) readv(ctx context.Context, words []string) error {
	t := &transfer{failing: "readv", misalign: s.Misalign}
	rest, err := s.getopt(words, "CP:qv", t.set)
	if err == nil {
		err = t.placeVector(rest)
	}
	if err != nil {
		return err
	}
	return s.transfer(ctx, t)
}

// writev is the command writev.
func (s *Session) writev(ctx context.Context, words []string) error {
	t := &transfer{failing: "writev", write: true, pattern: defaultPattern, misalign: s.Misalign}
	rest, err := s.getopt(words, "CfqP:", t.set)
	if err == nil {
		err = t.placeVector(rest)
	}
	if err != nil {
		return err
	}
	return s.transfer(ctx, t)
}

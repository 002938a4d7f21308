package image

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"math"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// The exit codes of a comparison, which are qemu-img's.
const (
	CompareSame      = 0
	CompareDiffer    = 1
	CompareNotOpened = 2
	CompareNotMapped = 3 // what a range is could not be found out
	CompareNotRead   = 4
)

// Compare compares the disks in two images, which are opened as o says. What one
// lacks at its end must be zero in the other; if strict, both must be of one size
// and every range the same in both: data, zero or not allocated. It writes the
// result to w in qemu-img's words, and returns the exit code that goes with it.
func Compare(ctx context.Context, w io.Writer, paths [2]string, o [2]OpenOptions, strict bool, meter *progress.Meter) (code int, err error) {
	defer func() {
		if err != nil && code < CompareNotOpened {
			code = CompareNotRead
		}
	}()
	c := &comparison{strict: strict, meter: meter}
	c.limit.Store(math.MaxInt64)
	for i, path := range paths {
		o[i].ReadOnly = true
		if c.disks[i], err = Open(path, o[i]); err != nil {
			return CompareNotOpened, err
		}
		defer closing(c.disks[i], &err)
	}
	both := min(c.disks[0].Size(), c.disks[1].Size())
	size := max(c.disks[0].Size(), c.disks[1].Size())
	if strict && both != size {
		_, err := fmt.Fprintln(w, "Strict mode: Image size mismatch!")
		return CompareDiffer, err
	}
	c.meter.Expect(size)
	c.run(ctx, size)
	p := printer{w: w}
	d := c.least
	if both != size && (d == nil || d.off >= both) {
		p.f("Warning: Image size mismatch!\n")
	}
	switch {
	case ctx.Err() != nil:
		return CompareNotRead, context.Cause(ctx)
	case d == nil:
		p.f("Images are identical.\n")
		return CompareSame, p.err
	case d.err != nil:
		return d.code, d.err
	}
	p.f("%s\n", d.what)
	return d.code, p.err
}

// comparison is a Compare. One goroutine walks over the maps of both disks and
// deals out what has to be read; workers read and compare it. The difference at the
// least offset is the result, as if one had read from the beginning to the end.
type comparison struct {
	disks  [2]*Image
	strict bool
	meter  *progress.Meter

	// limit is where the least difference is; nothing from there on matters.
	limit atomic.Int64
	mu    sync.Mutex
	least *difference // guarded by mu
}

// difference is what ends a comparison at off.
type difference struct {
	off  int64
	code int
	what string // for people, if there is no error
	err  error
}

func (c *comparison) found(d difference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.least == nil || d.off < c.least.off {
		c.least = &d
		c.limit.Store(d.off)
	}
}

// stretch is a range [off, end) of both disks, and which of them to read for it.
type stretch struct {
	off, end int64
	read     [2]bool
}

// run compares the first size bytes of both disks.
func (c *comparison) run(ctx context.Context, size int64) {
	work := make(chan stretch)
	var workers sync.WaitGroup
	for range defaultWorkers() {
		workers.Go(func() {
			var buffers [2][]byte // made for the first that is read
			for s := range work {
				if buffers[0] == nil {
					buffers = [2][]byte{make([]byte, pieceBytes), make([]byte, pieceBytes)}
				}
				c.compare(s, buffers)
			}
		})
	}
	for s := range merged(c.stretches(size)) {
		for s.off < s.end && s.off < c.limit.Load() && ctx.Err() == nil {
			part := stretch{s.off, min(s.end, s.off-s.off%pieceBytes+pieceBytes), s.read}
			if s.read == [2]bool{} {
				part.end = s.end
				c.meter.Add(part.end - part.off)
			} else {
				work <- part
			}
			s.off = part.end
		}
		if s.off < s.end {
			break
		}
	}
	close(work)
	workers.Wait()
}

// stretches are the ranges of the first size bytes, in order and without gaps, up to
// where the maps themselves end the comparison.
func (c *comparison) stretches(size int64) iter.Seq[stretch] {
	return func(yield func(stretch) bool) {
		var now [2]qcow2.Mapping
		var next [2]func() (qcow2.Mapping, error, bool)
		for i, d := range c.disks {
			n, stop := iter.Pull2(padded(d, size))
			defer stop()
			next[i] = n
		}
		for off := int64(0); off < size; {
			for i, d := range c.disks {
				if now[i].Offset+now[i].Length > off {
					continue
				}
				m, err, _ := next[i]()
				if err != nil {
					c.found(difference{off: off, code: CompareNotMapped, err: fmt.Errorf("%s: what lies at %d cannot be found: %w", d.Path, off, err)})
					return
				}
				now[i] = m
			}
			a, b := newMapEntry(now[0]), newMapEntry(now[1])
			if c.strict && !a.like(&b) {
				c.found(difference{off: off, code: CompareDiffer, what: fmt.Sprintf("Strict mode: Offset %d block status mismatch!", off)})
				return
			}
			s := stretch{off, min(a.start+a.length, b.start+b.length), [2]bool{!a.zero, !b.zero}}
			if a.sharedWith(&b) {
				s.read = [2]bool{}
			}
			if !yield(s) {
				return
			}
			off = s.end
		}
	}
}

// padded is the map of a disk as if it had size bytes.
func padded(d *Image, size int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		for m, err := range d.Map(0, d.Size()) {
			if !yield(m, err) {
				return
			}
		}
		if n := size - d.Size(); n > 0 {
			yield(qcow2.Mapping{Offset: d.Size(), Length: n, HostOffset: qcow2.NoOffset}, nil)
		}
	}
}

// like reports whether a range is in one image what it is in another.
func (e *mapEntry) like(o *mapEntry) bool {
	return e.present == o.present && e.zero == o.zero && e.data == o.data && (e.offset == qcow2.NoOffset) == (o.offset == qcow2.NoOffset)
}

// sharedWith reports whether the parts of e and o at one offset are the same bytes of
// one file, as in two images over one backing file.
func (e *mapEntry) sharedWith(o *mapEntry) bool {
	return e.path == o.path && e.offset != qcow2.NoOffset && o.offset != qcow2.NoOffset && e.data && o.data &&
		e.offset-e.start == o.offset-o.start
}

// merged makes one stretch of neighbours that are read alike.
func merged(all iter.Seq[stretch]) iter.Seq[stretch] {
	return func(yield func(stretch) bool) {
		var last stretch // not yielded yet, if it is not empty
		for s := range all {
			if s.read == last.read && s.off == last.end && last.off < last.end && last.end-last.off < pieceBytes {
				last.end = s.end
				continue
			}
			if last.off < last.end && !yield(last) {
				return
			}
			last = s
		}
		if last.off < last.end {
			yield(last)
		}
	}
}

// compare reads s, of at most pieceBytes, and compares it; what is not read is zero.
func (c *comparison) compare(s stretch, buffers [2][]byte) {
	if s.off >= c.limit.Load() {
		return
	}
	n := s.end - s.off
	for i, d := range c.disks {
		if !s.read[i] {
			continue
		}
		if err := d.ReadvAt([][]byte{buffers[i][:n]}, s.off); err != nil {
			c.found(difference{off: s.off, code: CompareNotRead, err: err})
			return
		}
	}
	same := func(from, to int64) bool {
		switch a, b := buffers[0][from:to], buffers[1][from:to]; {
		case !s.read[1]:
			return isZero(a)
		case !s.read[0]:
			return isZero(b)
		default:
			return bytes.Equal(a, b)
		}
	}
	c.meter.Add(n)
	if same(0, n) {
		return
	}
	for at, next := int64(0), int64(0); at < n; at = next {
		next = min(n, at+sectorBytes-(s.off+at)%sectorBytes)
		if !same(at, next) {
			c.found(difference{off: s.off + at, code: CompareDiffer, what: fmt.Sprintf("Content mismatch at offset %d!", s.off+at)})
			return
		}
	}
}

package image

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/calfvm/calf/qcow2"
)

const (
	// sectorBytes is the least length of what is lost.
	sectorBytes = 512
	// mostLost is how many ranges are kept; of others only their length is.
	mostLost = 1000
)

// Lost is what a copy could not read. The zero value is ready for use.
type Lost struct {
	mu     sync.Mutex
	ranges []lostRange
	more   int64 // bytes that are in none of them
}

type lostRange struct {
	off, end int64
	err      error // the first
}

func (l *Lost) add(off, end int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch k := len(l.ranges) - 1; {
	case k >= 0 && l.ranges[k].end == off:
		l.ranges[k].end = end
	case k+1 < mostLost:
		l.ranges = append(l.ranges, lostRange{off, end, err})
	default:
		l.more += end - off
	}
}

// Text writes a line for each range, in order.
func (l *Lost) Text(w io.Writer) error {
	slices.SortFunc(l.ranges, func(a, b lostRange) int { return cmp.Compare(a.off, b.off) })
	p := printer{w: w}
	for i := 0; i < len(l.ranges); {
		r := l.ranges[i]
		for i++; i < len(l.ranges) && l.ranges[i].off == r.end; i++ {
			r.end = l.ranges[i].end
		}
		p.f("lost: %d bytes at %d are zero now: %v\n", r.end-r.off, r.off, r.err)
	}
	if l.more > 0 {
		p.f("lost: %d bytes elsewhere\n", l.more)
	}
	return p.err
}

// read fills p from the source at off. What cannot be read is zero, and lost, if
// that is allowed; else the error says where it begins.
func (c *copying) read(p []byte, off int64) error {
	err := c.from.ReadvAt([][]byte{p}, off)
	n := int64(len(p))
	half := off + n/2
	half -= half % sectorBytes
	switch {
	case err == nil:
		return nil
	case half <= off && c.lost == nil:
		return c.unreadable(off, err)
	case half <= off:
		clear(p)
		c.lost.add(off, off+n, err)
		return nil
	}
	if err := c.read(p[:half-off], off); err != nil {
		return err
	}
	return c.read(p[half-off:], half)
}

// unreadable says where the source cannot be read: the first byte at off.
func (c *copying) unreadable(off int64, err error) error {
	for m, mapErr := range c.from.Map(off, 1) {
		if mapErr == nil && m.Kind == qcow2.MapData {
			return fmt.Errorf("byte %d of the disk, at %d in %s, cannot be read: %w", off, m.HostOffset, m.Path, err)
		}
	}
	return fmt.Errorf("byte %d of the disk cannot be read: %w", off, err)
}

package image

import (
	"errors"
	"iter"

	"github.com/calfvm/calf/qcow2"
)

// joined is several disks, one after the other.
type joined []part

// part is one of them: it begins at start.
type part struct {
	*Image
	start int64
}

var _ source = joined(nil)

// openAll opens images for reading, to be one disk.
func openAll(paths []string, o OpenOptions) (joined, error) {
	o.ReadOnly = true
	var all joined
	for _, path := range paths {
		m, err := Open(path, o)
		if err != nil {
			return nil, errors.Join(err, all.Close())
		}
		all = append(all, part{m, all.Size()})
	}
	return all, nil
}

// Size implements source.
func (j joined) Size() int64 {
	if len(j) == 0 {
		return 0
	}
	last := j[len(j)-1]
	return last.start + last.Size()
}

// ReadvAt implements source. iov has one buffer.
func (j joined) ReadvAt(iov [][]byte, off int64) error {
	b := iov[0]
	for p, n := range j.within(off, int64(len(b))) {
		if err := p.ReadvAt([][]byte{b[:n]}, off-p.start); err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

// Map implements source.
func (j joined) Map(off, n int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		for p, n := range j.within(off, n) {
			for m, err := range p.Map(off-p.start, n) {
				m.Offset += p.start
				if !yield(m, err) {
					return
				}
			}
			off += n
		}
	}
}

// within are the parts that [off, off+n) lies in, and how many of its bytes.
func (j joined) within(off, n int64) iter.Seq2[part, int64] {
	return func(yield func(part, int64) bool) {
		for _, p := range j {
			here := min(n, p.start+p.Size()-off)
			if here <= 0 {
				continue
			}
			if !yield(p, here) {
				return
			}
			off, n = off+here, n-here
		}
	}
}

// Close closes all of them.
func (j joined) Close() error {
	var err error
	for _, p := range j {
		err = errors.Join(err, p.Close())
	}
	return err
}

package exercise

import (
	"sync"

	"github.com/calfvm/calf/qcow2"
)

// copyingDisk is a Disk that keeps in the image, by whole clusters, what is read of
// what the image lies over.
type copyingDisk struct {
	Disk

	// mu keeps writes away between the read of a cluster and its copy. Held
	// across both, and shared by writes.
	mu *sync.RWMutex
}

// ReadvAt implements Disk.
func (d copyingDisk) ReadvAt(iov [][]byte, off int64) error {
	unit, n := d.CompressionUnit(), int64(0)
	for _, p := range iov {
		n += int64(len(p))
	}
	if unit > 0 && n > 0 {
		from := off / unit * unit
		if err := d.copy(from, min((off+n+unit-1)/unit*unit, d.Size())); err != nil {
			return err
		}
	}
	return d.Disk.ReadvAt(iov, off)
}

// copy copies what the image does not have of [from, to).
func (d copyingDisk) copy(from, to int64) error {
	missing, err := d.missing(from, to)
	if err != nil || len(missing) == 0 {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if missing, err = d.missing(from, to); err != nil {
		return err
	}
	buf := make([]byte, min(to-from, 1<<20))
	for _, m := range missing {
		for end := m.Offset + m.Length; m.Offset < end; m.Offset += int64(len(buf)) {
			part := buf[:min(int64(len(buf)), end-m.Offset)]
			if err := d.copyPart(part, m.Offset); err != nil {
				return err
			}
		}
	}
	return nil
}

// copyPart copies what lies at off, through p.
func (d copyingDisk) copyPart(p []byte, off int64) error {
	iov := [][]byte{p}
	if err := d.Disk.ReadvAt(iov, off); err != nil {
		return err
	}
	if isAll(p, 0) {
		return d.Disk.WriteZeroes(off, int64(len(p)))
	}
	return d.Disk.WritevAt(iov, off)
}

// missing returns the ranges in [from, to) that the image does not have.
func (d copyingDisk) missing(from, to int64) (ranges []qcow2.Mapping, err error) {
	for m, err := range d.Map(from, to-from) {
		if err != nil {
			return nil, err
		}
		if !allocated(m) {
			ranges = append(ranges, m)
		}
	}
	return ranges, nil
}

// shared does a write beside others.
func (d copyingDisk) shared(do func() error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return do()
}

func (d copyingDisk) WritevAt(iov [][]byte, off int64) error {
	return d.shared(func() error { return d.Disk.WritevAt(iov, off) })
}

func (d copyingDisk) WriteCompressed(p []byte, off int64) error {
	return d.shared(func() error { return d.Disk.WriteCompressed(p, off) })
}

func (d copyingDisk) WriteZeroes(off, n int64) error {
	return d.shared(func() error { return d.Disk.WriteZeroes(off, n) })
}

func (d copyingDisk) PunchHole(off, n int64) error {
	return d.shared(func() error { return d.Disk.PunchHole(off, n) })
}

func (d copyingDisk) Discard(off, n int64) error {
	return d.shared(func() error { return d.Disk.Discard(off, n) })
}

package image

import (
	"github.com/calfvm/calf/qcow2"
)

// sink is what a copy writes to, from several goroutines at once.
type sink interface {
	write(p []byte, off int64) error
	// zero makes the n bytes at off read as zero.
	zero(off, n int64) error
	// grain is the unit, aligned, that has to be written at once; all but the last
	// of a disk are as long.
	grain() int64
}

// target is a disk that a diskSink writes to. A Disk is one, and a qcow2.Base.
type target interface {
	source
	WritevAt(iov [][]byte, off int64) error
	PunchHole(off, n int64) error
}

// diskSink writes to a disk.
type diskSink struct{ target }

func (d diskSink) write(p []byte, off int64) error { return d.WritevAt([][]byte{p}, off) }
func (diskSink) grain() int64                      { return 1 }

// zero leaves alone what is zero already.
func (d diskSink) zero(off, n int64) error {
	for m, err := range d.Map(off, n) {
		if err != nil {
			return err
		}
		if m.Kind == qcow2.MapZero || m.Kind == qcow2.MapUnallocated {
			continue
		}
		if err := d.PunchHole(m.Offset, m.Length); err != nil {
			return err
		}
	}
	return nil
}

// packedSink writes compressed clusters.
type packedSink struct {
	diskSink
	image *qcow2.Image
}

func (p packedSink) grain() int64 { return p.image.ClusterSize() }

func (p packedSink) write(data []byte, off int64) error {
	for len(data) > 0 {
		n := min(int64(len(data)), p.grain())
		if err := p.image.WriteCompressed(data[:n], off); err != nil {
			return err
		}
		data, off = data[n:], off+n
	}
	return nil
}

package exercise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"sync"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

// Disk is an open image, on which the commands work. All methods but Resize, Info
// and Close may be called by several goroutines at once.
type Disk interface {
	blk.Disk
	blk.ZeroWriter
	Discard(off, n int64) error
	// Map returns what the n bytes at off are, as of qcow2.Image.
	Map(off, n int64) iter.Seq2[qcow2.Mapping, error]

	// WriteCompressed writes p at off, of which both are multiples of
	// CompressionUnit but for a p that ends where the disk does. The unit is 0 if
	// the image cannot compress.
	WriteCompressed(p []byte, off int64) error
	CompressionUnit() int64
	// ZeroUnit is the size of the aligned pieces of the disk that can be made zero
	// without writing zeros, 0 if there are none.
	ZeroUnit() int64

	// Resize makes the disk size bytes long, longer or shorter.
	Resize(ctx context.Context, size int64, mode qcow2.Preallocation) error
	// Info prints what is to be known of the image.
	Info(w io.Writer) error
	Close() error
}

// OpenImage opens the image that o describes.
func OpenImage(o Options) (Disk, error) {
	m, err := image.Open(o.Path, o.openOptions())
	if err != nil {
		return nil, err
	}
	var d Disk = &openDisk{Image: m, options: o}
	if o.KeepDiscarded {
		d = keepingDisk{d}
	}
	if o.CopyOnRead {
		d = copyingDisk{d, new(sync.RWMutex)}
	}
	return d, nil
}

// openDisk is an image of either format.
type openDisk struct {
	*image.Image

	options Options
}

// WriteCompressed implements Disk.
func (d *openDisk) WriteCompressed(p []byte, off int64) error {
	for unit := d.CompressionUnit(); len(p) > 0; {
		n := min(unit, int64(len(p)))
		if err := d.QCOW2.WriteCompressed(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// CompressionUnit implements Disk.
func (d *openDisk) CompressionUnit() int64 {
	if d.QCOW2 == nil {
		return 0
	}
	return d.QCOW2.ClusterSize()
}

// ZeroUnit implements Disk.
func (d *openDisk) ZeroUnit() int64 {
	if d.QCOW2 == nil {
		return 1
	}
	if info, err := d.Image.Info(); err != nil || info.Version == 2 {
		return 0
	}
	return d.QCOW2.DiscardGranularity()
}

// Resize implements Disk. A raw image is closed meanwhile.
func (d *openDisk) Resize(ctx context.Context, size int64, mode qcow2.Preallocation) error {
	o := qcow2.ResizeOptions{Shrink: true, Preallocation: mode}
	if d.QCOW2 != nil {
		return d.QCOW2.Resize(ctx, size, o)
	}
	err := d.Close()
	if err == nil {
		err = image.Resize(ctx, d.Path, d.Format, strconv.FormatInt(size, 10), o)
	}
	m, lost := image.Open(d.Path, d.options.openOptions())
	if lost != nil {
		return lostError{errors.Join(err, lost)}
	}
	d.Image = m
	return err
}

// lostError means that an image was closed and could not be opened again.
type lostError struct{ error }

// Info implements Disk.
func (d *openDisk) Info(w io.Writer) error {
	if d.QCOW2 == nil {
		return describe(w, image.Raw, 0, 0)
	}
	info, err := d.Image.Info()
	if err != nil {
		return err
	}
	// QEMU's state of a machine lies behind what the L2 tables of the disk map.
	span := info.ClusterSize * info.ClusterSize / 8
	if info.ExtendedL2 {
		span /= 2
	}
	if err := describe(w, image.QCOW2, info.ClusterSize, (d.Size()+span-1)/span*span); err != nil {
		return err
	}
	return image.SpecificText(w, info)
}

// describe prints what is to be known of an image of any format.
func describe(w io.Writer, format string, cluster, stateOffset int64) error {
	_, err := fmt.Fprintf(w, "format name: %s\ncluster size: %s\nvm state offset: %s\n", format, size(float64(cluster)), size(float64(stateOffset)))
	return err
}

// keepingDisk is a Disk that ignores discards and frees no room.
type keepingDisk struct{ Disk }

func (keepingDisk) Discard(int64, int64) error     { return nil }
func (d keepingDisk) PunchHole(off, n int64) error { return d.WriteZeroes(off, n) }

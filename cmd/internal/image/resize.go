package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/qcow2"
)

// Resize makes the disk in the image at path as long as to says: a size, or with a
// sign a difference.
func Resize(ctx context.Context, path, format, to string, opts qcow2.ResizeOptions) (err error) {
	if format == Raw {
		return resizeRaw(path, to, opts)
	}
	m, err := qcow2.Open(path, qcow2.Options{DataFile: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	size, err := newSize(m.Size(), to)
	if err != nil {
		return err
	}
	if err := allowed(path, m.Size(), size, opts); err != nil {
		return err
	}
	return m.Resize(ctx, size, opts)
}

// allowed refuses to shrink a disk of old bytes to size unless opts allow it.
func allowed(path string, old, size int64, opts qcow2.ResizeOptions) error {
	if size < old && !opts.Shrink {
		return fmt.Errorf("%s: shrinking the disk from %d to %d bytes loses what lies beyond; --shrink allows it", path, old, size)
	}
	return nil
}

// newSize is the size that to says for a disk of old bytes.
func newSize(old int64, to string) (int64, error) {
	number := strings.TrimLeft(to, "+-")
	size, err := ParseSize(number)
	if err != nil {
		return 0, err
	}
	switch {
	case len(to)-len(number) > 1:
		return 0, fmt.Errorf("%q is no size", to)
	case to[0] == '+':
		size = old + size
	case to[0] == '-':
		size = old - size
	}
	if size < 0 {
		return 0, fmt.Errorf("a disk of %d bytes cannot be changed by %s", old, to)
	}
	return size, nil
}

// resizeRaw is Resize for a raw image.
func resizeRaw(path, to string, opts qcow2.ResizeOptions) (err error) {
	d, err := blk.OpenRaw(path, blk.RawOptions{}) // for its lock
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	size, err := newSize(d.Size(), to)
	if err == nil {
		err = allowed(path, d.Size(), size, opts)
	}
	switch {
	case err != nil:
		return err
	case opts.Preallocation != qcow2.PreallocateOff && size < d.Size():
		return errors.New("a disk that shrinks cannot be preallocated")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := preallocateRaw(f, d.Size(), size, opts.Preallocation); err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Sync()
}

package qcow2

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Base is a backing file that is open for writing: an *Image or a raw file. Its
// methods are those of an Image, and as safe for concurrent use. The image above
// it shows at once what is written to it.
type Base interface {
	ReadvAt(iov [][]byte, off int64) error
	WritevAt(iov [][]byte, off int64) error
	PunchHole(off, n int64) error
	Flush() error
	Map(off, n int64) iter.Seq2[Mapping, error]
	Size() int64
	Resize(ctx context.Context, size int64, opts ResizeOptions) error
}

var (
	_ Base = (*Image)(nil)
	_ Base = (*rawBacking)(nil)
)

// Base returns the backing file that Options.Base names, and which Layer of a
// Mapping it is. It is nil without that option. Close closes it too.
func (m *Image) Base() (b Base, layer int) { return m.base, m.baseLayer }

// isBase reports whether target, the backing file of the image at path, is the
// base.
func (o *Options) isBase(path, target string) bool {
	if o.Base == "" {
		return false
	}
	fi, err := os.Stat(target)
	if err != nil {
		return false
	}
	for _, name := range []string{o.Base, besideImage(path, o.Base)} {
		if base, err := os.Stat(name); err == nil && os.SameFile(fi, base) {
			return true
		}
	}
	return false
}

// rawBacking is a raw file under an overlay.
type rawBacking struct {
	file     file
	path     string
	readOnly bool
	// size is in whole sectors, the last of which the file may lack. Resize alone
	// changes it.
	size atomic.Int64
}

var _ backing = (*rawBacking)(nil)

// measure makes the size that of the file.
func (r *rawBacking) measure() error {
	size, err := r.file.Size()
	r.size.Store((size + diskUnit - 1) &^ (diskUnit - 1))
	return err
}

func (r *rawBacking) Size() int64  { return r.size.Load() }
func (r *rawBacking) Close() error { return r.file.Close() }

func (r *rawBacking) ReadvAt(iov [][]byte, off int64) error {
	return inFile(r.path, r.file.ReadvAt(iov, off))
}

// WritevAt implements Base.
func (r *rawBacking) WritevAt(iov [][]byte, off int64) error {
	return r.change(off, length(iov), func() error { return r.file.WritevAt(iov, off) })
}

// PunchHole implements Base. Where the host cannot punch a hole it writes zeros.
func (r *rawBacking) PunchHole(off, n int64) error {
	return r.change(off, n, func() error {
		err := r.file.Punch(off, n)
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) { // a device's blocks may be larger
			return err
		}
		const most = 1 << 20
		for end := off + n; off < end; off += most {
			if err := r.file.WritevAt(zeroBuffers(min(most, end-off)), off); err != nil {
				return err
			}
		}
		return nil
	})
}

// change does what changes [off, off+n), if that may be changed.
func (r *rawBacking) change(off, n int64, do func() error) error {
	size := r.Size()
	switch {
	case r.readOnly:
		return &Error{Path: r.path, Kind: ErrReadOnly, What: "the backing file is open for reading only"}
	case off < 0 || off > size || n > size-off:
		return &Error{Path: r.path, Kind: ErrRange, What: fmt.Sprintf("the range of %d bytes at %d is outside the disk of %d bytes", n, off, size)}
	}
	return inFile(r.path, do())
}

// Flush implements Base.
func (r *rawBacking) Flush() error { return inFile(r.path, r.file.Fdatasync()) }

// Resize implements Base. It refuses what a raw file needs a tool for: to become
// shorter, and to be preallocated.
func (r *rawBacking) Resize(_ context.Context, size int64, opts ResizeOptions) error {
	if size < r.Size() || opts.Preallocation != PreallocateOff {
		return &Error{Path: r.path, Kind: ErrInvalidOption, What: "a raw backing file can become longer only, and is not preallocated"}
	}
	return r.change(0, r.Size(), func() error {
		if err := r.file.Truncate(size); err != nil {
			return err
		}
		r.size.Store(size)
		return nil
	})
}

// Map implements Base.
func (r *rawBacking) Map(off, n int64) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		for end := off + n; off < end; {
			next, err := r.mapAt(off, end-off)
			if !yield(next, err) || err != nil {
				return
			}
			off += next.Length
		}
	}
}

// mapAt takes the holes of a raw file for zero ranges.
func (r *rawBacking) mapAt(off, n int64) (Mapping, error) {
	found := Mapping{Offset: off, Kind: MapData, Path: r.path, HostOffset: off}
	hole, length := r.file.Extent(off, n)
	if hole {
		found.Kind = MapZero
	}
	found.Length = length
	return found, nil
}

// longBacking is a backing file, or none, with zeros behind it.
type longBacking struct {
	backing backing // nil for none
	size    int64
}

func (l *longBacking) Size() int64 { return l.size }

// ends reports whether there is nothing but zeros from off on.
func (l *longBacking) ends(off int64) bool { return l.backing == nil || off >= l.backing.Size() }

func (l *longBacking) ReadvAt(iov [][]byte, off int64) error {
	if l.ends(off) {
		zeroFrom(iov, 0)
		return nil
	}
	return readPadded(l.backing, iov, off)
}

func (l *longBacking) mapAt(off, n int64) (Mapping, error) {
	if l.ends(off) {
		return Mapping{Offset: off, Length: n, HostOffset: NoOffset}, nil
	}
	return l.backing.mapAt(off, min(n, l.backing.Size()-off))
}

func (l *longBacking) Close() error {
	if l.backing == nil {
		return nil
	}
	return l.backing.Close()
}

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/qcow2"
)

// Disk is what an open image of either format is. All methods but Close are safe
// for concurrent use.
type Disk interface {
	blk.Disk
	blk.ZeroWriter
	blk.Discarder
	io.Closer

	// Map returns what the n bytes at off are, in order and without gaps. Of a
	// raw image what is a hole in its file is qcow2.MapZero.
	Map(off, n int64) iter.Seq2[qcow2.Mapping, error]
}

var (
	_ Disk = (*qcow2.Image)(nil)
	_ Disk = (*rawDisk)(nil)
)

// OpenOptions say how to open an image. The zero value opens it for writing.
type OpenOptions struct {
	Format   string // QCOW2 or Raw; empty means what FormatOf says of the name
	ReadOnly bool
	// ForceShare opens it for reading beside a process that writes to it.
	ForceShare bool
	// Cache is one of qemu-img's cache modes, CacheWriteback if it is empty.
	Cache string
	// Volatile says that nobody needs what is written if the host crashes
	// before the image is closed, and synced by another way.
	Volatile bool
	// Snapshot is the internal snapshot to open, for reading, by its ID or name.
	Snapshot string
	// Scratch opens the image, or the snapshot, under a throw-away overlay, which
	// takes all writes.
	Scratch bool
	// NoBacking refuses a backing file; BackingDirs are where one may lie beside
	// the directory of the image that names it.
	NoBacking   bool
	BackingDirs []string
	// Base is the backing file that is opened for writing too, as that of
	// qcow2.Options.
	Base string
	// BackingSize is that of qcow2.Options.
	BackingSize int64
	// CompressionLevel and L2CacheBytes are those of qcow2.Options.
	CompressionLevel int
	L2CacheBytes     int64
}

// qemu-img's cache modes.
const (
	CacheWriteback    = "writeback"
	CacheWritethrough = "writethrough"
	CacheNone         = "none"
	CacheDirectsync   = "directsync"
	CacheUnsafe       = "unsafe"
)

// cacheMode says what a cache mode means.
type cacheMode struct {
	direct  bool // past the host's page cache
	through bool // a write is stable when it returns
	unsafe  bool // a flush does nothing
}

var cacheModes = map[string]cacheMode{
	CacheWriteback:    {},
	CacheWritethrough: {through: true},
	CacheNone:         {direct: true},
	CacheDirectsync:   {direct: true, through: true},
	CacheUnsafe:       {unsafe: true},
}

// parseCache reads a cache mode by its name, which may be empty for the default.
func parseCache(name string) (cacheMode, error) {
	mode, ok := cacheModes[name]
	if !ok && name != "" {
		return mode, fmt.Errorf("the cache mode %q is not one of writeback, writethrough, none, directsync and unsafe", name)
	}
	return mode, nil
}

// over returns the disk d, which is opened for the mode, in the mode.
func (c cacheMode) over(d Disk) Disk {
	switch {
	case c.through:
		return throughDisk{d}
	case c.unsafe:
		return unsafeDisk{d}
	}
	return d
}

// Image is an open image.
type Image struct {
	Disk // obeys the cache mode

	Path, Format string
	QCOW2        *qcow2.Image // what Disk writes to; nil if that is a raw image
	raw          *rawDisk     // nil if it is not

	scratch bool // it is the overlay of OpenOptions.Scratch
}

// Open opens the image at path. The caller has to close it.
func Open(path string, o OpenOptions) (*Image, error) {
	format, err := FormatOf(path, o.Format)
	if err != nil {
		return nil, err
	}
	mode, err := parseCache(o.Cache)
	if err != nil {
		return nil, err
	}
	if o.Volatile {
		mode.through, mode.unsafe = false, true
	}
	m := &Image{Path: path, Format: format, scratch: o.Scratch}
	switch {
	case o.Scratch:
		m.QCOW2, err = qcow2.OpenScratch("", path, format, o.qcow2(mode))
		m.Disk = m.QCOW2
	case format == QCOW2:
		m.QCOW2, err = qcow2.Open(path, o.qcow2(mode))
		m.Disk = m.QCOW2
	default:
		m.raw, err = openRaw(path, o, mode.direct)
		m.Disk = m.raw
	}
	if err != nil {
		return nil, err
	}
	m.Disk = mode.over(m.Disk)
	return m, nil
}

// qcow2 are the options for an image of that format.
func (o OpenOptions) qcow2(mode cacheMode) qcow2.Options {
	return qcow2.Options{
		ReadOnly: o.ReadOnly, ForceShare: o.ForceShare, Snapshot: o.Snapshot,
		NoBacking: o.NoBacking, BackingDirs: o.BackingDirs, Base: o.Base, BackingSize: o.BackingSize, DataFile: true,
		Direct: mode.direct, Volatile: mode.unsafe,
		CompressionLevel: o.CompressionLevel, L2CacheBytes: o.L2CacheBytes,
	}
}

func openRaw(path string, o OpenOptions, direct bool) (*rawDisk, error) {
	if o.Snapshot != "" {
		return nil, fmt.Errorf("%s: a raw image has no snapshots", path)
	}
	d, err := blk.OpenRaw(path, blk.RawOptions{ReadOnly: o.ReadOnly, ForceShare: o.ForceShare, Direct: direct})
	if err != nil {
		return nil, err
	}
	return &rawDisk{Raw: d, path: path}, nil
}

// Resize makes the disk size bytes long, a multiple of 512; a raw one only longer.
func (m *Image) Resize(ctx context.Context, size int64, o qcow2.ResizeOptions) error {
	if m.QCOW2 != nil {
		return m.QCOW2.Resize(ctx, size, o)
	}
	return m.raw.Grow(size)
}

// rawDisk is a raw image that can be mapped.
type rawDisk struct {
	*blk.Raw
	path string
}

// Map implements Disk.
func (r *rawDisk) Map(off, n int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		if off < 0 || n < 0 || off > r.Size()-n {
			yield(qcow2.Mapping{}, blk.ErrBounds)
			return
		}
		for end := off + n; off < end; {
			next := qcow2.Mapping{Offset: off, Kind: qcow2.MapData, Path: r.path, HostOffset: off}
			hole, length := r.Extent(off, end-off)
			if hole {
				next.Kind = qcow2.MapZero
			}
			next.Length = length
			if !yield(next, nil) {
				return
			}
			off += length
		}
	}
}

// throughDisk makes each change of a disk stable before it returns.
type throughDisk struct{ Disk }

func (d throughDisk) then(err error) error {
	if err != nil {
		return err
	}
	return d.Flush()
}

func (d throughDisk) WritevAt(iov [][]byte, off int64) error {
	return d.then(d.Disk.WritevAt(iov, off))
}
func (d throughDisk) WriteZeroes(off, n int64) error { return d.then(d.Disk.WriteZeroes(off, n)) }
func (d throughDisk) PunchHole(off, n int64) error   { return d.then(d.Disk.PunchHole(off, n)) }
func (d throughDisk) Discard(off, n int64) error     { return d.then(d.Disk.Discard(off, n)) }

// unsafeDisk acknowledges flushes without doing them.
type unsafeDisk struct{ Disk }

func (unsafeDisk) Flush() error { return nil }

// closing joins what closing c says to *err, at the end of a function.
func closing(c io.Closer, err *error) { *err = errors.Join(*err, c.Close()) }

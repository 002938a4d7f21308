package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// Stream is the name of a source or target that is standard input or output.
const Stream = "-"

// ConvertOptions say how to make one image of others.
type ConvertOptions struct {
	Source OpenOptions // for each source
	Format string      // of the target; empty means what FormatOf says of its name
	Cache  string      // with which the target is written
	// Create describes the target. Its size is that of the sources.
	Create CreateOptions
	// Compress makes compressed clusters.
	Compress bool
	// Existing writes into an image that exists, TargetIsZero says that its disk
	// reads as zero.
	Existing, TargetIsZero bool
	// Sparse is the least length of zeros that are left out; 0 writes them all.
	Sparse int64
	// Workers is how many pieces are in work at once; 0 leaves that to calf.
	Workers int
	// Unordered lets them be written in any order.
	Unordered bool
	Rate      int64 // bytes in a second; 0 is no limit
	// Lost, if not nil, takes what cannot be read; else that is an error.
	Lost *Lost

	// Bitmaps copies the persistent bitmaps of the source. SkipBroken, if not nil,
	// is told of those that cannot be trusted, which are left out.
	Bitmaps    bool
	SkipBroken func(name string)
	// Offload has the host copy the data of raw images, without looking for zeros in
	// it.
	Offload bool

	Input  io.Reader // what Stream is as a source
	Output io.Writer // and as the target
}

// Convert copies the disks in the sources, one after the other, to the target. A
// new image appears under its name when it is whole; on any error what had the name
// is what it was, and nothing else is left.
func Convert(ctx context.Context, sources []string, target string, o ConvertOptions, meter *progress.Meter) (err error) {
	if target == Stream && o.Format == "" {
		o.Format = Raw
	}
	if o.Format, err = FormatOf(target, o.Format); err != nil {
		return err
	}
	v := &conversion{ConvertOptions: o, sources: sources, target: target, copying: &copying{
		sparse: o.Sparse, workers: o.Workers, ordered: !o.Unordered && !o.Compress, rate: o.Rate, lost: o.Lost, meter: meter,
	}}
	if v.workers == 0 {
		v.workers = defaultWorkers()
	}
	if err := v.check(); err != nil {
		return err
	}
	if sources[0] == Stream {
		return v.write(ctx)
	}
	from, err := openAll(sources, o.Source)
	if err != nil {
		return err
	}
	defer closing(from, &err)
	v.from, v.size = from, from.Size()
	if o.Bitmaps {
		if v.bitmaps, err = checkBitmaps(from[0].Image, o.SkipBroken); err != nil {
			return err
		}
	}
	return v.write(ctx)
}

// conversion is a Convert.
type conversion struct {
	ConvertOptions
	*copying
	sources []string
	target  string
	size    int64 // of the source; 0 if that is not known
	bitmaps []qcow2.Bitmap
}

// check refuses options that exclude each other.
func (v *conversion) check() error {
	stream := v.target == Stream
	switch o := &v.ConvertOptions; {
	case o.Compress && v.Format == Raw:
		return errors.New("a raw image cannot be compressed")
	case o.Compress && o.Create.Preallocation != qcow2.PreallocateOff:
		return errors.New("compression and preallocation exclude each other")
	case o.Compress && o.Create.DataFile != "":
		return errors.New("an image with an external data file cannot be compressed")
	case o.Compress && o.Unordered:
		return errors.New("compressed clusters are written in any order: leave out -W")
	case o.TargetIsZero && !o.Existing:
		return errors.New("--target-is-zero requires -n")
	case stream && v.Format != Raw:
		return errors.New("a qcow2 image is not written from its beginning to its end, so it cannot go to standard output: write it to a file")
	case stream && (o.Existing || o.Unordered || o.Create.Preallocation != qcow2.PreallocateOff):
		return errors.New("standard output takes bytes in their order only: leave out -n, -W and preallocation")
	case o.Create.Size != 0:
		return errors.New("convert makes a disk of the size that the source has: leave out -o size, and resize it then")
	case o.Bitmaps && len(v.sources) > 1:
		return errors.New("bitmaps are copied from one source only")
	case o.Bitmaps && (v.Format == Raw || o.Create.Version == 2):
		return errors.New("--bitmaps takes a target that has bitmaps: a qcow2 image of version 3")
	case o.Bitmaps && v.sources[0] == Stream:
		return errors.New("standard input has no bitmaps to copy")
	case o.SkipBroken != nil && !o.Bitmaps:
		return errors.New("--skip-broken-bitmaps requires --bitmaps")
	case o.Offload && o.Compress:
		return errors.New("the host cannot compress what it copies: leave out -C or -c")
	case slices.Contains(v.sources, Stream) && len(v.sources) > 1:
		return errors.New("standard input can be the only source")
	case o.Create.BackingFile != "" && len(v.sources) > 1:
		return errors.New("a backing file for the target makes no sense with more than one source")
	case o.Create.BackingFile != "" && v.sources[0] == Stream:
		return errors.New("a backing file for the target makes no sense with standard input as the source")
	case o.Create.Preallocation != qcow2.PreallocateOff && v.sources[0] == Stream:
		return errors.New("preallocation takes a source whose size is known: leave it out with standard input")
	case o.Create.BackingFile != "" && o.Existing:
		return errors.New("the target exists, and has the backing file it has: leave out -B")
	}
	return nil
}

// write copies the source to the target.
func (v *conversion) write(ctx context.Context) error {
	if v.target == Stream {
		s := &streamSink{w: v.Output}
		v.to, v.fresh, v.ordered = s, true, true
		if err := v.copy(ctx, func(int64) error { return nil }); err != nil {
			return err
		}
		return s.zero(s.off, v.size-s.off)
	}
	if fi, err := os.Stat(v.target); v.Existing || err == nil && fi.Mode().Type() == fs.ModeDevice {
		return v.overwrite(ctx)
	}
	if err := v.apart(); err != nil {
		return err
	}
	v.Create.Size = v.size
	return replaceFile(v.target, v.Cache != CacheUnsafe, func(temp string) error { return v.create(ctx, temp) })
}

// apart refuses a target that is a source.
func (v *conversion) apart() error {
	for _, path := range v.sources {
		if sameFile(path, v.target) {
			return fmt.Errorf("%s is a source and the target: calf image compact rewrites an image", path)
		}
	}
	return nil
}

// create makes the target at path and fills it.
func (v *conversion) create(ctx context.Context, path string) (err error) {
	if _, err := Create(path, v.Format, v.Create, true); err != nil {
		return err
	}
	if data := v.Create.DataFile; data != "" {
		defer func() {
			if err != nil {
				err = errors.Join(err, os.Remove(beside(path, data)))
			}
		}()
	}
	if v.Create.BackingFile != "" {
		base, err := v.openBase(path)
		if err != nil {
			return err
		}
		defer closing(base, &err)
	}
	return v.fill(ctx, path, true)
}

// openBase opens the backing file of the target, and looks for it in the chain of
// the source.
func (v *conversion) openBase(path string) (*Image, error) {
	name := beside(path, v.Create.BackingFile)
	o := OpenOptions{Format: v.Create.BackingFormat, ReadOnly: true, BackingDirs: v.Source.BackingDirs}
	base, err := Open(name, o)
	if err != nil {
		return nil, err
	}
	v.base, v.shared = base, -1
	if resolved, err := filepath.EvalSymlinks(name); err == nil {
		v.Source.BackingDirs = append(slices.Clone(v.Source.BackingDirs), filepath.Dir(resolved))
	}
	// Whatever keeps the chain from being seen, comparing finds what is equal.
	o = v.Source
	o.Format, _ = FormatOf(v.sources[0], o.Format)
	chain, _ := Chain(v.sources[0], o)
	for layer, i := range chain {
		if sameFile(i.Filename, name) {
			v.shared = layer
		}
	}
	return base, nil
}

// sameFile reports whether both paths lead to one file.
func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// overwrite copies the source into a target that exists.
func (v *conversion) overwrite(ctx context.Context) error {
	if v.Format != Raw && !v.Existing {
		return fmt.Errorf("%s is a device, and gets a raw image only", v.target)
	}
	if err := v.apart(); err != nil {
		return err
	}
	return v.fill(ctx, v.target, v.TargetIsZero)
}

// fill copies the source into the image at path, which is new or exists, and reads
// as zero if it is fresh.
func (v *conversion) fill(ctx context.Context, path string, fresh bool) (err error) {
	isNew := path != v.target
	to, err := Open(path, OpenOptions{
		Format: v.Format, Cache: v.Cache, BackingDirs: v.Source.BackingDirs,
		Volatile: isNew && v.Create.DataFile == "", // of a new one only the file itself is made stable
	})
	if err != nil {
		return err
	}
	defer closing(to, &err)
	v.fresh = fresh && v.base == nil
	v.to = diskSink{to}
	if v.Compress {
		v.packing(packedSink{diskSink{to}, to.QCOW2})
	}
	if from, ok := v.from.(joined); ok && v.Offload && len(from) == 1 && from[0].raw != nil && to.raw != nil {
		v.offload = func(off, n int64) error { return from[0].raw.CopyRange(to.raw.Raw, off, n) }
	}
	longer := func(size int64) error {
		if isNew && size > to.Size() {
			return to.Resize(ctx, growth(to, size), qcow2.ResizeOptions{})
		}
		return v.fits(to, size)
	}
	if err := v.fits(to, v.size); err != nil {
		return err
	}
	if err := v.copy(ctx, longer); err != nil {
		return err
	}
	if v.from == nil && isNew {
		if err := to.Resize(ctx, v.size, qcow2.ResizeOptions{Shrink: true}); err != nil {
			return err
		}
	}
	if len(v.bitmaps) > 0 {
		if err := copyBitmaps(ctx, v.bitmaps, v.from.(joined)[0].Image, to); err != nil {
			return err
		}
	}
	return to.Flush()
}

func (v *conversion) fits(to *Image, size int64) error {
	if size > to.Size() {
		return fmt.Errorf("%s has %d bytes, fewer than the source: resize it first", to.Path, to.Size())
	}
	return nil
}

// growth is how long to make a new disk that is to have size bytes at least. To make
// that of a qcow2 image longer stops its other requests.
func growth(to *Image, size int64) int64 {
	if to.Format == Raw {
		return size
	}
	const first = 1 << 30
	return max(size, 2*to.Size(), first)
}

// copy copies the source. If its size is not known before, longer makes the target
// as long as it is so far.
func (v *conversion) copy(ctx context.Context, longer func(size int64) error) error {
	if v.from != nil {
		v.expect()
		return v.disk(ctx)
	}
	size, err := v.stream(ctx, v.Input, longer)
	v.size = size
	return err
}

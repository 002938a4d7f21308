package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// CompactOptions say how to rewrite an image.
type CompactOptions struct {
	Format      string   // of the image; empty means what FormatOf says of its name
	BackingDirs []string // as in OpenOptions
	// Compress compresses all clusters; else those are that have been.
	Compress bool
	// CompressionType is "zlib" or "zstd", that of the image if it is empty.
	CompressionType string
}

// Compaction is what a Compact has done: the room on the host, in bytes, that the
// image took before and takes now.
type Compaction struct{ Before, After int64 }

// errNoGain is why an image is left as it is.
var errNoGain = errors.New("the image would take as many clusters")

// Compact gives the room back to the host that the image at path takes for zeros and
// for what nothing refers to. A qcow2 image is written anew, with the options it has,
// and takes its name again when it is whole; nothing happens if that wins no
// cluster. In a raw image holes are made. Nobody else can use the image meanwhile.
func Compact(ctx context.Context, path string, o CompactOptions, meter *progress.Meter) (Compaction, error) {
	format, err := FormatOf(path, o.Format)
	if err != nil {
		return Compaction{}, err
	}
	c := &compacting{CompactOptions: o, path: path, meter: meter}
	if c.done.Before, err = occupied(path); err != nil {
		return Compaction{}, err
	}
	if format == Raw {
		err = c.punch(ctx)
	} else {
		err = c.rewrite(ctx)
	}
	return c.done, err
}

// occupied is the room that the file at path takes on the host.
func occupied(path string) (int64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// compacting is a Compact.
type compacting struct {
	CompactOptions
	path  string
	meter *progress.Meter
	done  Compaction
}

// punch makes holes where a raw image has zeros.
func (c *compacting) punch(ctx context.Context) (err error) {
	if c.Compress || c.CompressionType != "" {
		return errors.New("a raw image cannot be compressed")
	}
	d, err := Open(c.path, OpenOptions{Format: Raw})
	if err != nil {
		return err
	}
	copied := &copying{from: d, to: punchSink{diskSink{d}}, sparse: minSparse, workers: defaultWorkers(), meter: c.meter}
	copied.expect()
	if err := errors.Join(copied.disk(ctx), d.Flush(), d.Close()); err != nil {
		return err
	}
	c.done.After, err = occupied(c.path)
	return err
}

// punchSink is the disk that is copied from: what is written is there.
type punchSink struct{ diskSink }

func (punchSink) write([]byte, int64) error { return nil }

// rewrite makes a new image in the place of a qcow2 image.
func (c *compacting) rewrite(ctx context.Context) error {
	err := replace(c.path, func(temp string) error {
		// The image is locked as by a writer until it is replaced, so it may be
		// read beside that.
		info, err := qcow2.InspectShared(c.path)
		if err != nil {
			return err
		}
		if err := c.check(ctx, info); err != nil {
			return err
		}
		if err := c.fill(ctx, temp, info); err != nil {
			return err
		}
		if c.done.After, err = occupied(temp); err == nil && c.done.After+info.ClusterSize > c.done.Before {
			err = errNoGain
		}
		return err
	})
	if errors.Is(err, errNoGain) {
		c.done.After = c.done.Before
		return nil
	}
	return err
}

// check refuses an image that cannot be written anew as it is.
func (c *compacting) check(ctx context.Context, info *qcow2.Info) error {
	refuse := func(why, instead string) error { return fmt.Errorf("%s %s: %s", c.path, why, instead) }
	fi, err := os.Stat(c.path)
	if err != nil {
		return err
	}
	names := fi.Sys().(*syscall.Stat_t).Nlink
	switch {
	case len(info.Snapshots) > 0:
		return refuse("has internal snapshots, which a compact image could not share its data with",
			"delete them with calf image snapshot -d, or copy each to an image of its own with calf image convert -l")
	case info.ExternalData:
		return refuse("has its data in another file", "compact that, if it is raw, with calf image compact -f raw "+info.DataFile)
	case names > 1:
		return refuse(fmt.Sprintf("has %d other names, which would stay the old image's", names-1),
			"remove them, or make it a file of its own with cp")
	case info.Dirty || info.Corrupt:
		return refuse("was not closed cleanly or is corrupt", "mend it first with calf image check -r all")
	}
	result, err := qcow2.Check(ctx, c.path, qcow2.CheckOptions{ForceShare: true})
	if err != nil {
		return err
	}
	if result.Corruptions > 0 {
		return refuse("is corrupt", "mend it first with calf image check -r all")
	}
	return nil
}

// fill makes the new image at temp.
func (c *compacting) fill(ctx context.Context, temp string, info *qcow2.Info) (err error) {
	from, err := Open(c.path, OpenOptions{Format: QCOW2, ReadOnly: true, ForceShare: true, BackingDirs: c.BackingDirs})
	if err != nil {
		return err
	}
	defer closing(from, &err)
	copied := &copying{from: from, sparse: minSparse, workers: defaultWorkers(), fresh: info.BackingFile == "", meter: c.meter}
	if info.BackingFile != "" {
		base, err := Open(beside(c.path, info.BackingFile), OpenOptions{Format: info.BackingFormat, ReadOnly: true, BackingDirs: c.BackingDirs})
		if err != nil {
			return err
		}
		defer closing(base, &err)
		copied.base, copied.shared = base, 1
	}
	if err := c.room(copied.expect()); err != nil {
		return err
	}
	if err := qcow2.Create(temp, c.options(info)); err != nil {
		return err
	}
	to, err := Open(temp, OpenOptions{Format: QCOW2, Volatile: true, BackingDirs: c.BackingDirs})
	if err != nil {
		return err
	}
	defer closing(to, &err)
	if err := c.copyAll(ctx, copied, to); err != nil {
		return err
	}
	bitmaps, err := checkBitmaps(from, nil)
	if err != nil {
		return err
	}
	return copyBitmaps(ctx, bitmaps, from, to)
}

// copyAll copies what is compressed, and what is not, each as it is.
func (c *compacting) copyAll(ctx context.Context, copied *copying, to *Image) error {
	plain, packed := diskSink{to}, packedSink{diskSink{to}, to.QCOW2}
	if c.Compress {
		copied.packing(packed)
		return copied.disk(ctx)
	}
	// A range of compressed clusters has no others in it, as those of both images
	// are of the same size.
	copied.to, copied.leave = plain, func(m *qcow2.Mapping) bool { return m.Kind == qcow2.MapCompressed }
	if err := copied.disk(ctx); err != nil {
		return err
	}
	copied.packing(packed)
	copied.leave = func(m *qcow2.Mapping) bool { return m.Kind != qcow2.MapCompressed }
	return copied.disk(ctx)
}

// options are those that the image was made with.
func (c *compacting) options(i *qcow2.Info) qcow2.CreateOptions {
	o := qcow2.CreateOptions{
		Size: i.Size, ClusterSize: i.ClusterSize, Version: i.Version, RefcountBits: i.RefcountBits,
		BackingFile: i.BackingFile, BackingFormat: i.BackingFormat, ExtendedL2: i.ExtendedL2,
		LazyRefcounts: i.LazyRefcounts, CompressionType: i.CompressionType,
	}
	if c.CompressionType != "" {
		o.CompressionType = c.CompressionType
	}
	return o
}

// room makes sure that the new image, for which data bytes are copied, has room
// beside the old one.
func (c *compacting) room(data int64) error {
	dir := filepath.Dir(c.path)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	need, free := min(data, c.done.Before), int64(fs.Bavail)*fs.Bsize //nolint:gosec // G115: sizes of a file system
	if need > free {
		return fmt.Errorf("%s may take %s beside the image while it is written anew, and there are %s free in %s: "+
			"make room, or convert it to a file elsewhere", c.path, humanSize(need), humanSize(free), dir)
	}
	return nil
}

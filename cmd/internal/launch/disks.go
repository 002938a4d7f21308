package launch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/qcow2"
	"github.com/calfvm/calf/vmm"
)

// image is an open disk.
type image interface {
	blk.Disk
	io.Closer
}

// disks are the open disks of a guest, in order.
type disks []vmm.Disk

// openDisks opens the disks of cfg, which is effective. With readOnly, it opens
// every image for reading only and makes no overlay.
func openDisks(cfg *config.Config, readOnly bool) (disks, error) {
	var open disks
	for _, d := range cfg.Disks {
		img, err := openDisk(d, readOnly)
		if err != nil {
			return nil, errors.Join(err, open.close())
		}
		open = append(open, vmm.Disk{
			Name: d.Path, Disk: img, Queues: d.Queues, QueueSize: d.QueueSize, Serial: d.Serial,
		})
	}
	return open, nil
}

// close closes the disks, the last one first.
func (d disks) close() error {
	var errs []error
	for _, disk := range slices.Backward(d) {
		errs = append(errs, disk.Disk.(image).Close())
	}
	return errors.Join(errs...)
}

func openDisk(d config.Disk, readOnly bool) (image, error) {
	if d.Snapshot && !d.ReadOnly && !readOnly {
		return openOverlay(d)
	}
	return openImage(d, d.ReadOnly || readOnly)
}

func openImage(d config.Disk, readOnly bool) (image, error) {
	if d.Format == config.FormatRaw {
		return blk.OpenRaw(d.Path, blk.RawOptions{ReadOnly: readOnly})
	}
	return qcow2.Open(d.Path, options(d, readOnly))
}

func options(d config.Disk, readOnly bool) qcow2.Options {
	return qcow2.Options{ReadOnly: readOnly, BackingDirs: d.BackingDirs, L2CacheBytes: int64(d.L2Cache)} //nolint:gosec // G115: the rules bound it
}

// openOverlay opens an empty image over the one of d, which is opened for
// reading and locked as a reader locks it. The overlay has no name any more
// when openOverlay returns: nothing is left of it, however the process ends.
func openOverlay(d config.Disk) (img image, err error) {
	base, err := openImage(d, true) // finds what is wrong with it, under its own name
	if err != nil {
		return nil, err
	}
	create := qcow2.CreateOptions{Size: base.Size(), BackingFile: d.Path, BackingFormat: d.Format}
	if err := base.Close(); err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(d.Path)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "calf-")
	if err != nil {
		return nil, fmt.Errorf("make a throw-away overlay for %s: %w", d.Path, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "overlay.qcow2")
	if err := qcow2.Create(path, create); err != nil {
		return nil, err
	}
	// The trust rule is for what images name. That this overlay may name the
	// image is the user's own word.
	opts := options(d, false)
	opts.BackingDirs = append([]string{filepath.Dir(resolved)}, opts.BackingDirs...)
	return qcow2.Open(path, opts)
}

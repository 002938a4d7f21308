package launch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

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
		open = append(open, device(d, img))
	}
	return open, nil
}

// device is the disk d of the machine, which has been opened as img.
func device(d config.Disk, img image) vmm.Disk {
	dev := vmm.Disk{
		Name: d.Path, Disk: img, Queues: d.Queues, QueueSize: d.QueueSize, Serial: d.Serial,
		WriteThrough: d.Cache == config.CacheWritethrough,
		Unsafe:       d.Cache == config.CacheUnsafe,
		NoDiscard:    !*d.Discard,
		ByteRate:     blk.Rate{PerSecond: uint64(d.ByteRate), Burst: uint64(d.ByteBurst)},
		OpRate:       blk.Rate{PerSecond: uint64(d.OpRate), Burst: uint64(d.OpBurst)}, //nolint:gosec // G115: the rules bound them
	}
	if d.OnError == config.OnErrorStop {
		dev.OnError = blk.ErrorStop
	}
	return dev
}

// attach gives the disks, which are of the given kinds, to a machine. That one waits is
// said on messages, and what one has lost is kept in failed.
func (d disks) attach(machine *vmm.Machine, kinds []config.Disk, messages io.Writer, failed *failures) error {
	for i, dev := range d {
		dev.Stopped = func(err error) { announceStop(messages, explain(kinds[i], err)) }
		dev.Lost = func(err error) { failed.add(explain(kinds[i], err)) }
		if err := machine.AddDisk(dev); err != nil {
			return err
		}
	}
	return nil
}

// close closes the disks, the last one first.
func (d disks) close() error {
	var errs []error
	for _, disk := range slices.Backward(d) {
		errs = append(errs, disk.Disk.(image).Close())
	}
	return errors.Join(errs...)
}

// openDisk opens a disk, under a throw-away overlay if that is asked for.
func openDisk(d config.Disk, readOnly bool) (image, error) {
	if d.Snapshot && !d.ReadOnly && !readOnly {
		return qcow2.OpenScratch(overlayDir(), d.Path, d.Format, options(d, true))
	}
	return openImage(d, d.ReadOnly || readOnly)
}

// overlayDir is where throw-away overlays lie.
func overlayDir() string { return os.TempDir() }

// checkOverlays reports why no throw-away overlay can be made, if cfg needs one.
func checkOverlays(cfg *config.Config) error {
	throwAway := func(d config.Disk) bool { return d.Snapshot && !d.ReadOnly }
	if !slices.ContainsFunc(cfg.Disks, throwAway) {
		return nil
	}
	if err := unix.Access(overlayDir(), unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("no throw-away overlay can be made in %s: %w; set TMPDIR to a directory that can be written", overlayDir(), err)
	}
	return nil
}

// explain says what mends an error of the disk d, as far as that is known.
func explain(d config.Disk, err error) error {
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	switch {
	case full && d.Snapshot && !d.ReadOnly:
		return fmt.Errorf("there is no room left in %s for the throw-away overlay of disk %s; make some, or set TMPDIR to a directory with more (%w)", overlayDir(), d.Path, err)
	case full:
		return fmt.Errorf("there is no room left for disk %s; make some (%w)", d.Path, err)
	}
	return err
}

// failures keeps the first error of disks that has cost a guest what it wrote.
type failures struct {
	mu  sync.Mutex
	err error // guarded by mu
}

func (f *failures) add(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *failures) first() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func openImage(d config.Disk, readOnly bool) (image, error) {
	if d.Format == config.FormatRaw {
		return blk.OpenRaw(d.Path, blk.RawOptions{ReadOnly: readOnly, Direct: d.Cache == config.CacheNone})
	}
	return qcow2.Open(d.Path, options(d, readOnly))
}

func options(d config.Disk, readOnly bool) qcow2.Options {
	return qcow2.Options{
		ReadOnly: readOnly, BackingDirs: d.BackingDirs, DataFile: d.DataFile == config.DataFileAllow,
		L2CacheBytes: int64(d.L2Cache), //nolint:gosec // G115: the rules bound it
		Direct:       d.Cache == config.CacheNone,
	}
}

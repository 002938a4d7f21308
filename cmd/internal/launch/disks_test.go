package launch

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/qcow2"
	"github.com/calfvm/calf/vmm"
)

// newImage makes an image of 1 MiB whose first sector holds content.
func newImage(t *testing.T, path, format string, content []byte) {
	t.Helper()
	if format == config.FormatRaw {
		if err := os.WriteFile(path, append(content, make([]byte, 1<<20-len(content))...), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	img, err := qcow2.Open(path, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(img.WritevAt([][]byte{content}, 0), img.Close()); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSnapshotKeepsTheImageAndLeavesNothing(t *testing.T) {
	content := bytes.Repeat([]byte("calf"), 128)
	for _, format := range []string{config.FormatQCOW2, config.FormatRaw} {
		t.Run(format, func(t *testing.T) {
			dir, tmp := t.TempDir(), t.TempDir()
			t.Setenv("TMPDIR", tmp)
			path := filepath.Join(dir, "real.img")
			newImage(t, path, format, content)
			before := read(t, path)
			link := filepath.Join(t.TempDir(), "link.img") // the image is found through a link
			if err := os.Symlink(path, link); err != nil {
				t.Fatal(err)
			}
			img, err := openDisk(config.Disk{Path: link, Format: format, Snapshot: true}, false)
			if err != nil {
				t.Fatal(err)
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
				t.Errorf("while it is open, %s holds %v, %v", tmp, left, err)
			}
			if img.ReadOnly() || img.Size() != 1<<20 {
				t.Errorf("overlay: read-only %v, size %d", img.ReadOnly(), img.Size())
			}
			got := make([]byte, len(content))
			if err := img.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the overlay does not show the image: %q, %v", got[:8], err)
			}
			changed := bytes.Repeat([]byte("new!"), 128)
			if err := errors.Join(img.WritevAt([][]byte{changed}, 0), img.Flush(), img.ReadvAt([][]byte{got}, 0)); err != nil || !bytes.Equal(got, changed) {
				t.Errorf("the overlay does not keep a write: %q, %v", got[:8], err)
			}
			if other, err := openImage(config.Disk{Path: path, Format: format}, false); err == nil {
				t.Errorf("the image under an overlay can be opened for writing: %v", other.Close())
			}
			if other, err := openImage(config.Disk{Path: path, Format: format}, true); err != nil {
				t.Errorf("the image under an overlay cannot be read by others: %v", err)
			} else if err := other.Close(); err != nil {
				t.Error(err)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(read(t, path), before) {
				t.Error("the image has changed")
			}
		})
	}
}

func TestOpenDisksIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.qcow2")
	newImage(t, good, config.FormatQCOW2, make([]byte, 512))
	cfg := &config.Config{Disks: []config.Disk{{Path: good}, {Path: filepath.Join(dir, "none.qcow2")}}}
	if _, err := openDisks(cfg.Effective(), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("openDisks = %v, want that a file is missing", err)
	}
	// Had the first image been left open, it would be locked.
	cfg.Disks = cfg.Disks[:1]
	open, err := openDisks(cfg.Effective(), false)
	if err != nil {
		t.Fatal(err)
	}
	if open[0].Disk.ReadOnly() || open[0].Queues != 1 || open[0].QueueSize != 256 {
		t.Errorf("disk = %+v", open[0])
	}
	if err := open.close(); err != nil {
		t.Error(err)
	}
}

func TestCheckOpensForReadingOnly(t *testing.T) {
	dir := t.TempDir()
	kernel, image := new(guesttest.Program).Kernel(t), filepath.Join(dir, "a.qcow2")
	newImage(t, image, config.FormatQCOW2, make([]byte, 512))
	if err := os.Chmod(image, 0o400); err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{Boot: config.Boot{Kernel: kernel}, Disks: []config.Disk{{Path: image}}}
	other, err := openImage(config.Disk{Path: image, Format: config.FormatQCOW2}, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(cfg); err != nil {
		t.Errorf("Check beside another reader = %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	cfg.Boot.Initrd = dir
	if err := Check(cfg); err == nil {
		t.Error("Check takes a directory for an initrd")
	}
}

// TestDeviceTakesEveryKey checks that what a configuration says of a disk reaches
// the machine, and that nothing said means nothing asked for.
func TestDeviceTakesEveryKey(t *testing.T) {
	if vmm.MaxDisks != 31 {
		t.Errorf("a machine has %d disks; package config refuses more than 31", vmm.MaxDisks)
	}
	plain := (&config.Config{Disks: []config.Disk{{Path: "a.qcow2"}}}).Effective().Disks[0]
	want := vmm.Disk{Name: "a.qcow2", Queues: 1, QueueSize: 256}
	if diff := cmp.Diff(want, device(plain, nil), ignoreDisk); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
	full := config.Disk{
		Path: "b.img", Queues: 3, QueueSize: 64, Serial: "s", Discard: new(false), OnError: "stop",
		ByteRate: 1, ByteBurst: 2, OpRate: 3, OpBurst: 4,
	}
	want = vmm.Disk{
		Name: "b.img", Queues: 3, QueueSize: 64, Serial: "s", NoDiscard: true, OnError: blk.ErrorStop,
		ByteRate: blk.Rate{PerSecond: 1, Burst: 2}, OpRate: blk.Rate{PerSecond: 3, Burst: 4},
	}
	for cache, modes := range map[string][2]bool{"writeback": {}, "none": {}, "writethrough": {true, false}, "unsafe": {false, true}} {
		full.Cache = cache
		want.WriteThrough, want.Unsafe = modes[0], modes[1]
		if diff := cmp.Diff(want, device(full, nil), ignoreDisk); diff != "" {
			t.Errorf("cache %s (-want +got):\n%s", cache, diff)
		}
	}
}

var ignoreDisk = cmpopts.IgnoreFields(vmm.Disk{}, "Disk", "Stopped")

// TestCacheNoneIsDirect opens a raw disk whose cache mode is none: a file of half
// a sector, which only the page cache can reach, is refused.
func TestCacheNoneIsDirect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd.img")
	if err := os.WriteFile(path, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for cache, refused := range map[string]bool{config.CacheWriteback: false, config.CacheNone: true} {
		img, err := openImage(config.Disk{Path: path, Format: config.FormatRaw, Cache: cache}, false)
		if (err != nil) != refused {
			t.Errorf("cache %s: %v", cache, err)
		}
		if err == nil {
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
		if got := options(config.Disk{Cache: cache}, false).Direct; got != refused {
			t.Errorf("cache %s: a QCOW2 image is opened with Direct %v", cache, got)
		}
	}
}

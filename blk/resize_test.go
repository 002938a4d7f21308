package blk_test

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"testing"

	"github.com/calfvm/calf/blk"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// TestResize changes the capacity of a device while a driver uses it (B14).
func TestResize(t *testing.T) {
	path := rawFile(t, 1<<20)
	disk := openRaw(t, path, blk.RawOptions{})
	r := newRig(t, blk.Config{Disk: disk, BlockSize: 4096, Name: "grown"})
	r.start(allFeatures, 1, 16)
	line := r.m.Line(lineBase)
	check := func(what string, bytes int64, interrupts uint64) {
		t.Helper()
		if got := r.d.DeviceConfig(0, 8); got != uint64(bytes/512) {
			t.Errorf("%s: the driver sees %d sectors, want %d", what, got, bytes/512)
		}
		if got := line.Count(); got != interrupts {
			t.Errorf("%s: %d configuration interrupts, want %d", what, got, interrupts)
		}
		last := uint64(bytes/512) - 8
		data := make([]byte, 4096)
		if code, _, _ := r.do(tOut, last, data); code != sOK {
			t.Errorf("%s: a write of the last block has status %d", what, code)
		}
		if code, _, _ := r.do(tIn, last+8, data); code != sIOErr {
			t.Errorf("%s: a read past the end has status %d, want IOERR", what, code)
		}
	}
	resize := func(n int64) error {
		return r.t.UpdateConfig(func() error { return r.dev.Resize(n) })
	}
	check("at first", 1<<20, 0)
	gen := r.d.Get(vt.Generation, 1)
	if err := disk.Grow(2 << 20); err != nil {
		t.Fatal(err)
	}
	check("disk grown, device not", 1<<20, 0)
	if err := resize(2 << 20); err != nil {
		t.Fatal(err)
	}
	check("grown", 2<<20, 1)
	if r.d.Get(vt.Generation, 1) == gen {
		t.Error("P11 the generation has not changed")
	}
	for name, n := range map[string]int64{"beyond the disk": 2<<20 + 4096, "half a block": 1<<20 + 512, "negative": -4096} {
		if err := resize(n); !errors.Is(err, blk.ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", name, err)
		}
	}
	check("after refusals", 2<<20, 1)
	if err := resize(512 << 10); err != nil {
		t.Fatal(err)
	}
	check("shrunk", 512<<10, 2)
}

// TestRawGrow grows files, one of which ends inside a sector, while they are
// read.
func TestRawGrow(t *testing.T) {
	for _, length := range []int64{0, 700, 4096} {
		path := rawFile(t, 0)
		content := bytes.Repeat([]byte{7}, int(length))
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		d := openRaw(t, path, blk.RawOptions{})
		old := d.Size()
		for _, n := range []int64{old + 100, old - 512, -512} {
			if err := d.Grow(n); err == nil || d.Size() != old {
				t.Errorf("Grow(%d) of a disk of %d bytes: %v", n, old, err)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for d.Size() < 1<<20 {
				got := make([]byte, old)
				if err := d.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got[:length], content) {
					t.Errorf("a read beside Grow: %v", err)
					return
				}
			}
		})
		for _, n := range []int64{old, old + 512, 1 << 20} {
			if err := d.Grow(n); err != nil || d.Size() != n {
				t.Errorf("Grow(%d): %v, size %d", n, err, d.Size())
			}
		}
		wg.Wait()
		got := make([]byte, 1<<20)
		want := append(bytes.Clone(content), make([]byte, 1<<20-length)...)
		if err := d.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the grown disk reads wrong: %v", err)
		}
		if err := os.Truncate(path, 4096); err != nil {
			t.Fatal(err)
		}
		if err := d.ReadvAt([][]byte{got[:8192]}, 0); err == nil {
			t.Error("a read past the end of a file that was cut off after it had grown succeeded")
		}
	}
	ro := openRaw(t, rawFile(t, 512), blk.RawOptions{ReadOnly: true})
	if err := ro.Grow(1024); err == nil || ro.Size() != 512 {
		t.Errorf("a read-only disk has grown: %v", err)
	}
	dev := openRaw(t, loopDevice(t, 1<<20, 512), blk.RawOptions{})
	if err := dev.Grow(2 << 20); !errors.Is(err, blk.ErrBounds) || dev.Size() != 1<<20 {
		t.Errorf("a block device of 1 MiB has grown: %v", err)
	}
}

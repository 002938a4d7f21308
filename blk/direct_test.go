package blk_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

// openDirect opens a file of n zero bytes without the page cache.
func openDirect(tb testing.TB, n int64) *blk.Raw {
	tb.Helper()
	path := rawFile(tb, n)
	if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0); errors.Is(err, unix.EINVAL) {
		tb.Skip("the directory for temporary files has no direct I/O")
	} else if err := errors.Join(err, unix.Close(fd)); err != nil {
		tb.Fatal(err)
	}
	return openRaw(tb, path, blk.RawOptions{Direct: true})
}

// TestRawDirect runs the suite over direct I/O as this host has it, and as a
// host with large blocks would.
func TestRawDirect(t *testing.T) {
	t.Run("host", func(t *testing.T) {
		blktest.All(t, func(tb testing.TB) blk.Disk { return openDirect(tb, 4<<20) })
	})
	t.Run("4 KiB", func(t *testing.T) {
		blktest.All(t, func(tb testing.TB) blk.Disk {
			d := openDirect(tb, 4<<20)
			blk.AlignDirect(d, 4096, 4096)
			return d
		})
	})
}

// TestDirectNeighbours changes the sectors of one block from a goroutine each,
// by writes that have to put back the rest of the block and by holes: no change
// is lost.
func TestDirectNeighbours(t *testing.T) {
	d := openDirect(t, 64<<10)
	blk.AlignDirect(d, 4096, 4096)
	rounds := 1000
	if testing.Short() {
		rounds = 100
	}
	var all sync.WaitGroup
	for sector := range int64(3) {
		all.Go(func() {
			off, b := sector*512, make([]byte, 512)
			for i := range rounds {
				want := bytes.Repeat([]byte{byte(i)}, 512)
				err := d.WritevAt([][]byte{want[:100], want[100:]}, off)
				if sector == 2 {
					clear(want)
					err = errors.Join(err, d.PunchHole(off, 512))
				}
				if err := errors.Join(err, d.ReadvAt([][]byte{b}, off)); err != nil || !bytes.Equal(b, want) {
					t.Errorf("sector %d reads as %#x after %#x was written: %v", sector, b[0], want[0], err)
					return
				}
			}
		})
	}
	all.Wait()
}

// TestDirectWholeNeighbours writes whole blocks, from memory that is aligned and
// from memory that is not, while their first sectors are written too: what follows
// the first sector is not put back as it was before.
func TestDirectWholeNeighbours(t *testing.T) {
	const block, rounds = 4096, 300
	page, err := unix.Mmap(-1, 0, 2*block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(page) }()
	for name, whole := range map[string][]byte{"aligned": page[:block], "not aligned": page[100 : 100+block]} {
		t.Run(name, func(t *testing.T) {
			d := openDirect(t, 64<<10)
			blk.AlignDirect(d, block, block)
			var stop atomic.Bool
			var other sync.WaitGroup
			other.Go(func() {
				for sector := make([]byte, 512); !stop.Load(); {
					if err := d.WritevAt([][]byte{sector}, 0); err != nil {
						t.Error(err)
					}
				}
			})
			got := make([]byte, block)
			for i := range rounds {
				want := bytes.Repeat([]byte{byte(i)}, block)
				copy(whole, want)
				err := d.WritevAt([][]byte{whole}, 0)
				if err := errors.Join(err, d.ReadvAt([][]byte{got}, 0)); err != nil || !bytes.Equal(got[512:], want[512:]) {
					t.Errorf("round %d: the block reads as %#x after %#x was written: %v", i, got[512], want[512], err)
					break
				}
			}
			stop.Store(true)
			other.Wait()
		})
	}
}

// TestDirectRefusals checks that what direct I/O cannot reach is refused, with a
// way out.
func TestDirectRefusals(t *testing.T) {
	openDirect(t, 512) // skips where there is none
	for name, path := range map[string]string{"part of a sector": rawFile(t, 1000), "no direct I/O": "/proc/self/maps"} {
		if _, err := blk.OpenRaw(path, blk.RawOptions{Direct: true, ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "another cache mode") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := openDirect(t, 64<<10)
	blk.AlignDirect(d, 4096, 512)
	if err := d.Grow(64<<10 + 512); err == nil {
		t.Error("a file grew by part of a block")
	}
	if err := d.Grow(68 << 10); err != nil {
		t.Error(err)
	}
}

// TestDirectIsDirect checks what was asked of the kernel.
func TestDirectIsDirect(t *testing.T) {
	for _, want := range []bool{false, true} {
		d := openRaw(t, rawFile(t, 4096), blk.RawOptions{})
		if want {
			d = openDirect(t, 4096)
		}
		flags, err := unix.FcntlInt(uintptr(blk.FD(d)), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_DIRECT != 0 != want {
			t.Errorf("flags of the file %#x, %v; want O_DIRECT: %v", flags, err, want)
		}
	}
}

// TestBlockSize puts a device over a block device with large blocks: the guest
// has to count in them, or it would not find its partitions.
func TestBlockSize(t *testing.T) {
	path := loopDevice(t, 1<<20, 4096)
	for _, direct := range []bool{false, true} {
		disk, err := blk.OpenRaw(path, blk.RawOptions{Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, blk.Config{Disk: disk})
		r.start(allFeatures, 1, 16)
		if got := r.d.DeviceConfig(0x14, 4); got != 4096 {
			t.Errorf("direct %v: blk_size is %d, want 4096", direct, got)
		}
		data := bytes.Repeat([]byte{9}, 4096)
		if code, _, _ := r.do(tOut, 8, data); code != sOK {
			t.Errorf("direct %v: status %d", direct, code)
		}
		if code, _, _ := r.do(tOut, 8, data[:512]); code != sIOErr {
			t.Errorf("direct %v: part of a block has status %d, want IOERR", direct, code)
		}
		if err := errors.Join(r.t.Close(), disk.Close()); err != nil {
			t.Error(err)
		}
	}
	if b, err := os.ReadFile(path); err != nil || b[4096] != 9 || b[4095] != 0 {
		t.Errorf("the write is not on the device: %v", err)
	}
}

package blk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

// allocated is how many bytes of the host's disk the file at path takes.
func allocated(tb testing.TB, path string) int64 {
	tb.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		tb.Fatal(err)
	}
	return st.Blocks * 512
}

// fullFile makes a file of n bytes that are not zero, and opens it.
func fullFile(tb testing.TB, n int) (path string, d *blk.Raw) {
	tb.Helper()
	path = filepath.Join(tb.TempDir(), "disk.raw")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xaa}, n), 0o600); err != nil {
		tb.Fatal(err)
	}
	d = openRaw(tb, path, blk.RawOptions{})
	if err := d.Flush(); err != nil { // so that blocks are allocated
		tb.Fatal(err)
	}
	return path, d
}

// TestRawRanges looks at what discards and zeros do to the file: its length
// stays, its room goes with Discard and PunchHole and stays with WriteZeroes.
func TestRawRanges(t *testing.T) {
	const size = 4 << 20
	for _, c := range []struct {
		name  string
		call  func(d *blk.Raw, off, n int64) error
		frees bool
	}{
		{"Discard", (*blk.Raw).Discard, true},
		{"B7 PunchHole", (*blk.Raw).PunchHole, true},
		{"B7 WriteZeroes", (*blk.Raw).WriteZeroes, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, d := fullFile(t, size)
			if g := d.DiscardGranularity(); g < 512 || g > 64<<10 || g&(g-1) != 0 {
				t.Errorf("granularity %d", g)
			}
			before := allocated(t, path)
			if err := c.call(d, 1<<20, 2<<20); err != nil {
				t.Fatal(err)
			}
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
			freed := before - allocated(t, path)
			if !c.frees && freed > 0 {
				t.Errorf("%d bytes were freed", freed)
			}
			if c.frees && freed == 0 && !holes(t) {
				t.Skip("the file system of the test has no holes")
			}
			if c.frees && freed < 1<<20 {
				t.Errorf("%d bytes of %d were freed", freed, 2<<20)
			}
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{0xaa}, size)
			clear(want[1<<20 : 3<<20])
			if !bytes.Equal(got, want) {
				t.Error("the file does not hold what it should")
			}
		})
	}
	t.Run("tail of a file that ends inside a sector", func(t *testing.T) {
		path, d := fullFile(t, 10_000)
		for _, call := range []func(off, n int64) error{d.Discard, d.PunchHole, d.WriteZeroes} {
			if err := call(9728, 512); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 1024)
			if err := d.ReadvAt([][]byte{got}, 9216); err != nil || !bytes.Equal(got[:512], bytes.Repeat([]byte{0xaa}, 512)) || !bytes.Equal(got[512:], make([]byte, 512)) {
				t.Errorf("the last sectors read wrong: %v", err)
			}
		}
		if fi, err := os.Stat(path); err != nil || fi.Size() > 10_240 {
			t.Errorf("length %d: %v", fi.Size(), err)
		}
	})
	t.Run("B5 read-only", func(t *testing.T) {
		path := rawFile(t, 1<<20)
		d := openRaw(t, path, blk.RawOptions{ReadOnly: true})
		for _, call := range []func(off, n int64) error{d.Discard, d.PunchHole, d.WriteZeroes} {
			if err := call(0, 4096); !errors.Is(err, syscall.EROFS) {
				t.Errorf("got %v, want EROFS", err)
			}
		}
	})
}

// holes reports whether the file system of t's files has holes.
func holes(t *testing.T) bool {
	t.Helper()
	return allocated(t, rawFile(t, 1<<20)) == 0
}

// loopDevice returns the path of a block device of n bytes on a file, where the
// host lets the test make one.
func loopDevice(tb testing.TB, n int64, blockSize uint32) string {
	tb.Helper()
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Skipf("no loop devices: %v", err)
	}
	defer func() { _ = unix.Close(control) }()
	backing, err := unix.Open(rawFile(tb, n), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = unix.Close(backing) }()
	for range 10 { // another test may take the device between the two calls
		i, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			tb.Skipf("no free loop device: %v", err)
		}
		path := fmt.Sprintf("/dev/loop%d", i)
		loop, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			tb.Skipf("open %s: %v", path, err)
		}
		if err := unix.IoctlLoopConfigure(loop, &unix.LoopConfig{Fd: uint32(backing), Size: blockSize}); err != nil {
			_ = unix.Close(loop)
			if errors.Is(err, unix.EBUSY) {
				continue
			}
			tb.Skipf("configure %s: %v", path, err)
		}
		tb.Cleanup(func() {
			if _, err := unix.IoctlRetInt(loop, unix.LOOP_CLR_FD); err != nil {
				tb.Error(err)
			}
			_ = unix.Close(loop)
		})
		return path
	}
	tb.Skip("loop devices are taken faster than they are found")
	return ""
}

// TestRawBlockDevice runs the suite on a block device.
func TestRawBlockDevice(t *testing.T) {
	blktest.All(t, func(tb testing.TB) blk.Disk {
		d := openRaw(tb, loopDevice(tb, 2<<20, 512), blk.RawOptions{})
		if d.Size() != 2<<20 {
			tb.Fatalf("size %d", d.Size())
		}
		return d
	})
}

// TestRawMemfd runs the suite on a file system that has PUNCH_HOLE but not
// ZERO_RANGE, so that zeros must be written.
func TestRawMemfd(t *testing.T) {
	blktest.All(t, func(tb testing.TB) blk.Disk {
		fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
		if err != nil {
			tb.Skipf("no memory file: %v", err)
		}
		tb.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Ftruncate(fd, 2<<20); err != nil {
			tb.Fatal(err)
		}
		return openRaw(tb, fmt.Sprintf("/proc/self/fd/%d", fd), blk.RawOptions{})
	})
}

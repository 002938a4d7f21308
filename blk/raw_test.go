package blk_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

// rawFile makes a file of n zero bytes.
func rawFile(tb testing.TB, n int64) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(path, n); err != nil {
		tb.Fatal(err)
	}
	return path
}

func openRaw(tb testing.TB, path string, opts blk.RawOptions) *blk.Raw {
	tb.Helper()
	d, err := blk.OpenRaw(path, opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

func TestRaw(t *testing.T) {
	blktest.All(t, func(tb testing.TB) blk.Disk {
		return openRaw(tb, rawFile(tb, 4<<20), blk.RawOptions{})
	})
}

// TestRawTail is about a file that ends inside its last sector.
func TestRawTail(t *testing.T) {
	path := rawFile(t, 0)
	content := bytes.Repeat([]byte{7}, 1<<20+100)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	d := openRaw(t, path, blk.RawOptions{})
	if got := d.Size(); got != 1<<20+512 {
		t.Fatalf("size %d, want %d", got, 1<<20+512)
	}
	got := bytes.Repeat([]byte{0xee}, 1024)
	want := append(bytes.Repeat([]byte{7}, 612), make([]byte, 412)...)
	if err := d.ReadvAt([][]byte{got[:700], got[700:]}, 1<<20-512); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the last two sectors read wrong: %v", err)
	}
	if err := d.ReadvAt([][]byte{got[:8]}, 1<<20+300); err != nil || !bytes.Equal(got[:8], make([]byte, 8)) {
		t.Errorf("what the file lacks does not read as zero: %v", err)
	}
	if err := d.WritevAt([][]byte{{1, 2}}, 1<<20+400); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadvAt([][]byte{got[:6]}, 1<<20+398); err != nil || !bytes.Equal(got[:6], []byte{0, 0, 1, 2, 0, 0}) {
		t.Errorf("after a write to the tail: %v, %v", got[:6], err)
	}
}

// TestRawShrunk checks that a file which another program has cut off gives
// errors, not zeros.
func TestRawShrunk(t *testing.T) {
	path := rawFile(t, 1<<20)
	d := openRaw(t, path, blk.RawOptions{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadvAt([][]byte{make([]byte, 8192)}, 0); err == nil {
		t.Error("a read past the end of the file succeeded")
	}
}

func TestRawReadOnly(t *testing.T) {
	path := rawFile(t, 1<<20)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	d := openRaw(t, path, blk.RawOptions{ReadOnly: true})
	if !d.ReadOnly() {
		t.Error("the disk is not read-only")
	}
	if err := d.WritevAt([][]byte{make([]byte, 512)}, 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a write: %v, want EROFS", err)
	}
	if err := d.ReadvAt([][]byte{make([]byte, 512)}, 0); err != nil {
		t.Error(err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

func TestOpenRawErrors(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path, want string
		opts             blk.RawOptions
	}{
		{"missing", filepath.Join(dir, "none"), "no such file", blk.RawOptions{}},
		{"directory", dir, "directory", blk.RawOptions{}},
		{"directory to read", dir, "it is a directory", blk.RawOptions{ReadOnly: true}},
		{"FIFO", fifo, "neither a regular file nor a block device", blk.RawOptions{}},
		{"character device", "/dev/null", "neither a regular file nor a block device", blk.RawOptions{}},
	} {
		_, err := blk.OpenRaw(c.path, c.opts)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.path) {
			t.Errorf("%s: %v; want an error that names it and says %q", c.name, err, c.want)
		}
	}
}

func TestRawLock(t *testing.T) {
	for _, c := range []struct {
		name          string
		first, second bool // read-only
		ok            bool
	}{
		{"two writers", false, false, false},
		{"a writer, then a reader", false, true, false},
		{"a reader, then a writer", true, false, false},
		{"two readers", true, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := rawFile(t, 1<<20)
			first, err := blk.OpenRaw(path, blk.RawOptions{ReadOnly: c.first})
			if err != nil {
				t.Fatal(err)
			}
			second, err := blk.OpenRaw(path, blk.RawOptions{ReadOnly: c.second})
			if c.ok {
				if err != nil {
					t.Fatal(err)
				}
				if err := second.Close(); err != nil {
					t.Error(err)
				}
			} else if !errors.Is(err, blk.ErrLocked) {
				t.Fatalf("got %v, want ErrLocked", err)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			openRaw(t, path, blk.RawOptions{ReadOnly: c.second})
		})
	}
}

// TestRawLockQEMU checks that QEMU and this package refuse each other.
func TestRawLockQEMU(t *testing.T) {
	qemuIO, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skip("qemu-io is not installed")
	}
	path := rawFile(t, 1<<20)
	t.Run("QEMU second", func(t *testing.T) {
		d := openRaw(t, path, blk.RawOptions{})
		out, err := exec.Command(qemuIO, "-f", "raw", "-c", "write 0 512", path).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "lock") {
			t.Errorf("QEMU opened a locked image: %v\n%s", err, out)
		}
		got := make([]byte, 512)
		if err := d.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, make([]byte, 512)) {
			t.Error("QEMU has written to the image")
		}
	})
	t.Run("QEMU first", func(t *testing.T) {
		cmd := exec.Command(qemuIO, "-f", "raw", path)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			// qemu-io ends at the end of its input.
			if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
				t.Error(err)
			}
		}()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			d, err := blk.OpenRaw(path, blk.RawOptions{})
			if errors.Is(err, blk.ErrLocked) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if time.Now().After(end) {
				t.Fatal("an image that QEMU writes to can be opened")
			}
		}
	})
}

// TestRawDevice runs requests through the device onto a file.
func TestRawDevice(t *testing.T) {
	path := rawFile(t, diskSize)
	r := newRig(t, blk.Config{Disk: openRaw(t, path, blk.RawOptions{}), Name: path})
	r.start(allFeatures, 1, 64)
	want := bytes.Repeat([]byte("raw!"), 4096)
	if code, _, _ := r.do(tOut, 9, want); code != sOK {
		t.Fatalf("write: status %d", code)
	}
	if code, _, _ := r.do(tFlush, 0, nil); code != sOK {
		t.Fatalf("flush: status %d", code)
	}
	if code, _, got := r.do(tIn, 9, make([]byte, len(want))); code != sOK || !bytes.Equal(got, want) {
		t.Fatalf("read: status %d", code)
	}
	onDisk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(onDisk[9*512:][:len(want)], want) || len(onDisk) != diskSize {
		t.Error("the file does not hold what was written")
	}
}

// TestRawNoAllocation checks that a request allocates nothing on its way to the
// file and back.
func TestRawNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop values at random")
	}
	d := openRaw(t, rawFile(t, diskSize), blk.RawOptions{})
	for _, kind := range []uint32{tIn, tOut} {
		b := newBench(t, d, kind, 4096, 16)
		if n := testing.AllocsPerRun(500, b.round); n != 0 {
			t.Errorf("type %d: %v allocations per 16 requests", kind, n)
		}
	}
}

// TestGrowBesideTailRead reads the last, partial sector of a file while the file
// grows: the end that the read has met may be gone a moment later.
func TestGrowBesideTailRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	for round := range 150 {
		if err := os.WriteFile(path, make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
		raw, err := blk.OpenRaw(path, blk.RawOptions{})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			b := make([]byte, 512)
			for range 30 {
				if err := raw.ReadvAt([][]byte{b}, 512); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		time.Sleep(time.Duration(round%20) * time.Microsecond)
		if err := errors.Join(raw.Grow(4096), <-done, raw.Close()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

package blk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFlushStaysFailed makes one fdatasync fail: every later flush must fail
// too, although the file is sound again (B13).
func TestFlushStaysFailed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := OpenRaw(path, RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	defer func() { check(d.Close()) }()
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer func() { check(errors.Join(unix.Close(pipe[0]), unix.Close(pipe[1]))) }()
	file := d.fd
	d.fd = pipe[1] // which cannot be synchronised
	first := d.Flush()
	d.fd = file
	if first == nil {
		t.Fatal("the flush of a pipe succeeded")
	}
	if again := d.Flush(); again == nil || again.Error() != first.Error() {
		t.Errorf("the next flush returned %v, want %v", again, first)
	}
}

// TestZeroFallback zeroes unaligned ranges of a file as if it were a device of
// 4 KiB blocks, with and without an operation of the host for whole blocks
// (B7). What that operation is given is checked too.
func TestZeroFallback(t *testing.T) {
	const size, block = 64 << 10, 4096
	for name, failure := range map[string]error{"supported": nil, "unsupported": unix.EOPNOTSUPP, "failing": unix.EIO} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			content := bytes.Repeat([]byte{0xaa}, size)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			d, err := OpenRaw(path, RawOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}()
			d.align = block
			for _, c := range []struct{ off, n, first, end int64 }{
				{0, size, 0, size},
				{100, 200, 0, 0},
				{4000, 200, 0, 0},
				{4095, 4098, 4096, 8192},
				{10_000, 20_000, 12_288, 28_672},
				{12_288, 100, 0, 0},
			} {
				if err := d.WritevAt([][]byte{content}, 0); err != nil {
					t.Fatal(err)
				}
				called := false
				err := d.zero(c.off, c.n, func(off, n int64) error {
					called = true
					if off != c.first || off+n != c.end {
						t.Errorf("[%d, %d) is zeroed as blocks, want [%d, %d)", off, off+n, c.first, c.end)
					}
					if failure != nil {
						return failure
					}
					return writeZeros(d, off, n)
				})
				if called != (c.end > 0) {
					t.Errorf("%+v: whole blocks zeroed: %v", c, called)
				}
				if called && errors.Is(failure, unix.EIO) {
					if !errors.Is(err, unix.EIO) {
						t.Errorf("%+v: got %v, want EIO", c, err)
					}
					continue
				}
				got := make([]byte, size)
				want := bytes.Clone(content)
				clear(want[c.off : c.off+c.n])
				if err := errors.Join(err, d.ReadvAt([][]byte{got}, 0)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%+v: the disk reads wrong: %v", c, err)
				}
			}
		})
	}
}

// TestWriterMayResize asks as QEMU would whether a disk that can grow says so.
func TestWriterMayResize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := OpenRaw(path, RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fd, err := openFile(path, unix.O_RDWR|unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := refuse(fd, lockUsed+permResize, "taken"); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	if err := errors.Join(unix.Close(fd), d.Close()); err != nil {
		t.Error(err)
	}
}

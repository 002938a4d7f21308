package blk

import (
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

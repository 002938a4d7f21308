package ramdir

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// needVM skips a test that would change the machine of whoever runs it.
func needVM(t *testing.T) {
	t.Helper()
	if os.Getenv("IN_VM") == "" {
		t.Skip("it mounts file systems, and is for a machine of its own: run test.sh")
	}
}

func TestNothing(t *testing.T) {
	if d, err := New(0); err == nil {
		t.Errorf("a directory of no bytes was made: %s", d.Path)
	}
}

func TestFull(t *testing.T) {
	needVM(t)
	d, err := New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	half := bytes.Repeat([]byte("x"), 1<<19)
	if err := os.WriteFile(filepath.Join(d.Path, "first"), half, 0o600); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(d.Path, "second"), append(half, 'x'), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("writing more than it holds: %v", err)
	}
	if err := d.Remove(); err != nil {
		t.Error(err)
	}
}

func TestRemove(t *testing.T) {
	needVM(t)
	d, err := New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Path, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(d.Path)) {
		t.Errorf("it is still mounted:\n%s", mounts)
	}
}

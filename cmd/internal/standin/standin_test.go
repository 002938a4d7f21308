package standin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestName makes a file beside one for which others are being made, and beside what
// has been left.
func TestName(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "disk.qcow2")
	write := func(path string) {
		t.Helper()
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	there := func(path string, want bool) {
		t.Helper()
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) == want {
			t.Errorf("%s is there: %v, want %v", filepath.Base(path), !want, want)
		}
	}
	foreign := []string{".disk.qcow2.calf-", ".disk.qcow2.calf-abcdefgh", ".disk.qcow2.calf-ABCDEFGHI", ".disk.calf-ABCDEFGH", "disk.qcow2.calf-ABCDEFGH", ".calf-ABCDEFGH"}
	for _, name := range foreign {
		write(filepath.Join(dir, name))
	}
	left := filepath.Join(dir, ".disk.qcow2.calf-ABCDEFG2")
	write(left)
	first, firstDone := Name(target)
	there(left, false)
	write(first)
	other, otherDone := Name(filepath.Join(dir, "other"))
	write(left) // by one that was killed meanwhile
	second, secondDone := Name(target)
	write(second)
	there(first, true)
	there(left, true)
	if first == second {
		t.Error("both have one name")
	}
	if err := os.Rename(first, target); err != nil {
		t.Fatal(err)
	}
	for _, done := range []func() error{firstDone, secondDone, otherDone} {
		if err := done(); err != nil {
			t.Error(err)
		}
	}
	there(first, false)
	there(second, false)
	there(other, false)
	there(target, true)
	_, done := Name(target)
	there(left, false)
	if err := done(); err != nil {
		t.Error(err)
	}
	for _, name := range foreign {
		there(filepath.Join(dir, name), true)
	}
	if _, done := Name(filepath.Join(dir, "none", "disk")); done() != nil {
		t.Error("what is not there cannot be given up")
	}
}

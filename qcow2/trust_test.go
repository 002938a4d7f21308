package qcow2

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTrustAfterSwap opens a layer, then puts a symbolic link in the place of its
// directory, as somebody may who can write there, and lets it name its backing
// file. The link must not widen what the layer may open.
func TestTrustAfterSwap(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"images/sub", "secret"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, root+"/secret/shadow", []byte("secret"))
	mid := root + "/images/sub/mid.qcow2"
	if err := Create(mid, CreateOptions{Size: 4096}); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(root+"/secret", root+"/images/link"); err != nil {
		t.Fatal(err)
	}
	f, err := openRegular(mid, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var c chain
	if err := c.enter(f, mid); err != nil {
		t.Fatal(err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, root+"/images/sub", unix.AT_FDCWD, root+"/images/link", unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	under, err := c.openBacking(mid, "shadow", "raw", Options{})
	if err == nil {
		under.Close()
	}
	if !errors.Is(err, ErrBackingRefused) {
		t.Errorf("a file outside of where the layer was: %v", err)
	}
}

// TestTrustUnknown shows that a layer whose place is not known opens nothing.
func TestTrustUnknown(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/base", []byte("base"))
	if _, err := (&chain{}).openBacking(dir+"/top.qcow2", "base", "raw", Options{}); !errors.Is(err, ErrBackingRefused) {
		t.Errorf("got %v", err)
	}
}

package e2e

import (
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// bases makes the root file system of guests, once, as base.raw and base.qcow2
// of a directory.
var bases = sync.OnceValues(func() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "bases-"); err != nil {
		return "", err
	}
	raw, qcow2 := filepath.Join(dir, "base.raw"), filepath.Join(dir, "base.qcow2")
	if err := lab.GuestRoot(raw, 48, nil); err != nil {
		return "", err
	}
	return dir, exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2).Run()
})

// images is a directory of a test for its images.
type images struct {
	t    *testing.T
	dir  string
	sums map[string]uint32 // checksums of what must not change
}

// newImages returns an empty directory. Images put into it that must not change
// are checked at the end of the test.
func newImages(t *testing.T) *images {
	im := &images{t: t, dir: t.TempDir(), sums: make(map[string]uint32)}
	t.Cleanup(func() {
		for file, want := range im.sums {
			if got := checksum(t, file); got != want {
				t.Errorf("%s was changed", filepath.Base(file))
			}
		}
	})
	return im
}

func (im *images) path(name string) string { return filepath.Join(im.dir, name) }

// base puts the root file system of guests into the directory, raw.
func (im *images) base() string {
	im.t.Helper()
	return im.link("base.raw")
}

// baseQCOW2 puts the same there as a QCOW2 image.
func (im *images) baseQCOW2() string {
	im.t.Helper()
	return im.link("base.qcow2")
}

// link puts a base image into the directory, as a backing file has to lie in
// the one of its overlay. All tests share it, so none may change it.
func (im *images) link(name string) string {
	im.t.Helper()
	dir, err := bases()
	if err != nil {
		im.t.Fatal(err)
	}
	file := im.path(name)
	if err := os.Link(filepath.Join(dir, name), file); err != nil {
		im.t.Fatal(err)
	}
	im.sums[file] = checksum(im.t, file)
	return file
}

// overlay makes an empty overlay of an image in the directory.
func (im *images) overlay(base string) string {
	im.t.Helper()
	file := im.path("root.qcow2")
	format := strings.TrimPrefix(filepath.Ext(base), ".")
	run(im.t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(base), "-F", format, file)
	return file
}

// create makes an empty QCOW2 image.
func (im *images) create(name, size string, options ...string) string {
	im.t.Helper()
	file := im.path(name)
	args := append([]string{"create", "-q", "-f", "qcow2"}, options...)
	run(im.t, "qemu-img", append(args, file, size)...)
	return file
}

// Exit statuses of qemu-img check.
const (
	checkClean = 0
	checkLeaks = 3
)

// check fails the test if the image is corrupt, or if it has leaks and they
// are not allowed.
func (im *images) check(file string, allowed ...int) {
	im.t.Helper()
	out, status := try(im.t, "qemu-img", "check", file)
	if slices.Contains(allowed, status) {
		return
	}
	im.t.Errorf("qemu-img check %s: exit status %d\n%s", filepath.Base(file), status, out)
}

// fileInside returns the contents of a file in the ext4 file system that a
// QCOW2 image holds.
func (im *images) fileInside(image, name string) string {
	im.t.Helper()
	raw := image + ".raw"
	run(im.t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
	defer os.Remove(raw)
	return run(im.t, "debugfs", "-R", "cat "+name, raw)
}

// checksum is of the contents of a file; one that an emulated processor computes
// fast.
func checksum(t *testing.T, file string) uint32 {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum32()
}

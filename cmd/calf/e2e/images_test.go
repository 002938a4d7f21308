package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// The base images are made once and shared by hard links: a backing file has
// to lie in the directory of its overlay, and no test may change one.
var bases = sync.OnceValues(func() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "bases-"); err != nil {
		return "", err
	}
	return dir, lab.GuestRoot(filepath.Join(dir, "base.raw"), 64, nil)
})

// images is a directory of a test for its images.
type images struct {
	t    *testing.T
	dir  string
	sums map[string]string // of the base images in dir, when they were put there
}

// newImages returns an empty directory. At the end of the test its base images
// have to be what they were.
func newImages(t *testing.T) *images {
	im := &images{t: t, dir: t.TempDir(), sums: make(map[string]string)}
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

// base puts the raw root file system of guests into the directory.
func (im *images) base() string {
	im.t.Helper()
	dir, err := bases()
	if err != nil {
		im.t.Fatal(err)
	}
	file := im.path("base.raw")
	if err := os.Link(filepath.Join(dir, "base.raw"), file); err != nil {
		im.t.Fatal(err)
	}
	im.sums[file] = checksum(im.t, file)
	return file
}

// baseQCOW2 puts the same into the directory as a QCOW2 image.
func (im *images) baseQCOW2() string {
	im.t.Helper()
	file := im.path("base.qcow2")
	run(im.t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", im.base(), file)
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
	for _, a := range allowed {
		if status == a {
			return
		}
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

func checksum(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

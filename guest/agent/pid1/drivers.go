package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/internal/modules"
)

// Drivers are the modules that the agent needs for a root with a kind of file system,
// which may be empty, in the order in which it loads them. Some are part of one kernel
// or another, or do not exist in it.
func Drivers(kind string) []string {
	return append([]string{"virtio_pci", "virtio_blk", socketDriver}, driversOf(kind)...)
}

const socketDriver = "vmw_vsock_virtio_transport"

// driversOf are the modules for a kind of file system. What checks its checksums is
// looked for by the kernel under another name, with a program that may not be there.
func driversOf(kind string) []string {
	switch kind = typeOf(kind); kind {
	case "":
		return nil
	case "ext2", "ext3":
		kind = "ext4"
	}
	return []string{"crc32c_intel", "crc32c_generic", kind}
}

// typeOf is what the kernel calls a kind of file system.
func typeOf(kind string) string {
	if kind == "fat" {
		return "vfat"
	}
	return kind
}

// loader loads modules from the first of some sets that has them.
type loader []*modules.Set

// newLoader returns a loader of the kernel's modules that are under the root that there
// is now, and in dirs.
func newLoader(dirs ...string) loader {
	release := "/lib/modules/" + kernelRelease()
	var l loader
	for _, dir := range append([]string{release, "/usr" + release}, dirs...) {
		if s, err := modules.Open(os.DirFS(dir)); err == nil {
			l = append(l, s)
		}
	}
	return l
}

// load loads modules with what they need. One that there is already is loaded, as is one
// that is part of the kernel; the error is that of the last one.
func (l loader) load(names ...string) error {
	var err error
	for _, name := range names {
		err = l.loadOne(name, 0)
	}
	return err
}

func (l loader) loadOne(name string, depth int) error {
	const maxDepth = 16
	if _, err := os.Stat("/sys/module/" + strings.ReplaceAll(name, "-", "_")); err == nil {
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("%s needs itself", name)
	}
	err := fmt.Errorf("%s: %w", name, modules.ErrNoModule)
	for _, set := range l {
		image, needs, readErr := set.Read(name)
		if errors.Is(readErr, modules.ErrNoModule) {
			continue
		}
		if err = readErr; err != nil {
			continue
		}
		for _, need := range needs {
			if err := l.loadOne(need, depth+1); err != nil && !errors.Is(err, modules.ErrNoModule) {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if err = unix.InitModule(image, ""); err == nil || errors.Is(err, unix.EEXIST) {
			return nil
		}
		err = fmt.Errorf("the module %s cannot be loaded: %w", name, err)
	}
	return err
}

func kernelRelease() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

package doctor

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/vmm"
)

// Host is what the checks see of a host.
type Host struct {
	// Root is its file system, of which /proc and /sys are read.
	Root fs.FS
	// OpenKVM tries to open /dev/kvm.
	OpenKVM func() error
	// Probe is vmm.Probe.
	Probe func() error
	// Capabilities is vmm.Capabilities.
	Capabilities func() ([]vmm.Capability, int, error)
	// IOUring is nil if this process may use io_uring.
	IOUring func() error
	// Landlock returns the version of Landlock's interface.
	Landlock func() (int, error)
}

// ThisHost is the host that calf runs on.
func ThisHost() Host {
	return Host{
		Root:         os.DirFS("/"),
		OpenKVM:      openKVM,
		Probe:        vmm.Probe,
		Capabilities: vmm.Capabilities,
		IOUring:      ioUring,
		Landlock:     landlock,
	}
}

func openKVM() error {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// ioUring asks for a ring without saying where its parameters are. The kernel
// looks for them only once it has found that the caller may have a ring.
func ioUring() error {
	_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	if errors.Is(errno, unix.EFAULT) {
		return nil
	}
	return errno
}

func landlock() (int, error) {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0, errno
	}
	return int(abi), nil
}

// read returns the contents of a file without the space around it, empty if it
// cannot be read.
func (h Host) read(path string) string {
	b, err := fs.ReadFile(h.Root, path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// field returns the rest of the first line of a file that begins with key and a
// colon.
func (h Host) field(path, key string) string {
	for line := range strings.Lines(h.read(path)) {
		if k, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

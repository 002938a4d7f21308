package pid1

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountKernel mounts what shows the kernel's devices and states.
func mountKernel() error {
	for _, m := range []struct{ kind, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := mountAt(m.kind, m.at, 0, ""); err != nil {
			return err
		}
	}
	return nil
}

// mountUsual mounts what programs expect beside that, and those that test a kernel. What
// the kernel does not have, and what has no directory in an image that cannot be written,
// is left out.
func mountUsual() error {
	const quiet = unix.MS_NOSUID | unix.MS_NODEV
	for _, m := range []struct {
		kind, at, data string
		flags          uintptr
	}{
		{"devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=000", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", quiet},
		{"mqueue", "/dev/mqueue", "", quiet | unix.MS_NOEXEC},
		{"hugetlbfs", "/dev/hugepages", "", quiet},
		{"tmpfs", "/run", "mode=755", quiet},
		{"cgroup2", "/sys/fs/cgroup", "nsdelegate", quiet | unix.MS_NOEXEC},
		{"bpf", "/sys/fs/bpf", "mode=700", quiet | unix.MS_NOEXEC},
		{"securityfs", "/sys/kernel/security", "", quiet | unix.MS_NOEXEC},
		{"debugfs", "/sys/kernel/debug", "", quiet | unix.MS_NOEXEC},
		{"tracefs", "/sys/kernel/tracing", "", quiet | unix.MS_NOEXEC},
	} {
		if err := mountAt(m.kind, m.at, m.flags, m.data); err != nil && !isAbsent(err) {
			return err
		}
	}
	for _, dir := range []string{"/tmp", "/run/lock"} {
		if err := makeShared(dir); err != nil && !isAbsent(err) {
			return err
		}
	}
	// What a static /dev has and devtmpfs has not.
	for link, to := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(to, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return upLoopback()
}

// isAbsent reports whether the kernel or the image does not have, or does not want to
// have, what an error is about.
func isAbsent(err error) bool {
	for _, absent := range []error{unix.ENOENT, unix.ENODEV, unix.EROFS, unix.EPERM, unix.EACCES, unix.ENOTDIR} {
		if errors.Is(err, absent) {
			return true
		}
	}
	return false
}

// makeShared makes a directory that all users write to, unless there is one.
func makeShared(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	return os.Chmod(dir, 0o777|os.ModeSticky)
}

// mountAt mounts a file system of the kernel's own, unless there is one already.
func mountAt(kind, at string, flags uintptr, data string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, at, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mounting %s at %s: %w", kind, at, err)
	}
	return nil
}

// upLoopback lets programs reach each other by 127.0.0.1.
func upLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil // a kernel without that network
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("starting the loopback device: %w", err)
	}
	return nil
}

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

// mountUsual mounts what programs expect beside that. An image without a directory
// for one of them does without it.
func mountUsual() error {
	const quiet = unix.MS_NOSUID | unix.MS_NODEV
	for _, m := range []struct {
		kind, at, data string
		flags          uintptr
	}{
		{"devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=000", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", quiet},
		{"tmpfs", "/run", "mode=755", quiet},
		{"cgroup2", "/sys/fs/cgroup", "nsdelegate", quiet | unix.MS_NOEXEC},
	} {
		if err := mountAt(m.kind, m.at, m.flags, m.data); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.ENODEV) {
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

package doctor

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ioUring says whether io_uring may be used, which calf does not do yet.
func (h Host) ioUring() Check {
	const (
		name     = "io_uring"
		unneeded = "; not needed: calf's I/O engine is sync today"
	)
	err := h.IOUring()
	disabled := h.read("proc/sys/kernel/io_uring_disabled")
	switch {
	case err == nil:
		return ok(name, "allowed%s", unneeded)
	case errors.Is(err, unix.ENOSYS):
		return warning(name, "this kernel has none"+unneeded, "Use a host kernel with CONFIG_IO_URING, if you want it.")
	case disabled != "" && disabled != "0":
		return warning(name, fmt.Sprintf("turned off (kernel.io_uring_disabled = %s)%s", disabled, unneeded),
			"Turn it on, if you want it: sudo sysctl kernel.io_uring_disabled=0")
	}
	return warning(name, fmt.Sprintf("not allowed to this process (%v)%s", err, unneeded),
		"Allow io_uring_setup in the seccomp profile of this container, if you want it.")
}

// landlock says which Landlock there is, which calf gitlab-executor confines jobs with.
func (h Host) landlock() Check {
	const name = "landlock"
	abi, err := h.Landlock()
	switch {
	case err == nil:
		return ok(name, "ABI %d; calf gitlab-executor uses it", abi)
	case errors.Is(err, unix.EOPNOTSUPP):
		return warning(name, "turned off when this host booted; only calf gitlab-executor needs it",
			"Add landlock to lsm= on the host's kernel command line, if you want it.")
	}
	return warning(name, fmt.Sprintf("none (%v); only calf gitlab-executor needs it", err),
		"Use a host kernel with CONFIG_SECURITY_LANDLOCK (Linux 5.13), if you want it.")
}

// Package pid1 is the agent of calf in a guest: the guest's first process. It loads
// the drivers that it needs from what the image has, finds and mounts the root, and
// there does what the host asks for over the socket device: it runs a command, or
// lets the image's own init take over.
//
// It keeps in its initramfs, and in /run and /dev, and changes nothing else of the
// image by itself.
package pid1

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Where the agent is in its initramfs.
const (
	Dir     = ".calf"
	Program = Dir + "/init"

	newRoot = "/" + Dir + "/root"
)

// IsAgent reports whether this process is the first one of a guest that has been
// started as the agent.
func IsAgent() bool { return os.Getpid() == 1 && os.Args[0] == "/"+Program }

// Main runs the agent, and ends the guest. What goes wrong before the host can be
// told is said on the console.
func Main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "calf: the agent in the guest gives up: %v\n", err)
	}
	unix.Sync()
	// There is nothing left to do if this fails, either: the kernel panics when
	// its first process ends.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := mountKernel(); err != nil {
		return err
	}
	args, err := readArgs()
	if err != nil {
		return err
	}
	root, err := findRoot(args)
	if err != nil {
		return err
	}
	if err := root.mount(); err != nil {
		return err
	}
	// The drivers may be in either place, and the initramfs is about to go.
	if err := loadAny([]string{"/", newRoot}, "vmw_vsock_virtio_transport"); err != nil {
		return fmt.Errorf("the driver of the socket device cannot be loaded: %w", err)
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := mountUsual(); err != nil {
		return err
	}
	return serve()
}

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
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Where the agent is in its initramfs.
const (
	Dir     = ".calf"
	Program = Dir + "/init"
	// ModulesDir has modules that the initramfs of the image may lack.
	ModulesDir = Dir + "/modules"

	newRoot = "/" + Dir + "/root"
)

// GivesUp begins the line on the console that says why the agent cannot do its work.
const GivesUp = "calf: the agent in the guest gives up: "

// IsAgent reports whether this process is the first one of a guest that has been
// started as the agent.
func IsAgent() bool { return os.Getpid() == 1 && os.Args[0] == "/"+Program }

// Main runs the agent, and ends the guest unless the image's init takes over. What goes
// wrong before the host can be told is said on the console.
func Main() {
	began := sinceBoot()
	a, err := start()
	if err == nil {
		err = run(a, began)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, GivesUp+strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	unix.Sync()
	if a.handOver {
		os.Exit(1) // the kernel panics: a guest that cannot be started is none that has ended
	}
	// There is nothing left to do if this fails, either: the kernel panics when
	// its first process ends.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// start returns what the kernel has been told.
func start() (args, error) {
	if err := mountKernel(); err != nil {
		return args{}, err
	}
	return readArgs()
}

func run(a args, began time.Duration) error {
	drivers := newLoader("/" + ModulesDir)
	root, err := findRoot(a, drivers)
	if err != nil {
		return err
	}
	if err := root.mount(drivers); err != nil {
		return err
	}
	loaded := drivers.load(socketDriver) // while the initramfs is there
	if err := switchRoot(); err != nil {
		return err
	}
	if a.handOver {
		mountFstab(func(e entry) bool { return e.at == "/usr" }, root.readOnlyFlag()) // which an init counts on
	} else {
		mountFstab(func(entry) bool { return true }, 0)
	}
	if loaded != nil {
		loaded = newLoader().load(socketDriver)
	}
	if a.handOver {
		if err := announce(began, loaded); err != nil {
			fmt.Fprintf(os.Stderr, "calf: the host does not learn that the guest is up: %v\n", err)
		}
		return handOver(a.init)
	}
	if err := mountUsual(); err != nil {
		return err
	}
	return serve(began, loaded)
}

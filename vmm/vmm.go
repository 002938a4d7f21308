// Package vmm is calf's virtual machine: an x86-64 PC of memory, vCPUs,
// interrupt controllers, ACPI tables, a serial port and a PCI bus, run by KVM.
// It wires virtio devices to the kernel's ioeventfds and irqfds, and alone
// touches /dev/kvm.
//
// # Life
//
// New checks everything that can be wrong before a guest runs and builds the
// machine; AddDisk plugs a disk into it; Run runs it until it ends; Close frees
// it. So whatever New refuses has been refused before a caller need open an
// image for writing. A guest that reboots gets a new machine over the same
// disks.
//
// # Threads
//
// Each vCPU is a goroutine locked to its thread. It serves its own exits: port
// and memory accesses are answered on the goroutine of the vCPU that made
// them. Queue notifications do not exit: each queue has an ioeventfd on which
// its worker, a plain goroutine of the device, waits. Interrupts are irqfds,
// raised by a write from any goroutine. Console output goes through a buffer to
// a goroutine that writes it, console input comes from one that reads it.
package vmm

import (
	"errors"
	"log/slog"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/virtio/vsock"
)

// Limits of a machine.
const (
	// MaxCPUs is what 8-bit local APIC IDs allow, of which 0xFF means every
	// one. KVM may allow fewer.
	MaxCPUs = 254
	// MaxDisks is the number of slots of the PCI bus beside the host bridge's.
	MaxDisks = slots - 1
)

// Config describes a machine.
type Config struct {
	// CPUs is the number of vCPUs; 0 means 1.
	CPUs int
	// Memory is the guest's RAM in bytes, a multiple of 4096; 0 means 512 MiB.
	// Host memory is taken as the guest touches it.
	Memory uint64
	// Kernel is the path of a bzImage, or of an ELF vmlinux with a PVH entry.
	Kernel string
	// Initrd is the path of an initial RAM disk, or empty.
	Initrd string
	// FirstInitrd precedes the initial RAM disk, or is the only one: the kernel
	// unpacks both. A packed one may not say where it ends, so that nothing can
	// follow it. Nil: there is none.
	FirstInitrd *boot.File
	// Cmdline is appended to the machine's own kernel command line.
	Cmdline string
	// Boot says what to boot where Kernel is empty. New calls it, and Run calls it
	// again for every reboot, while no guest runs.
	Boot func() (Payload, error)
	// Console is the far end of the guest's serial port.
	Console Console
	// Vsock is the guest's socket device, or nil. It stays the caller's, who
	// closes it after the machine.
	Vsock *vsock.Device
	// NoReboot ends the run where the guest would be restarted.
	NoReboot bool
	// BootTimeout bounds the time from Run until the guest has booted: its
	// kernel has opened the serial console for the first process, or started a
	// disk, whichever comes first. 0: no bound. A reboot starts it anew.
	BootTimeout time.Duration
	// AllowEmulation accepts a KVM that has no hardware virtualization behind
	// it and emulates each instruction: enough for tiny guests, useless for
	// Linux.
	AllowEmulation bool
	// Started is when whatever leads to the guest's first instruction began, such
	// as the process; zero: at New. The phases that are logged at debug level are
	// measured from it.
	Started time.Time
	// Logger gets what the machine does; nil: nothing does.
	Logger *slog.Logger
}

// Payload is what a machine boots. It is read before the call is over that asked
// for it.
type Payload struct {
	// Name is what messages call the kernel.
	Name   string
	Kernel boot.File
	// Initrd is used if Config.Initrd is empty; nil: none.
	Initrd *boot.File
	// Cmdline comes before Config.Cmdline.
	Cmdline string
}

// Disk is a block device of a machine.
type Disk struct {
	// Name is what messages call the disk.
	Name string
	Disk blk.Disk
	// Queues is the number of virtqueues; 0: one per vCPU.
	Queues int
	// QueueSize is the number of descriptors of each, a power of two; 0: 256.
	QueueSize int
	// Serial is the serial number that the guest sees, at most 20 bytes.
	Serial string
	// What follows is as in blk.Config.
	WriteThrough     bool
	Unsafe           bool
	NoDiscard        bool
	ByteRate, OpRate blk.Rate
	OnError          blk.ErrorPolicy
	Stopped          func(err error) // see Machine.ResumeDisks
	Lost             func(err error)
}

// Outcome is how a run ended.
type Outcome int

// Outcomes of Run.
const (
	// Unknown: the run ended with an error.
	Unknown Outcome = iota
	// PowerOff: the guest powered itself off.
	PowerOff
	// Reboot: the guest restarted itself, and Config.NoReboot is set.
	Reboot
	// Panic: the guest's kernel panicked. It is known by a warm reset, which
	// Linux does for calf since 5.2, or by the kernel's pvpanic driver.
	Panic
	// TripleFault: the guest's processor gave up.
	TripleFault
	// BootTimeout: the guest had not booted in time.
	BootTimeout
	// Canceled: the context of Run ended.
	Canceled
)

func (o Outcome) String() string {
	switch o {
	case PowerOff:
		return "poweroff"
	case Reboot:
		return "reboot"
	case Panic:
		return "panic"
	case TripleFault:
		return "triple-fault"
	case BootTimeout:
		return "boot-timeout"
	case Canceled:
		return "canceled"
	}
	return "unknown"
}

// ErrNoGuest says that no guest runs that could be told. It may be about to restart.
var ErrNoGuest = errors.New("no guest is running")

// Errors of New. Each is wrapped in a sentence that says what to do.
var (
	// ErrNoKVM: /dev/kvm is missing, may not be opened, or lacks what calf needs.
	ErrNoKVM = errors.New("KVM is not available")
	// ErrEmulated: KVM works without hardware virtualization.
	ErrEmulated = errors.New("KVM has no hardware virtualization")
	// ErrConfig: the configuration asks for what this host or calf cannot give.
	ErrConfig = errors.New("the machine cannot be built")
)

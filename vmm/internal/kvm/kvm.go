// Package kvm is calf's typed face of /dev/kvm: one method per ioctl that calf
// uses, as the kernel's Documentation/virt/kvm/api.rst defines them.
//
// The value types of registers, CPUID entries and capabilities are gokvm's;
// the calls are our own, because a pointer handed to the kernel must become a
// uintptr only in the argument list of the system call itself, or a growing
// stack leaves the kernel writing to where the value used to be.
//
// Descriptors are plain integers closed by Close, never *os.File, whose
// finalizer would close them behind a running guest.
package kvm

import (
	"errors"
	"fmt"
	"os"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// The types of gokvm whose layout is the kernel's; TestABI holds them to it.
type (
	// Regs mirrors struct kvm_regs.
	Regs = gokvm.Regs
	// Sregs mirrors struct kvm_sregs.
	Sregs = gokvm.Sregs
	// Segment mirrors struct kvm_segment.
	Segment = gokvm.Segment
	// CPUIDEntry mirrors struct kvm_cpuid_entry2.
	CPUIDEntry = gokvm.CPUIDEntry2
	// MSREntry mirrors struct kvm_msr_entry.
	MSREntry = gokvm.MSREntry
	// Capability is a KVM_CAP number.
	Capability = gokvm.Capability
)

// Capabilities that gokvm does not name as linux/kvm.h does, and those used.
const (
	CapIRQFD            Capability = 32
	CapMaxVCPUs         Capability = 66
	CapTSCDeadlineTimer            = gokvm.CapTSCDeadlineTimer
	CapCoalescedPIO                = gokvm.CapCoalescedPIO
	CapIOEventFDNoLen   Capability = 100
	CapImmediateExit               = gokvm.CapImmediateExit
)

// apiVersion is the only KVM_GET_API_VERSION there has been since Linux 2.6.22.
const apiVersion = 12

// System is an open /dev/kvm.
type System struct {
	fd int
}

// Open opens /dev/kvm and checks the version of its interface.
func Open() (*System, error) {
	const path = "/dev/kvm"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	s := &System{fd: fd}
	v, err := ioctl(fd, kvmGetAPIVersion, 0)
	if err == nil && v != apiVersion {
		err = fmt.Errorf("its interface has version %d, calf needs %d", v, apiVersion)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), s.Close())
	}
	return s, nil
}

// Close closes /dev/kvm. Machines created from it live on.
func (s *System) Close() error { return unix.Close(s.fd) }

// Extension returns what KVM_CHECK_EXTENSION says of c: 0 where it is absent.
func (s *System) Extension(c Capability) int {
	n, err := ioctl(s.fd, kvmCheckExtension, uintptr(c))
	if err != nil {
		return 0
	}
	return n
}

// CreateVM makes an empty virtual machine.
func (s *System) CreateVM() (*VM, error) {
	fd, err := ioctl(s.fd, kvmCreateVM, 0)
	if err != nil {
		return nil, fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	size, err := ioctl(s.fd, kvmGetVCPUMmapSize, 0)
	if err != nil {
		_ = unix.Close(fd) // The error that matters is the one being returned.
		return nil, fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	return &VM{fd: fd, runSize: size}, nil
}

// VM is a virtual machine. Its methods may be called from any goroutine.
type VM struct {
	fd      int
	runSize int
}

// Close closes the machine's descriptor. The kernel frees the machine when its
// vCPUs are closed too.
func (v *VM) Close() error { return unix.Close(v.fd) }

// SetTSSAddr tells KVM which three pages of guest-physical space it may use
// for real mode on Intel processors.
func (v *VM) SetTSSAddr(addr uint32) error {
	return opErr("KVM_SET_TSS_ADDR", ioctlErr(v.fd, kvmSetTSSAddr, uintptr(addr)))
}

// CreateIRQChip creates the in-kernel PICs, I/O APIC and, for every vCPU made
// later, a local APIC.
func (v *VM) CreateIRQChip() error {
	return opErr("KVM_CREATE_IRQCHIP", ioctlErr(v.fd, kvmCreateIRQChip, 0))
}

// CreateVCPU makes the vCPU whose local APIC has the given ID.
func (v *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctl(v.fd, kvmCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("KVM_CREATE_VCPU %d: %w", id, err)
	}
	run, err := unix.Mmap(fd, 0, v.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = unix.Close(fd) // The error that matters is the one being returned.
		return nil, fmt.Errorf("map the run area of vCPU %d: %w", id, err)
	}
	return &VCPU{fd: fd, run: run}, nil
}

func opErr(op string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", op, err)
}

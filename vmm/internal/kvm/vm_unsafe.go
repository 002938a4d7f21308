package kvm

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sizes of linux/kvm.h, held at compile time.
var (
	_ [32]byte = [unsafe.Sizeof(userspaceMemoryRegion{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(irqLevel{})]byte{}
	_ [16]byte = [unsafe.Sizeof(coalescedZone{})]byte{}
	_ [24]byte = [unsafe.Sizeof(coalescedEntry{})]byte{}
	_ [64]byte = [unsafe.Sizeof(pitConfig{})]byte{}
	_ [64]byte = [unsafe.Sizeof(ioEventFD{})]byte{}
	_ [32]byte = [unsafe.Sizeof(irqFD{})]byte{}
	_ [48]byte = [unsafe.Sizeof(Route{})]byte{}
	_ [40]byte = [unsafe.Sizeof(CPUIDEntry{})]byte{}
	_ [16]byte = [unsafe.Sizeof(MSREntry{})]byte{}

	_ [0x90]byte  = [unsafe.Sizeof(Regs{})]byte{}
	_ [0x138]byte = [unsafe.Sizeof(Sregs{})]byte{}
)

// ioctl repeats a call that a signal interrupted, which the runtime's own
// preemption signals do: KVM_CREATE_VM for one gives up then.
func ioctl(fd int, req, arg uintptr) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, e
	}
}

func ioctlErr(fd int, req, arg uintptr) error {
	_, err := ioctl(fd, req, arg)
	return err
}

// ioctlPtr is ioctl with a pointer. The conversion stands in the call itself:
// there the compiler keeps the value where it is until the call returns.
func ioctlPtr(fd int, req uintptr, p unsafe.Pointer) error {
	_, err := ioctlPtrN(fd, req, p)
	return err
}

func ioctlPtrN(fd int, req uintptr, p unsafe.Pointer) (int, error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(p))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, e
	}
}

// SupportedCPUID returns what KVM can show a guest of this processor.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	c := &cpuid2{NEnt: maxCPUIDEntries}
	if err := ioctlPtr(s.fd, kvmGetSupportedCPUID, unsafe.Pointer(c)); err != nil {
		return nil, fmt.Errorf("KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return c.Entries[:c.NEnt], nil
}

// SetIdentityMapAddr tells KVM which page of guest-physical space it may use
// for the identity map of real mode on Intel processors.
func (v *VM) SetIdentityMapAddr(addr uint64) error {
	return opErr("KVM_SET_IDENTITY_MAP_ADDR", ioctlPtr(v.fd, kvmSetIdentityMapAddr, unsafe.Pointer(&addr)))
}

// CreatePIT2 creates the in-kernel interval timer.
func (v *VM) CreatePIT2() error {
	return opErr("KVM_CREATE_PIT2", ioctlPtr(v.fd, kvmCreatePIT2, unsafe.Pointer(&pitConfig{Flags: pitSpeakerDummy})))
}

// SetUserMemoryRegion puts mem at guest-physical address gpa as the given
// slot. mem must be page-aligned and stay mapped until the VM and its vCPUs
// are closed.
func (v *VM) SetUserMemoryRegion(slot uint32, gpa uint64, mem []byte) error {
	r := userspaceMemoryRegion{
		Slot:          slot,
		GuestPhysAddr: gpa,
		MemorySize:    uint64(len(mem)),
		UserspaceAddr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))),
	}
	return opErr("KVM_SET_USER_MEMORY_REGION", ioctlPtr(v.fd, kvmSetUserMemoryRegion, unsafe.Pointer(&r)))
}

// IRQLine sets the level of an interrupt line.
func (v *VM) IRQLine(gsi uint32, level uint32) error {
	l := irqLevel{IRQ: gsi, Level: level}
	return opErr("KVM_IRQ_LINE", ioctlPtr(v.fd, kvmIRQLine, unsafe.Pointer(&l)))
}

// CoalescePIO makes writes to one I/O port collect in a ring instead of
// leaving the guest one by one; see VCPU.Coalesced.
func (v *VM) CoalescePIO(port uint16) error {
	z := coalescedZone{Addr: uint64(port), Size: 1, PIO: 1}
	return opErr("KVM_REGISTER_COALESCED_MMIO", ioctlPtr(v.fd, kvmRegisterCoalesced, unsafe.Pointer(&z)))
}

// AssignIOEventFD makes a guest write of any width and value to addr signal
// eventfd without leaving the kernel (K1, K2).
func (v *VM) AssignIOEventFD(addr uint64, eventfd int) error {
	e := ioEventFD{Addr: addr, FD: int32(eventfd)}
	return opErr("KVM_IOEVENTFD", ioctlPtr(v.fd, kvmIOEventFD, unsafe.Pointer(&e)))
}

// DeassignIOEventFD ends what AssignIOEventFD began with the same arguments.
func (v *VM) DeassignIOEventFD(addr uint64, eventfd int) error {
	e := ioEventFD{Addr: addr, FD: int32(eventfd), Flags: ioEventFDDeassign}
	return opErr("KVM_IOEVENTFD", ioctlPtr(v.fd, kvmIOEventFD, unsafe.Pointer(&e)))
}

// AssignIRQFD makes a write to eventfd raise gsi (K6).
func (v *VM) AssignIRQFD(gsi uint32, eventfd int) error {
	e := irqFD{FD: uint32(eventfd), GSI: gsi}
	return opErr("KVM_IRQFD", ioctlPtr(v.fd, kvmIRQFD, unsafe.Pointer(&e)))
}

// DeassignIRQFD ends what AssignIRQFD began; after it returns, nothing more is
// raised through eventfd (K7).
func (v *VM) DeassignIRQFD(gsi uint32, eventfd int) error {
	e := irqFD{FD: uint32(eventfd), GSI: gsi, Flags: irqFDDeassign}
	return opErr("KVM_IRQFD", ioctlPtr(v.fd, kvmIRQFD, unsafe.Pointer(&e)))
}

// SetGSIRouting replaces the whole table of routes (K8).
func (v *VM) SetGSIRouting(routes []Route) error {
	if len(routes) > maxRoutes {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes, at most %d fit", len(routes), maxRoutes)
	}
	// struct kvm_irq_routing: a count, flags, and as many entries.
	const entryWords = unsafe.Sizeof(Route{}) / 8
	words := make([]uint64, 1+int(entryWords)*len(routes))
	words[0] = uint64(len(routes))
	if len(routes) > 0 {
		copy(unsafe.Slice((*Route)(unsafe.Pointer(&words[1])), len(routes)), routes)
	}
	return opErr("KVM_SET_GSI_ROUTING", ioctlPtr(v.fd, kvmSetGSIRouting, unsafe.Pointer(&words[0])))
}

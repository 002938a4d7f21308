package kvm

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VCPU is a virtual processor. Every method but RequestExit belongs to the one
// thread that runs it: from any other, the kernel makes the call wait for
// KVM_RUN to return.
type VCPU struct {
	fd  int
	run []byte
}

// Close unmaps and closes the vCPU, which must not be running.
func (c *VCPU) Close() error {
	err := unix.Munmap(c.run)
	if e := unix.Close(c.fd); err == nil {
		err = e
	}
	return err
}

// Run enters the guest until it needs user space. On an error the exit reason
// is that of an earlier exit and must not be looked at: EINTR says that the
// vCPU was asked to leave, EAGAIN that it was woken while waiting to start.
//
// unix.Syscall, not RawSyscall: the scheduler must be able to take the
// processor away from a thread that stays in the guest.
func (c *VCPU) Run() error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), kvmRun, 0)
	if e != 0 {
		return e
	}
	return nil
}

func (c *VCPU) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&c.run[off])) }

// immediateExit is the byte immediate_exit within the first word of the area.
const immediateExit = 1 << (8 * runImmediateExit)

// RequestExit makes the next Run return EINTR at once. With a signal sent to
// the vCPU's thread after it, the current one does too. Any goroutine may call
// it.
func (c *VCPU) RequestExit() { atomic.OrUint32(c.word(0), immediateExit) }

// ClearExit takes back RequestExit. Only the vCPU's own thread may call it,
// after Run returned EINTR, and must look for its orders after it.
func (c *VCPU) ClearExit() { atomic.AndUint32(c.word(0), ^uint32(immediateExit)) }

// ExitReason is why the last Run returned.
func (c *VCPU) ExitReason() uint32 { return *c.word(runExitReason) }

// IO describes a KVM_EXIT_IO: Count transfers of Size bytes each, one after
// the other in Data, to or from Port. Data is the kernel's own buffer: for an
// input, what is put there before the next Run is what the guest reads.
type IO struct {
	Port  uint16
	Write bool
	Size  int
	Data  []byte
}

// IO returns the transfer of the last exit, which was ExitIO.
func (c *VCPU) IO() IO {
	size := int(c.run[ioSize])
	off := int(binary.LittleEndian.Uint64(c.run[ioDataOffset:]))
	count := int(binary.LittleEndian.Uint32(c.run[ioCount:]))
	return IO{
		Port:  binary.LittleEndian.Uint16(c.run[ioPort:]),
		Write: c.run[ioDirection] == 1,
		Size:  size,
		Data:  c.run[off : off+size*count],
	}
}

// MMIO describes a KVM_EXIT_MMIO; Data is as in IO.
type MMIO struct {
	Addr  uint64
	Write bool
	Data  []byte
}

// MMIO returns the access of the last exit, which was ExitMMIO.
func (c *VCPU) MMIO() MMIO {
	n := min(int(binary.LittleEndian.Uint32(c.run[mmioLen:])), 8)
	return MMIO{
		Addr:  binary.LittleEndian.Uint64(c.run[mmioPhysAddr:]),
		Write: c.run[mmioIsWrite] != 0,
		Data:  c.run[mmioData : mmioData+n],
	}
}

// FailReason is the hardware's reason for an ExitFailEntry.
func (c *VCPU) FailReason() uint64 { return binary.LittleEndian.Uint64(c.run[failReason:]) }

// InternalError is the suberror of an ExitInternalError.
func (c *VCPU) InternalError() uint32 { return *c.word(internalError) }

// Coalesced calls write for each port write that the kernel collected, oldest
// first, at most as many as the ring holds: a guest may fill it as fast as it
// is emptied. The ring is the machine's, whichever vCPU it is
// reached through: only one goroutine may be in Coalesced at a time, but it
// need not be the vCPU's.
func (c *VCPU) Coalesced(write func(port uint16, p []byte)) {
	first, last := c.word(coalescedFirst), c.word(coalescedLast)
	i := *first
	for range coalescedMax {
		if i == atomic.LoadUint32(last) || i >= coalescedMax {
			return // Empty; the kernel keeps both below the size of the ring.
		}
		e := (*coalescedEntry)(unsafe.Pointer(&c.run[coalescedEntries+int(i)*coalescedSize]))
		write(uint16(e.PhysAddr), e.Data[:min(e.Len, 8)])
		i = (i + 1) % coalescedMax
		// The entry is the kernel's again once first has moved past it.
		atomic.StoreUint32(first, i)
	}
}

// Regs reads the general registers.
func (c *VCPU) Regs() (Regs, error) {
	var r Regs
	err := ioctlPtr(c.fd, kvmGetRegs, unsafe.Pointer(&r))
	return r, opErr("KVM_GET_REGS", err)
}

// SetRegs sets the general registers.
func (c *VCPU) SetRegs(r *Regs) error {
	return opErr("KVM_SET_REGS", ioctlPtr(c.fd, kvmSetRegs, unsafe.Pointer(r)))
}

// Sregs reads the segment and control registers.
func (c *VCPU) Sregs() (Sregs, error) {
	var r Sregs
	err := ioctlPtr(c.fd, kvmGetSregs, unsafe.Pointer(&r))
	return r, opErr("KVM_GET_SREGS", err)
}

// SetSregs sets the segment and control registers.
func (c *VCPU) SetSregs(r *Sregs) error {
	return opErr("KVM_SET_SREGS", ioctlPtr(c.fd, kvmSetSregs, unsafe.Pointer(r)))
}

// SetCPUID sets what the CPUID instruction tells this vCPU.
func (c *VCPU) SetCPUID(entries []CPUIDEntry) error {
	if len(entries) > maxCPUIDEntries {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries, at most %d fit", len(entries), maxCPUIDEntries)
	}
	s := &cpuid2{NEnt: uint32(len(entries))}
	copy(s.Entries[:], entries)
	return opErr("KVM_SET_CPUID2", ioctlPtr(c.fd, kvmSetCPUID2, unsafe.Pointer(s)))
}

// SetMSRs sets model-specific registers. KVM sets them in order and stops at
// the first it refuses, which the error names.
func (c *VCPU) SetMSRs(entries []MSREntry) error {
	if len(entries) > maxMSRs {
		return fmt.Errorf("KVM_SET_MSRS: %d entries, at most %d fit", len(entries), maxMSRs)
	}
	m := &msrs{NMSRs: uint32(len(entries))}
	copy(m.Entries[:], entries)
	n, err := ioctlPtrN(c.fd, kvmSetMSRs, unsafe.Pointer(m))
	if err != nil {
		return opErr("KVM_SET_MSRS", err)
	}
	if n != len(entries) {
		return fmt.Errorf("KVM_SET_MSRS: register %#x refused", entries[n].Index)
	}
	return nil
}

package vmm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"github.com/bobuhiro11/gokvm/pvh"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/vmm/internal/kvm"
	"golang.org/x/sys/unix"
)

// kickSignal interrupts KVM_RUN. The Go runtime has a handler for every signal
// and ignores this one unless someone asks for it; 32 to 34 are the C
// library's and the runtime's own.
const kickSignal = unix.Signal(36)

// allowKick lets kickSignal through to this thread: whoever started this
// process may have it blocked, and the runtime leaves that as it is.
func allowKick() error {
	var set unix.Sigset_t
	set.Val[(kickSignal-1)/64] = 1 << ((kickSignal - 1) % 64)
	return unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil)
}

// vcpu is a virtual processor and the goroutine that runs it, which is locked
// to its thread for life.
type vcpu struct {
	id    int
	kvm   *kvm.VCPU
	board *board

	started  atomic.Bool  // set before the loop begins
	stopping atomic.Bool  // set by stop, read by the loop before each entry
	tid      atomic.Int32 // thread of the loop; 0 before and after
	done     chan struct{}
}

// stop makes the loop end and does not wait for it. The order of flag, exit
// request and signal is what makes it certain: whatever the thread is doing,
// it sees one of them before or in the guest.
func (c *vcpu) stop() {
	c.stopping.Store(true)
	c.kvm.RequestExit()
	if tid := c.tid.Load(); tid != 0 {
		// It fails only where the thread has ended, which is what is wanted.
		_ = unix.Tgkill(os.Getpid(), int(tid), kickSignal)
	}
}

// loop runs the guest until stop is called or the machine ends.
func (c *vcpu) loop() {
	defer close(c.done)
	// Never unlocked: the thread dies with the goroutine, and with it the
	// kernel's idea of where this vCPU runs.
	runtime.LockOSThread()
	if err := allowKick(); err != nil {
		c.board.fail(fmt.Errorf("vCPU %d: let signal %d through: %w", c.id, kickSignal, err))
		return
	}
	c.tid.Store(int32(unix.Gettid())) //nolint:gosec // G115: a thread ID has 32 bits
	defer c.tid.Store(0)

	for !c.stopping.Load() {
		err := c.kvm.Run()
		switch {
		case err == nil:
			c.board.drainCoalesced(c.kvm)
			c.handleExit()
			if c.board.hasEnded() {
				return // the guest shall not run on after its end
			}
		case errors.Is(err, unix.EINTR):
			// The request is taken back first and the flag looked at after,
			// so one made in between is not lost.
			c.kvm.ClearExit()
		case errors.Is(err, unix.EAGAIN):
			// Woken while waiting for its start-up interrupt.
		default:
			c.board.fail(fmt.Errorf("vCPU %d: KVM_RUN: %w", c.id, err))
			return
		}
	}
}

func (c *vcpu) handleExit() {
	switch reason := c.kvm.ExitReason(); reason {
	case kvm.ExitIO:
		c.handleIO(c.kvm.IO())
	case kvm.ExitMMIO:
		if m := c.kvm.MMIO(); m.Write {
			c.board.mmio.write(guest.GPA(m.Addr), m.Data)
		} else {
			c.board.mmio.read(guest.GPA(m.Addr), m.Data)
		}
	case kvm.ExitHLT:
		// Only without an in-kernel local APIC.
	case kvm.ExitShutdown:
		c.board.end(TripleFault)
	case kvm.ExitFailEntry:
		c.board.fail(fmt.Errorf("vCPU %d: the processor refused to enter the guest, reason %#x", c.id, c.kvm.FailReason()))
	case kvm.ExitInternalError:
		c.board.fail(c.internalError())
	default:
		c.board.fail(fmt.Errorf("vCPU %d: unexpected exit %d from KVM", c.id, reason))
	}
}

// handleIO serves each transfer of a string instruction in turn.
func (c *vcpu) handleIO(io kvm.IO) {
	for off := 0; off < len(io.Data); off += io.Size {
		p := io.Data[off : off+io.Size]
		if io.Write {
			c.board.pio.write(io.Port, p)
		} else {
			c.board.pio.read(io.Port, p)
		}
	}
}

func (c *vcpu) internalError() error {
	regs, err := c.kvm.Regs()
	if err != nil {
		return fmt.Errorf("vCPU %d: KVM internal error %d", c.id, c.kvm.InternalError())
	}
	return fmt.Errorf("vCPU %d: KVM internal error %d (1: an instruction it cannot emulate) at RIP %#x", c.id, c.kvm.InternalError(), regs.RIP)
}

// Bits of control registers, and model-specific registers.
const (
	cr0PE = 1 << 0
	cr0ET = 1 << 4
	cr0PG = 1 << 31

	cr4PAE = 1 << 5

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsReserved = 1 << 1

	msrMiscEnable     = 0x1A0
	miscFastString    = 1 << 0
	msrMTRRDefType    = 0x2FF
	mtrrEnabledWB     = 1<<11 | 6
	msrTimeStampCount = 0x10
)

// setUp gives the processor its identity and, the boot processor, its first
// instruction. The others wait for the boot processor's start-up interrupt.
func (c *vcpu) setUp(cpuid []kvm.CPUIDEntry, e boot.Entry) error {
	if err := c.kvm.SetCPUID(cpuid); err != nil {
		return err
	}
	// A firmware would have turned caching on.
	err := c.kvm.SetMSRs([]kvm.MSREntry{
		{Index: msrTimeStampCount},
		{Index: msrMiscEnable, Data: miscFastString},
		{Index: msrMTRRDefType, Data: mtrrEnabledWB},
	})
	if err != nil || c.id != 0 {
		return err
	}
	sregs, err := c.kvm.Sregs()
	if err != nil {
		return err
	}
	enter(&sregs, e)
	if err := c.kvm.SetSregs(&sregs); err != nil {
		return err
	}
	regs := kvm.Regs{RIP: uint64(e.RIP), RFLAGS: rflagsReserved}
	if e.Mode == boot.LongMode {
		regs.RSI = uint64(e.Params)
	} else {
		regs.RBX = uint64(e.Params)
	}
	return c.kvm.SetRegs(&regs)
}

// enter puts the mode, the tables and the segments of e into s.
func enter(s *kvm.Sregs, e boot.Entry) {
	segment := func(selector int) kvm.Segment {
		return pvh.SegmentFromGDT(boot.Descriptors()[selector/8], uint8(selector/8)) //nolint:gosec // G115: a constant of package boot
	}
	s.GDT.Base, s.GDT.Limit = uint64(e.GDT), uint16(e.GDTSize-1) //nolint:gosec // G115: a few descriptors
	s.CR0, s.CR4, s.EFER = cr0PE|cr0ET, 0, 0
	s.CS = segment(boot.Code32Selector)
	if e.Mode == boot.LongMode {
		s.CS = segment(boot.Code64Selector)
		s.CR0 |= cr0PG
		s.CR3 = uint64(e.PageTable)
		s.CR4 = cr4PAE
		s.EFER = eferLME | eferLMA
	}
	data := segment(boot.DataSelector)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.TR = segment(boot.TSSSelector)
}

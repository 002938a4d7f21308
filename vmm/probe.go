package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/bobuhiro11/gokvm/cpuid"
	"github.com/calfvm/calf/vmm/internal/kvm"
	"golang.org/x/sys/unix"
)

// Probe says whether this host can run guests: nil, or an error that wraps
// ErrNoKVM or ErrEmulated and says what to do.
func Probe() error {
	s, err := openKVM(false)
	if err != nil {
		return err
	}
	return s.Close()
}

// openKVM opens /dev/kvm and checks that it has what calf needs.
func openKVM(allowEmulation bool) (*kvm.System, error) {
	s, err := kvm.Open()
	if err != nil {
		return nil, explainOpen(err)
	}
	for _, c := range capabilities() {
		if c.Required && s.Extension(c.number) == 0 {
			return nil, errors.Join(fmt.Errorf("%w: /dev/kvm lacks %s (Linux %s); use a newer host kernel", ErrNoKVM, c.Name, c.Since), s.Close())
		}
	}
	if allowEmulation || processorVirtualizes() {
		return s, nil
	}
	// The processor does not show its virtualization here, which need not mean
	// that there is none: time it.
	fast, err := runsFast(s)
	if err == nil && !fast {
		err = fmt.Errorf("%w: /dev/kvm of this host emulates every instruction, too slowly for Linux; "+
			"use a host with VT-x or AMD-V, or turn on nested virtualization for this one", ErrEmulated)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func explainOpen(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: /dev/kvm is missing; load its module (modprobe kvm_intel or kvm_amd), "+
			"turn on virtualization in the firmware, or pass the device into this container", ErrNoKVM)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: this user may not open /dev/kvm; join its group "+
			"(sudo usermod -aG kvm \"$USER\", then log in again)", ErrNoKVM)
	}
	return fmt.Errorf("%w: %w", ErrNoKVM, err)
}

// processorVirtualizes reports whether the processor says that it has VT-x
// (CPUID.1:ECX.5) or AMD-V (CPUID.80000001:ECX.2).
func processorVirtualizes() bool {
	_, _, ecx, _ := cpuid.CPUID(leafFeatures)
	_, _, ecxAMD, _ := cpuid.CPUID(leafAMDFeatures)
	return ecx&(1<<5) != 0 || ecxAMD&(1<<2) != 0
}

const (
	probeLoops = 100_000
	// probeLimit lies between what hardware takes for the loop, well under a
	// millisecond, and what an emulator does, a hundred.
	probeLimit = 20 * time.Millisecond
	probeTries = 3
)

// probeCode counts ECX down from probeLoops in real mode and stops:
//
//	66 b9 imm32   mov ecx, probeLoops
//	66 49         dec ecx
//	75 fc         jnz -4
//	f4            hlt
func probeCode() []byte {
	code := binary.LittleEndian.AppendUint32([]byte{0x66, 0xB9}, probeLoops)
	return append(code, 0x66, 0x49, 0x75, 0xFC, 0xF4)
}

// runsFast times a counted loop in a vCPU of its own. The best of a few tries
// counts: a busy host can only make it slower.
func runsFast(s *kvm.System) (fast bool, err error) {
	vm, err := s.CreateVM()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	ram, unmap, err := mapRAM(pageSize)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, unmap()) }()
	copy(ram, probeCode())
	if err := vm.SetUserMemoryRegion(0, 0, ram); err != nil {
		return false, err
	}
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(vcpu.Close(), err) }()
	for range probeTries {
		took, err := timeProbe(vcpu)
		if err != nil {
			return false, err
		}
		if took < probeLimit {
			return true, nil
		}
	}
	return false, nil
}

func timeProbe(c *kvm.VCPU) (time.Duration, error) {
	sregs, err := c.Sregs()
	if err != nil {
		return 0, err
	}
	sregs.CS.Base, sregs.CS.Selector = 0, 0
	if err := c.SetSregs(&sregs); err != nil {
		return 0, err
	}
	if err := c.SetRegs(&kvm.Regs{RFLAGS: rflagsReserved}); err != nil {
		return 0, err
	}
	began := time.Now()
	for {
		switch err := c.Run(); {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return 0, fmt.Errorf("%w: KVM_RUN: %w", ErrNoKVM, err)
		case c.ExitReason() != kvm.ExitHLT:
			return 0, fmt.Errorf("%w: a trial guest ended with exit %d", ErrNoKVM, c.ExitReason())
		}
		return time.Since(began), nil
	}
}

package vmm

import (
	"encoding/binary"
	"sync"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/vmm/internal/kvm"
)

// Bits of the ACPI fixed registers (ACPI 6.5, 4.8.3).
const (
	pm1PowerButton  = 1 << 8 // in both status and enable
	pm1SCIEnable    = 1 << 0
	pm1SleepTypeBit = 10
	pm1SleepTypes   = 7
	pm1SleepEnable  = 1 << 13

	sleepTypeS5 = 5
)

// powerManager is the PM1 register block: the power button towards the guest,
// soft-off towards the machine.
type powerManager struct {
	vm  *kvm.VM
	end func(Outcome)

	mu sync.Mutex // guards what follows; held across KVM_IRQ_LINE
	// asked is set from a press of the button until the guest acknowledges it
	// with the event enabled: a guest that is still starting clears and only
	// then enables it, and shall not miss the press.
	asked   bool
	status  uint16
	enable  uint16
	control uint16
}

// pressButton is what a finger would do.
func (pm *powerManager) pressButton() error {
	pm.mu.Lock()
	defer pm.mu.Unlock()
	pm.asked = true
	pm.status |= pm1PowerButton
	return pm.updateSCILocked()
}

// updateSCILocked drives the level of the system control interrupt.
func (pm *powerManager) updateSCILocked() error {
	var level uint32
	if pm.status&pm.enable != 0 {
		level = 1
	}
	return pm.vm.IRQLine(gsiSCI, level)
}

func (pm *powerManager) readPIO(port uint16, p []byte) {
	pm.mu.Lock()
	defer pm.mu.Unlock()
	var regs [8]byte
	binary.LittleEndian.PutUint16(regs[0:], pm.status)
	binary.LittleEndian.PutUint16(regs[2:], pm.enable)
	binary.LittleEndian.PutUint16(regs[4:], pm.control|pm1SCIEnable)
	clear(p)
	copy(p, regs[port-portPM1Event:])
}

func (pm *powerManager) writePIO(port uint16, p []byte) {
	pm.mu.Lock()
	defer pm.mu.Unlock()
	var regs [8]byte
	binary.LittleEndian.PutUint16(regs[2:], pm.enable)
	binary.LittleEndian.PutUint16(regs[4:], pm.control)
	copy(regs[port-portPM1Event:], p)
	cleared := binary.LittleEndian.Uint16(regs[0:]) // written ones clear
	if cleared&pm1PowerButton != 0 && pm.enable&pm1PowerButton != 0 {
		pm.asked = false
	}
	pm.status &^= cleared
	pm.enable = binary.LittleEndian.Uint16(regs[2:])
	if pm.asked && pm.enable&pm1PowerButton != 0 {
		pm.status |= pm1PowerButton
	}
	control := binary.LittleEndian.Uint16(regs[4:])
	pm.control = control &^ pm1SleepEnable
	_ = pm.updateSCILocked() // It fails only on a machine that is going away.
	if control&pm1SleepEnable != 0 && control>>pm1SleepTypeBit&pm1SleepTypes == sleepTypeS5 {
		pm.end(PowerOff)
	}
}

// resetControl is the reset register at CF9 and the keyboard controller's
// reset line, the two that Linux tries.
type resetControl struct {
	mem *guest.Memory
	end func(Outcome)
}

const (
	resetNow     = 1 << 2 // of the byte at CF9
	resetValue   = 0x06   // a hard reset through CF9
	i8042Reset   = 0xFE
	warmBootFlag = guest.GPA(0x472)
	warmBoot     = 0x1234
)

// reset ends the machine. A kernel that panics reboots warm and every other
// reboot is cold (the command line says so: reboot=panic_warm), and it is the
// warm-boot flag in the BIOS data area by which the kernel passes that on.
func (r *resetControl) reset() {
	var flag [2]byte
	if err := r.mem.Read(warmBootFlag, flag[:]); err == nil && binary.LittleEndian.Uint16(flag[:]) == warmBoot {
		r.end(Panic)
		return
	}
	r.end(Reboot)
}

// readPIO says that the keyboard controller is ready for a command, or a
// kernel that wants to reset waits for it.
func (r *resetControl) readPIO(_ uint16, p []byte) { clear(p) }

func (r *resetControl) writePIO(port uint16, p []byte) {
	switch {
	case port == portReset && p[0]&resetNow != 0,
		port == portI8042Command && p[0] == i8042Reset:
		r.reset()
	}
}

// pvpanic is QEMU's panic notifier (docs/specs/pvpanic): a kernel that has its
// driver says at once that it panicked, also where it would then hang.
type pvpanic struct {
	end func(Outcome)
}

const pvpanicPanicked = 1 << 0

func (pvpanic) readPIO(_ uint16, p []byte) {
	clear(p)
	p[0] = pvpanicPanicked // the events that are understood
}

func (d pvpanic) writePIO(_ uint16, p []byte) {
	if p[0]&pvpanicPanicked != 0 {
		d.end(Panic)
	}
}

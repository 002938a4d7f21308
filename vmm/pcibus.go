package vmm

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
)

// pciBus is bus 0: configuration space by way of both the CF8/CFC ports (PCI
// Local Bus 3.0, 3.2.2.3.2) and the mapped window (PCI Express 5.0, 7.2.2),
// and addresses for the functions on it. Slot 0 is the host bridge.
type pciBus struct {
	functions [slots * functionsPerSlot]pci.Function
	lines     [pciLines]sharedLine // pin INTA of slot n is wired to line n%pciLines
	nextSlot  int
	nextBAR   guest.GPA

	mu      sync.Mutex // guards address
	address uint32     // the CONFIG_ADDRESS register
}

const (
	slots            = 32
	functionsPerSlot = 8
	configEnable     = 1 << 31
)

// newPCIBus makes a bus whose lines raise interrupts by setLine.
func newPCIBus(setLine func(gsi, level uint32)) *pciBus {
	b := &pciBus{nextSlot: 1, nextBAR: pciWindow}
	b.functions[0] = hostBridge{}
	for i := range b.lines {
		b.lines[i].set = func(level uint32) { setLine(uint32(gsiPCI+i), level) } //nolint:gosec // G115: below 24
	}
	return b
}

// slotGSI is the interrupt of pin INTA of a slot.
func slotGSI(slot int) uint32 { return uint32(gsiPCI + slot%pciLines) }

// line is what pin INTA of the function plugged next is wired to.
func (b *pciBus) line() *sharedLine { return &b.lines[b.nextSlot%pciLines] }

// plug puts fn into the next free slot.
func (b *pciBus) plug(fn pci.Function) error {
	if b.nextSlot == slots {
		return fmt.Errorf("%w: the PCI bus takes %d disks", ErrConfig, MaxDisks)
	}
	b.functions[b.nextSlot*functionsPerSlot] = fn
	b.nextSlot++
	return nil
}

// allocateBAR returns the address of size bytes of the window, aligned to
// size, which is a power of two.
func (b *pciBus) allocateBAR(size uint64) (guest.GPA, error) {
	base := (b.nextBAR + guest.GPA(size-1)) &^ guest.GPA(size-1)
	if base+guest.GPA(size) > pciWindow+pciWinSize {
		return 0, fmt.Errorf("no room for %d bytes in the PCI window of %d MiB", size, pciWinSize>>20)
	}
	b.nextBAR = base + guest.GPA(size)
	return base, nil
}

// access finds the function that devfn names and whether the access is one
// that configuration space allows: naturally aligned, at most 4 bytes.
func (b *pciBus) access(devfn int, off uint16, p []byte) pci.Function {
	n := len(p)
	if n > 4 || n&(n-1) != 0 || int(off)%n != 0 {
		return nil
	}
	return b.functions[devfn]
}

func (b *pciBus) readConfig(devfn int, off uint16, p []byte) {
	if fn := b.access(devfn, off, p); fn != nil {
		fn.ReadConfig(off, p)
		return
	}
	fill(p, 0xFF)
}

func (b *pciBus) writeConfig(devfn int, off uint16, p []byte) {
	if fn := b.access(devfn, off, p); fn != nil {
		fn.WriteConfig(off, p)
	}
}

// ReadMMIO reads the mapped configuration space.
func (b *pciBus) ReadMMIO(off uint64, p []byte) {
	b.readConfig(int(off>>12)%len(b.functions), uint16(off&0xFFF), p)
}

// WriteMMIO writes the mapped configuration space.
func (b *pciBus) WriteMMIO(off uint64, p []byte) {
	b.writeConfig(int(off>>12)%len(b.functions), uint16(off&0xFFF), p)
}

// selected decodes CONFIG_ADDRESS for an access to port. ok is false where no
// function of bus 0 is selected.
func (b *pciBus) selected(port uint16) (devfn int, off uint16, ok bool) {
	b.mu.Lock()
	a := b.address
	b.mu.Unlock()
	const busMask = 0xFF << 16
	return int(a >> 8 & 0xFF), uint16(a&0xFC) + port - portPCIData, a&configEnable != 0 && a&busMask == 0
}

func (b *pciBus) readPIO(port uint16, p []byte) {
	fill(p, 0xFF)
	if port >= portPCIData {
		if devfn, off, ok := b.selected(port); ok {
			b.readConfig(devfn, off, p)
		}
		return
	}
	if port == portPCIAddress && len(p) == 4 {
		b.mu.Lock()
		defer b.mu.Unlock()
		binary.LittleEndian.PutUint32(p, b.address)
	}
}

func (b *pciBus) writePIO(port uint16, p []byte) {
	if port >= portPCIData {
		if devfn, off, ok := b.selected(port); ok {
			b.writeConfig(devfn, off, p)
		}
		return
	}
	// Only a write of the whole register counts: a byte at CF9 is a reset.
	if port == portPCIAddress && len(p) == 4 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.address = binary.LittleEndian.Uint32(p)
	}
}

// hostBridge is the function that every PC has at 00:00.0: an identity and
// nothing to set.
type hostBridge struct{}

var _ pci.Function = hostBridge{}

func (hostBridge) ReadConfig(off uint16, p []byte) {
	var header [64]byte
	binary.LittleEndian.PutUint16(header[0x00:], 0x1B36) // Red Hat, Inc.
	binary.LittleEndian.PutUint16(header[0x02:], 0x0008) // generic PCIe host bridge
	header[0x0B] = 0x06                                  // bridge; subclass 0, host
	clear(p)
	if int(off) < len(header) {
		copy(p, header[off:])
	}
}

func (hostBridge) WriteConfig(uint16, []byte) {}

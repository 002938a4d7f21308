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
// and addresses for the functions on it. Slot 0 has the host bridge and the devices
// that every machine has; disks have a slot each.
type pciBus struct {
	functions [slots * functionsPerSlot]pci.Function
	lines     [pciLines]sharedLine // pin INTA of slot n is wired to line n%pciLines
	nextSlot  int
	nextOwn   int // function of slot 0

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
	b := &pciBus{nextSlot: 1, nextOwn: 1}
	b.functions[0] = hostBridge{}
	for i := range b.lines {
		b.lines[i].set = func(level uint32) { setLine(uint32(gsiPCI+i), level) } //nolint:gosec // G115: below 24
	}
	return b
}

// slotGSI is the interrupt of pin INTA of a slot.
func slotGSI(slot int) uint32 { return uint32(gsiPCI + slot%pciLines) }

// freeSlot takes the next free slot, and returns its function 0.
func (b *pciBus) freeSlot() (devfn int, err error) {
	if b.nextSlot == slots {
		return 0, fmt.Errorf("%w: the PCI bus takes %d disks", ErrConfig, MaxDisks)
	}
	b.nextSlot++
	return (b.nextSlot - 1) * functionsPerSlot, nil
}

// freeFunction takes the next free function of slot 0.
func (b *pciBus) freeFunction() (devfn int) {
	if b.nextOwn == functionsPerSlot {
		panic("BUG: slot 0 of the PCI bus is full")
	}
	b.nextOwn++
	return b.nextOwn - 1
}

// line is what pin INTA of a function is wired to.
func (b *pciBus) line(devfn int) *sharedLine { return &b.lines[devfn/functionsPerSlot%pciLines] }

// bar is the address of BAR 0 of a function that may be plugged: of those of the
// slots in order, then of those of slot 0.
func bar(devfn int) guest.GPA {
	i := devfn/functionsPerSlot - 1
	if i < 0 {
		i = slots - 1 + devfn
	}
	return pciWindow + guest.GPA(i*pci.BARSize) //nolint:gosec // G115: not negative
}

// All of them lie in the window.
const _ = uint64(pciWinSize - (slots-1+functionsPerSlot)*pci.BARSize)

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
	header[0x0E] = 0x80                                  // there are more functions
	clear(p)
	if int(off) < len(header) {
		copy(p, header[off:])
	}
}

func (hostBridge) WriteConfig(uint16, []byte) {}

package vmm

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
)

// pioDevice answers accesses to I/O ports: p is 1, 2 or 4 bytes from port on.
// Both methods are called from vCPU goroutines, several at a time.
type pioDevice interface {
	readPIO(port uint16, p []byte)
	writePIO(port uint16, p []byte)
}

type pioRange struct {
	base, size uint16
	dev        pioDevice
}

// pioBus routes I/O port accesses. It does not change once vCPUs run.
type pioBus []pioRange

func (b *pioBus) add(base, size uint16, dev pioDevice) {
	*b = append(*b, pioRange{base, size, dev})
}

func (b pioBus) find(port uint16) pioDevice {
	for i := range b {
		if port-b[i].base < b[i].size { // below base it wraps to a large number
			return b[i].dev
		}
	}
	return nil
}

// read fills p; where there is no device every bit reads as one.
func (b pioBus) read(port uint16, p []byte) {
	if dev := b.find(port); dev != nil {
		dev.readPIO(port, p)
		return
	}
	fill(p, 0xFF)
}

func (b pioBus) write(port uint16, p []byte) {
	if dev := b.find(port); dev != nil {
		dev.writePIO(port, p)
	}
}

type mmioRange struct {
	base guest.GPA
	size uint64
	dev  pci.MMIO
}

// mmioBus routes accesses to device memory. The ranges change while vCPUs run
// (a guest moves its base address registers): readers take a snapshot, so no
// lock is held while a device is called, and a device may map and unmap.
type mmioBus struct {
	mu     sync.Mutex // serialises writers of ranges
	ranges atomic.Pointer[[]mmioRange]
}

func (b *mmioBus) snapshot() []mmioRange {
	if r := b.ranges.Load(); r != nil {
		return *r
	}
	return nil
}

// mapRange adds [base, base+size). Of two ranges that overlap, which only a
// guest's choice of addresses can bring about, the one mapped first answers.
func (b *mmioBus) mapRange(base guest.GPA, size uint64, dev pci.MMIO) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := append(slices.Clone(b.snapshot()), mmioRange{base, size, dev})
	b.ranges.Store(&r)
}

func (b *mmioBus) unmap(base guest.GPA, dev pci.MMIO) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := slices.DeleteFunc(slices.Clone(b.snapshot()), func(m mmioRange) bool {
		return m.base == base && m.dev == dev
	})
	b.ranges.Store(&r)
}

func (b *mmioBus) find(addr guest.GPA, n int) (pci.MMIO, uint64) {
	for _, r := range b.snapshot() {
		if off := uint64(addr - r.base); addr >= r.base && off < r.size && uint64(n) <= r.size-off { //nolint:gosec // G115: 1 to 8
			return r.dev, off
		}
	}
	return nil, 0
}

func (b *mmioBus) read(addr guest.GPA, p []byte) {
	if dev, off := b.find(addr, len(p)); dev != nil {
		dev.ReadMMIO(off, p)
		return
	}
	fill(p, 0xFF)
}

func (b *mmioBus) write(addr guest.GPA, p []byte) {
	if dev, off := b.find(addr, len(p)); dev != nil {
		dev.WriteMMIO(off, p)
	}
}

func fill(p []byte, v byte) {
	for i := range p {
		p[i] = v
	}
}

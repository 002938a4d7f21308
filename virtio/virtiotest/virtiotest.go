// Package virtiotest is the other side of package virtio: a machine without a
// processor, and a driver that probes a PCI function, negotiates, and works
// split virtqueues the way Linux does, through the same registers and rings and
// nothing else. Guest memory is on the heap, so the race detector sees what
// driver and device do to it.
//
// It is for tests. What cannot go wrong but through a mistake in a test panics.
package virtiotest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
)

// Guest-physical layout of a Machine: low memory, a hole with the PCI window,
// and a little memory above 4 GiB.
const (
	LowSize  = 32 << 20
	HighBase = guest.GPA(4 << 30)
	HighSize = 1 << 20
	Window   = guest.GPA(0xe000_0000)
)

// Machine is the host of PCI functions: memory, MMIO ranges, doorbells and
// interrupt lines. All methods are safe for concurrent use.
type Machine struct {
	Memory *guest.Memory
	// NoDoorbells makes BindDoorbell fail, so that every kick is an MMIO write.
	NoDoorbells bool

	mu     sync.Mutex // held across no call into a function
	next   guest.GPA  // of Alloc
	ranges map[guest.GPA]mmioRange
	bells  map[guest.GPA]int
	lines  map[uint32]*Line
	intrs  int // interrupts that are open
}

type mmioRange struct {
	size uint64
	m    pci.MMIO
}

// NewMachine returns a machine with zeroed memory.
func NewMachine() *Machine { return NewMachineOf(LowSize) }

// NewMachineOf is NewMachine with only low bytes of low memory, for tests that
// make machines by the thousand.
func NewMachineOf(low uint64) *Machine {
	mem, err := guest.NewMemory(
		guest.Region{Base: 0, Bytes: make([]byte, low)},
		guest.Region{Base: HighBase, Bytes: make([]byte, min(HighSize, low))},
	)
	if err != nil {
		panic(err)
	}
	return &Machine{
		Memory: mem,
		next:   0x1000,
		ranges: make(map[guest.GPA]mmioRange),
		bells:  make(map[guest.GPA]int),
		lines:  make(map[uint32]*Line),
	}
}

// Alloc reserves n bytes of low memory aligned to align, a power of 2.
func (m *Machine) Alloc(n, align uint64) guest.GPA {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := (m.next + guest.GPA(align) - 1) &^ guest.GPA(align-1)
	m.next = a + guest.GPA(n)
	if m.next > m.Memory.Regions()[0].End() {
		panic("virtiotest: out of guest memory")
	}
	return a
}

// Bytes is guest memory [addr, addr+n), which must be RAM.
func (m *Machine) Bytes(addr guest.GPA, n uint64) []byte {
	b, err := m.Memory.Slice(addr, n)
	if err != nil {
		panic(fmt.Sprintf("virtiotest: %v+%d: %v", addr, n, err))
	}
	return b
}

// MapMMIO implements pci.Host. It refuses ranges over RAM or another range.
func (m *Machine) MapMMIO(base guest.GPA, size uint64, f pci.MMIO) error {
	end, ok := base.Add(size)
	if !ok {
		return errors.New("virtiotest: range wraps around")
	}
	for _, r := range m.Memory.Regions() {
		if base < r.End() && r.Base < end {
			return errors.New("virtiotest: range covers RAM")
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for b, r := range m.ranges {
		if base < b+guest.GPA(r.size) && b < end {
			return errors.New("virtiotest: range covers another")
		}
	}
	m.ranges[base] = mmioRange{size, f}
	return nil
}

// UnmapMMIO implements pci.Host.
func (m *Machine) UnmapMMIO(base guest.GPA, f pci.MMIO) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ranges[base].m != f {
		panic(fmt.Sprintf("virtiotest: nothing to unmap at %v", base))
	}
	delete(m.ranges, base)
}

// BindDoorbell implements pci.Host.
func (m *Machine) BindDoorbell(addr guest.GPA, eventfd int) error {
	if m.NoDoorbells {
		return errors.New("virtiotest: this machine has no doorbells")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.bells[addr]; ok {
		return fmt.Errorf("virtiotest: %v has a doorbell", addr)
	}
	m.bells[addr] = eventfd
	return nil
}

// UnbindDoorbell implements pci.Host.
func (m *Machine) UnbindDoorbell(addr guest.GPA, eventfd int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fd, ok := m.bells[addr]; !ok || fd != eventfd {
		return fmt.Errorf("virtiotest: doorbell %d is not at %v", eventfd, addr)
	}
	delete(m.bells, addr)
	return nil
}

// Doorbells returns how many addresses have a doorbell bound.
func (m *Machine) Doorbells() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.bells)
}

// Ranges returns how many MMIO ranges are mapped.
func (m *Machine) Ranges() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.ranges)
}

// OpenInterrupts returns how many interrupts have not been closed.
func (m *Machine) OpenInterrupts() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.intrs
}

// find returns the range that addr is in and the offset there.
func (m *Machine) find(addr guest.GPA) (pci.MMIO, uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for b, r := range m.ranges {
		if addr >= b && uint64(addr-b) < r.size {
			return r.m, uint64(addr - b)
		}
	}
	return nil, 0
}

// Read is a processor's load of n bytes from a device register. What is not
// mapped reads as all ones.
func (m *Machine) Read(addr guest.GPA, n int) uint64 {
	p := []byte{255, 255, 255, 255, 255, 255, 255, 255}
	if f, off := m.find(addr); f != nil {
		f.ReadMMIO(off, p[:n])
	}
	clear(p[n:])
	return binary.LittleEndian.Uint64(p)
}

// Write is a processor's store of the low n bytes of v to a device register.
func (m *Machine) Write(addr guest.GPA, n int, v uint64) {
	m.mu.Lock()
	fd, bound := m.bells[addr]
	if bound {
		ring(fd)
		m.mu.Unlock()
		return
	}
	m.mu.Unlock()
	if f, off := m.find(addr); f != nil {
		p := binary.LittleEndian.AppendUint64(nil, v)
		f.WriteMMIO(off, p[:n])
	}
}

// Line is where the messages with one data value go.
type Line struct {
	count atomic.Uint64
	raise chan struct{}
}

// Line returns the line of messages with data.
func (m *Machine) Line(data uint32) *Line {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.lines[data]
	if l == nil {
		l = &Line{raise: make(chan struct{}, 1)}
		m.lines[data] = l
	}
	return l
}

// Count is how many messages have come.
func (l *Line) Count() uint64 { return l.count.Load() }

// Raised receives a value once messages have come since the last one received.
func (l *Line) Raised() <-chan struct{} { return l.raise }

type interrupt struct {
	m    *Machine
	line atomic.Pointer[Line]
}

// NewInterrupt implements pci.Host.
func (m *Machine) NewInterrupt() (pci.Interrupt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.intrs++
	return &interrupt{m: m}, nil
}

func (i *interrupt) Route(address uint64, data uint32) error {
	if address>>20 != 0xfee {
		return fmt.Errorf("virtiotest: message address %#x is not the interrupt controller's", address)
	}
	i.line.Store(i.m.Line(data))
	return nil
}

func (i *interrupt) Trigger() {
	l := i.line.Load()
	if l == nil {
		panic("virtiotest: interrupt triggered before it was routed")
	}
	l.count.Add(1)
	select {
	case l.raise <- struct{}{}:
	default:
	}
}

func (i *interrupt) Close() error {
	i.m.mu.Lock()
	defer i.m.mu.Unlock()
	i.m.intrs--
	return nil
}

package vmm

import (
	"errors"
	"fmt"
	"sync"

	"github.com/calfvm/calf/vmm/internal/kvm"
	"golang.org/x/sys/unix"
)

// interrupts owns the routes of a machine's global system interrupts. KVM
// takes the whole table or nothing (K8), so it is kept here.
type interrupts struct {
	vm *kvm.VM

	mu     sync.Mutex // guards what follows; held across KVM_SET_GSI_ROUTING
	routes []kvm.Route
	free   []uint32 // message GSIs given back
	next   uint32   // lowest message GSI never given out
}

// newInterrupts installs the routes of a PC: the first 16 interrupts go to the
// 8259 pair and the I/O APIC both, the timer's to pin 2 of the latter.
func newInterrupts(vm *kvm.VM) (*interrupts, error) {
	it := &interrupts{vm: vm, next: firstMSI}
	for gsi := range uint32(firstMSI) {
		switch {
		case gsi == 2: // the cascade of the 8259s
			continue
		case gsi < 8:
			it.routes = append(it.routes, kvm.RoutePin(gsi, kvm.PICMaster, gsi))
		case gsi < 16:
			it.routes = append(it.routes, kvm.RoutePin(gsi, kvm.PICSlave, gsi-8))
		}
		pin := gsi
		if gsi == 0 {
			pin = 2
		}
		it.routes = append(it.routes, kvm.RoutePin(gsi, kvm.IOAPIC, pin))
	}
	return it, vm.SetGSIRouting(it.routes)
}

// setMSI routes gsi as a message, replacing the route it had.
func (it *interrupts) setMSI(gsi uint32, address uint64, data uint32) error {
	it.mu.Lock()
	defer it.mu.Unlock()
	route := kvm.RouteMSI(gsi, address, data)
	for i := range it.routes {
		if it.routes[i].GSI == gsi {
			if it.routes[i] == route {
				return nil
			}
			it.routes[i] = route
			return it.vm.SetGSIRouting(it.routes)
		}
	}
	it.routes = append(it.routes, route)
	return it.vm.SetGSIRouting(it.routes)
}

// newMSI allocates a message interrupt. It is inert until it is routed.
func (it *interrupts) newMSI() (*msi, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an eventfd for an interrupt: %w", err)
	}
	it.mu.Lock()
	defer it.mu.Unlock()
	m := &msi{owner: it, fd: fd}
	switch n := len(it.free); {
	case n > 0:
		m.gsi, it.free = it.free[n-1], it.free[:n-1]
	case it.next < maxGSI:
		m.gsi = it.next
		it.next++
	default:
		return nil, errors.Join(fmt.Errorf("all %d interrupts of the machine are in use", maxGSI), unix.Close(fd))
	}
	return m, nil
}

// msi is one message interrupt: an irqfd and its route. It is a pci.Interrupt.
type msi struct {
	owner *interrupts
	gsi   uint32
	fd    int

	mu       sync.Mutex // guards assigned; held across KVM_IRQFD
	assigned bool
}

// Route sends the interrupt as data to address from now on.
func (m *msi) Route(address uint64, data uint32) error {
	if err := m.owner.setMSI(m.gsi, address, data); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned {
		return nil
	}
	// The route comes first: what is pending in the eventfd is raised at once (K7).
	if err := m.owner.vm.AssignIRQFD(m.gsi, m.fd); err != nil {
		return err
	}
	m.assigned = true
	return nil
}

// Trigger raises the interrupt.
func (m *msi) Trigger() { signalEventFD(m.fd) }

// Close ends the interrupt; after it returns none is raised (K7).
func (m *msi) Close() error {
	var err error
	m.mu.Lock()
	if m.assigned {
		err = m.owner.vm.DeassignIRQFD(m.gsi, m.fd)
		m.assigned = false
	}
	m.mu.Unlock()
	m.owner.mu.Lock()
	m.owner.free = append(m.owner.free, m.gsi)
	m.owner.mu.Unlock()
	return errors.Join(err, unix.Close(m.fd))
}

// line is an edge-triggered interrupt line raised through an irqfd.
type line struct {
	vm  *kvm.VM
	gsi uint32
	fd  int
}

func newLine(vm *kvm.VM, gsi uint32) (*line, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an eventfd for interrupt %d: %w", gsi, err)
	}
	if err := vm.AssignIRQFD(gsi, fd); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &line{vm: vm, gsi: gsi, fd: fd}, nil
}

func (l *line) trigger() { signalEventFD(l.fd) }

func (l *line) close() error {
	return errors.Join(l.vm.DeassignIRQFD(l.gsi, l.fd), unix.Close(l.fd))
}

// sharedLine is a level-triggered interrupt line of several functions: it is high
// while any of them asserts it. It is a pci.Line.
type sharedLine struct {
	set func(level uint32)

	mu       sync.Mutex // held across set
	asserted int        // functions that assert it
}

// Set implements pci.Line.
func (l *sharedLine) Set(asserted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if asserted {
		if l.asserted++; l.asserted == 1 {
			l.set(1)
		}
		return
	}
	if l.asserted--; l.asserted == 0 {
		l.set(0)
	}
}

var eventOne = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// signalEventFD adds one to the counter. It can fail only where 2^64-2 signals
// are already pending, and then one more says nothing new.
func signalEventFD(fd int) { _, _ = unix.Write(fd, eventOne) }

package pci

import "sync"

// intx is the interrupt status of a function and its pin INTA, which is asserted
// while the status says anything, the function does not use MSI-X and the guest
// does not forbid it (P10; PCI Local Bus 3.0, 2.2.6). Its methods are safe for
// concurrent use and wait for nothing but each other.
type intx struct {
	line Line // nil: there is no pin

	mu       sync.Mutex // held across Line.Set, so that the last call says what holds
	isr      uint8
	blocked  bool // by MSI-X Enable, or by the Interrupt Disable bit
	asserted bool // what line was told last
}

// raise sets bits of the interrupt status.
func (x *intx) raise(bits uint8) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.isr |= bits
	x.syncLocked()
}

// take returns the interrupt status and clears it.
func (x *intx) take() uint8 {
	x.mu.Lock()
	defer x.mu.Unlock()
	isr := x.isr
	x.isr = 0
	x.syncLocked()
	return isr
}

// block keeps the pin from being asserted, or ends that.
func (x *intx) block(blocked bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.blocked = blocked
	x.syncLocked()
}

func (x *intx) pending() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.isr != 0
}

func (x *intx) syncLocked() {
	if level := x.isr != 0 && !x.blocked; x.line != nil && level != x.asserted {
		x.asserted = level
		x.line.Set(level)
	}
}

package pci

import "github.com/calfvm/calf/guest"

// MMIO is a range of device registers. Offsets count from the start of the
// range; p is 1 to 8 bytes, of any alignment, and never reaches past its end.
// Both methods are called from vCPU goroutines, several at a time.
type MMIO interface {
	ReadMMIO(off uint64, p []byte)
	WriteMMIO(off uint64, p []byte)
}

// Function is one PCI function as a bus sees it. Offsets are into the 4 KiB of
// PCI Express configuration space; p is 1, 2 or 4 bytes, naturally aligned.
// Both methods are called from vCPU goroutines, several at a time.
type Function interface {
	ReadConfig(off uint16, p []byte)
	WriteConfig(off uint16, p []byte)
}

// Host is what a function needs of the machine it is plugged into. The machine
// holds no lock of its own that these methods take while it calls into a
// function, so a function may call them from any of its methods.
type Host interface {
	// MapMMIO makes guest accesses to [base, base+size) reach m.
	MapMMIO(base guest.GPA, size uint64, m MMIO) error
	// UnmapMMIO ends what MapMMIO began with the same base and m. An access
	// already under way may still finish after it returns.
	UnmapMMIO(base guest.GPA, m MMIO)
	// BindDoorbell makes a guest write of any width to addr signal the eventfd
	// without leaving the kernel (K2, K3). While none is bound, or where the
	// host cannot, the write reaches the MMIO range around it instead.
	BindDoorbell(addr guest.GPA, eventfd int) error
	// UnbindDoorbell ends what BindDoorbell began with the same arguments.
	UnbindDoorbell(addr guest.GPA, eventfd int) error
	// NewInterrupt allocates one message-signalled interrupt.
	NewInterrupt() (Interrupt, error)
}

// Line is a level-triggered interrupt line, which functions may share: it is at
// work while any of them asserts it.
type Line interface {
	// Set asserts the line for the caller, or ends that, in turn. It does not
	// block and is safe from any goroutine.
	Set(asserted bool)
}

// Interrupt is one message-signalled interrupt of a function.
type Interrupt interface {
	// Route makes Trigger send data to address from now on (K8: called while
	// the vector is masked or being unmasked, never per request).
	Route(address uint64, data uint32) error
	// Trigger sends the message last routed. It does not block or allocate and
	// is safe from any goroutine.
	Trigger()
	// Close frees the interrupt; after it returns, no message is sent.
	Close() error
}

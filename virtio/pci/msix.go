package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
)

const (
	capMSIX = 0x11

	msixEntrySize  = 16
	msixCtrl       = 2 // offset of message control in the capability
	msixEnable     = 1 << 15
	msixFuncMask   = 1 << 14
	msixEntryMask  = 1 // in vector control
	msixCtrlOffset = 12
)

// Bits of msixVector.state.
const (
	vectorMasked  = 1
	vectorPending = 2
)

// msixVector is one vector. trigger may be called by any goroutine; all else is
// under the owner's lock.
type msixVector struct {
	intr Interrupt
	// state says whether the vector is masked, by itself or as a whole, and
	// whether an interrupt waits for that to end. It is one word so that a
	// trigger meeting an unmask is never lost (K11).
	state atomic.Uint32

	entry  [msixEntrySize]byte // as the guest sees it
	routed struct {            // what intr was last told
		valid   bool
		address uint64
		data    uint32
	}
}

// trigger sends the vector's message, or remembers to.
func (v *msixVector) trigger() {
	for {
		s := v.state.Load()
		if s&vectorMasked == 0 {
			v.intr.Trigger()
			return
		}
		if v.state.CompareAndSwap(s, s|vectorPending) {
			return
		}
	}
}

// forget drops an interrupt that waits for an unmask.
func (v *msixVector) forget() { v.state.And(^uint32(vectorPending)) }

// msix is the MSI-X capability, table and pending bits of a function (PCI Local
// Bus 3.0, section 6.8.2). The owner's lock guards everything but trigger.
type msix struct {
	vectors []msixVector
	enabled atomic.Bool // MSI-X Enable; read by whoever raises an interrupt
	masked  bool        // Function Mask
	mute    bool        // the function may not send messages: it is no bus master
}

// newMSIX returns n vectors of interrupts of host, each masked (P9).
func newMSIX(host Host, n int) (*msix, error) {
	m := &msix{vectors: make([]msixVector, n)}
	for i := range m.vectors {
		intr, err := host.NewInterrupt()
		if err != nil {
			return nil, fmt.Errorf("pci: allocate interrupt %d of %d: %w", i+1, n, errors.Join(err, m.close()))
		}
		m.vectors[i].intr = intr
	}
	m.reset()
	return m, nil
}

// reset masks every vector and forgets what was pending, as at power-on.
func (m *msix) reset() {
	m.enabled.Store(false)
	m.masked = false
	m.mute = true
	for i := range m.vectors {
		v := &m.vectors[i]
		v.state.Store(vectorMasked)
		v.entry = [msixEntrySize]byte{msixCtrlOffset: msixEntryMask}
	}
}

func (m *msix) close() error {
	var errs []error
	for i := range m.vectors {
		if v := &m.vectors[i]; v.intr != nil {
			errs = append(errs, v.intr.Close())
			v.intr = nil
		}
	}
	return errors.Join(errs...)
}

// trigger raises vector i if there is one. It neither blocks nor locks.
func (m *msix) trigger(i uint16) {
	if int(i) < len(m.vectors) {
		m.vectors[i].trigger()
	}
}

// clearPending forgets the interrupts that wait for an unmask.
func (m *msix) clearPending() {
	for i := range m.vectors {
		m.vectors[i].forget()
	}
}

// setControl takes over the message control word. The error is of a vector that
// could not be routed; it stays masked.
func (m *msix) setControl(ctrl uint16) error {
	m.enabled.Store(ctrl&msixEnable != 0)
	m.masked = ctrl&msixFuncMask != 0
	return m.updateAll()
}

// setMaster lets the function send messages, or keeps it from that, in which case
// they wait as behind a mask. The error is as for setControl.
func (m *msix) setMaster(master bool) error {
	if m.mute == !master {
		return nil
	}
	m.mute = !master
	return m.updateAll()
}

func (m *msix) updateAll() error {
	var errs []error
	for i := range m.vectors {
		errs = append(errs, m.update(i))
	}
	return errors.Join(errs...)
}

// update brings vector i in line with all that masks it. K8: its
// message is routed only here, when it becomes unmasked, because a guest writes
// an entry in several stores.
func (m *msix) update(i int) error {
	v := &m.vectors[i]
	if !m.enabled.Load() || m.masked || m.mute || v.entry[msixCtrlOffset]&msixEntryMask != 0 {
		v.state.Or(vectorMasked)
		return nil
	}
	if v.state.Load()&vectorMasked == 0 {
		return nil
	}
	address := binary.LittleEndian.Uint64(v.entry[0:]) &^ 3
	data := binary.LittleEndian.Uint32(v.entry[8:])
	if r := &v.routed; !r.valid || r.address != address || r.data != data {
		if err := v.intr.Route(address, data); err != nil {
			r.valid = false
			return fmt.Errorf("pci: route vector %d to %#x: %w", i, address, err)
		}
		r.valid, r.address, r.data = true, address, data
	}
	if v.state.Swap(0)&vectorPending != 0 {
		v.intr.Trigger()
	}
	return nil
}

// readTable reads the vector table. What is outside reads as all ones (P9).
func (m *msix) readTable(off uint64, p []byte) {
	i, in := off/msixEntrySize, off%msixEntrySize
	if i >= uint64(len(m.vectors)) || !wholeDwords(off, p) {
		fill(p, 0xff)
		return
	}
	copy(p, m.vectors[i].entry[in:])
}

// writeTable stores to the vector table. The error is as for setControl.
func (m *msix) writeTable(off uint64, p []byte) error {
	i, in := off/msixEntrySize, off%msixEntrySize
	if i >= uint64(len(m.vectors)) || !wholeDwords(off, p) {
		return nil
	}
	v := &m.vectors[i]
	copy(v.entry[in:], p)
	// All bits of vector control but the mask are reserved.
	v.entry[msixCtrlOffset] &= msixEntryMask
	clear(v.entry[msixCtrlOffset+1:])
	if in+uint64(len(p)) <= msixCtrlOffset {
		return nil
	}
	return m.update(int(i))
}

// readPBA reads the pending bit array.
func (m *msix) readPBA(off uint64, p []byte) {
	clear(p)
	if !wholeDwords(off, p) {
		fill(p, 0xff)
		return
	}
	for bit := range len(p) * 8 {
		i := off*8 + uint64(bit)
		if i < uint64(len(m.vectors)) && m.vectors[i].state.Load()&vectorPending != 0 {
			p[bit/8] |= 1 << (bit % 8)
		}
	}
}

// wholeDwords reports whether p at off is an access of 4 or 8 bytes on its own
// boundary, the only kind that the table and the pending bits take.
func wholeDwords(off uint64, p []byte) bool {
	n := uint64(len(p))
	return (n == 4 || n == 8) && off%n == 0
}

func fill(p []byte, v byte) {
	for i := range p {
		p[i] = v
	}
}

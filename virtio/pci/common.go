package pci

import (
	"encoding/binary"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
)

// Registers of the common configuration structure (virtio 4.1.4.3) as
// offset<<4 | width: each is accessed whole, with its own width, and the
// 64-bit ones by halves too. Any other access reads zero and writes nothing.
const (
	regDeviceFeatureSelect = 0x00<<4 | 4
	regDeviceFeature       = 0x04<<4 | 4
	regDriverFeatureSelect = 0x08<<4 | 4
	regDriverFeature       = 0x0c<<4 | 4
	regConfigVector        = 0x10<<4 | 2
	regNumQueues           = 0x12<<4 | 2
	regStatus              = 0x14<<4 | 1
	regGeneration          = 0x15<<4 | 1
	regQueueSelect         = 0x16<<4 | 2
	regQueueSize           = 0x18<<4 | 2
	regQueueVector         = 0x1a<<4 | 2
	regQueueEnable         = 0x1c<<4 | 2
	regQueueNotifyOff      = 0x1e<<4 | 2
	regQueueReset          = 0x3a<<4 | 2

	addrsOff = 0x20 // queue_desc, queue_driver, queue_device
	addrsEnd = 0x38
)

// ReadMMIO implements MMIO.
func (t *Transport) ReadMMIO(off uint64, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.readBARLocked(off, p)
}

// WriteMMIO implements MMIO.
func (t *Transport) WriteMMIO(off uint64, p []byte) {
	// A kick must not wait for a register access, nor hold one up.
	if off-notifyBase < regionLen {
		t.kick(off - notifyBase)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.writeBARLocked(off, p)
}

// kick rings the doorbell of the queue whose notify address is off (P7). It
// takes no lock. What was written does not matter.
func (t *Transport) kick(off uint64) {
	if i := off / notifyMultiplier; off%notifyMultiplier == 0 && i < uint64(len(t.queues)) {
		t.queues[i].bell.Ring()
	}
}

func (t *Transport) readBARLocked(off uint64, p []byte) {
	clear(p)
	in, n := off%regionLen, uint64(len(p))
	switch off - in {
	case commonBase:
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], t.readCommonLocked(in, n))
		copy(p, b[:])
	case isrBase:
		if in == 0 {
			p[0] = t.intx.take() // P10: reading clears
		}
	case deviceBase:
		if in+n > deviceLen {
			return
		}
		if t.configDirty {
			t.configDirty = false
			t.regs.generation++ // P11
		}
		t.dev.ReadConfig(in, p)
	case tableBase:
		t.msix.readTable(in, p)
	case pbaBase:
		t.msix.readPBA(in, p)
	}
}

func (t *Transport) writeBARLocked(off uint64, p []byte) {
	if t.closed || t.quiescing > 0 {
		return
	}
	in, n := off%regionLen, uint64(len(p))
	switch off - in {
	case commonBase:
		var b [8]byte
		copy(b[:], p)
		t.writeCommonLocked(in, n, binary.LittleEndian.Uint64(b[:]))
	case deviceBase:
		// P25
		if in+n <= deviceLen && t.regs.status&virtio.StatusFeaturesOK != 0 && !t.resetting {
			t.dev.WriteConfig(in, p)
		}
	case notifyBase:
		t.kick(in)
	case tableBase:
		t.complain("MSI-X", t.msix.writeTable(in, p))
	}
}

// selectedLocked is the queue that queue_select names, or nil if there is none
// (P3).
func (t *Transport) selectedLocked() *queueState {
	if i := int(t.regs.queueSelect); i < len(t.queues) {
		return &t.queues[i]
	}
	return nil
}

func (t *Transport) readCommonLocked(off, n uint64) uint64 {
	r := &t.regs
	switch off<<4 | n {
	case regDeviceFeatureSelect:
		return uint64(r.deviceFeatureSelect)
	case regDeviceFeature:
		return half(t.offered, r.deviceFeatureSelect)
	case regDriverFeatureSelect:
		return uint64(r.driverFeatureSelect)
	case regDriverFeature:
		return half(r.driverFeatures, r.driverFeatureSelect)
	case regConfigVector:
		return uint64(t.configVector.Load())
	case regNumQueues:
		return uint64(len(t.queues))
	case regStatus:
		return uint64(t.statusLocked())
	case regGeneration:
		return uint64(r.generation)
	case regQueueSelect:
		return uint64(r.queueSelect)
	}
	s := t.selectedLocked()
	if s == nil {
		if off<<4|n == regQueueVector {
			return noVector
		}
		return 0
	}
	switch off<<4 | n {
	case regQueueSize:
		return uint64(s.size)
	case regQueueVector:
		return uint64(s.vector.Load())
	case regQueueEnable:
		return bit(s.q != nil)
	case regQueueNotifyOff:
		return uint64(r.queueSelect)
	case regQueueReset:
		return bit(s.resetting)
	}
	if a := s.address(off); a != nil {
		switch {
		case n == 8 && off%8 == 0:
			return *a
		case n == 4 && off%4 == 0:
			return half(*a, uint32(off%8/4))
		}
	}
	return 0
}

func (t *Transport) writeCommonLocked(off, n, v uint64) {
	r := &t.regs
	if off<<4|n == regStatus {
		t.writeStatusLocked(uint8(v))
		return
	}
	if t.resetting {
		return // nothing can be set up before the reset is over
	}
	switch off<<4 | n {
	case regDeviceFeatureSelect:
		r.deviceFeatureSelect = uint32(v)
	case regDriverFeatureSelect:
		r.driverFeatureSelect = uint32(v)
	case regDriverFeature:
		// P2: frozen once accepted; there are no bits above 63.
		if r.status&virtio.StatusFeaturesOK == 0 && r.driverFeatureSelect < 2 {
			setHalf(&r.driverFeatures, r.driverFeatureSelect, v)
		}
	case regConfigVector:
		t.configVector.Store(t.validVector(v))
	case regQueueSelect:
		r.queueSelect = uint16(v)
	default:
		if s := t.selectedLocked(); s != nil {
			t.writeQueueLocked(s, off, n, v)
		}
	}
}

// writeQueueLocked stores to a register of the selected queue s.
func (t *Transport) writeQueueLocked(s *queueState, off, n, v uint64) {
	switch off<<4 | n {
	case regQueueVector:
		s.vector.Store(t.validVector(v))
		return
	case regQueueReset:
		if v == 1 {
			t.resetQueueLocked(int(t.regs.queueSelect))
		}
		return
	}
	if !t.configurableLocked(s) {
		return
	}
	switch off<<4 | n {
	case regQueueSize:
		// P3: anything else leaves the old value.
		if v != 0 && v&(v-1) == 0 && v <= uint64(t.maxSize) {
			s.size = uint16(v)
		}
		return
	case regQueueEnable:
		if v == 1 {
			t.enableQueueLocked(int(t.regs.queueSelect))
		}
		return
	}
	if a := s.address(off); a != nil {
		switch {
		case n == 8 && off%8 == 0:
			*a = v
		case n == 4 && off%4 == 0:
			setHalf(a, uint32(off%8/4), v)
		}
	}
}

// configurableLocked reports whether the driver may change the size and the
// addresses of s, or enable it (P4): features are agreed, s is not in use, and
// the driver is still setting up, unless it may reset single queues.
func (t *Transport) configurableLocked(s *queueState) bool {
	status := t.regs.status
	return status&virtio.StatusFeaturesOK != 0 &&
		status&virtio.StatusFailed == 0 &&
		s.q == nil &&
		(status&virtio.StatusDriverOK == 0 || t.negotiatedLocked(virtio.FeatureRingReset))
}

// enableQueueLocked freezes the geometry of queue i and makes it ready. The
// device gets it at DRIVER_OK (V16), or now if it has started.
func (t *Transport) enableQueueLocked(i int) {
	s := &t.queues[i]
	q, err := virtio.NewQueue(t.mem, virtio.QueueConfig{
		Index:    i,
		Size:     s.size,
		MaxSize:  t.maxSize,
		Desc:     guest.GPA(s.desc),
		Avail:    guest.GPA(s.driver),
		Used:     guest.GPA(s.device),
		Features: t.regs.driverFeatures,
		Doorbell: s.bell,
		Events:   (*queueEvents)(t),
	})
	if err != nil {
		t.damage(err) // P5
		return
	}
	s.q = q
	t.bindLocked()
	if t.started && !t.held {
		t.startQueueLocked(i)
	}
}

// startQueueLocked hands queue i to the device and wakes it: a kick may have
// come too early, or gone past the doorbell (V16).
func (t *Transport) startQueueLocked(i int) {
	s := &t.queues[i]
	t.dev.StartQueue(i, s.q)
	s.bell.Ring()
}

func (t *Transport) negotiatedLocked(feature uint) bool {
	return t.regs.driverFeatures&(1<<feature) != 0
}

// validVector is v if there is such a vector, else NO_VECTOR (P8).
func (t *Transport) validVector(v uint64) uint32 {
	if v < uint64(len(t.msix.vectors)) {
		return uint32(v)
	}
	return noVector
}

// address is the area address that the register at off is part of, or nil.
func (s *queueState) address(off uint64) *uint64 {
	if off < addrsOff || off >= addrsEnd {
		return nil
	}
	return [...]*uint64{&s.desc, &s.driver, &s.device}[(off-addrsOff)/8]
}

// half is the low (i=0) or high (i=1) 32 bits of v, or 0 for any other i.
func half(v uint64, i uint32) uint64 {
	switch i {
	case 0:
		return v & 0xffff_ffff
	case 1:
		return v >> 32
	default:
		return 0
	}
}

// setHalf stores v to the low (i=0) or high (i=1) 32 bits of p.
func setHalf(p *uint64, i uint32, v uint64) {
	shift := i * 32
	*p = *p&^(0xffff_ffff<<shift) | v&0xffff_ffff<<shift
}

func bit(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

package pci

import "github.com/calfvm/calf/virtio"

// statusLocked is the device status the driver reads.
func (t *Transport) statusLocked() uint8 {
	s := t.regs.status
	if t.needsReset.Load() {
		s |= virtio.StatusDeviceNeedsReset
	}
	return s
}

// writeStatusLocked moves the status machine of virtio 3.1.1. A driver sets
// bits and never clears them; the one way back is a reset (P20).
func (t *Transport) writeStatusLocked(v uint8) {
	if t.resetting {
		return
	}
	if v == 0 {
		t.beginResetLocked()
		return
	}
	r := &t.regs
	if r.status&virtio.StatusFailed != 0 {
		return // the driver has given up until it resets
	}
	r.status |= v & (virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFailed)
	if v&^r.status&virtio.StatusFeaturesOK != 0 && r.status&virtio.StatusDriver != 0 && t.acceptableLocked() {
		r.status |= virtio.StatusFeaturesOK
		t.dev.Negotiated(r.driverFeatures)
	}
	if v&virtio.StatusDriverOK != 0 && r.status&virtio.StatusFeaturesOK != 0 && r.status&virtio.StatusDriverOK == 0 {
		r.status |= virtio.StatusDriverOK
		t.startLocked()
	}
}

// acceptableLocked reports whether the device can work with the features the
// driver has chosen. If not, FEATURES_OK stays clear on reading (P21).
func (t *Transport) acceptableLocked() bool {
	return t.regs.driverFeatures&^t.offered == 0 && t.negotiatedLocked(virtio.FeatureVersion1)
}

// startLocked brings the device to life: the driver has set DRIVER_OK.
func (t *Transport) startLocked() {
	t.driverOK.Store(true)
	if err := t.dev.Start(); err != nil {
		t.damage(err)
		return
	}
	t.started = true
	if t.needsReset.Load() || t.outdated {
		// A ring was refused (P22), or the configuration has changed (B14),
		// before the driver could be told.
		t.notifyConfig()
	}
	if t.held = !t.cfg.busMaster(); !t.held {
		t.startQueuesLocked()
	}
}

// startQueuesLocked hands the device every queue that is enabled.
func (t *Transport) startQueuesLocked() {
	for i := range t.queues {
		if s := &t.queues[i]; s.q != nil && !s.resetting {
			t.startQueueLocked(i)
		}
	}
}

// syncMasterLocked lets the device work its queues, and vectors fire, iff the
// guest allows the function to access memory by its Bus Master bit (P26). Queues
// that are at work are taken back in a goroutine, for here a vCPU waits.
func (t *Transport) syncMasterLocked() {
	master := t.cfg.busMaster()
	t.complain("MSI-X", t.msix.setMaster(master))
	switch {
	case !t.started || t.resetting || t.holding || t.held == !master:
	case master:
		t.held = false
		t.startQueuesLocked()
	default:
		t.held, t.holding = true, true
		t.queueStops.Go(func() {
			for i := range t.queues {
				t.stopQueue(i)
			}
			t.mu.Lock()
			defer t.mu.Unlock()
			t.holding = false
			t.syncMasterLocked() // the guest may have changed its mind
		})
	}
}

// stopQueue takes queue i back from the device. mu is not held.
func (t *Transport) stopQueue(i int) {
	s := &t.queues[i]
	s.stopMu.Lock()
	defer s.stopMu.Unlock()
	t.dev.StopQueue(i)
}

// beginResetLocked resets the device. While it may still be at work the status
// keeps its old value, and becomes 0 only when all is quiet (P23): the driver
// polls for that, so waiting here would stop a vCPU for nothing.
func (t *Transport) beginResetLocked() {
	for i := range t.queues {
		t.unbindLocked(&t.queues[i])
	}
	if !t.driverOK.Load() {
		t.dev.Stop()
		t.clearLocked()
		return
	}
	t.resetting = true
	go func() {
		t.queueStops.Wait()
		t.dev.Stop()
		t.mu.Lock()
		defer t.mu.Unlock()
		t.clearLocked()
		t.resetting = false
		t.quiet.Broadcast()
	}()
}

// quiesceLocked resets the device and waits until it is quiet. It releases mu
// while it waits, but lets no vCPU set the device up again meanwhile: when it
// returns, mu is held and the device is as after the reset.
func (t *Transport) quiesceLocked() {
	t.quiescing++
	if !t.resetting {
		t.beginResetLocked()
	}
	for t.resetting {
		t.quiet.Wait()
	}
	t.quiescing--
}

// clearLocked gives every register its value after a reset (P24). PCI
// configuration and the vector table stay as they are, but an interrupt that a
// mask has held back must not come after the reset (P23).
func (t *Transport) clearLocked() {
	t.driverOK.Store(false)
	t.started, t.held, t.outdated = false, false, false
	t.needsReset.Store(false)
	t.intx.take()
	t.configVector.Store(noVector)
	t.msix.clearPending()
	t.regs = registers{generation: t.regs.generation}
	for i := range t.queues {
		t.clearQueueLocked(&t.queues[i])
	}
}

// forgetInterruptLocked drops an interrupt of s that a mask has held back: the
// driver must not see it after the reset of the queue (V15). Where another queue
// or the configuration shares the vector, the interrupt may be theirs, and stays.
func (t *Transport) forgetInterruptLocked(s *queueState) {
	v := s.vector.Load()
	if v == noVector || v == t.configVector.Load() {
		return
	}
	for i := range t.queues {
		if other := &t.queues[i]; other != s && other.vector.Load() == v {
			return
		}
	}
	t.msix.vectors[v].forget()
}

func (t *Transport) clearQueueLocked(s *queueState) {
	s.size = t.maxSize
	s.desc, s.driver, s.device = 0, 0, 0
	s.q = nil
	s.resetting = false
	s.vector.Store(noVector)
}

// resetQueueLocked resets queue i alone (V15). As with a device reset, the
// register shows that it is under way until the queue is quiet.
func (t *Transport) resetQueueLocked(i int) {
	s := &t.queues[i]
	if !t.negotiatedLocked(virtio.FeatureRingReset) || s.q == nil || s.resetting {
		return
	}
	t.unbindLocked(s)
	if !t.driverOK.Load() {
		t.clearQueueLocked(s)
		return
	}
	s.resetting = true
	t.queueStops.Go(func() {
		t.stopQueue(i)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.forgetInterruptLocked(s)
		t.clearQueueLocked(s)
	})
}

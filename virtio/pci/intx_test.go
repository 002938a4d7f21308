package pci_test

import (
	"testing"
	"time"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/pci"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

const (
	command   = 4
	masterOn  = 1<<1 | 1<<2
	masterOff = 1 << 1
	noINTx    = 1 << 10
)

// startPolling starts queue 0 without MSI-X, and without EVENT_IDX, so that every
// completion is announced.
func (r *rig) startPolling() *vt.Ring {
	r.t.Helper()
	if err := r.Negotiate(all &^ (1 << virtio.FeatureEventIdx)); err != nil {
		r.t.Fatal(err)
	}
	ring, err := r.SetupQueue(0, 8)
	if err != nil {
		r.t.Fatal(err)
	}
	r.DriverOK()
	return ring
}

func (r *rig) isr() uint64 { return r.m.Read(bar+guest.GPA(r.ISR.Offset), 1) }

// interrupting is the Interrupt Status bit of the PCI status register.
func (r *rig) interrupting() bool { return r.Config(6, 2)>>3&1 != 0 }

// TestINTx drives a device by its pin: it is asserted from a notification until
// the driver has read why, and never where something forbids it (P10).
func TestINTx(t *testing.T) {
	wait := func(r *rig) {
		t.Helper()
		r.eventually("an assertion of INTA", r.pin.asserted.Load)
	}
	t.Run("queue and configuration", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if got := r.Config(0x3d, 1); got != 1 {
			t.Errorf("Interrupt Pin reads %d, want INTA", got)
		}
		ring := r.startPolling()
		if r.pin.asserted.Load() || r.interrupting() {
			t.Error("INTA is asserted at DRIVER_OK")
		}
		for i := range int64(3) {
			r.submit(ring, 1)
			wait(r)
			r.collect(ring, 1)
			if !r.interrupting() {
				t.Error("Interrupt Status does not say so")
			}
			if isr := r.isr(); isr != 1 || r.pin.asserted.Load() || r.interrupting() {
				t.Errorf("ISR reads %d, INTA asserted after that: %v", isr, r.pin.asserted.Load())
			}
			if got := r.pin.count.Load(); got != i+1 {
				t.Errorf("%d assertions, want %d", got, i+1)
			}
		}
		r.update(1)
		r.submit(ring, 1)
		seen := uint64(0)
		r.eventually("both bits", func() bool { seen |= r.isr(); return seen == 3 })
	})
	t.Run("Interrupt Disable", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		ring := r.startPolling()
		r.SetConfig(command, 2, masterOn|noINTx)
		r.submit(ring, 1)
		r.collect(ring, 1)
		r.eventually("Interrupt Status", r.interrupting)
		if r.pin.asserted.Load() {
			t.Error("INTA is asserted although it is disabled")
		}
		r.SetConfig(command, 2, masterOn)
		if !r.pin.asserted.Load() {
			t.Error("what waits is not announced when INTA is enabled")
		}
		r.SetConfig(command, 2, masterOn|noINTx)
		if r.pin.asserted.Load() {
			t.Error("INTA stays asserted when it is disabled")
		}
	})
	t.Run("MSI-X", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		ring := r.startPolling()
		r.submit(ring, 1)
		wait(r)
		r.EnableMSIX(lineBase)
		if r.pin.asserted.Load() || r.interrupting() {
			t.Error("INTA stays asserted when MSI-X is enabled")
		}
		r.submit(ring, 1)
		r.collect(ring, 2)
		r.update(1)
		if r.pin.count.Load() != 1 {
			t.Error("INTA is asserted beside MSI-X")
		}
	})
	t.Run("P23 reset", func(t *testing.T) {
		for name, reset := range map[string]func(r *rig){
			"device":   func(r *rig) { _ = r.Reset() },
			"function": func(r *rig) { r.f.Reset() },
		} {
			r := newRig(t, &echo{n: 1})
			r.submit(r.startPolling(), 1)
			wait(r)
			if reset(r); r.pin.asserted.Load() || r.interrupting() {
				t.Errorf("INTA is asserted after a reset of the %s", name)
			}
		}
	})
	t.Run("no pin", func(t *testing.T) {
		m := vt.NewMachine()
		f, err := pci.New(m, m.Memory, &echo{n: 1}, pci.Options{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := vt.Probe(m, f, bar)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.Config(0x3d, 1); got != 0 {
			t.Errorf("Interrupt Pin reads %d, want none", got)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestBusMaster takes the right to access memory from a function and gives it
// back: meanwhile it completes nothing and sends nothing, and nothing is lost
// (P26).
func TestBusMaster(t *testing.T) {
	idle := func(r *rig) {
		t.Helper()
		r.eventually("no queue at work", func() bool { _, running := r.dev.count(); return running == 0 })
	}
	still := func(r *rig, ring *vt.Ring, what string) {
		t.Helper()
		before, messages := ring.UsedIdx(), r.m.Line(lineBase).Count()
		r.submit(ring, 2)
		r.update(1)
		time.Sleep(2 * time.Millisecond)
		if ring.UsedIdx() != before || r.m.Line(lineBase).Count() != messages {
			t.Errorf("%s: %d completions and %d messages without Bus Master", what,
				ring.UsedIdx()-before, r.m.Line(lineBase).Count()-messages)
		}
	}
	t.Run("while at work", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		for range 3 {
			r.SetConfig(command, 2, masterOff)
			idle(r)
			still(r, r.Rings[1], "off")
			messages := r.m.Line(lineBase).Count()
			r.SetConfig(command, 2, masterOn)
			r.collect(r.Rings[1], 2)
			if got := r.m.Line(lineBase).Count() - messages; got != 1 {
				t.Errorf("%d messages of the configuration change when Bus Master is set, want 1", got)
			}
		}
	})
	t.Run("before DRIVER_OK", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.SetConfig(command, 2, masterOff)
		r.start(all)
		still(r, r.Rings[0], "off from the start")
		r.SetConfig(command, 2, masterOn)
		r.collect(r.Rings[0], 2)
	})
	t.Run("changes its mind", func(t *testing.T) {
		r := newRig(t, &echo{n: 2, hold: make(chan struct{})})
		r.start(all)
		r.SetConfig(command, 2, masterOff)
		r.SetConfig(command, 2, masterOn)
		r.SetConfig(command, 2, masterOff)
		r.SetConfig(command, 2, masterOn)
		close(r.dev.hold)
		for _, ring := range r.Rings {
			r.submit(ring, 3)
			r.collect(ring, 3)
		}
	})
	t.Run("reset meanwhile", func(t *testing.T) {
		r := newRig(t, &echo{n: 1, hold: make(chan struct{})})
		r.start(all)
		r.SetConfig(command, 2, masterOff)
		idle(r) // as the device has it: it waits for a request
		r.Set(vt.Status, 1, 0)
		time.Sleep(2 * time.Millisecond)
		if r.Get(vt.Status, 1) == 0 {
			t.Error("P23 the reset is over while a queue is at work")
		}
		r.SetConfig(command, 2, masterOn)
		close(r.dev.hold)
		r.start(all)
		r.submit(r.Rings[0], 1)
		r.collect(r.Rings[0], 1)
	})
	t.Run("queue reset meanwhile", func(t *testing.T) {
		r := newRig(t, &echo{n: 2, hold: make(chan struct{})})
		r.start(all)
		r.SetConfig(command, 2, masterOff)
		r.Set(vt.QueueSelect, 2, 1)
		r.Set(vt.QueueReset, 2, 1)
		close(r.dev.hold)
		r.eventually("end of the queue reset", func() bool { return r.Get(vt.QueueReset, 2) == 0 })
		idle(r)
		ring, err := r.SetupQueue(1, 8)
		if err != nil {
			t.Fatal(err)
		}
		still(r, ring, "a queue enabled meanwhile")
		r.SetConfig(command, 2, masterOn)
		r.collect(ring, 2)
		r.submit(r.Rings[0], 1)
		r.collect(r.Rings[0], 1)
	})
}

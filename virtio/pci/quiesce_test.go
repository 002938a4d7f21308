package pci_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/pci"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// P23: whatever a vCPU does meanwhile, nothing is at work when Close returns.
func TestCloseAgainstSetup(t *testing.T) {
	for range 200 {
		m := vt.NewMachineOf(256 << 10)
		dev := &echo{n: 1}
		f, err := pci.New(m, m.Memory, dev, pci.Options{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := vt.Probe(m, f, bar)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Start(all, 1, 8, lineBase); err != nil {
			t.Fatal(err)
		}
		var stop atomic.Bool
		var vcpu sync.WaitGroup
		vcpu.Go(func() {
			for !stop.Load() {
				setUp(f, d.Rings[0])
			}
		})
		time.Sleep(100 * time.Microsecond)
		var closers sync.WaitGroup
		for range 2 {
			closers.Go(func() {
				if err := f.Close(); err != nil {
					t.Error(err)
				}
				if _, running := dev.count(); running != 0 {
					t.Errorf("%d queues are at work after Close", running)
				}
			})
		}
		closers.Wait()
		stop.Store(true)
		vcpu.Wait()
		if t.Failed() {
			return
		}
	}
}

// setUp brings the device to life with one queue if its status is 0.
func setUp(f *pci.Transport, ring *vt.Ring) {
	var status [1]byte
	if f.ReadMMIO(0x14, status[:]); status[0] != 0 {
		return
	}
	for _, w := range []struct {
		off, n, v uint64
	}{
		{0x14, 1, drv},
		{0x08, 4, 1}, // VERSION_1 is in the high word
		{0x0c, 4, 1},
		{0x14, 1, fok},
		{0x18, 2, 8},
		{0x20, 4, uint64(ring.Desc)},
		{0x28, 4, uint64(ring.Avail)},
		{0x30, 4, uint64(ring.Used)},
		{0x1c, 2, 1},
		{0x14, 1, dok},
	} {
		p := [4]byte{byte(w.v), byte(w.v >> 8), byte(w.v >> 16), byte(w.v >> 24)}
		f.WriteMMIO(w.off, p[:w.n])
	}
}

// TestQueueAfterFailedStart enables a queue of a device that could not start: it
// must not be handed to the device.
func TestQueueAfterFailedStart(t *testing.T) {
	r := newRig(t, &echo{n: 2, fail: errors.New("no")})
	if err := r.Negotiate(all); err != nil {
		t.Fatal(err)
	}
	r.DriverOK()
	r.want("status", vt.Status, 1, dok|virtio.StatusDeviceNeedsReset)
	if _, err := r.SetupQueue(1, 8); err != nil {
		t.Fatal(err)
	}
	if _, running := r.dev.count(); running != 0 {
		t.Error("a queue of a device that has not started is at work")
	}
}

// TestWindowWidth accesses the PCI configuration window with another width than
// it is set to, which must not reach the register, and sets it to what it does not
// reach (P12).
func TestWindowWidth(t *testing.T) {
	r := newRig(t, &echo{n: 1})
	r.start(all)
	at := r.Config(0x34, 1)
	for r.Config(int(at), 1) != 9 || r.Config(int(at)+3, 1) != 5 {
		at = r.Config(int(at)+1, 1)
	}
	window := uint16(at)
	r.f.WriteConfig(window+4, []byte{0})
	r.f.WriteConfig(window+8, []byte{0x14, 0, 0, 0}) // device_status
	r.f.WriteConfig(window+12, []byte{1, 0, 0, 0})
	if got := r.Config(int(window)+16, 4); got != 0 {
		t.Errorf("4 bytes of a window of 1 read %#x, want 0", got)
	}
	r.f.WriteConfig(window+16, []byte{0, 0, 0, 0})
	r.want("status", vt.Status, 1, dok)
	// The vector table is no virtio structure.
	const table = 0x8000
	r.f.WriteConfig(window+8, []byte{0, table >> 8, 0, 0})
	r.f.WriteConfig(window+12, []byte{4, 0, 0, 0})
	before := r.m.Read(bar+table, 4)
	if got := r.Config(int(window)+16, 4); got != 0 || before == 0 {
		t.Errorf("the window shows %#x of the vector table, which holds %#x", got, before)
	}
	r.f.WriteConfig(window+16, []byte{1, 2, 3, 4})
	if got := r.m.Read(bar+table, 4); got != before {
		t.Errorf("the vector table was written through the window: %#x", got)
	}
}

// TestResetDuringQueueReset resets the device while the reset of a queue waits
// for a request: status does not read 0 before both are over (P23).
func TestResetDuringQueueReset(t *testing.T) {
	r := newRig(t, &echo{n: 1, hold: make(chan struct{})})
	r.start(all)
	r.Set(vt.QueueSelect, 2, 0)
	r.Set(vt.QueueReset, 2, 1)
	r.eventually("the device to stop the queue", func() bool { _, running := r.dev.count(); return running == 0 })
	r.Set(vt.Status, 1, 0)
	time.Sleep(5 * time.Millisecond)
	if got := r.Get(vt.Status, 1); got == 0 {
		t.Error("the reset is over while the queue is at work")
	}
	close(r.dev.hold)
	r.eventually("the end of the reset", func() bool { return r.Get(vt.Status, 1) == 0 })
}

// TestDamageBeforeDriverOK enables a queue in a place that cannot be, before the
// driver can be told of anything: it is told as soon as it is ready (P22).
func TestDamageBeforeDriverOK(t *testing.T) {
	r := newRig(t, &echo{n: 1})
	if err := r.Negotiate(all); err != nil {
		t.Fatal(err)
	}
	r.EnableMSIX(lineBase)
	r.Set(vt.ConfigVector, 2, 0)
	r.Set(vt.QueueSelect, 2, 0)
	r.Set(vt.QueueDesc, 4, 1) // not aligned
	r.Set(vt.QueueEnable, 2, 1)
	line := r.m.Line(lineBase)
	if got := r.Get(vt.Status, 1); got != fok|virtio.StatusDeviceNeedsReset || line.Count() != 0 {
		t.Errorf("before DRIVER_OK status reads %#x, %d interrupts; want NEEDS_RESET and none", got, line.Count())
	}
	r.DriverOK()
	if got := r.Get(vt.Status, 1); got != dok|virtio.StatusDeviceNeedsReset || line.Count() != 1 {
		t.Errorf("after it %#x, %d interrupts; want NEEDS_RESET and one", got, line.Count())
	}
}

package pci_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/pci"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

const (
	bar      = vt.Window
	lineBase = 0x30
	maxSize  = 64

	all = ^uint64(0)
	ack = virtio.StatusAcknowledge
	drv = ack | virtio.StatusDriver
	fok = drv | virtio.StatusFeaturesOK
	dok = fok | virtio.StatusDriverOK
)

// echo is a device that completes every chain with the number of its writable
// bytes. It remembers what the transport has told it.
type echo struct {
	n     int
	hold  chan struct{} // if not nil, a stop takes until it is closed
	fail  error         // of Start
	space [8]byte

	mu       sync.Mutex
	served   int
	agreed   []uint64 // features of every Negotiated
	features uint64   // of the last Negotiated
	started  []uint64 // features of every Start
	running  map[int]*worker
}

type worker struct {
	stop chan struct{}
	done chan struct{}
	q    *virtio.Queue
}

func (e *echo) DeviceID() uint16                 { return 2 }
func (e *echo) Features() uint64                 { return 1<<3 | 1<<9 }
func (e *echo) Queues() (n int, maxSize_ uint16) { return e.n, maxSize }

func (e *echo) ReadConfig(off uint64, p []byte) {
	clear(p)
	if off < uint64(len(e.space)) {
		copy(p, e.space[off:])
	}
}

func (e *echo) WriteConfig(off uint64, p []byte) {
	if off < uint64(len(e.space)) {
		copy(e.space[off:], p)
	}
}

func (e *echo) Negotiated(features uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.features = features
	e.agreed = append(e.agreed, features)
}

func (e *echo) Start() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.started = append(e.started, e.features)
	return e.fail
}

func (e *echo) StartQueue(i int, q *virtio.Queue) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w := &worker{make(chan struct{}), make(chan struct{}), q}
	if e.running == nil {
		e.running = make(map[int]*worker)
	}
	if e.running[i] != nil {
		panic(fmt.Sprintf("queue %d is started twice", i))
	}
	e.running[i] = w
	go e.work(w)
}

func (e *echo) work(w *worker) {
	defer close(w.done)
	var c virtio.Chain
	for w.q.Wait() == nil {
		select {
		case <-w.stop:
			return
		default:
		}
		for more := true; more; more = w.q.Rearm() {
			for w.q.Pop(&c) {
				e.mu.Lock()
				e.served++
				e.mu.Unlock()
				w.q.Push(&c, uint32(virtio.Len(c.Writable)))
			}
			w.q.Publish()
		}
	}
}

func (e *echo) StopQueue(i int) {
	e.mu.Lock()
	w := e.running[i]
	delete(e.running, i)
	e.mu.Unlock()
	if w == nil {
		return
	}
	if e.hold != nil {
		<-e.hold
	}
	close(w.stop)
	w.q.Kick()
	<-w.done
}

func (e *echo) Stop() {
	for i := range e.n {
		e.StopQueue(i)
	}
}

func (e *echo) count() (served, running int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.served, len(e.running)
}

type rig struct {
	*vt.Driver
	t   *testing.T
	m   *vt.Machine
	dev *echo
	f   *pci.Transport
	pin *pin
}

// pin is the line of a function's INTA.
type pin struct {
	t        *testing.T
	asserted atomic.Bool
	count    atomic.Int64 // of assertions
}

func (p *pin) Set(asserted bool) {
	if p.asserted.Swap(asserted) == asserted {
		p.t.Errorf("INTA is set to %v twice", asserted)
	}
	if asserted {
		p.count.Add(1)
	}
}

func newRig(t *testing.T, dev *echo) *rig {
	t.Helper()
	return newRigOn(t, vt.NewMachine(), dev)
}

func newRigOn(t *testing.T, m *vt.Machine, dev *echo) *rig {
	t.Helper()
	inta := &pin{t: t}
	f, err := pci.New(m, m.Memory, dev, pci.Options{Line: inta})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if inta.asserted.Load() {
			t.Error("INTA is asserted after Close")
		}
		if n := m.Doorbells() + m.Ranges() + m.OpenInterrupts(); n != 0 {
			t.Errorf("%d resources of the machine are left after Close", n)
		}
	})
	d, err := vt.Probe(m, f, bar)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{d, t, m, dev, f, inta}
}

func (r *rig) start(mask uint64) {
	r.t.Helper()
	if err := r.Start(mask, r.dev.n, 8, lineBase); err != nil {
		r.t.Fatal(err)
	}
}

// want checks a register of the common configuration.
func (r *rig) want(what string, off guest.GPA, n int, want uint64) {
	r.t.Helper()
	if got := r.Get(off, n); got != want {
		r.t.Errorf("%s: got %#x, want %#x", what, got, want)
	}
}

// submit makes n one-byte chains available on ring, and kicks.
func (r *rig) submit(ring *vt.Ring, n int) {
	r.t.Helper()
	for range n {
		if _, ok := ring.Add(vt.Buf{Addr: 0x1000, Len: 1, Write: true}); !ok {
			r.t.Fatal("the ring is full")
		}
	}
	ring.Publish()
	ring.Kick()
}

// eventually waits until cond holds.
func (r *rig) eventually(what string, cond func() bool) {
	r.t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); time.Sleep(50 * time.Microsecond) {
		if time.Now().After(end) {
			r.t.Fatalf("it did not come to this: %s", what)
		}
	}
}

// collect waits for n completions.
func (r *rig) collect(ring *vt.Ring, n int) {
	r.t.Helper()
	r.eventually("completion", func() bool {
		for {
			if _, _, ok := ring.TakeUsed(); !ok {
				return n <= 0
			}
			n--
		}
	})
}

func TestIdentity(t *testing.T) {
	r := newRig(t, &echo{n: 3})
	for _, c := range []struct {
		name string
		off  int
		n    int
		want uint64
	}{
		{"vendor", 0, 2, 0x1af4},
		{"device", 2, 2, 0x1042},
		{"status: capability list", 6, 2, 0x10},
		{"revision", 8, 1, 1},
		{"class", 8, 4, 0x01800001},
		{"header type", 0xe, 1, 0},
		{"subsystem vendor", 0x2c, 2, 0x1af4},
		{"subsystem is not transitional", 0x2e, 2, 0x42},
		{"interrupt pin INTA", 0x3d, 1, 1},
		{"no ROM", 0x30, 4, 0},
		{"no extended capability", 0x100, 4, 0},
		{"end of configuration space", 0xffc, 4, 0},
	} {
		if got := r.Config(c.off, c.n); got != c.want {
			t.Errorf("%s: got %#x, want %#x", c.name, got, c.want)
		}
	}
}

func TestCapabilities(t *testing.T) {
	r := newRig(t, &echo{n: 3})
	t.Run("P1", func(t *testing.T) {
		for _, c := range []struct {
			name          string
			cap           vt.Cap
			len           uint8
			align, length uint32
		}{
			{"common", r.Common, 16, 4, 0x3c},
			{"notify", r.Notify, 20, 4, 3 * 4},
			{"ISR", r.ISR, 16, 1, 1},
			{"device", r.Device, 16, 4, 0x100},
			{"PCI", r.PCI, 20, 1, 0},
		} {
			if c.cap.Pos == 0 || c.cap.Len != c.len || c.cap.Offset%c.align != 0 || c.cap.Length != c.length {
				t.Errorf("%s: %+v; want length %d of %#x bytes aligned to %d", c.name, c.cap, c.len, c.length, c.align)
			}
		}
	})
	t.Run("P6", func(t *testing.T) {
		if r.NotifyMultiplier != 4 {
			t.Errorf("multiplier %d, want 4", r.NotifyMultiplier)
		}
		for i := range uint64(3) {
			r.Set(vt.QueueSelect, 2, i)
			r.want("queue_notify_off", vt.QueueNotifyOff, 2, i)
		}
	})
	t.Run("P8", func(t *testing.T) {
		if r.Vectors != 4 {
			t.Errorf("%d vectors, want 4", r.Vectors)
		}
	})
	t.Run("P14", func(t *testing.T) {
		if table, pba := r.Table-bar, r.PBA-bar; table%0x2000 != 0 || pba%0x2000 != 0 || table == pba || table < 0x8000 {
			t.Errorf("table at %v, pending bits at %v", table, pba)
		}
	})
}

func TestFeatures(t *testing.T) {
	const offered = 1<<3 | 1<<9 | 1<<28 | 1<<29 | 1<<32 | 1<<40
	r := newRig(t, &echo{n: 1})
	if got := r.Offered(); got != offered {
		t.Errorf("offered %#x, want %#x", got, uint64(offered))
	}
	t.Run("P2", func(t *testing.T) {
		for _, sel := range []uint64{2, 3, 0xffff_ffff} {
			r.Set(vt.DeviceFeatureSelect, 4, sel)
			r.want("device_feature", vt.DeviceFeature, 4, 0)
			r.Set(vt.DriverFeatureSelect, 4, sel)
			r.Set(vt.DriverFeature, 4, 0xffff_ffff)
			r.want("driver_feature", vt.DriverFeature, 4, 0)
		}
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		r.Accept(0)
		r.Set(vt.DriverFeatureSelect, 4, 1)
		r.want("driver_feature after FEATURES_OK", vt.DriverFeature, 4, offered>>32)
	})
	for _, c := range []struct {
		name     string
		features uint64
		ok       bool
	}{
		{"P21 all that is offered", offered, true},
		{"P21 VERSION_1 alone", 1 << 32, true},
		{"P21 nothing", 0, false},
		{"P21 no VERSION_1", offered &^ (1 << 32), false},
		{"P21 one that is not offered", 1<<32 | 1<<34, false},
		{"P21 everything", all, false},
		{"P21 all that is offered, again", offered, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := r.Reset(); err != nil {
				t.Fatal(err)
			}
			r.Set(vt.Status, 1, drv)
			r.Accept(c.features)
			r.Set(vt.Status, 1, fok)
			want := uint64(drv)
			if c.ok {
				want = fok
			}
			r.want("status", vt.Status, 1, want)
			r.dev.agreed = nil
			r.Set(vt.Status, 1, fok)
			r.Set(vt.Status, 1, dok)
			if len(r.dev.agreed) != 0 {
				t.Errorf("the device is told again of features %#x", r.dev.agreed)
			}
		})
	}
	t.Run("P21 the device learns of them before DRIVER_OK", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(1<<32 | 1<<9); err != nil {
			t.Fatal(err)
		}
		if a := r.dev.agreed; len(a) != 1 || a[0] != 1<<32|1<<9 || len(r.dev.started) != 0 {
			t.Errorf("told of %#x, started with %#x", a, r.dev.started)
		}
	})
}

func TestStatus(t *testing.T) {
	t.Run("P20 bits are only added", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		r.Set(vt.Status, 1, ack)
		r.want("status", vt.Status, 1, dok)
		r.Set(vt.Status, 1, dok|64|16|32)
		r.want("status after bits that are not the driver's", vt.Status, 1, dok)
		r.Set(vt.Status, 1, dok|virtio.StatusFailed)
		r.want("status after FAILED", vt.Status, 1, dok|virtio.StatusFailed)
		if err := r.Reset(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("P20 no step is skipped", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.Set(vt.Status, 1, virtio.StatusDriverOK)
		r.want("status after DRIVER_OK alone", vt.Status, 1, 0)
		r.Set(vt.Status, 1, ack|virtio.StatusFeaturesOK)
		r.want("status after FEATURES_OK without DRIVER", vt.Status, 1, ack)
		r.Set(vt.Status, 1, drv|virtio.StatusDriverOK)
		r.want("status after DRIVER_OK without FEATURES_OK", vt.Status, 1, drv)
		if len(r.dev.started) != 0 {
			t.Error("the device was started")
		}
	})
	t.Run("P20 FAILED is final until a reset", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		r.Set(vt.Status, 1, fok|virtio.StatusFailed)
		r.Set(vt.Status, 1, dok)
		r.want("status", vt.Status, 1, fok|virtio.StatusFailed)
		if _, err := r.SetupQueue(0, 8); err == nil {
			t.Error("a queue was enabled")
		}
	})
	t.Run("P22 a device that does not start", func(t *testing.T) {
		r := newRig(t, &echo{n: 1, fail: errors.New("no")})
		r.start(all)
		r.want("status", vt.Status, 1, dok|virtio.StatusDeviceNeedsReset)
		if _, running := r.dev.count(); running != 0 {
			t.Error("a queue was started")
		}
	})
	t.Run("P22 damage to a ring", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		r.Rings[1].SetAvailIdx(1000)
		r.Rings[1].Kick()
		r.eventually("NEEDS_RESET", func() bool { return r.Get(vt.Status, 1) == dok|virtio.StatusDeviceNeedsReset })
		r.eventually("configuration interrupt", func() bool { return r.m.Line(lineBase).Count() == 1 })
		if isr := r.m.Read(bar+guest.GPA(r.ISR.Offset), 1); isr != 2 {
			t.Errorf("ISR reads %d, want 2", isr)
		}
		r.Set(vt.Status, 1, dok)
		r.want("status that the driver wrote", vt.Status, 1, dok|virtio.StatusDeviceNeedsReset)
		r.start(all)
		r.want("status after a reset", vt.Status, 1, dok)
		r.submit(r.Rings[1], 2)
		r.collect(r.Rings[1], 2)
	})
}

func TestReset(t *testing.T) {
	t.Run("P23 quiet", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		for range 50 {
			r.start(all)
			for i := range 2 {
				r.submit(r.Rings[i], 8)
			}
			rings := r.Rings
			if err := r.Reset(); err != nil {
				t.Fatal(err)
			}
			if _, running := r.dev.count(); running != 0 {
				t.Fatal("a queue is at work after the reset")
			}
			lines := r.m.Line(lineBase+1).Count() + r.m.Line(lineBase+2).Count()
			idx := rings[0].UsedIdx() + rings[1].UsedIdx()
			for i, ring := range rings {
				ring.Kick()
				r.m.Write(bar+guest.GPA(r.Notify.Offset)+guest.GPA(4*i), 2, uint64(i))
			}
			time.Sleep(200 * time.Microsecond)
			if r.m.Line(lineBase+1).Count()+r.m.Line(lineBase+2).Count() != lines || rings[0].UsedIdx()+rings[1].UsedIdx() != idx {
				t.Fatal("an interrupt or a used element came after the reset")
			}
		}
	})
	t.Run("P23 reads 0 only when done", func(t *testing.T) {
		dev := &echo{n: 1, hold: make(chan struct{})}
		r := newRig(t, dev)
		r.start(all)
		r.Set(vt.Status, 1, 0)
		for range 3 {
			time.Sleep(time.Millisecond)
			r.want("status while the device stops", vt.Status, 1, dok)
		}
		// Nothing can be set up meanwhile.
		r.Set(vt.Status, 1, ack)
		r.Set(vt.QueueSelect, 2, 7)
		r.m.Write(bar+guest.GPA(r.Device.Offset), 1, 0x55)
		r.Set(vt.Status, 1, 0)
		if dev.space[0] != 0 {
			t.Error("the device configuration was written")
		}
		close(dev.hold)
		r.eventually("reset", func() bool { return r.Get(vt.Status, 1) == 0 })
		r.want("queue_select", vt.QueueSelect, 2, 0)
	})
	t.Run("P23 no pending interrupt outlives it", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		r.Mask(1, true)
		r.submit(r.Rings[0], 1)
		r.eventually("pending bit", func() bool { return r.Pending(1) })
		if err := r.Reset(); err != nil {
			t.Fatal(err)
		}
		before := r.m.Line(lineBase + 1).Count()
		r.Mask(1, false)
		if r.Pending(1) || r.m.Line(lineBase+1).Count() != before {
			t.Error("an interrupt came after the reset")
		}
	})
	t.Run("P24 registers", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		r.Set(vt.DeviceFeatureSelect, 4, 1)
		r.Set(vt.QueueSelect, 2, 1)
		ctrl := r.Config(r.MSIX+2, 2)
		if err := r.Reset(); err != nil {
			t.Fatal(err)
		}
		r.want("device_feature_select", vt.DeviceFeatureSelect, 4, 0)
		r.want("driver_feature_select", vt.DriverFeatureSelect, 4, 0)
		r.want("driver_feature", vt.DriverFeature, 4, 0)
		r.want("queue_select", vt.QueueSelect, 2, 0)
		r.want("config_msix_vector", vt.ConfigVector, 2, 0xffff)
		for i := range uint64(2) {
			r.Set(vt.QueueSelect, 2, i)
			r.want("queue_size", vt.QueueSize, 2, maxSize)
			r.want("queue_enable", vt.QueueEnable, 2, 0)
			r.want("queue_msix_vector", vt.QueueVector, 2, 0xffff)
			for off := guest.GPA(vt.QueueDesc); off < 0x38; off += 4 {
				r.want("queue address", off, 4, 0)
			}
		}
		if r.Config(r.MSIX+2, 2) != ctrl || r.Config(4, 2)&2 == 0 {
			t.Error("the reset has changed PCI configuration")
		}
		if r.m.Doorbells() != 0 {
			t.Error("doorbells are bound after the reset")
		}
	})
	t.Run("function", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		r.f.Reset()
		if r.m.Ranges() != 0 || r.Config(4, 2) != 0 || r.Config(r.MSIX+2, 2)&(1<<15) != 0 {
			t.Error("the function still decodes or interrupts")
		}
		if got := r.Config(0x10, 4); got != uint64(bar)|4 {
			t.Errorf("BAR reads %#x", got)
		}
		r.SetConfig(4, 2, 6)
		r.start(all)
		r.submit(r.Rings[0], 1)
		r.collect(r.Rings[0], 1)
	})
}

func TestQueueRegisters(t *testing.T) {
	t.Run("P3 size", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		r.want("size after reset", vt.QueueSize, 2, maxSize)
		for _, c := range []struct{ write, want uint64 }{
			{8, 8}, {0, 8}, {3, 8}, {7, 8}, {maxSize * 2, 8}, {0xffff, 8}, {0x8000, 8}, {1, 1}, {maxSize, maxSize},
		} {
			r.Set(vt.QueueSize, 2, c.write)
			r.want(fmt.Sprintf("size after writing %d", c.write), vt.QueueSize, 2, c.want)
		}
	})
	t.Run("P3 queue that is not there", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		for _, sel := range []uint64{2, 0x100, 0xffff} {
			r.Set(vt.QueueSelect, 2, sel)
			for off := guest.GPA(vt.QueueSize); off < 0x3c; off += 2 {
				r.Set(off, 2, 1)
			}
			r.want("queue_size", vt.QueueSize, 2, 0)
			r.want("queue_enable", vt.QueueEnable, 2, 0)
			r.want("queue_msix_vector", vt.QueueVector, 2, 0xffff)
			r.want("queue_desc", vt.QueueDesc, 4, 0)
			r.want("queue_reset", vt.QueueReset, 2, 0)
		}
	})
	t.Run("P4 frozen once enabled", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		ring := r.Rings[0]
		frozen := func() {
			t.Helper()
			r.Set(vt.QueueSelect, 2, 0)
			r.Set(vt.QueueSize, 2, 64)
			r.Set(vt.QueueEnable, 2, 0)
			for off := guest.GPA(vt.QueueDesc); off < 0x38; off += 4 {
				r.Set(off, 4, 0xffff_fff0)
			}
			r.want("queue_size", vt.QueueSize, 2, 8)
			r.want("queue_enable", vt.QueueEnable, 2, 1)
			r.want("queue_desc", vt.QueueDesc, 4, uint64(ring.Desc))
			r.want("queue_device", vt.QueueDevice, 4, uint64(ring.Used))
		}
		frozen()
		r.submit(ring, 8)
		r.collect(ring, 8)
		frozen()
	})
	t.Run("P4 not before FEATURES_OK", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.Set(vt.Status, 1, drv)
		r.Set(vt.QueueSize, 2, 8)
		r.Set(vt.QueueDesc, 4, 0x1000)
		r.Set(vt.QueueEnable, 2, 1)
		r.want("queue_size", vt.QueueSize, 2, maxSize)
		r.want("queue_desc", vt.QueueDesc, 4, 0)
		r.want("queue_enable", vt.QueueEnable, 2, 0)
	})
	t.Run("P4 not after DRIVER_OK without RING_RESET", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		if err := r.Start(all&^(1<<virtio.FeatureRingReset), 1, 8, lineBase); err != nil {
			t.Fatal(err)
		}
		if _, err := r.SetupQueue(1, 8); err == nil {
			t.Error("a queue was enabled after DRIVER_OK")
		}
	})
	t.Run("P5", func(t *testing.T) {
		for _, c := range []struct {
			name             string
			desc, drv, dev   uint64
			enable, wantBits uint64
		}{
			{"good", 0x1000, 0x2000, 0x3000, 1, 0},
			{"enable 0", 0x1000, 0x2000, 0x3000, 0, 0},
			{"enable 2", 0x1000, 0x2000, 0x3000, 2, 0},
			{"enable 0xffff", 0x1000, 0x2000, 0x3000, 0xffff, 0},
			{"descriptors misaligned", 0x1008, 0x2000, 0x3000, 1, 64},
			{"driver area misaligned", 0x1000, 0x2001, 0x3000, 1, 64},
			{"device area misaligned", 0x1000, 0x2000, 0x3002, 1, 64},
			{"descriptors not in RAM", 0xe000_0000, 0x2000, 0x3000, 1, 64},
			{"driver area past all", 0x1000, 0xffff_ffff_ffff_fffe, 0x3000, 1, 64},
			{"device area across the end", 0x1000, 0x2000, vt.LowSize - 4, 1, 64},
		} {
			t.Run(c.name, func(t *testing.T) {
				r := newRig(t, &echo{n: 1})
				if err := r.Negotiate(all); err != nil {
					t.Fatal(err)
				}
				for i, a := range []uint64{c.desc, c.drv, c.dev} {
					r.Set(vt.QueueDesc+guest.GPA(8*i), 8, a)
				}
				r.Set(vt.QueueEnable, 2, c.enable)
				r.want("status", vt.Status, 1, fok|c.wantBits)
				enabled := uint64(0)
				if c.enable == 1 && c.wantBits == 0 {
					enabled = 1
				}
				r.want("queue_enable", vt.QueueEnable, 2, enabled)
				r.Set(vt.Status, 1, dok) // must not start what is not there
				if _, running := r.dev.count(); running != int(enabled) {
					t.Errorf("%d queues are running", running)
				}
			})
		}
	})
	t.Run("P8 bad vectors", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		for _, c := range []struct{ write, want uint64 }{
			{0, 0}, {1, 1}, {2, 0xffff}, {0x7ff, 0xffff}, {1, 1}, {0xffff, 0xffff},
		} {
			r.Set(vt.ConfigVector, 2, c.write)
			r.want("config_msix_vector", vt.ConfigVector, 2, c.want)
			r.Set(vt.QueueVector, 2, c.write)
			r.want("queue_msix_vector", vt.QueueVector, 2, c.want)
		}
	})
}

func TestRingReset(t *testing.T) {
	t.Run("V15", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		for turn, size := range []int{4, 16, 8} {
			for _, ring := range r.Rings {
				r.submit(ring, 3)
				r.collect(ring, 3)
			}
			r.Set(vt.QueueSelect, 2, 1)
			r.Set(vt.QueueReset, 2, 1)
			r.eventually("queue reset", func() bool { return r.Get(vt.QueueReset, 2) == 0 })
			r.want("queue_enable", vt.QueueEnable, 2, 0)
			r.want("queue_size", vt.QueueSize, 2, maxSize)
			r.want("queue_desc", vt.QueueDesc, 4, 0)
			r.want("queue_msix_vector", vt.QueueVector, 2, 0xffff)
			used := r.Rings[1].UsedIdx()
			r.submit(r.Rings[1], 1)
			r.submit(r.Rings[0], 1) // the other queue goes on
			r.collect(r.Rings[0], 1)
			if r.Rings[1].UsedIdx() != used {
				t.Fatalf("turn %d: the queue works after its reset", turn)
			}
			ring := vt.NewRing(r.m, size, r.Features)
			if err := r.Enable(1, ring, 2); err != nil {
				t.Fatal(err)
			}
			r.Rings[1] = ring
		}
		r.submit(r.Rings[1], 8)
		r.collect(r.Rings[1], 8)
	})
	t.Run("P23 reads 1 until done", func(t *testing.T) {
		dev := &echo{n: 2, hold: make(chan struct{})}
		r := newRig(t, dev)
		r.start(all)
		r.Set(vt.QueueReset, 2, 1)
		time.Sleep(time.Millisecond)
		r.want("queue_reset", vt.QueueReset, 2, 1)
		r.Set(vt.QueueReset, 2, 1) // again, and a device reset on top of it
		r.Set(vt.Status, 1, 0)
		r.want("status", vt.Status, 1, dok)
		close(dev.hold)
		r.eventually("reset", func() bool { return r.Get(vt.Status, 1) == 0 })
		r.want("queue_reset", vt.QueueReset, 2, 0)
	})
	for _, c := range []struct {
		name   string
		share  guest.GPA // register that gets the queue's vector too, or 0
		forgot bool
	}{
		{"V15 a masked interrupt is forgotten", 0, true},
		{"V15 unless another queue shares the vector", vt.QueueVector, false},
		{"V15 unless the configuration shares the vector", vt.ConfigVector, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, &echo{n: 2})
			r.start(all)
			if c.share != 0 {
				r.Set(vt.QueueSelect, 2, 0)
				r.Set(c.share, 2, 2)
			}
			r.Mask(2, true)
			r.submit(r.Rings[1], 1)
			r.eventually("pending", func() bool { return r.Pending(2) })
			r.Set(vt.QueueSelect, 2, 1)
			r.Set(vt.QueueReset, 2, 1)
			r.eventually("queue reset", func() bool { return r.Get(vt.QueueReset, 2) == 0 })
			if r.Pending(2) == c.forgot {
				t.Errorf("pending bit %v after the reset", r.Pending(2))
			}
			r.Mask(2, false)
			if came := r.m.Line(lineBase+2).Count() != 0; came == c.forgot {
				t.Errorf("interrupt after the unmask: %v", came)
			}
		})
	}
	t.Run("V15 before DRIVER_OK", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		if _, err := r.SetupQueue(0, 8); err != nil {
			t.Fatal(err)
		}
		r.Set(vt.QueueReset, 2, 1)
		r.want("queue_reset", vt.QueueReset, 2, 0)
		r.want("queue_enable", vt.QueueEnable, 2, 0)
		if r.m.Doorbells() != 0 {
			t.Error("the doorbell is still bound")
		}
		ring, err := r.SetupQueue(0, 4)
		if err != nil {
			t.Fatal(err)
		}
		r.DriverOK()
		r.submit(ring, 2)
		r.collect(ring, 2)
	})
	t.Run("ignored unless negotiated", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all &^ (1 << virtio.FeatureRingReset))
		r.Set(vt.QueueReset, 2, 1)
		r.want("queue_reset", vt.QueueReset, 2, 0)
		r.want("queue_enable", vt.QueueEnable, 2, 1)
	})
}

func TestDoorbells(t *testing.T) {
	work := func(t *testing.T, r *rig) {
		t.Helper()
		for _, ring := range r.Rings {
			r.submit(ring, 4)
			r.collect(ring, 4)
		}
	}
	t.Run("P13 follow the BAR", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		if r.m.Doorbells() != 2 {
			t.Fatalf("%d doorbells, want 2", r.m.Doorbells())
		}
		work(t, r)
		r.SetConfig(4, 2, 0)
		if r.m.Doorbells() != 0 || r.m.Ranges() != 0 {
			t.Fatal("the function decodes while memory space is off")
		}
		const moved = bar + 0x10_0000
		r.SetConfig(0x10, 4, uint64(moved))
		r.SetConfig(4, 2, 6)
		if r.m.Doorbells() != 2 || r.m.Ranges() != 1 {
			t.Fatal("the function does not decode at its new place")
		}
		for i, ring := range r.Rings {
			ring.Moved(moved + guest.GPA(r.Notify.Offset) + guest.GPA(4*i))
		}
		work(t, r)
	})
	t.Run("P13 none for queues that are not enabled", func(t *testing.T) {
		r := newRig(t, &echo{n: 4})
		if err := r.Start(all, 1, 8, lineBase); err != nil {
			t.Fatal(err)
		}
		if r.m.Doorbells() != 1 {
			t.Errorf("%d doorbells, want 1", r.m.Doorbells())
		}
	})
	t.Run("P7 kicks that reach the BAR", func(t *testing.T) {
		m := vt.NewMachine()
		m.NoDoorbells = true
		r := newRigOn(t, m, &echo{n: 2})
		r.start(all)
		work(t, r)
		at := bar + guest.GPA(r.Notify.Offset)
		for _, n := range []int{1, 2, 4, 8} {
			for _, ring := range r.Rings {
				ring.Add(vt.Buf{Addr: 0x1000, Len: 1, Write: true})
				ring.Publish()
			}
			r.m.Write(at, n, 0xffff)
			r.m.Write(at+4, n, 0xffff)
			r.collect(r.Rings[0], 1)
			r.collect(r.Rings[1], 1)
		}
		for off := guest.GPA(1); off < 0x2000; off += 37 {
			r.m.Write(at+off, 4, uint64(off)) // to no queue, or a spurious kick
		}
	})
	t.Run("V16 nothing before DRIVER_OK, and nothing lost", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		r.EnableMSIX(lineBase)
		ring, err := r.SetupQueue(0, 8)
		if err != nil {
			t.Fatal(err)
		}
		r.submit(ring, 3)
		time.Sleep(time.Millisecond)
		if ring.UsedIdx() != 0 || r.m.Line(lineBase+1).Count() != 0 {
			t.Fatal("the device was at work before DRIVER_OK")
		}
		r.DriverOK()
		r.collect(ring, 3)
	})
	t.Run("V16 kick that went nowhere", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		ring, err := r.SetupQueue(0, 8)
		if err != nil {
			t.Fatal(err)
		}
		ring.Add(vt.Buf{Addr: 0x1000, Len: 1, Write: true})
		ring.Publish()
		r.DriverOK()
		r.collect(ring, 1)
	})
}

func TestMSIX(t *testing.T) {
	t.Run("P9 masks and pending bits", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		line := r.m.Line(lineBase + 1)
		ctrl := r.Config(r.MSIX+2, 2)
		one := func() {
			t.Helper()
			r.Rings[0].Arm()
			r.submit(r.Rings[0], 1)
			r.collect(r.Rings[0], 1)
		}
		one()
		r.eventually("interrupt", func() bool { return line.Count() == 1 })
		for i, mask := range []struct{ on, off func() }{
			{func() { r.Mask(1, true) }, func() { r.Mask(1, false) }},
			{func() { r.SetConfig(r.MSIX+2, 2, ctrl|1<<14) }, func() { r.SetConfig(r.MSIX+2, 2, ctrl) }},
			{
				func() { r.Mask(1, true); r.SetConfig(r.MSIX+2, 2, ctrl|1<<14) },
				func() { r.SetConfig(r.MSIX+2, 2, ctrl); r.Mask(1, false) },
			},
		} {
			before := line.Count()
			mask.on()
			one()
			one()
			r.eventually("pending bit", func() bool { return r.Pending(1) })
			if line.Count() != before {
				t.Fatalf("mask %d: an interrupt came through", i)
			}
			mask.off()
			if r.Pending(1) || line.Count() != before+1 {
				t.Fatalf("mask %d: pending %v, %d interrupts after unmasking; want one", i, r.Pending(1), line.Count()-before)
			}
		}
	})
	t.Run("P9 both masks must end", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		line := r.m.Line(lineBase + 1)
		ctrl := r.Config(r.MSIX+2, 2)
		r.SetConfig(r.MSIX+2, 2, ctrl|1<<14)
		r.Mask(1, true)
		r.submit(r.Rings[0], 1)
		r.eventually("pending bit", func() bool { return r.Pending(1) })
		r.Mask(1, false)
		if line.Count() != 0 || !r.Pending(1) {
			t.Error("an interrupt came through the function mask")
		}
		r.SetConfig(r.MSIX+2, 2, ctrl)
		if line.Count() != 1 || r.Pending(1) {
			t.Error("no interrupt when both masks had ended")
		}
	})
	t.Run("P8 NO_VECTOR", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		r.Set(vt.QueueVector, 2, 0xffff)
		r.Set(vt.ConfigVector, 2, 0xffff)
		r.submit(r.Rings[0], 4)
		r.collect(r.Rings[0], 4)
		r.update(0)
		if r.m.Line(lineBase).Count()+r.m.Line(lineBase+1).Count() != 0 {
			t.Error("an interrupt without a vector")
		}
	})
	t.Run("P8 one vector for all", func(t *testing.T) {
		r := newRig(t, &echo{n: 2})
		r.start(all)
		for i := range uint64(2) {
			r.Set(vt.QueueSelect, 2, i)
			r.Set(vt.QueueVector, 2, 0)
			r.submit(r.Rings[i], 1)
			r.collect(r.Rings[i], 1)
		}
		r.eventually("interrupts", func() bool { return r.m.Line(lineBase).Count() == 2 })
	})
	t.Run("K8 a vector is routed when it is unmasked", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		r.start(all)
		r.Mask(1, true)
		r.m.Write(r.Table+16, 4, 0xfee0_1000)
		r.m.Write(r.Table+16+8, 4, 0x77)
		r.submit(r.Rings[0], 1)
		r.eventually("pending bit", func() bool { return r.Pending(1) })
		r.Mask(1, false)
		if r.m.Line(0x77).Count() != 1 || r.m.Line(lineBase+1).Count() != 0 {
			t.Error("the interrupt did not follow its new route")
		}
		// A bad address cannot be routed: the vector stays masked.
		r.Mask(1, true)
		r.m.Write(r.Table+16, 4, 0x1234_0000)
		r.Mask(1, false)
		r.collect(r.Rings[0], 1)
		r.Rings[0].Arm()
		r.submit(r.Rings[0], 1)
		r.eventually("pending bit", func() bool { return r.Pending(1) })
	})
	t.Run("P9 table accesses", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		for i := range 2 {
			if got := r.m.Read(r.Table+guest.GPA(16*i+12), 4); got != 1 {
				t.Errorf("vector control %d is %#x at power-on, want 1", i, got)
			}
		}
		r.m.Write(r.Table, 8, 0x1122334455667788)
		r.m.Write(r.Table+8, 8, 0xffff_fffe_99aa_bbcc)
		for _, c := range []struct {
			off  guest.GPA
			n    int
			want uint64
		}{
			{0, 8, 0x1122334455667788},
			{0, 4, 0x55667788},
			{4, 4, 0x11223344},
			{8, 4, 0x99aabbcc},
			{12, 4, 0}, // reserved bits read as zero
			{0, 1, 0xff},
			{0, 2, 0xffff},
			{2, 4, 0xffff_ffff},
			{4, 8, all},
			{32, 4, 0xffff_ffff},
			{0x1ff8, 8, all}, // past the last vector
		} {
			if got := r.m.Read(r.Table+c.off, c.n); got != c.want {
				t.Errorf("%d bytes at %#x: got %#x, want %#x", c.n, uint64(c.off), got, c.want)
			}
		}
		r.m.Write(r.Table, 2, 0)
		r.m.Write(r.Table+4, 8, 0)
		r.m.Write(r.Table+0x1ff8, 8, 0)
		if got := r.m.Read(r.Table, 8); got != 0x1122334455667788 {
			t.Errorf("an odd store changed the entry to %#x", got)
		}
		r.m.Write(r.PBA, 8, all)
		if got := r.m.Read(r.PBA, 8); got != 0 {
			t.Errorf("pending bits were written: %#x", got)
		}
	})
	t.Run("P10 ISR without MSI-X", func(t *testing.T) {
		r := newRig(t, &echo{n: 1})
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		ring, err := r.SetupQueue(0, 8)
		if err != nil {
			t.Fatal(err)
		}
		r.DriverOK()
		isr := bar + guest.GPA(r.ISR.Offset)
		if got := r.m.Read(isr, 1); got != 0 {
			t.Errorf("ISR reads %d at DRIVER_OK, want 0", got)
		}
		r.submit(ring, 1)
		r.collect(ring, 1)
		r.eventually("ISR bit", func() bool { return r.m.Read(isr, 1) == 1 })
		r.update(0)
		if got := r.m.Read(isr, 1); got != 2 {
			t.Errorf("ISR reads %d, want 2", got)
		}
		if got := r.m.Read(isr, 1); got != 0 {
			t.Errorf("ISR reads %d the second time, want 0", got)
		}
	})
}

func TestDeviceConfig(t *testing.T) {
	r := newRig(t, &echo{n: 1, space: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}})
	t.Run("P25", func(t *testing.T) {
		if got := r.DeviceConfig(0, 8); got != 0x0807060504030201 {
			t.Errorf("got %#x before FEATURES_OK", got)
		}
		at := bar + guest.GPA(r.Device.Offset)
		r.m.Write(at, 1, 0x55)
		if got := r.DeviceConfig(0, 1); got != 1 {
			t.Errorf("byte 0 is %#x: written before FEATURES_OK", got)
		}
		if err := r.Negotiate(all); err != nil {
			t.Fatal(err)
		}
		r.m.Write(at, 1, 0x55)
		if got := r.DeviceConfig(0, 1); got != 0x55 {
			t.Errorf("byte 0 is %#x, want what was written", got)
		}
		for _, off := range []guest.GPA{0xfd, 0x100, 0x1fff} {
			if got := r.DeviceConfig(off, 4); got != 0 {
				t.Errorf("%#x at %#x, want 0", got, uint64(off))
			}
		}
	})
	t.Run("P11", func(t *testing.T) {
		gen := r.Get(vt.Generation, 1)
		r.DeviceConfig(0, 4)
		r.want("generation without a change", vt.Generation, 1, gen)
		for range 256 { // never back to gen unseen
			r.update(0)
		}
		r.DeviceConfig(0, 4)
		if got := r.Get(vt.Generation, 1); got == gen {
			t.Error("the generation did not show a change")
		}
	})
	t.Run("B14 configuration interrupt", func(t *testing.T) {
		r.start(all)
		before := r.m.Line(lineBase).Count()
		r.update(0)
		if got := r.m.Line(lineBase).Count() - before; got != 1 {
			t.Errorf("%d interrupts, want 1", got)
		}
		gen := r.Get(vt.Generation, 1)
		want := errors.New("no")
		if err := r.f.UpdateConfig(func() error { return want }); !errors.Is(err, want) {
			t.Errorf("got %v, want the error of the change", err)
		}
		r.DeviceConfig(0, 4)
		r.want("generation without a change", vt.Generation, 1, gen+1)
		if got := r.m.Line(lineBase).Count() - before; got != 1 {
			t.Errorf("%d interrupts, want no second one", got)
		}
		if err := r.Reset(); err != nil {
			t.Fatal(err)
		}
		r.update(0)
		if got := r.m.Line(lineBase).Count() - before; got != 1 {
			t.Errorf("%d interrupts, want none without a driver", got)
		}
	})
	t.Run("B14 change before DRIVER_OK", func(t *testing.T) {
		for _, changes := range []int{0, 1, 2} {
			if err := r.Reset(); err != nil {
				t.Fatal(err)
			}
			r.update(0) // there is no driver that could have read what was before
			if err := r.Negotiate(all); err != nil {
				t.Fatal(err)
			}
			r.EnableMSIX(lineBase)
			r.Set(vt.ConfigVector, 2, 0)
			r.DeviceConfig(0, 8)
			before := r.m.Line(lineBase).Count()
			for i := range changes {
				r.update(byte(i + 1))
			}
			if got := r.m.Line(lineBase).Count() - before; got != 0 {
				t.Errorf("%d interrupts before DRIVER_OK", got)
			}
			r.DriverOK()
			if got, want := int(r.m.Line(lineBase).Count()-before), min(changes, 1); got != want {
				t.Errorf("%d interrupts at DRIVER_OK after %d changes that the driver has not seen, want %d", got, changes, want)
			}
		}
	})
	t.Run("P11 never half of a change", func(t *testing.T) {
		r.start(all)
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 2000 {
				r.update(byte(i))
			}
		})
		reads := 0
		for done := false; !done; reads++ {
			gen := r.Get(vt.Generation, 1)
			lo, hi := r.DeviceConfig(0, 4), r.DeviceConfig(4, 4)
			if r.Get(vt.Generation, 1) == gen && lo != hi {
				t.Fatalf("read %#x and %#x of one configuration", lo, hi)
			}
			done = lo == 0xcfcfcfcf && hi == lo // of the last update
		}
		wg.Wait()
		t.Logf("%d reads", reads)
	})
}

// update sets every byte of the device configuration to v.
func (r *rig) update(v byte) {
	r.t.Helper()
	err := r.f.UpdateConfig(func() error {
		for i := range r.dev.space {
			r.dev.space[i] = v
		}
		return nil
	})
	if err != nil {
		r.t.Error(err)
	}
}

func TestBAR(t *testing.T) {
	r := newRig(t, &echo{n: 1})
	t.Run("P13 sizing", func(t *testing.T) {
		r.SetConfig(4, 2, 0)
		lo, hi := r.Config(0x10, 4), r.Config(0x14, 4)
		r.SetConfig(0x10, 4, 0xffff_ffff)
		r.SetConfig(0x14, 4, 0xffff_ffff)
		size := r.Config(0x10, 4)&^0xf | r.Config(0x14, 4)<<32
		if -size != pci.BARSize || r.Config(0x10, 4)&0xf != 4 {
			t.Errorf("sizing reads %#x", size)
		}
		for off := 0x18; off < 0x28; off += 4 {
			r.SetConfig(off, 4, 0xffff_ffff)
			if got := r.Config(off, 4); got != 0 {
				t.Errorf("a BAR at %#x: %#x", off, got)
			}
		}
		r.SetConfig(0x10, 4, lo)
		r.SetConfig(0x14, 4, hi)
		r.SetConfig(4, 2, 6)
		r.want("num_queues", vt.NumQueues, 2, 1)
	})
	t.Run("P13 sizing while it is decoded", func(t *testing.T) {
		r.SetConfig(0x10, 4, 0xffff_ffff)
		r.SetConfig(0x14, 4, 0xffff_ffff)
		if r.m.Ranges() != 0 {
			t.Error("mapped where it cannot be")
		}
		r.SetConfig(0x10, 4, uint64(bar))
		r.SetConfig(0x14, 4, 0)
		r.want("num_queues", vt.NumQueues, 2, 1)
	})
	t.Run("P13 over RAM", func(t *testing.T) {
		r.SetConfig(0x10, 4, 0x10_0000)
		if r.m.Ranges() != 0 {
			t.Error("mapped over RAM")
		}
		r.SetConfig(0x10, 4, uint64(bar))
		r.want("num_queues", vt.NumQueues, 2, 1)
	})
	t.Run("AssignBAR", func(t *testing.T) {
		if r.f.AssignBAR(1, bar) == nil || r.f.AssignBAR(0, bar+0x1000) == nil {
			t.Error("an impossible assignment succeeded")
		}
	})
	t.Run("read-only configuration", func(t *testing.T) {
		var before [256]uint64
		for off := range before {
			before[off] = r.Config(off, 1)
		}
		for off := range before {
			if off != 5 && off != 4 && (off < 0x10 || off >= 0x18) { // command, BAR
				r.SetConfig(off, 1, 0xff)
			}
		}
		writable := map[int]bool{0xc: true, 0x3c: true, r.MSIX + 3: true, r.PCI.Pos + 4: true}
		for off := r.PCI.Pos + 8; off < r.PCI.Pos+20; off++ {
			writable[off] = true
		}
		for off := range before {
			if got := r.Config(off, 1); got != before[off] && !writable[off] {
				t.Errorf("byte %#x went from %#x to %#x", off, before[off], got)
			}
		}
	})
}

func TestWindow(t *testing.T) {
	r := newRig(t, &echo{n: 1, space: [8]byte{0xa1, 0xa2, 0xa3, 0xa4}})
	point := func(bar, off, n uint64) {
		r.SetConfig(r.PCI.Pos+4, 1, bar)
		r.SetConfig(r.PCI.Pos+8, 4, off)
		r.SetConfig(r.PCI.Pos+12, 4, n)
	}
	data := r.PCI.Pos + 16
	t.Run("P12 registers", func(t *testing.T) {
		point(0, uint64(r.Common.Offset)+vt.NumQueues, 2)
		if got := r.Config(data, 2); got != 1 {
			t.Errorf("num_queues is %d", got)
		}
		point(0, uint64(r.Common.Offset)+vt.Status, 1)
		r.SetConfig(data, 1, ack)
		r.want("status", vt.Status, 1, ack)
		point(0, uint64(r.Device.Offset), 4)
		if got := r.Config(data, 4); got != 0xa4a3a2a1 {
			t.Errorf("device configuration is %#x", got)
		}
	})
	t.Run("P12 refused", func(t *testing.T) {
		for _, c := range [][3]uint64{
			{1, uint64(r.Device.Offset), 4},     // no such BAR
			{0, uint64(r.Device.Offset) + 2, 4}, // misaligned
			{0, uint64(r.Device.Offset), 3},     // odd length
			{0, uint64(r.Device.Offset), 0},     //
			{0, uint64(r.Device.Offset), 8},     //
			{0, uint64(r.Table - bar), 4},       // no virtio structure
			{0, uint64(r.PBA - bar), 4},         //
			{0, 0x10000, 4},                     // past the BAR
			{0, 0xffff_fffc, 4},                 //
			{0xff, 0xffff_ffff, 0xffff_ffff},    //
		} {
			point(c[0], c[1], c[2])
			r.SetConfig(data, 4, 0)
			if got := r.Config(data, 4); got != 0 {
				t.Errorf("window at %#x reads %#x", c, got)
			}
		}
		if got := r.m.Read(r.Table+12, 4); got != 1 {
			t.Error("the window has written the vector table")
		}
	})
	t.Run("P12 kick", func(t *testing.T) {
		r.start(all)
		ring := r.Rings[0]
		ring.Add(vt.Buf{Addr: 0x1000, Len: 1, Write: true})
		ring.Publish()
		point(0, uint64(r.Notify.Offset), 2)
		r.SetConfig(data, 2, 0)
		r.collect(ring, 1)
	})
}

// TestHostileRegisters writes hostile values of every width to every place in
// the BAR and in configuration space, in every state of the device, and reads
// everything. The device must live and must serve a driver afterwards.
func TestHostileRegisters(t *testing.T) {
	values := []uint64{0, 1, 2, 0x7f, 0x80, 0xff, 0x8000, 0xffff, 1 << 31, 0xffff_ffff, 1 << 63, all}
	for _, state := range []struct {
		name string
		set  func(*rig) error
	}{
		{"reset", func(r *rig) error { return r.Reset() }},
		{"FEATURES_OK", func(r *rig) error { return r.Negotiate(all) }},
		{"DRIVER_OK", func(r *rig) error { return r.Start(all, 2, 8, lineBase) }},
	} {
		t.Run(state.name, func(t *testing.T) {
			r := newRig(t, &echo{n: 2})
			for i, v := range values {
				if err := state.set(r); err != nil {
					t.Fatal(err)
				}
				for off := range guest.GPA(pci.BARSize) {
					if off%0x2000 > 0x120 && off%0x2000 < 0x1ff0 {
						continue
					}
					n := []int{1, 2, 4, 8}[(int(off)+i)%4]
					if off+guest.GPA(n) > pci.BARSize {
						continue
					}
					r.m.Write(bar+off, n, v)
					r.m.Read(bar+off, n)
				}
				for _, n := range []int{1, 2, 4} {
					for off := 0; off < 0x120; off += n {
						if off < 4 || off >= 0x18 { // the BAR and its enable stay
							r.SetConfig(off, n, v)
						}
						r.Config(off, n)
					}
				}
				r.SetConfig(0x10, 8-4, uint64(bar))
				r.SetConfig(0x14, 4, 0)
				r.SetConfig(4, 2, 6)
			}
			r.start(all)
			for _, ring := range r.Rings {
				r.submit(ring, 8)
				r.collect(ring, 8)
			}
		})
	}
}

// poorHost is a host with few interrupts.
type poorHost struct {
	*vt.Machine
	left int
}

func (h *poorHost) NewInterrupt() (pci.Interrupt, error) {
	if h.left == 0 {
		return nil, errors.New("no interrupt is left")
	}
	h.left--
	return h.Machine.NewInterrupt()
}

func TestNew(t *testing.T) {
	t.Run("no interrupts left", func(t *testing.T) {
		h := &poorHost{vt.NewMachine(), 3}
		if _, err := pci.New(h, h.Memory, &echo{n: 4}, pci.Options{}); err == nil || !strings.Contains(err.Error(), "no interrupt is left") {
			t.Errorf("got %v, want the host's error", err)
		}
		if n := h.OpenInterrupts(); n != 0 {
			t.Errorf("%d interrupts are left open", n)
		}
	})
	for _, n := range []int{0, 65} {
		m := vt.NewMachine()
		if _, err := pci.New(m, m.Memory, &echo{n: n}, pci.Options{}); !errors.Is(err, pci.ErrDevice) {
			t.Errorf("%d queues: got %v, want ErrDevice", n, err)
		}
	}
	t.Run("64 queues", func(t *testing.T) {
		r := newRig(t, &echo{n: 64})
		r.start(all)
		for _, ring := range r.Rings {
			r.submit(ring, 1)
		}
		for i, ring := range r.Rings {
			r.collect(ring, 1)
			r.eventually("interrupt", func() bool { return r.m.Line(lineBase+1+uint32(i)).Count() == 1 })
		}
	})
}

func TestClose(t *testing.T) {
	r := newRig(t, &echo{n: 2})
	r.start(all)
	r.submit(r.Rings[0], 8)
	if err := r.f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, running := r.dev.count(); running != 0 {
		t.Error("a queue is at work after Close")
	}
	// A vCPU may still be inside an access that had begun.
	p := make([]byte, 8)
	for off := range uint64(pci.BARSize) {
		r.f.WriteMMIO(off, p[:1])
		r.f.ReadMMIO(off, p[:1])
	}
	r.SetConfig(4, 2, 6)
	r.update(0)
	if err := r.f.Close(); err != nil {
		t.Error(err)
	}
}

// FuzzTransport is a guest that writes any register, any configuration byte and
// any byte of its rings, kicks and resets, in any order.
func FuzzTransport(f *testing.F) {
	f.Add([]byte{0, 0x14, 1, 0, 1, 0x14, 2, 3, 4, 5, 6, 7})
	f.Add([]byte("\x07\x06\x06\x05\x04\x03\x02\x01\x00"))
	seq := []byte{}
	for _, s := range []byte{ack, drv, fok, dok, 0} {
		seq = append(seq, 0, vt.Status, s, 6, 0)
	}
	f.Add(seq)
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRigOn(t, vt.NewMachineOf(256<<10), &echo{n: 2})
		starts := 0
		next := func(n int) uint64 {
			var b [8]byte
			in = in[copy(b[:n], in):]
			return binary.LittleEndian.Uint64(b[:])
		}
		for len(in) > 0 {
			switch op := next(1); op % 8 {
			case 0: // a common register of its own width
				off := guest.GPA(next(1))
				r.Set(off, []int{1, 2, 4, 8}[op>>3%4], next(4))
			case 1: // a common register of any width
				off := guest.GPA(next(1) % 0x40)
				r.Set(off, []int{1, 2, 4, 8}[op>>3%4], next(8))
			case 2: // anywhere in the BAR
				off := guest.GPA(next(2))
				if n := 1 << (op >> 3 % 4); int(off)+n <= pci.BARSize {
					r.m.Write(bar+off, n, next(8))
					r.m.Read(bar+off, n)
				}
			case 3: // configuration space
				n := 1 << (op >> 3 % 3)
				off := int(next(2)) % 0x1000 &^ (n - 1)
				r.SetConfig(off, n, next(n))
				r.Config(off, n)
			case 4: // a ring byte
				if len(r.Rings) > 0 {
					ring := r.Rings[op>>3%2]
					switch op >> 4 % 4 {
					case 0:
						ring.SetAvailIdx(uint16(next(2)))
					case 1:
						ring.SetDesc(int(next(1)%8), guest.GPA(next(3)), uint32(next(2)), uint16(next(1)), uint16(next(1)))
					case 2:
						ring.SetHead(uint16(next(1)), uint16(next(1)))
					default:
						ring.Add(vt.Buf{Addr: guest.GPA(next(3)), Len: uint32(next(2)), Write: op>>6&1 == 0})
						ring.Publish()
					}
				}
			case 5:
				for _, ring := range r.Rings {
					ring.Kick()
				}
			case 6:
				r.Set(vt.Status, 1, next(1))
			default: // a driver that means well
				if starts++; starts > 50 {
					return
				}
				r.SetConfig(0x10, 4, uint64(bar))
				r.SetConfig(0x14, 4, 0)
				r.SetConfig(4, 2, 6)
				r.start(all)
			}
		}
	})
}

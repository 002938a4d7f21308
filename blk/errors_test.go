package blk_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// failingDisk fails every call while broken is set.
type failingDisk struct {
	*blktest.Thin
	broken atomic.Bool
	cause  error
}

func newFailingDisk() *failingDisk {
	d := &failingDisk{Thin: newThin(diskSize), cause: errors.New("the cable is out")}
	d.Fault = func(string, int64) error {
		if d.broken.Load() {
			return d.cause
		}
		return nil
	}
	return d
}

// stops collects what a device says when it stops.
type stops struct {
	mu   sync.Mutex
	errs []error
}

func (s *stops) add(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, err)
}

// wait waits until the device has stopped n times.
func (s *stops) wait(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); len(s.all()) != n; time.Sleep(time.Millisecond) {
		if got := len(s.all()); got > n || time.Now().After(end) {
			t.Fatalf("the device has stopped %d times, want %d", got, n)
		}
	}
}

func (s *stops) all() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.errs)
}

// TestErrorStop lets the disk fail for a while under requests of each kind: the
// guest gets no answer before Resume, and the right one after it.
func TestErrorStop(t *testing.T) {
	for _, c := range []struct {
		name, op string
		kind     uint32
		data     []byte
		used     uint32
		mask     uint64
	}{
		{"IN", "read", tIn, make([]byte, 4096), 4097, allFeatures},
		{"OUT", "write", tOut, bytes.Repeat([]byte{3}, 4096), 1, allFeatures},
		{"OUT in write-through", "write", tOut, bytes.Repeat([]byte{3}, 4096), 1, ^uint64(1 << fFlush)},
		{"FLUSH", "flush", tFlush, nil, 1, allFeatures},
		{"DISCARD", "discard", tDiscard, payload(seg{8, 8, 0}), 1, allFeatures},
		{"WRITE_ZEROES", "write zeroes", tWriteZeroes, payload(seg{8, 8, 0}), 1, allFeatures},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk, said := newFailingDisk(), &stops{}
			r := newRig(t, blk.Config{Disk: disk, Queues: 2, Name: "root", OnError: blk.ErrorStop, Stopped: said.add})
			r.start(c.mask, 2, 16)
			q := r.newRequest(c.kind, 8, len(c.data))
			if len(c.data) > 0 {
				copy(q.bytes(), c.data)
			}
			other := r.newRequest(tGetID, 0, 20)
			for turn := range 3 {
				q.set(c.kind, 8)
				other.set(tGetID, 0)
				disk.broken.Store(true)
				submit(t, r.d.Rings[0], q.bufs(c.kind == tIn))
				said.wait(t, turn+1)
				err := said.all()[turn]
				if !errors.Is(err, disk.cause) || !strings.Contains(err.Error(), "disk root: "+c.op) {
					t.Errorf("stopped because of %v", err)
				}
				submit(t, r.d.Rings[1], other.bufs(true))
				time.Sleep(2 * time.Millisecond)
				said.wait(t, turn+1) // no second time
				if q.code() != sUntouched || other.code() != sUntouched {
					t.Fatalf("statuses %#x and %#x while the device is stopped, want none", q.code(), other.code())
				}
				disk.broken.Store(false)
				r.dev.Resume()
				if _, used := r.wait(r.d.Rings[0]); q.code() != sOK || used != c.used {
					t.Errorf("status %d, used length %d; want OK, %d", q.code(), used, c.used)
				}
				if r.wait(r.d.Rings[1]); other.code() != sOK {
					t.Errorf("status %d on the other queue", other.code())
				}
			}
			if s := r.dev.Stats()[0]; s.Errors != 0 || s.Malformed != 0 {
				t.Errorf("stats %+v", s)
			}
			r.dev.Resume() // which does nothing
		})
	}
}

// submit makes one chain available.
func submit(t *testing.T, ring *vt.Ring, bufs []vt.Buf) {
	t.Helper()
	if _, ok := ring.Add(bufs...); !ok {
		t.Fatal("the ring is full")
	}
	if ring.Publish() {
		ring.Kick()
	}
}

// TestErrorStopBatch stops in the middle of a batch, and again: what was done is
// done once, and the order is kept.
func TestErrorStopBatch(t *testing.T) {
	disk, said := newFailingDisk(), &stops{}
	var served atomic.Int64
	disk.Fault = func(string, int64) error {
		if disk.broken.Load() || served.Load() == 5 && !disk.broken.Swap(true) {
			return disk.cause
		}
		served.Add(1)
		return nil
	}
	r := newRig(t, blk.Config{Disk: disk, OnError: blk.ErrorStop, Stopped: said.add})
	r.start(allFeatures, 1, 64)
	q := r.newRequest(tIn, 0, 512)
	ring := r.d.Rings[0]
	for range 12 {
		if _, ok := ring.Add(q.bufs(true)...); !ok {
			t.Fatal("the ring is full")
		}
	}
	ring.Publish()
	ring.Kick()
	said.wait(t, 1)
	r.dev.Resume() // too early
	said.wait(t, 2)
	for range 5 {
		r.wait(ring)
	}
	if served.Load() != 5 || ring.UsedIdx() != 5 {
		t.Fatalf("%d requests served, %d completed; want 5", served.Load(), ring.UsedIdx())
	}
	served.Add(1)
	disk.broken.Store(false)
	r.dev.Resume()
	for range 7 {
		r.wait(ring)
	}
	if served.Load() != 13 || ring.UsedIdx() != 12 {
		t.Errorf("%d requests served, %d completed; want 12", served.Load()-1, ring.UsedIdx())
	}
}

// TestErrorStopReset resets a stopped device (P23), and pauses one.
func TestErrorStopReset(t *testing.T) {
	t.Run("reset", func(t *testing.T) {
		disk, said := newFailingDisk(), &stops{}
		disk.broken.Store(true)
		r := newRig(t, blk.Config{Disk: disk, OnError: blk.ErrorStop, Stopped: said.add})
		r.start(allFeatures, 1, 16)
		q := r.newRequest(tIn, 0, 512)
		submit(t, r.d.Rings[0], q.bufs(true))
		said.wait(t, 1)
		ring := r.d.Rings[0]
		if err := r.d.Reset(); err != nil {
			t.Fatal(err)
		}
		disk.broken.Store(false)
		r.dev.Resume()
		r.start(allFeatures, 1, 16)
		if code, _, _ := r.do(tIn, 0, make([]byte, 512)); code != sOK {
			t.Errorf("status %d after the reset", code)
		}
		if ring.UsedIdx() != 0 || q.code() != sUntouched {
			t.Error("the request of before the reset was completed")
		}
	})
	t.Run("pause", func(t *testing.T) {
		disk, said := newFailingDisk(), &stops{}
		disk.broken.Store(true)
		dev, err := blk.New(blk.Config{Disk: disk, OnError: blk.ErrorStop, Stopped: said.add})
		if err != nil {
			t.Fatal(err)
		}
		m := vt.NewMachine()
		ring := vt.NewRing(m, 16, 0)
		bell, err := virtio.NewDoorbell()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = bell.Close() }()
		vq, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{
			Size: 16, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used, Doorbell: bell, Events: noEvents{t},
		})
		if err != nil {
			t.Fatal(err)
		}
		dev.Negotiated(0)
		if err := dev.Start(); err != nil {
			t.Fatal(err)
		}
		q := (&rig{tb: t, m: m}).newRequest(tIn, 0, 512)
		ring.Add(q.bufs(true)...)
		ring.Publish()
		dev.StartQueue(0, vq)
		vq.Kick()
		said.wait(t, 1)
		dev.StopQueue(0)
		disk.broken.Store(false)
		dev.Resume()
		dev.StartQueue(0, vq)
		vq.Kick()
		for ring.UsedIdx() != 1 {
			time.Sleep(10 * time.Microsecond)
		}
		dev.Stop()
		if _, used, ok := ring.TakeUsed(); !ok || used != 513 || q.code() != sOK {
			t.Errorf("status %d, used length %d; want OK, 513", q.code(), used)
		}
	})
}

// TestCacheOffFails turns the write cache off while the disk cannot flush: the
// guest is never told that the cache is off, or else gets no answer, while what
// it has written is not stable (B11).
func TestCacheOffFails(t *testing.T) {
	begin := func(t *testing.T, cfg blk.Config, disk *failingDisk) (r *rig, writeback func() uint64, turnOff func()) {
		cfg.Disk = disk
		r = newRig(t, cfg)
		r.start(allFeatures, 1, 16)
		if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sOK {
			t.Fatalf("status %d", code)
		}
		disk.broken.Store(true)
		writeback = func() uint64 { return r.d.DeviceConfig(0x20, 1) }
		turnOff = func() { r.m.Write(bar+guest.GPA(r.d.Device.Offset)+0x20, 1, 0) }
		turnOff()
		return r, writeback, turnOff
	}
	t.Run("report", func(t *testing.T) {
		disk := newFailingDisk()
		_, writeback, turnOff := begin(t, blk.Config{}, disk)
		if got := writeback(); got != 1 {
			t.Errorf("writeback is %d after a failed flush, want 1", got)
		}
		disk.broken.Store(false)
		if turnOff(); writeback() != 0 {
			t.Error("the cache cannot be turned off when the disk is sound again")
		}
	})
	t.Run("stop", func(t *testing.T) {
		disk, said := newFailingDisk(), &stops{}
		r, writeback, _ := begin(t, blk.Config{OnError: blk.ErrorStop, Stopped: said.add}, disk)
		said.wait(t, 1)
		if got := writeback(); got != 0 {
			t.Errorf("writeback is %d, want 0", got)
		}
		r.dev.Resume() // too early
		said.wait(t, 2)
		disk.broken.Store(false)
		before := disk.Flushes()
		r.dev.Resume()
		if code, _, _ := r.do(tGetID, 0, make([]byte, 20)); code != sOK {
			t.Errorf("status %d", code)
		}
		if got := disk.Flushes() - before; got != 1 {
			t.Errorf("%d flushes before the next request completed, want 1", got)
		}
	})
}

package blk_test

import (
	"bytes"
	"errors"
	"math"
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

// TestErrorStopOutside asks for what is not on the disk in every way: that is the
// guest's mistake, and stops nothing (B1).
func TestErrorStopOutside(t *testing.T) {
	r := newRig(t, blk.Config{Disk: newThin(diskSize), OnError: blk.ErrorStop, Stopped: func(err error) { t.Error(err) }})
	r.start(allFeatures, 1, 16)
	const end = diskSize / 512
	for _, sector := range []uint64{end - 1, end, 1 << 55, 1<<55 - 1, 1 << 63, math.MaxUint64 - 1, math.MaxUint64} {
		for kind, data := range map[uint32][]byte{
			tIn: make([]byte, 1024), tOut: make([]byte, 1024),
			tDiscard: payload(seg{sector, 2, 0}), tWriteZeroes: payload(seg{sector, 2, 0}),
		} {
			if code, _, _ := r.do(kind, sector, data); code != sIOErr {
				t.Errorf("type %d at sector %#x: status %d, want IOERR", kind, sector, code)
			}
		}
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

// TestCacheOffFails turns the write cache off while the disk cannot flush: until
// it can, no write is answered as if it were stable (B11).
func TestCacheOffFails(t *testing.T) {
	begin := func(t *testing.T, cfg blk.Config, disk *failingDisk) *rig {
		cfg.Disk = disk
		r := newRig(t, cfg)
		r.start(allFeatures, 1, 16)
		if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sOK {
			t.Fatalf("status %d", code)
		}
		disk.broken.Store(true)
		r.m.Write(bar+guest.GPA(r.d.Device.Offset)+0x20, 1, 0)
		if got := r.d.DeviceConfig(0x20, 1); got != 0 {
			t.Errorf("writeback is %d, want 0", got)
		}
		return r
	}
	t.Run("report", func(t *testing.T) {
		disk := newFailingDisk()
		cause := disk.Fault
		disk.Fault = func(op string, off int64) error {
			if op != "flush" {
				return nil
			}
			return cause(op, off)
		}
		r := begin(t, blk.Config{}, disk)
		if code, _, _ := r.do(tIn, 0, make([]byte, 512)); code != sOK {
			t.Errorf("a read has status %d", code)
		}
		if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sIOErr {
			t.Errorf("a write has status %d, want IOERR", code)
		}
		disk.broken.Store(false)
		before := disk.Flushes()
		if code, _, _ := r.do(tGetID, 0, make([]byte, 20)); code != sOK || disk.Flushes() != before+1 {
			t.Errorf("status %d after %d flushes, want OK after the one that is owed", code, disk.Flushes()-before)
		}
	})
	t.Run("stop", func(t *testing.T) {
		disk, said := newFailingDisk(), &stops{}
		r := begin(t, blk.Config{OnError: blk.ErrorStop, Stopped: said.add}, disk)
		said.wait(t, 1)
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

// TestCacheOffDoesNotWait turns the write cache off of a disk whose flush takes
// long: the vCPU that does it goes on, and no request is answered meanwhile.
func TestCacheOffDoesNotWait(t *testing.T) {
	disk := newThin(diskSize)
	entered, release := make(chan struct{}, 1), make(chan struct{})
	disk.Fault = func(op string, _ int64) error {
		if op == "flush" {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	r := newRig(t, blk.Config{Disk: disk, Queues: 2})
	r.start(allFeatures, 2, 16)
	r.m.Write(bar+guest.GPA(r.d.Device.Offset)+0x20, 1, 0)
	<-entered // by a worker, for the write to the register has returned
	q := r.newRequest(tIn, 0, 512)
	submit(t, r.d.Rings[1], q.bufs(true))
	time.Sleep(5 * time.Millisecond)
	if q.code() != sUntouched {
		t.Error("a request was answered before the flush had ended")
	}
	close(release)
	if r.wait(r.d.Rings[1]); q.code() != sOK {
		t.Errorf("status %d", q.code())
	}
}

// TestUnsafe checks that a device for which nothing has to survive flushes its
// disk on no account.
func TestUnsafe(t *testing.T) {
	for name, mask := range map[string]uint64{"cache": allFeatures, "write-through": ^uint64(1 << fFlush)} {
		t.Run(name, func(t *testing.T) {
			disk := newThin(diskSize)
			r := newRig(t, blk.Config{Disk: disk, Unsafe: true})
			r.start(mask, 1, 16)
			for _, kind := range []uint32{tOut, tFlush, tWriteZeroes} {
				data := map[uint32][]byte{tOut: make([]byte, 512), tWriteZeroes: payload(seg{0, 8, 0})}[kind]
				if code, _, _ := r.do(kind, 0, data); code != sOK {
					t.Errorf("status %d of type %d", code, kind)
				}
			}
			r.m.Write(bar+guest.GPA(r.d.Device.Offset)+0x20, 1, 0)
			if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sOK || disk.Flushes() != 0 {
				t.Errorf("status %d, %d flushes; want OK, 0", code, disk.Flushes())
			}
		})
	}
}

// TestLost tells of the first write that is answered with an error, and of no read.
func TestLost(t *testing.T) {
	for _, kind := range []uint32{tOut, tFlush, tWriteZeroes} {
		var said stops
		disk := newFailingDisk()
		r := newRig(t, blk.Config{Disk: disk, Name: "root", Lost: said.add})
		r.start(allFeatures, 1, 16)
		disk.broken.Store(true)
		data := make([]byte, 512)
		switch kind {
		case tFlush:
			data = nil
		case tWriteZeroes:
			data = payload(seg{0, 1, 0})
		}
		if code, _, _ := r.do(tIn, 0, make([]byte, 512)); code != sIOErr || len(said.all()) != 0 {
			t.Fatalf("a read has status %d, and it is said %v", code, said.all())
		}
		for range 2 {
			if code, _, _ := r.do(kind, 0, data); code != sIOErr {
				t.Fatalf("request %d has status %d", kind, code)
			}
		}
		if all := said.all(); len(all) != 1 || !errors.Is(all[0], disk.cause) || !strings.Contains(all[0].Error(), "disk root: ") {
			t.Errorf("after request %d it is said %v", kind, all)
		}
	}
}

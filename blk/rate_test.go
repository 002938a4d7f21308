package blk_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// TestRates sends more than the rates allow on two queues at once and checks
// that it takes as long as it must, and that the workers sleep meanwhile.
func TestRates(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  blk.Config
		n    int           // requests of 4 KiB per queue
		min  time.Duration // that they take
	}{
		{"operations", blk.Config{OpRate: blk.Rate{PerSecond: 500, Burst: 10}}, 30, 90 * time.Millisecond},
		{"bytes", blk.Config{ByteRate: blk.Rate{PerSecond: 1 << 20, Burst: 64 << 10}}, 20, 80 * time.Millisecond},
		{"the stricter of both", blk.Config{
			ByteRate: blk.Rate{PerSecond: 1 << 40},
			OpRate:   blk.Rate{PerSecond: 500, Burst: 10},
		}, 30, 90 * time.Millisecond},
	} {
		for _, kind := range []uint32{tIn, tOut} {
			t.Run(c.name, func(t *testing.T) {
				cfg := c.cfg
				cfg.Disk, cfg.Queues = newMemory(diskSize), 2
				r := newRig(t, cfg)
				r.start(allFeatures, 2, 128)
				begin := time.Now()
				for _, ring := range r.d.Rings {
					for range c.n {
						if _, ok := ring.Add(r.newRequest(kind, 0, 4096).bufs(kind == tIn)...); !ok {
							t.Fatal("the ring is full")
						}
					}
					ring.Publish()
					ring.Kick()
				}
				for _, ring := range r.d.Rings {
					for range c.n {
						r.wait(ring)
					}
				}
				// The burst was full, and the last request of each queue need
				// not be paid for.
				if took := time.Since(begin); took < c.min {
					t.Errorf("took %v, want at least %v", took, c.min)
				}
				var waits uint64
				for _, s := range r.dev.Stats() {
					waits += s.Throttled
					if s.Errors != 0 {
						t.Errorf("stats %+v", s)
					}
				}
				// A worker that did not sleep would look thousands of times.
				if waits == 0 || waits > uint64(20*c.n) {
					t.Errorf("%d waits for %d requests", waits, 2*c.n)
				}
			})
		}
	}
}

// TestRateReset resets a device that is deep in debt. The driver's patience ends
// long before the debt (P23).
func TestRateReset(t *testing.T) {
	disk := newMemory(diskSize)
	r := newRig(t, blk.Config{Disk: disk, ByteRate: blk.Rate{PerSecond: 1, Burst: 1}})
	r.start(allFeatures, 1, 16)
	if code, _, _ := r.do(tIn, 0, make([]byte, 4096)); code != sOK {
		t.Fatalf("status %d: a request larger than the burst does not pass", code)
	}
	ring := r.d.Rings[0]
	for range 3 {
		ring.Add(r.newRequest(tOut, 0, 512).bufs(false)...)
	}
	ring.Publish()
	ring.Kick()
	time.Sleep(20 * time.Millisecond)
	if s := r.dev.Stats()[0]; s.Writes != 0 || s.Throttled > 2 {
		t.Errorf("%d writes, %d waits in 20 ms: want none and at most 2", s.Writes, s.Throttled)
	}
	before := bytes.Clone(disk.Bytes)
	if err := r.d.Reset(); err != nil {
		t.Fatal(err)
	}
	if got := ring.UsedIdx(); got != 1 || !bytes.Equal(disk.Bytes, before) {
		t.Errorf("used.idx is %d after the reset, want 1", got)
	}
}

// TestRateZeroes uses up a rate by zeros.
func TestRateZeroes(t *testing.T) {
	r := newRig(t, blk.Config{Disk: newMemory(diskSize), ByteRate: blk.Rate{PerSecond: 1, Burst: 1}})
	r.start(allFeatures, 1, 16)
	if code, _, _ := r.do(tWriteZeroes, 0, payload(seg{0, 8, 0})); code != sOK {
		t.Fatalf("status %d", code)
	}
	q := r.newRequest(tIn, 0, 512)
	submit(t, r.d.Rings[0], q.bufs(true))
	time.Sleep(10 * time.Millisecond)
	if q.code() != sUntouched {
		t.Errorf("status %d of a read beyond the rate, want none yet", q.code())
	}
}

// TestRatePause stops and starts a queue while it waits for its rate: no request
// is lost or done twice.
func TestRatePause(t *testing.T) {
	dev, err := blk.New(blk.Config{Disk: newMemory(diskSize), OpRate: blk.Rate{PerSecond: 1000, Burst: 1}})
	if err != nil {
		t.Fatal(err)
	}
	m := vt.NewMachine()
	ring := vt.NewRing(m, 64, 0)
	bell, err := virtio.NewDoorbell()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bell.Close() }()
	q, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{
		Size: 64, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used, Doorbell: bell, Events: noEvents{t},
	})
	if err != nil {
		t.Fatal(err)
	}
	dev.Negotiated(0)
	if err := dev.Start(); err != nil {
		t.Fatal(err)
	}
	req := (&rig{tb: t, m: m}).newRequest(tFlush, 0, 0)
	for range 20 {
		ring.Add(req.bufs(false)...)
	}
	ring.Publish()
	for turns := 0; ring.UsedIdx() != 20; turns++ {
		dev.StartQueue(0, q)
		q.Kick()
		time.Sleep(time.Millisecond)
		dev.StopQueue(0)
		if turns == 10_000 {
			t.Fatal("the requests are not served")
		}
	}
	if got := dev.Stats()[0]; got.Flushes != 20 || got.Throttled == 0 {
		t.Errorf("stats %+v", got)
	}
	dev.Stop()
}

// TestRateDoesNotAllocate serves requests under a rate that is never reached.
func TestRateDoesNotAllocate(t *testing.T) {
	rate := blk.Rate{PerSecond: 1 << 50}
	dev, err := blk.New(blk.Config{Disk: newMemory(diskSize), ByteRate: rate, OpRate: rate})
	if err != nil {
		t.Fatal(err)
	}
	b := newBenchOn(t, dev, 0, tIn, 4096, 16)
	if n := testing.AllocsPerRun(1000, b.round); n != 0 {
		t.Errorf("%v allocations per 16 requests", n)
	}
}

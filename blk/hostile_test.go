package blk_test

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// TestHostileMemory rewrites rings, descriptors, indirect tables and headers at
// random while the device works on them (V18), with kicks and resets between,
// and then asks for an honest read. It runs without the race detector, which
// would report just what the test is about.
func TestHostileMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the races are the point")
	}
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	const queues, size = 2, 16
	r := newRig(t, blk.Config{Disk: newMemory(diskSize), Queues: queues})
	for round := range uint64(20) {
		r.start(allFeatures, queues, size)
		q := r.newRequest(tIn, 0, 4096)
		table := r.m.Alloc(16*size, 16)
		targets := [][]byte{
			r.m.Bytes(table, 48), r.m.Bytes(q.header, 16),
			r.m.Bytes(r.d.Rings[0].Desc, 16*size), r.m.Bytes(r.d.Rings[1].Desc, 16*size),
		}
		if round%4 == 0 { // soon breaks the queue
			targets = append(targets, r.m.Bytes(r.d.Rings[0].Avail, 6+2*size))
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		for i := range uint64(2) {
			noise := rand.New(rand.NewPCG(seed, 2*round+i))
			wg.Go(func() {
				for n := 0; !stop.Load(); n++ {
					at := targets[noise.IntN(len(targets))]
					at[noise.IntN(len(at))] = byte(noise.Uint32()) >> noise.IntN(8)
					if n%500 == 0 {
						time.Sleep(10 * time.Microsecond) // let the workers be woken
					}
				}
			})
		}
		rnd := rand.New(rand.NewPCG(seed, 1000+round))
		var idx [queues]uint16
		for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); {
			ring := r.d.Rings[rnd.IntN(queues)]
			at := &idx[ring.Index]
			if ring.UsedIdx() != *at {
				time.Sleep(20 * time.Microsecond)
				continue // not done with the last lot, or broken
			}
			ring.Table(table, q.bufs(rnd.IntN(2) == 0)...)
			for i := range size {
				ring.SetDesc(i, table, 48, vt.Indirect, 0)
				ring.SetHead(*at+uint16(i), uint16(i))
			}
			*at += uint16(1 + rnd.IntN(size)) //nolint:govet // unusedwrite: it is read in a later round
			ring.SetAvailIdx(*at)
			ring.Kick()
			r.d.DeviceConfig(guest.GPA(rnd.IntN(64)), 4)
		}
		stop.Store(true)
		wg.Wait()
	}
	r.start(allFeatures, queues, size)
	if code, used, _ := r.do(tIn, 0, make([]byte, 512)); code != sOK || used != 513 {
		t.Errorf("an honest read: status %d, used length %d", code, used)
	}
	var malformed, served uint64
	for _, s := range r.dev.Stats() {
		malformed += s.Malformed
		served += s.Reads + s.Writes + s.Others + s.Flushes
	}
	t.Logf("%d requests served, %d chains malformed", served, malformed)
	if malformed == 0 || served < 1000 {
		t.Errorf("%d requests served, %d chains malformed: the test does not bite", served, malformed)
	}
}

// TestResetUnderLoad resets the device while every queue has requests in
// flight, and checks that a request made available afterwards is served (P23).
func TestResetUnderLoad(t *testing.T) {
	disk := newMemory(diskSize)
	disk.Fault = func(string, int64) error { time.Sleep(20 * time.Microsecond); return nil }
	r := newRig(t, blk.Config{Disk: disk, Queues: 4})
	var reqs [4]*request
	for i := range reqs {
		reqs[i] = r.newRequest(tIn, 0, 512)
	}
	for range 40 {
		r.start(allFeatures, 4, 64)
		for i, ring := range r.d.Rings {
			for range 20 {
				ring.Add(reqs[i].bufs(true)...)
			}
			ring.Publish()
			ring.Kick()
		}
		rings := r.d.Rings
		if err := r.d.Reset(); err != nil {
			t.Fatal(err)
		}
		before := [4]uint16{}
		for i, ring := range rings {
			before[i] = ring.UsedIdx()
			ring.Kick()
			reqs[i].set(tIn, 0)
		}
		time.Sleep(100 * time.Microsecond)
		for i, ring := range rings {
			if ring.UsedIdx() != before[i] || reqs[i].code() != sUntouched {
				t.Fatal("the device is at work after a reset")
			}
		}
	}
	r.start(allFeatures, 4, 64)
	if code, _, _ := r.do(tIn, 0, make([]byte, 512)); code != sOK {
		t.Errorf("status %d after the resets", code)
	}
}

// TestPauseResume stops a queue with requests waiting and starts it again, as a
// transport does for a pause: nothing moves meanwhile, and nothing is lost.
func TestPauseResume(t *testing.T) {
	for _, features := range []uint64{1 << virtio.FeatureEventIdx, 0} {
		dev, err := blk.New(blk.Config{Disk: newMemory(diskSize)})
		if err != nil {
			t.Fatal(err)
		}
		m := vt.NewMachine()
		ring := vt.NewRing(m, 64, features)
		bell, err := virtio.NewDoorbell()
		if err != nil {
			t.Fatal(err)
		}
		q, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{
			Size: 64, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used,
			Features: features, Doorbell: bell, Events: noEvents{t},
		})
		if err != nil {
			t.Fatal(err)
		}
		dev.Negotiated(features)
		if err := dev.Start(); err != nil {
			t.Fatal(err)
		}
		req := (&rig{tb: t, m: m}).newRequest(tFlush, 0, 0)
		for turn := range uint16(20) {
			for range 10 {
				ring.Add(req.bufs(false)...)
			}
			ring.Publish()
			q.Kick()
			time.Sleep(100 * time.Microsecond)
			if ring.UsedIdx() != turn*10 {
				t.Fatal("the device is at work while the queue is stopped")
			}
			dev.StartQueue(0, q)
			q.Kick()
			for ring.UsedIdx() != turn*10+10 {
				time.Sleep(10 * time.Microsecond)
			}
			dev.StopQueue(0)
			dev.StopQueue(0) // which does nothing
			for range 10 {
				ring.TakeUsed()
			}
		}
		if got := dev.Stats()[0]; got.Flushes != 200 || got.Interrupts+got.Suppressed < 20 {
			t.Errorf("stats %+v", got)
		}
		dev.Stop()
		if err := bell.Close(); err != nil {
			t.Error(err)
		}
	}
}

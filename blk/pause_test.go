package blk_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

// countingDisk knows how many calls are under way.
type countingDisk struct {
	*blktest.Thin
	active, calls atomic.Int64
}

func newCountingDisk() *countingDisk { return &countingDisk{Thin: newThin(diskSize)} }

func (d *countingDisk) ReadvAt(iov [][]byte, off int64) error {
	d.active.Add(1)
	defer d.active.Add(-1)
	d.calls.Add(1)
	time.Sleep(20 * time.Microsecond)
	return d.Thin.ReadvAt(iov, off)
}

// TestPause pauses a device again and again while drivers keep all its queues
// busy: between Pause and resume the disk is left alone and no request is half
// answered, and afterwards every request of the drivers is.
func TestPause(t *testing.T) {
	const queues, perQueue = 4, 300
	disk := newCountingDisk()
	r := newRig(t, blk.Config{Disk: disk, Queues: queues})
	r.start(allFeatures, queues, 16)
	requests := make([]*request, queues)
	for i := range requests {
		requests[i] = r.newRequest(tIn, 0, 512)
	}
	var drivers sync.WaitGroup
	for i, ring := range r.d.Rings {
		drivers.Go(func() {
			for sent, got := 0, 0; got < perQueue; {
				for sent < perQueue {
					if _, ok := ring.Add(requests[i].bufs(true)...); !ok {
						break
					}
					sent++
				}
				if ring.Publish() {
					ring.Kick()
				}
				r.wait(ring)
				got++
			}
		})
	}
	done := make(chan struct{})
	go func() {
		drivers.Wait()
		close(done)
	}()
	pauses := 0
	for running := true; running; {
		resume := r.dev.Pause()
		again := r.dev.Pause() // they nest
		again()
		before := disk.calls.Load()
		time.Sleep(200 * time.Microsecond)
		if active, after := disk.active.Load(), disk.calls.Load(); active != 0 || after != before {
			t.Fatalf("%d requests are at the disk and %d have begun during a pause", active, after-before)
		}
		var served, used uint64
		for i, s := range r.dev.Stats() {
			served += s.Reads
			used += uint64(r.d.Rings[i].UsedIdx())
		}
		if served != used {
			t.Fatalf("%d requests have been served, %d answered", served, used)
		}
		resume()
		resume() // which does nothing
		pauses++
		select {
		case <-done:
			running = false
		case <-time.After(300 * time.Microsecond):
		}
	}
	if disk.calls.Load() != queues*perQueue || pauses < 2 {
		t.Errorf("%d requests over %d pauses, want %d", disk.calls.Load(), pauses, queues*perQueue)
	}
}

// TestPauseReset resets a paused device, which then starts paused (P23).
func TestPauseReset(t *testing.T) {
	disk := newCountingDisk()
	r := newRig(t, blk.Config{Disk: disk})
	r.start(allFeatures, 1, 16)
	resume := r.dev.Pause()
	old := r.newRequest(tIn, 0, 512)
	submit(t, r.d.Rings[0], old.bufs(true))
	if err := r.d.Reset(); err != nil {
		t.Fatal(err)
	}
	r.start(allFeatures, 1, 16)
	q := r.newRequest(tIn, 0, 512)
	submit(t, r.d.Rings[0], q.bufs(true))
	time.Sleep(2 * time.Millisecond)
	if disk.calls.Load() != 0 {
		t.Error("a request was served during a pause")
	}
	resume()
	if r.wait(r.d.Rings[0]); q.code() != sOK || old.code() != sUntouched {
		t.Errorf("statuses %#x and %#x, want OK and none", q.code(), old.code())
	}
}

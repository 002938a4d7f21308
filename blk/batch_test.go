package blk_test

import (
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// TestBatch fills a queue and has one batch of it served: however much there is,
// the driver gets to see some of it soon, and sooner over a slow disk (V17).
func TestBatch(t *testing.T) {
	for name, c := range map[string]struct {
		delay time.Duration // of the disk
		want  uint16        // requests completed by one batch
	}{
		"fast disk": {0, 16},
		"slow disk": {time.Millisecond, 1},
	} {
		t.Run(name, func(t *testing.T) {
			disk := newThin(diskSize)
			disk.Fault = func(string, int64) error {
				time.Sleep(c.delay)
				return nil
			}
			dev, err := blk.New(blk.Config{Disk: disk})
			if err != nil {
				t.Fatal(err)
			}
			// A machine with other things to do may end a batch early.
			most := uint16(0)
			for tries := 0; tries < 50 && most != c.want; tries++ {
				most = max(most, longestBatch(t, dev))
			}
			if most != c.want {
				t.Errorf("a batch completed %d requests, want %d", most, c.want)
			}
		})
	}
}

// longestBatch lets dev serve a ring full of requests, and returns how many one of its
// batches completed at most.
func longestBatch(t *testing.T, dev *blk.Device) (most uint16) {
	t.Helper()
	const size = 256
	m := vt.NewMachine()
	ring := vt.NewRing(m, size, 0)
	vq, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{Size: size, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used, Events: noEvents{t}})
	if err != nil {
		t.Fatal(err)
	}
	q := (&rig{tb: t, m: m}).newRequest(tIn, 0, 512)
	for range 64 {
		if _, ok := ring.Add(q.bufs(true)...); !ok {
			t.Fatal("the ring is full")
		}
	}
	ring.Publish()
	batch := dev.Batch(0, vq)
	before := uint16(0)
	for range 3 {
		if !batch() {
			t.Error("a batch ends as if the queue were empty")
		}
		most = max(most, ring.UsedIdx()-before)
		before = ring.UsedIdx()
	}
	return most
}

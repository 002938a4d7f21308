package blk_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// noEvents is a transport that has no use for what a queue tells it.
type noEvents struct{ tb testing.TB }

func (noEvents) UsedBuffers(int) {}
func (n noEvents) QueueBroken(_ int, err *virtio.GuestError) {
	n.tb.Error(err)
}

// bench is a device without a transport, one of whose queues is served in the
// goroutine of the caller: what is left is calf's own work on a request.
type bench struct {
	dev   *blk.Device
	ring  *vt.Ring
	batch func() bool
	reqs  []*request
	n     int
	idx   uint16
}

// newBench prepares n requests of a kind, each of size bytes in an indirect
// table of three, as Linux sends them.
func newBench(tb testing.TB, disk blk.Disk, kind uint32, size, n int) *bench {
	tb.Helper()
	dev, err := blk.New(blk.Config{Disk: disk, Queues: 4})
	if err != nil {
		tb.Fatal(err)
	}
	return newBenchOn(tb, dev, 0, kind, size, n)
}

func newBenchOn(tb testing.TB, dev *blk.Device, queue int, kind uint32, size, n int) *bench {
	tb.Helper()
	const features = 1<<virtio.FeatureIndirectDesc | 1<<virtio.FeatureEventIdx | 1<<fFlush | 1<<fDiscard | 1<<fWriteZeroes
	dev.Negotiated(features)
	if err := dev.Start(); err != nil {
		tb.Fatal(err)
	}
	m := vt.NewMachineOf(4 << 20)
	ring := vt.NewRing(m, 256, features)
	q, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{
		Index: queue, Size: 256, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used, Features: features, Events: noEvents{tb},
	})
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{tb: tb, m: m}
	b := &bench{dev: dev, ring: ring, batch: dev.Batch(queue, q), n: n}
	for i := range n {
		req := r.newRequest(kind, uint64(i*size/512)%512, size)
		b.reqs = append(b.reqs, req)
		bufs := req.bufs(kind == tIn || kind == tGetID)
		table := m.Alloc(64, 16)
		ring.Table(table, bufs...)
		ring.SetDesc(i, table, uint32(16*len(bufs)), vt.Indirect, 0)
	}
	return b
}

// fill puts data into every request.
func (b *bench) fill(data []byte) {
	for _, req := range b.reqs {
		copy(req.bytes(), data)
	}
}

// round makes all requests available once and has them served.
func (b *bench) round() {
	for i := range b.n {
		b.ring.SetHead(b.idx+uint16(i), uint16(i))
	}
	b.idx += uint16(b.n)
	b.ring.SetUsedEvent(b.idx - 1)
	b.ring.SetAvailIdx(b.idx)
	for b.batch() {
	}
	if b.ring.UsedIdx() != b.idx {
		panic("BUG: requests are left over")
	}
}

// nullDisk moves no data and takes no time.
type nullDisk struct{}

func (nullDisk) ReadvAt([][]byte, int64) error  { return nil }
func (nullDisk) WritevAt([][]byte, int64) error { return nil }
func (nullDisk) Flush() error                   { return nil }
func (nullDisk) Size() int64                    { return 1 << 30 }
func (nullDisk) ReadOnly() bool                 { return false }

// BenchmarkRequest measures what a request costs calf beyond the disk: parsing,
// completion and its share of a batch. Every queue has a goroutine of its own.
func BenchmarkRequest(b *testing.B) {
	for _, op := range []struct {
		name string
		kind uint32
	}{{"read", tIn}, {"write", tOut}, {"flush", tFlush}} {
		for _, queues := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("op=%s/size=4k/qd=32/queues=%d", op.name, queues), func(b *testing.B) {
				dev, err := blk.New(blk.Config{Disk: nullDisk{}, Queues: queues})
				if err != nil {
					b.Fatal(err)
				}
				const depth = 32
				var all []*bench
				for i := range queues {
					all = append(all, newBenchOn(b, dev, i, op.kind, 4096, depth))
				}
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				for _, q := range all {
					wg.Go(func() {
						for i := 0; i < b.N/queues; i += depth {
							q.round()
						}
					})
				}
				wg.Wait()
			})
		}
	}
}

// FuzzRequest gives the device requests of any bytes in any framing. Whatever
// comes, it must answer within the chain, never touch the disk outside its
// bounds, and claim no more bytes than it was given.
func FuzzRequest(f *testing.F) {
	f.Add([]byte{tIn, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}, []byte{16, 128 + 64, 128 + 1})
	f.Add([]byte{tOut, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, []byte{16, 64, 128 + 1})
	f.Add([]byte{tGetID}, []byte{8, 8, 128 + 21})
	f.Add([]byte{tFlush}, []byte{17, 129})
	f.Add([]byte{}, []byte{3, 129})
	f.Add(append([]byte{tDiscard, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, payload(seg{1, 2, 0}, seg{3, 4, 0})...), []byte{16, 32, 129})
	f.Add(append([]byte{tWriteZeroes, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, payload(seg{1, 2, fUnmap})...), []byte{32, 129})
	const features = 1<<virtio.FeatureIndirectDesc | 1<<virtio.FeatureEventIdx | 1<<fFlush | 1<<fDiscard | 1<<fWriteZeroes
	m := vt.NewMachineOf(1 << 20)
	ringArea := [3]guest.GPA{m.Alloc(16*64, 16), m.Alloc(512, 4), m.Alloc(1024, 4)}
	area := m.Alloc(256<<10, 4096)
	disk := newThin(64 << 10)
	f.Fuzz(func(t *testing.T, header, frame []byte) {
		dev, err := blk.New(blk.Config{Disk: disk})
		if err != nil {
			t.Fatal(err)
		}
		dev.Negotiated(features)
		if err := dev.Start(); err != nil {
			t.Fatal(err)
		}
		clear(m.Bytes(ringArea[0], 8192))
		ring := vt.NewRingAt(m, 64, features, ringArea[0], ringArea[1], ringArea[2])
		q, err := virtio.NewQueue(m.Memory, virtio.QueueConfig{
			Size: 64, Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used, Features: features, Events: noEvents{t},
		})
		if err != nil {
			t.Fatal(err)
		}
		// A frame byte is a buffer: bit 7 says writable, the others the
		// length, in bytes up to 32 and in steps of 64 above.
		var bufs []vt.Buf
		at, writable := area, uint32(0)
		for _, c := range frame[:min(len(frame), 64)] {
			n := uint32(c & 0x7f)
			if n > 32 {
				n = (n - 32) * 64
			}
			bufs = append(bufs, vt.Buf{Addr: at, Len: n, Write: c&0x80 != 0})
			if c&0x80 != 0 {
				writable += n
			}
			at += guest.GPA(n)
		}
		if len(bufs) == 0 {
			return
		}
		copy(m.Bytes(area, 64<<10), header)
		head, _ := ring.Add(bufs...)
		ring.Publish()
		for batch := dev.Batch(0, q); batch(); {
		}
		got, used, ok := ring.TakeUsed()
		if !ok || got != head || used > writable {
			t.Errorf("used head %d, length %d, %v; want head %d, at most %d", got, used, ok, head, writable)
		}
	})
}

// BenchmarkNotifications keeps a number of requests under way on a queue, as a
// guest under load does, through doorbells and messages, and reports how many of
// either a thousand requests cost.
func BenchmarkNotifications(b *testing.B) {
	for name, mask := range map[string]uint64{"on": allFeatures, "off": ^uint64(1 << virtio.FeatureEventIdx)} {
		for _, depth := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("event_idx=%s/qd=%d", name, depth), func(b *testing.B) {
				r := newRig(b, blk.Config{Disk: nullDisk{}})
				r.start(mask, 1, 256)
				ring, q := r.d.Rings[0], r.newRequest(tIn, 0, 4096)
				b.ResetTimer()
				for sent, done := 0, 0; done < b.N; {
					for ; sent < b.N && sent < done+depth; sent++ {
						if _, ok := ring.AddIndirect(q.bufs(true)...); !ok {
							b.Fatal("the ring is full")
						}
					}
					if ring.Publish() {
						ring.Kick()
					}
					r.wait(ring)
					for done++; ; done++ { // what has come meanwhile
						if _, _, ok := ring.TakeUsed(); !ok {
							break
						}
					}
				}
				s := r.dev.Stats()[0]
				b.ReportMetric(float64(s.Interrupts)*1000/float64(b.N), "interrupts/1000req")
				b.ReportMetric(float64(s.Kicks)*1000/float64(b.N), "kicks/1000req")
			})
		}
	}
}

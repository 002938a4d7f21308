package blk_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// wideDisk is large, moves no data, and checks that it is asked for one range
// after the other. The first call says so and waits.
type wideDisk struct {
	t        *testing.T
	entered  chan struct{}
	release  chan struct{}
	calls    atomic.Int64
	next     atomic.Int64
	longest  atomic.Int64
	duration time.Duration // of the others
}

const wideSize = 1 << 30

func (d *wideDisk) Size() int64    { return wideSize }
func (d *wideDisk) ReadOnly() bool { return false }
func (d *wideDisk) Flush() error   { return nil }

func (d *wideDisk) WritevAt(iov [][]byte, off int64) error { return d.ReadvAt(iov, off) }

func (d *wideDisk) ReadvAt(iov [][]byte, off int64) error {
	n := int64(virtio.Len(iov))
	if want := d.next.Swap(off + n); off != want {
		d.t.Errorf("a piece begins at %#x, want %#x", off, want)
	}
	d.longest.Store(max(d.longest.Load(), n))
	if d.calls.Add(1) == 1 {
		close(d.entered)
		<-d.release
	} else {
		time.Sleep(d.duration)
	}
	return nil
}

// TestLongRequest moves a request in pieces, and TestStopInLongRequest ends one:
// neither a reset nor Close waits for all that a guest asks for (P23).
func TestLongRequest(t *testing.T) {
	for kind, name := range map[uint32]string{tIn: "IN", tOut: "OUT"} {
		t.Run(name, func(t *testing.T) {
			r, disk, q := startLong(t, kind, 0)
			close(disk.release)
			r.wait(r.d.Rings[0])
			if q.code() != sOK || disk.next.Load() != longTotal || disk.longest.Load() != 4<<20 {
				t.Errorf("status %#x, moved %d bytes in pieces of up to %d; want OK, %d, 4 MiB",
					q.code(), disk.next.Load(), disk.longest.Load(), longTotal)
			}
		})
	}
}

func TestStopInLongRequest(t *testing.T) {
	for kind, name := range map[uint32]string{tIn: "IN", tOut: "OUT"} {
		t.Run(name, func(t *testing.T) {
			r, disk, q := startLong(t, kind, 2*time.Millisecond)
			done := make(chan struct{})
			go func() {
				defer close(done)
				r.t.Reset()
			}()
			time.Sleep(10 * time.Millisecond)
			close(disk.release)
			<-done
			if disk.next.Load() == longTotal || q.code() != sUntouched || r.d.Rings[0].UsedIdx() != 0 {
				t.Errorf("after a reset %d of %d bytes are moved, status %#x, %d requests completed; want part of it, untouched, 0",
					disk.next.Load(), longTotal, q.code(), r.d.Rings[0].UsedIdx())
			}
		})
	}
}

// longTotal is the length in bytes of the request of startLong.
const longTotal = 11*(15<<20) + 512

// startLong submits a request of buffers that are no multiples of a piece, and
// returns when the disk is at its first.
func startLong(t *testing.T, kind uint32, d time.Duration) (*rig, *wideDisk, *request) {
	t.Helper()
	disk := &wideDisk{t: t, entered: make(chan struct{}), release: make(chan struct{}), duration: d}
	r := newRig(t, blk.Config{Disk: disk})
	r.start(allFeatures, 1, 16)
	q := r.newRequest(kind, 0, 0)
	bufs := []vt.Buf{{Addr: q.header, Len: 16}, {Addr: 1 << 20, Len: 512, Write: kind == tIn}}
	for range 11 {
		bufs = append(bufs, vt.Buf{Addr: guest.GPA(vt.LowSize / 2), Len: 15 << 20, Write: kind == tIn})
	}
	submit(t, r.d.Rings[0], append(bufs, vt.Buf{Addr: q.status, Len: 1, Write: true}))
	<-disk.entered
	return r, disk, q
}

// slowRanges is a Thin disk whose ranges take long, one piece of them at a time.
type slowRanges struct {
	wideDisk
	begun atomic.Int64 // bytes of the pieces begun
}

func (d *slowRanges) DiscardGranularity() int64 { return 4096 }

func (d *slowRanges) Discard(off, n int64) error {
	if d.begun.Add(n); off%(32<<20) != 0 && d.calls.Load() > 0 {
		d.t.Errorf("a piece begins at %#x, inside what a disk may have as a unit", off)
	}
	return d.ReadvAt([][]byte{nil}, d.next.Load())
}

func (d *slowRanges) WriteZeroes(off, n int64) error { return d.Discard(off, n) }
func (d *slowRanges) PunchHole(off, n int64) error   { return d.Discard(off, n) }

// TestStopInRange ends requests that act on ranges: a reset waits for a piece of
// one, not for all that a guest asks for (P23).
func TestStopInRange(t *testing.T) {
	const piece = 32 << 20 / 512
	short := make([]seg, 32) // each of one piece
	for i := range short {
		short[i] = seg{uint64(i) * piece, piece, 0}
	}
	for _, c := range []struct {
		name  string
		kind  uint32
		total int64 // bytes
		segs  []seg
	}{
		{"DISCARD", tDiscard, 1 << 30, []seg{{0, 1 << 30 / 512, 0}}},
		{"DISCARD of many ranges", tDiscard, 1 << 30, short},
		{"WRITE_ZEROES", tWriteZeroes, 64 << 20, []seg{{0, 64 << 20 / 512, 0}}},
		{"WRITE_ZEROES across pieces", tWriteZeroes, 64 << 20, []seg{{8, 64 << 20 / 512, 0}}},
	} {
		for _, stop := range []bool{false, true} {
			t.Run(c.name, func(t *testing.T) {
				disk := &slowRanges{wideDisk: wideDisk{t: t, entered: make(chan struct{}), release: make(chan struct{}), duration: time.Millisecond}}
				r := newRig(t, blk.Config{Disk: disk})
				r.start(allFeatures, 1, 16)
				data := payload(c.segs...)
				q := r.newRequest(c.kind, 0, len(data))
				copy(q.bytes(), data)
				submit(t, r.d.Rings[0], q.bufs(false))
				<-disk.entered
				if !stop {
					close(disk.release)
					if r.wait(r.d.Rings[0]); q.code() != sOK || disk.begun.Load() != c.total {
						t.Errorf("status %#x after %d bytes, want OK after %d", q.code(), disk.begun.Load(), c.total)
					}
					return
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					r.t.Reset()
				}()
				time.Sleep(10 * time.Millisecond)
				close(disk.release)
				<-done
				if disk.begun.Load() == c.total || q.code() != sUntouched {
					t.Errorf("after a reset %d of %d bytes are done, status %#x; want part of it, untouched", disk.begun.Load(), c.total, q.code())
				}
			})
		}
	}
}

package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/virtiotest"
)

const (
	indirect = 1 << virtio.FeatureIndirectDesc
	eventIdx = 1 << virtio.FeatureEventIdx
)

// events records what a queue tells its transport.
type events struct {
	interrupts int
	broken     []*virtio.GuestError
}

func (e *events) UsedBuffers(int)                           { e.interrupts++ }
func (e *events) QueueBroken(_ int, err *virtio.GuestError) { e.broken = append(e.broken, err) }

// rig is a queue with the driver's side of it.
type rig struct {
	*virtiotest.Ring
	m  *virtiotest.Machine
	q  *virtio.Queue
	ev *events
	c  virtio.Chain
}

func newRig(tb testing.TB, size int, features uint64) *rig {
	tb.Helper()
	m := virtiotest.NewMachine()
	return newRigOn(tb, m, virtiotest.NewRing(m, size, features), features)
}

func newRigOn(tb testing.TB, m *virtiotest.Machine, ring *virtiotest.Ring, features uint64) *rig {
	tb.Helper()
	bell, err := virtio.NewDoorbell()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := bell.Close(); err != nil {
			tb.Error(err)
		}
	})
	r := &rig{Ring: ring, m: m, ev: &events{}}
	r.q, err = virtio.NewQueue(m.Memory, virtio.QueueConfig{
		Size: uint16(ring.Size), Desc: ring.Desc, Avail: ring.Avail, Used: ring.Used,
		Features: features, Doorbell: bell, Events: r.ev,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// offer makes head available and publishes it.
func (r *rig) offer(i, head uint16) {
	r.SetHead(i, head)
	r.SetAvailIdx(i + 1)
}

func (r *rig) buf(n uint32, write bool) virtiotest.Buf {
	return virtiotest.Buf{Addr: r.m.Alloc(uint64(n), 16), Len: n, Write: write}
}

// add is Add of n one-byte chains, published.
func (r *rig) add(tb testing.TB, n int) {
	tb.Helper()
	for range n {
		if _, ok := r.Add(r.buf(1, true)); !ok {
			tb.Fatal("the ring is full")
		}
	}
	r.Publish()
}

// drain pops and pushes everything and publishes it.
func (r *rig) drain() (n int) {
	for ; r.q.Pop(&r.c); n++ {
		r.q.Push(&r.c, 0)
	}
	r.q.Publish()
	return n
}

func (r *rig) wantBroken(tb testing.TB, rule string) {
	tb.Helper()
	if len(r.ev.broken) != 1 || r.ev.broken[0].Rule != rule {
		tb.Fatalf("queue reported %v, want one %s", r.ev.broken, rule)
	}
	if r.q.Pop(&r.c) || r.q.Rearm() || len(r.ev.broken) != 1 {
		tb.Error("a broken queue goes on")
	}
}

// TestMalformedChain gives the device chains that break a rule. Each must be
// completed with length 0 and counted, and the next chain served (B10).
func TestMalformedChain(t *testing.T) {
	const size = 8
	const ram = guest.GPA(0x10_0000)
	const nx, wr, in = virtiotest.Next, virtiotest.Write, virtiotest.Indirect
	buf := func(n uint32, write bool) virtiotest.Buf { return virtiotest.Buf{Addr: ram, Len: n, Write: write} }
	many := func(n int, b virtiotest.Buf) (bufs []virtiotest.Buf) {
		for range n {
			bufs = append(bufs, b)
		}
		return bufs
	}
	for _, c := range []struct {
		name  string
		build func(r *rig, table guest.GPA) // a chain with head 0
	}{
		{"V4 loop to itself", func(r *rig, _ guest.GPA) { r.SetDesc(0, ram, 1, nx, 0) }},
		{"V4 loop of two", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 1, nx, 1)
			r.SetDesc(1, ram, 1, nx, 0)
		}},
		{"V4 indirect table longer than the queue", func(r *rig, table guest.GPA) {
			r.Table(table, many(size+1, buf(1, false))...)
			r.SetDesc(0, table, 16*(size+1), in, 0)
		}},
		{"V4 direct and indirect together longer than the queue", func(r *rig, table guest.GPA) {
			r.Table(table, many(size, buf(1, false))...)
			r.SetDesc(0, ram, 1, nx, 1)
			r.SetDesc(1, table, 16*size, in, 0)
		}},
		{"V4 loop in an indirect table", func(r *rig, table guest.GPA) {
			r.Table(table, buf(1, false), buf(1, false))
			binary.LittleEndian.PutUint16(r.m.Bytes(table+28, 2), nx)
			binary.LittleEndian.PutUint16(r.m.Bytes(table+30, 2), 0)
			r.SetDesc(0, table, 32, in, 0)
		}},
		{"V5 next outside the table", func(r *rig, _ guest.GPA) { r.SetDesc(0, ram, 1, nx, size) }},
		{"V5 next far outside the table", func(r *rig, _ guest.GPA) { r.SetDesc(0, ram, 1, nx, 0xffff) }},
		{"V5 next outside an indirect table", func(r *rig, table guest.GPA) {
			r.Table(table, many(size, buf(1, false))...)
			r.SetDesc(0, table, 32, in, 0) // of the linked table only 2 entries
		}},
		{"V5 length 0", func(r *rig, _ guest.GPA) { r.SetDesc(0, ram, 0, 0, 0) }},
		{"V5 address wraps around", func(r *rig, _ guest.GPA) { r.SetDesc(0, ^guest.GPA(0), 2, 0, 0) }},
		{"V5 address in the hole", func(r *rig, _ guest.GPA) { r.SetDesc(0, virtiotest.Window, 16, 0, 0) }},
		{"V5 across the end of a region", func(r *rig, _ guest.GPA) { r.SetDesc(0, virtiotest.LowSize-1, 2, 0, 0) }},
		{"V5 across the end of memory", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, virtiotest.HighBase+virtiotest.HighSize-8, 16, 0, 0)
		}},
		{"V5 last buffer bad", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 1, nx, 1)
			r.SetDesc(1, virtiotest.Window, 1, wr, 0)
		}},
		{"V6 indirect table of length 0", func(r *rig, table guest.GPA) { r.SetDesc(0, table, 0, in, 0) }},
		{"V6 indirect table of length 24", func(r *rig, table guest.GPA) {
			r.Table(table, buf(1, false)) // which is good
			r.SetDesc(0, table, 24, in, 0)
		}},
		{"V6 indirect table not in RAM", func(r *rig, _ guest.GPA) { r.SetDesc(0, virtiotest.Window, 16, in, 0) }},
		{"V6 indirect and next", func(r *rig, table guest.GPA) {
			r.Table(table, buf(1, false))
			r.SetDesc(0, table, 16, in|nx, 1)
		}},
		{"V6 indirect in indirect", func(r *rig, table guest.GPA) {
			r.Table(table, buf(16, false))
			binary.LittleEndian.PutUint16(r.m.Bytes(table+12, 2), in)
			r.SetDesc(0, table, 16, in, 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, size, indirect|eventIdx)
			c.build(r, r.m.Alloc(16*2*size, 16))
			r.SetDesc(7, ram, 4, wr, 0) // a good one behind it
			r.SetHead(0, 0)
			r.SetHead(1, 7)
			r.SetAvailIdx(2)
			if !r.q.Pop(&r.c) || len(r.c.Writable) != 1 || len(r.c.Writable[0]) != 4 {
				t.Fatal("the good chain behind the malformed one did not come")
			}
			r.q.Push(&r.c, 4)
			r.q.Publish()
			if head, n, ok := r.TakeUsed(); head != 0 || n != 0 || !ok {
				t.Errorf("first used element %d length %d %v, want 0 length 0", head, n, ok)
			}
			if head, n, ok := r.TakeUsed(); head != 7 || n != 4 || !ok {
				t.Errorf("second used element %d length %d %v, want 7 length 4", head, n, ok)
			}
			if got := r.q.Stats().Malformed; got != 1 || len(r.ev.broken) != 0 {
				t.Errorf("malformed %d, broken %v; want 1 and none", got, r.ev.broken)
			}
		})
	}
	t.Run("V4 more than 4 GiB", func(t *testing.T) {
		r := newRig(t, 256, indirect)
		table := r.m.Alloc(16*256, 16)
		all := virtiotest.Buf{Addr: 0, Len: virtiotest.LowSize}
		r.Table(table, many(129, all)...)
		r.SetDesc(0, table, 16*129, in, 0)
		r.offer(0, 0)
		if r.q.Pop(&r.c) || r.q.Stats().Malformed != 1 {
			t.Error("a chain of 129 times 32 MiB was accepted")
		}
		r.Table(table, many(128, all)...)
		r.SetDesc(1, table, 16*128, in, 0)
		r.offer(1, 1)
		if !r.q.Pop(&r.c) || virtio.Len(r.c.Readable) != 1<<32 {
			t.Error("a chain of exactly 4 GiB was refused")
		}
	})
	t.Run("V6 not negotiated", func(t *testing.T) {
		r := newRig(t, size, 0)
		table := r.m.Alloc(16, 16)
		r.Table(table, buf(1, false))
		r.SetDesc(0, table, 16, in, 0)
		r.offer(0, 0)
		if r.q.Pop(&r.c) || r.q.Stats().Malformed != 1 {
			t.Error("an indirect descriptor was accepted without INDIRECT_DESC")
		}
	})
}

// TestRefusedChain gives the device malformed chains whose last writable byte is
// plain to see: it gets that byte to answer in, and nothing else (B10).
func TestRefusedChain(t *testing.T) {
	const size = 8
	const ram = guest.GPA(0x10_0000)
	const nx, wr, in = virtiotest.Next, virtiotest.Write, virtiotest.Indirect
	const hole = virtiotest.Window
	for _, c := range []struct {
		name  string
		build func(r *rig, table guest.GPA) // a chain with head 0
		last  guest.GPA                     // its last writable byte
	}{
		{"V3 readable after writable", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 4, nx|wr, 1)
			r.SetDesc(1, ram+8, 1, 0, 0)
		}, ram + 3},
		{"V3 writable after that", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 4, nx|wr, 1)
			r.SetDesc(1, ram+8, 1, nx, 2)
			r.SetDesc(2, ram+16, 1, wr, 0)
		}, ram + 16},
		{"V5 data of length 0", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 16, nx, 1)
			r.SetDesc(1, ram+32, 0, nx|wr, 2)
			r.SetDesc(2, ram+16, 1, wr, 0)
		}, ram + 16},
		{"V5 data not in RAM", func(r *rig, _ guest.GPA) {
			r.SetDesc(0, ram, 16, nx, 1)
			r.SetDesc(1, hole, 512, nx|wr, 2)
			r.SetDesc(2, ram+16, 2, wr, 0)
		}, ram + 17},
		{"V5 header not in RAM, in an indirect table", func(r *rig, table guest.GPA) {
			r.Table(table, virtiotest.Buf{Addr: hole, Len: 16}, virtiotest.Buf{Addr: ram, Len: 1, Write: true})
			r.SetDesc(0, table, 32, in, 0)
		}, ram},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, size, indirect|eventIdx)
			c.build(r, r.m.Alloc(16*2*size, 16))
			r.offer(0, 0)
			if !r.q.Pop(&r.c) || len(r.c.Readable) != 0 || virtio.Len(r.c.Writable) != 1 {
				t.Fatalf("got %d readable, %d writable bytes; want 0 and 1", virtio.Len(r.c.Readable), virtio.Len(r.c.Writable))
			}
			r.c.TakeStatus()[0] = 0x77
			if r.m.Bytes(c.last, 1)[0] != 0x77 {
				t.Error("the byte is not the last writable one")
			}
			r.q.Push(&r.c, 1)
			r.q.Publish()
			if head, n, ok := r.TakeUsed(); head != 0 || n != 0 || !ok {
				t.Errorf("V7 used element %d length %d %v, want 0 length 0", head, n, ok)
			}
			if got := r.q.Stats().Malformed; got != 1 || len(r.ev.broken) != 0 {
				t.Errorf("malformed %d, broken %v; want 1 and none", got, r.ev.broken)
			}
			r.SetDesc(3, ram, 4, wr, 0)
			r.offer(1, 3)
			if !r.q.Pop(&r.c) || virtio.Len(r.c.Writable) != 4 {
				t.Fatal("the good chain behind the malformed one did not come")
			}
			r.q.Push(&r.c, 4)
			r.q.Publish()
			if _, n, _ := r.TakeUsed(); n != 4 {
				t.Errorf("its used length is %d, want 4", n)
			}
		})
	}
	t.Run("V4 ends in a circle of faults", func(t *testing.T) {
		r := newRig(t, size, indirect)
		table := r.m.Alloc(32, 16)
		r.Table(table, virtiotest.Buf{Addr: ram}, virtiotest.Buf{Addr: ram, Len: 1, Write: true})
		binary.LittleEndian.PutUint16(r.m.Bytes(table+28, 2), nx|wr)
		binary.LittleEndian.PutUint16(r.m.Bytes(table+30, 2), 0)
		r.SetDesc(0, table, 32, in, 0)
		r.offer(0, 0)
		if r.q.Pop(&r.c) || r.q.Stats().Malformed != 1 {
			t.Error("a circle was taken for a chain")
		}
	})
}

// TestChain gives the device chains that break no rule, however odd.
func TestChain(t *testing.T) {
	const size = 8
	const nx, wr, in = virtiotest.Next, virtiotest.Write, virtiotest.Indirect
	t.Run("V4 as long as the queue", func(t *testing.T) {
		r := newRig(t, size, 0)
		var bufs []virtiotest.Buf
		for i := range size {
			bufs = append(bufs, r.buf(uint32(i+1), i >= 3))
		}
		r.Add(bufs...)
		r.Publish()
		if !r.q.Pop(&r.c) || len(r.c.Readable) != 3 || len(r.c.Writable) != 5 {
			t.Fatalf("got %d readable, %d writable buffers; want 3 and 5", len(r.c.Readable), len(r.c.Writable))
		}
		if virtio.Len(r.c.Readable) != 6 || virtio.Len(r.c.Writable) != 30 {
			t.Error("lengths differ from what was given")
		}
	})
	t.Run("V6 direct before indirect, WRITE on the table ignored", func(t *testing.T) {
		r := newRig(t, size, indirect)
		a, b, c := r.buf(3, false), r.buf(4, false), r.buf(5, true)
		copy(r.m.Bytes(a.Addr, 3), "abc")
		copy(r.m.Bytes(b.Addr, 4), "defg")
		table := r.m.Alloc(32, 1) + 1 // of no alignment
		r.Table(table, b, c)
		r.SetDesc(5, a.Addr, a.Len, nx, 2)
		r.SetDesc(2, table, 32, in|wr, 0)
		r.offer(0, 5)
		if !r.q.Pop(&r.c) {
			t.Fatal("refused")
		}
		var got [7]byte
		if !r.c.TakeReadable(got[:]) || string(got[:]) != "abcdefg" || len(r.c.Readable) != 0 {
			t.Errorf("readable half is %q", got)
		}
		if len(r.c.Writable) != 1 || len(r.c.Writable[0]) != 5 {
			t.Error("writable half differs from what was given")
		}
	})
	t.Run("V2 TakeReadable and TakeStatus cut across buffers", func(t *testing.T) {
		r := newRig(t, size, 0)
		r.Add(r.buf(1, false), r.buf(5, false), r.buf(2, true), r.buf(1, true))
		r.Publish()
		r.q.Pop(&r.c)
		var p [4]byte
		if r.c.TakeReadable(make([]byte, 7)) || virtio.Len(r.c.Readable) != 6 {
			t.Error("7 bytes taken of 6")
		}
		if !r.c.TakeReadable(p[:]) || virtio.Len(r.c.Readable) != 2 {
			t.Error("4 bytes not taken of 6")
		}
		for want := 2; want >= 0; want-- {
			if s := r.c.TakeStatus(); len(s) != 1 || virtio.Len(r.c.Writable) != uint64(want) {
				t.Errorf("status %v leaves %d bytes, want %d", s, virtio.Len(r.c.Writable), want)
			}
		}
		if r.c.TakeStatus() != nil {
			t.Error("a status byte out of nothing")
		}
	})
	t.Run("V1 descriptors and readable buffers are not written", func(t *testing.T) {
		r := newRig(t, size, indirect|eventIdx)
		a := r.buf(64, false)
		copy(r.m.Bytes(a.Addr, 64), bytes.Repeat([]byte{0xa5}, 64))
		r.AddIndirect(a, r.buf(8, true))
		r.Publish()
		desc := bytes.Clone(r.m.Bytes(r.Desc, 16*size))
		avail := bytes.Clone(r.m.Bytes(r.Avail, 6+2*size))
		r.drain()
		r.q.Rearm()
		if !bytes.Equal(desc, r.m.Bytes(r.Desc, 16*size)) || !bytes.Equal(avail, r.m.Bytes(r.Avail, 6+2*size)) ||
			!bytes.Equal(r.m.Bytes(a.Addr, 64), bytes.Repeat([]byte{0xa5}, 64)) {
			t.Error("the device has written what belongs to the driver")
		}
	})
}

// TestBrokenRing damages the ring itself: the queue must stop and say so once.
func TestBrokenRing(t *testing.T) {
	const size = 4
	t.Run("V5 head outside the table", func(t *testing.T) {
		for _, head := range []uint16{size, 0xffff} {
			r := newRig(t, size, eventIdx)
			r.offer(0, head)
			if r.q.Pop(&r.c) {
				t.Error("a chain came")
			}
			r.wantBroken(t, "V5")
		}
	})
	t.Run("V8 avail.idx too far ahead", func(t *testing.T) {
		for _, idx := range []uint16{size + 1, 0x8000, 0xffff} {
			r := newRig(t, size, eventIdx)
			r.SetAvailIdx(idx)
			if r.q.Pop(&r.c) {
				t.Error("a chain came")
			}
			r.wantBroken(t, "V8")
		}
	})
	t.Run("V8 avail.idx moves back", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		r.add(t, 2)
		r.drain()
		r.SetAvailIdx(1)
		if r.q.Pop(&r.c) {
			t.Error("a chain came")
		}
		r.wantBroken(t, "V8")
	})
	t.Run("V9 head in flight twice", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		r.SetDesc(2, 0x1000, 1, virtiotest.Write, 0)
		r.SetHead(0, 2)
		r.SetHead(1, 2)
		r.SetAvailIdx(2)
		var first, second virtio.Chain
		if !r.q.Pop(&first) || r.q.Pop(&second) {
			t.Error("want just one chain")
		}
		r.wantBroken(t, "V9")
	})
	t.Run("V9 head again after its completion", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		r.SetDesc(2, 0x1000, 1, virtiotest.Write, 0)
		for i := range uint16(100) {
			r.offer(i, 2)
			if r.drain() != 1 {
				t.Fatalf("turn %d: no chain: %v", i, r.ev.broken)
			}
		}
	})
	t.Run("V17 more chains than descriptors before a publication", func(t *testing.T) {
		// A driver that makes malformed chains available without end gets
		// no more than the queue's size of them into one drain.
		r := newRig(t, size, eventIdx)
		for i := range uint16(size) {
			r.offer(i, i) // length 0
			if r.q.Pop(&r.c) {
				t.Fatal("a chain came")
			}
		}
		r.offer(size, 0)
		if r.q.Pop(&r.c) {
			t.Error("a chain came")
		}
		r.wantBroken(t, "V8")
	})
}

// TestNotification is about who tells whom, and when.
func TestNotification(t *testing.T) {
	const size = 8
	t.Run("V10 avail.flags decide without EVENT_IDX", func(t *testing.T) {
		r := newRig(t, size, 0)
		for i, want := range []int{1, 1, 2} {
			r.SetAvailFlags(uint16(i % 2))
			r.SetUsedEvent(0x7777) // to be ignored
			r.add(t, 1)
			r.drain()
			r.TakeUsed()
			if r.ev.interrupts != want {
				t.Errorf("after batch %d: %d interrupts, want %d", i, r.ev.interrupts, want)
			}
		}
	})
	t.Run("V10 used.flags suppress kicks during a drain", func(t *testing.T) {
		r := newRig(t, size, 0)
		r.add(t, 2)
		r.q.Pop(&r.c)
		if r.UsedFlags() != 1 {
			t.Error("kicks are wanted during a drain")
		}
		r.q.Push(&r.c, 0)
		r.drain()
		if r.UsedFlags() != 1 || r.UsedIdx() != 2 {
			t.Errorf("after the drain: flags %d, idx %d", r.UsedFlags(), r.UsedIdx())
		}
		if r.q.Rearm() || r.UsedFlags() != 0 || r.UsedIdx() != 2 {
			t.Errorf("after Rearm: flags %d, idx %d", r.UsedFlags(), r.UsedIdx())
		}
	})
	t.Run("V11 used.flags stay 0 and avail.flags are ignored with EVENT_IDX", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		r.SetAvailFlags(1)
		for range 3 {
			r.add(t, 2)
			r.SetUsedEvent(r.UsedIdx())
			r.q.Pop(&r.c)
			r.q.Push(&r.c, 0)
			if r.drain(); r.UsedFlags() != 0 {
				t.Error("used.flags is not 0")
			}
			r.q.Rearm()
			r.TakeUsed()
			r.TakeUsed()
		}
		if r.ev.interrupts != 3 {
			t.Errorf("%d interrupts, want 3", r.ev.interrupts)
		}
	})
	t.Run("V11 first decision notifies", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		r.SetUsedEvent(100)
		r.add(t, 1)
		r.drain()
		if r.ev.interrupts != 1 {
			t.Errorf("%d interrupts, want 1", r.ev.interrupts)
		}
	})
	t.Run("V11 a batch passes the event once, through wrap-around", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		want := 1 // the first decision
		for i := range 70_000 / 3 {
			at := r.UsedIdx()
			event := at + uint16(i%5) - 1 // before, in and after the 3 to come
			r.SetUsedEvent(event)
			if r.add(t, 3); r.drain() != 3 {
				t.Fatal("not 3 chains")
			}
			if n := event - at; i > 0 && n < 3 {
				want++
			}
			for range 3 {
				r.TakeUsed()
			}
			if r.ev.interrupts != want {
				t.Fatalf("batch %d from %d, event %d: %d interrupts, want %d", i, at, event, r.ev.interrupts, want)
			}
		}
		s := r.q.Stats()
		if s.Interrupts != uint64(want) || s.Interrupts+s.Suppressed != 70_000/3 {
			t.Errorf("stats %+v", s)
		}
	})
	t.Run("V12 avail_event", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		const neighbour = 0xbeef
		at := r.m.Bytes(r.Used+4+8*size+2, 2)
		binary.LittleEndian.PutUint16(at, neighbour)
		r.add(t, 3)
		r.drain()
		if got := r.AvailEvent(); got != 0 {
			t.Errorf("avail_event is %d before Rearm, want it left at 0", got)
		}
		if r.q.Rearm() || r.AvailEvent() != 3 {
			t.Errorf("avail_event is %d after Rearm, want 3", r.AvailEvent())
		}
		r.add(t, 2)
		if !r.q.Rearm() {
			t.Error("Rearm does not see the chains that came before it")
		}
		r.q.Pop(&r.c)
		r.q.Push(&r.c, 0)
		if !r.q.Rearm() || r.AvailEvent() != 4 {
			t.Error("Rearm forgets the chain that was not popped")
		}
		if binary.LittleEndian.Uint16(at) != neighbour {
			t.Error("the bytes after avail_event have changed")
		}
	})
	t.Run("V12 spurious kicks", func(t *testing.T) {
		r := newRig(t, size, eventIdx)
		for range 3 {
			r.q.Kick()
			r.q.Kick()
			if err := r.q.Wait(); err != nil {
				t.Fatal(err)
			}
			if r.drain() != 0 || r.q.Rearm() {
				t.Error("something came of nothing")
			}
		}
		if r.ev.interrupts != 0 || r.q.Stats().Kicks != 3 {
			t.Errorf("%d interrupts, %+v", r.ev.interrupts, r.q.Stats())
		}
	})
}

// TestIndexWrap takes a queue twice through the 16-bit range.
// TestUnpop gives chains back and pops them again, the first one, the last one of
// a full ring, and one that the guest has changed meanwhile (V18).
func TestUnpop(t *testing.T) {
	for _, features := range []uint64{0, eventIdx, indirect | eventIdx} {
		r := newRig(t, 8, features)
		for turn := range 100 { // across the wrap of the ring
			r.add(t, 8)
			for i := range 8 {
				if !r.q.Pop(&r.c) {
					t.Fatal("nothing to pop")
				}
				if (turn+i)%3 != 0 {
					r.q.Push(&r.c, 1)
					continue
				}
				r.c.TakeStatus()
				r.q.Unpop(&r.c)
				r.q.Publish()
				if r.UsedIdx() != uint16(8*turn+i) {
					t.Fatalf("used.idx is %d, want %d", r.UsedIdx(), 8*turn+i)
				}
				if !r.q.Rearm() {
					t.Fatal("Rearm does not see the chain that was given back")
				}
				if !r.q.Pop(&r.c) || virtio.Len(r.c.Writable) != 1 {
					t.Fatal("the chain that was given back does not come again")
				}
				r.q.Push(&r.c, 1)
			}
			r.q.Publish()
			if r.q.Pop(&r.c) || len(r.ev.broken) != 0 {
				t.Fatalf("a chain too many, or a broken queue: %v", r.ev.broken)
			}
			for range 8 {
				if _, n, ok := r.TakeUsed(); !ok || n != 1 {
					t.Fatalf("used length %d, %v", n, ok)
				}
			}
		}
	}
	r := newRig(t, 8, 0)
	r.SetDesc(3, 0x2000, 16, 0, 0)
	r.offer(0, 3)
	r.q.Pop(&r.c)
	r.q.Unpop(&r.c)
	r.SetDesc(5, 0x3000, 7, virtiotest.Write, 0)
	r.SetHead(0, 5)
	if !r.q.Pop(&r.c) || virtio.Len(r.c.Writable) != 7 || len(r.c.Readable) != 0 {
		t.Error("the second Pop did not read the ring anew")
	}
}

func TestIndexWrap(t *testing.T) {
	for _, features := range []uint64{0, eventIdx} {
		r := newRig(t, 4, features)
		served := 0
		for served < 140_000 {
			for i := range 4 {
				r.SetDesc(i, guest.GPA(0x1000+i), 1, virtiotest.Write, 0)
				r.SetHead(uint16(served+i), uint16(i))
			}
			r.SetAvailIdx(uint16(served + 4))
			n := r.drain()
			if n != 4 {
				t.Fatalf("features %#x: %d chains at %d: %v", features, n, served, r.ev.broken)
			}
			if served += n; r.UsedIdx() != uint16(served) {
				t.Fatalf("used.idx is %d after %d chains", r.UsedIdx(), served)
			}
		}
	}
}

// TestAlignment puts the rings where alignment is the least allowed.
func TestAlignment(t *testing.T) {
	for _, size := range []int{1, 2, 8} {
		for _, features := range []uint64{0, eventIdx} {
			t.Run(fmt.Sprintf("size=%d/features=%#x", size, features), func(t *testing.T) {
				m := virtiotest.NewMachine()
				avail := m.Alloc(4096, 4) + 2
				used := m.Alloc(4096, 8) + 4
				r := newRigOn(t, m, virtiotest.NewRingAt(m, size, features, m.Alloc(4096, 16), avail, used), features)
				for range 5 * size {
					r.SetUsedEvent(r.UsedIdx())
					r.add(t, 1)
					if r.drain() != 1 {
						t.Fatalf("no chain: %v", r.ev.broken)
					}
					if _, _, ok := r.TakeUsed(); !ok {
						t.Fatal("nothing used")
					}
				}
				if r.ev.interrupts != 5*size {
					t.Errorf("%d interrupts, want %d", r.ev.interrupts, 5*size)
				}
			})
		}
	}
}

func TestNewQueue(t *testing.T) {
	m := virtiotest.NewMachine()
	good := virtio.QueueConfig{Size: 8, Desc: 0x1000, Avail: 0x2000, Used: 0x3000}
	if _, err := virtio.NewQueue(m.Memory, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, rule string
		change     func(*virtio.QueueConfig)
	}{
		{"size 0", "P3", func(c *virtio.QueueConfig) { c.Size = 0 }},
		{"size 3", "P3", func(c *virtio.QueueConfig) { c.Size = 3 }},
		{"size 65535", "P3", func(c *virtio.QueueConfig) { c.Size = 65535 }},
		{"descriptors aligned to 8", "P5", func(c *virtio.QueueConfig) { c.Desc += 8 }},
		{"available ring aligned to 1", "P5", func(c *virtio.QueueConfig) { c.Avail++ }},
		{"used ring aligned to 2", "P5", func(c *virtio.QueueConfig) { c.Used += 2 }},
		{"descriptors past the end", "P5", func(c *virtio.QueueConfig) { c.Desc = virtiotest.LowSize - 16*7 }},
		{"available ring in the hole", "P5", func(c *virtio.QueueConfig) { c.Avail = virtiotest.Window }},
		{"used ring wraps around", "P5", func(c *virtio.QueueConfig) { c.Used = ^guest.GPA(3) }},
		{"size needs more than there is", "P5", func(c *virtio.QueueConfig) {
			c.Size = virtio.MaxQueueSize
			c.Desc = virtiotest.HighBase + virtiotest.HighSize - 16*virtio.MaxQueueSize + 16
		}},
	} {
		t.Run(c.rule+" "+c.name, func(t *testing.T) {
			cfg := good
			c.change(&cfg)
			var guilty *virtio.GuestError
			if _, err := virtio.NewQueue(m.Memory, cfg); !errors.As(err, &guilty) || guilty.Rule != c.rule {
				t.Errorf("got %v, want a GuestError of %s", err, c.rule)
			}
		})
	}
}

func TestNoAllocation(t *testing.T) {
	r := newRig(t, 16, indirect|eventIdx)
	table := r.m.Alloc(16*16, 16)
	bufs := make([]virtiotest.Buf, 16)
	for i := range bufs {
		bufs[i] = virtiotest.Buf{Addr: 0x10_0000, Len: 512, Write: i > 0}
	}
	r.Table(table, bufs...)
	r.SetDesc(0, table, 16*16, virtiotest.Indirect, 0)
	i := uint16(0)
	if n := testing.AllocsPerRun(1000, func() {
		r.offer(i, 0)
		i++
		if r.drain() != 1 || r.q.Rearm() {
			t.Error("want one chain")
		}
	}); n != 0 {
		t.Errorf("%v allocations per request", n)
	}
}

func TestDoorbellClose(t *testing.T) {
	bell, err := virtio.NewDoorbell()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		for {
			if err := bell.Wait(); err != nil {
				done <- err
				return
			}
		}
	}()
	bell.Ring()
	bell.Ring()
	time.Sleep(time.Millisecond) // usually parks the waiter; right without it too
	if err := bell.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait returned %v, want os.ErrClosed", err)
	}
	bell.Ring()
}

// FuzzQueue lets the fuzzer write the ring, and a driver with no sense of shame
// move its indices. Whatever comes, the device must end each drain, stay inside
// guest memory, and hand out only chains that obey the rules.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{0, 2, 1, 0, 0, 0x10, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0})
	f.Add([]byte{7, 0, 3, 0, 0, 0x20, 0, 0, 0, 32, 0, 0, 0, 4, 0, 0, 0, 2, 1, 5, 9})
	f.Add(bytes.Repeat([]byte{1, 3, 0xff, 0}, 40))
	m := virtiotest.NewMachine()
	desc, avail, used := m.Alloc(16*64, 16), m.Alloc(512, 4), m.Alloc(1024, 4)
	f.Fuzz(func(t *testing.T, in []byte) {
		next := func() byte {
			if len(in) == 0 {
				return 0
			}
			b := in[0]
			in = in[1:]
			return b
		}
		mode := next()
		size := 1 << (next() % 7)
		features := uint64(0)
		if mode&1 == 0 {
			features |= eventIdx
		}
		if mode&2 == 0 {
			features |= indirect
		}
		clear(m.Bytes(0, 64<<10))
		r := newRigOn(t, m, virtiotest.NewRingAt(m, size, features, desc, avail, used), features)
		idx := uint16(0)
		for len(in) > 0 {
			switch op := next(); op % 8 {
			case 0, 1: // a descriptor of small numbers, near the truth
				r.SetDesc(int(next())%size, guest.GPA(next())<<8|guest.GPA(next()), uint32(next()), uint16(next()), uint16(next())%uint16(size+1))
			case 2: // a descriptor of any numbers
				var b [16]byte
				in = in[copy(b[:], in):]
				copy(m.Bytes(desc+guest.GPA(16*(int(op>>3)%size)), 16), b[:])
			case 3: // a chain that may be good
				r.SetHead(idx, uint16(next())%uint16(size+1))
				idx++
				r.SetAvailIdx(idx)
			case 4:
				idx = uint16(next())<<8 | uint16(next())
				r.SetAvailIdx(idx)
			case 5:
				r.SetUsedEvent(uint16(next()))
				r.SetAvailFlags(uint16(next()))
			default:
				popped := 0
				for r.q.Pop(&r.c) {
					if popped++; popped > size {
						t.Fatalf("%d chains popped of a queue of %d", popped, size)
					}
					checkChain(t, &r.c, size)
					r.q.Push(&r.c, uint32(virtio.Len(r.c.Writable)))
				}
				r.q.Publish()
				r.q.Rearm()
			}
		}
		if len(r.ev.broken) > 1 {
			t.Errorf("a queue broke %d times", len(r.ev.broken))
		}
	})
}

// checkChain checks what Pop promises of a chain.
func checkChain(t *testing.T, c *virtio.Chain, size int) {
	if n := len(c.Readable) + len(c.Writable); n < 1 || n > size {
		t.Fatalf("chain of %d buffers in a queue of %d", n, size)
	}
	for _, half := range [][][]byte{c.Readable, c.Writable} {
		for _, b := range half {
			if len(b) == 0 {
				t.Fatal("empty buffer")
			}
			_, _ = b[0], b[len(b)-1]
		}
	}
	c.TakeReadable(make([]byte, 16))
	c.TakeStatus()
}

// TestMalformedBound fills a queue with malformed chains: one Pop refuses some,
// and Rearm says that there are more (V17).
func TestMalformedBound(t *testing.T) {
	const size, bound = 64, 16
	r := newRig(t, size, 0)
	for i := range uint16(size) {
		r.SetDesc(int(i), 0x10_0000, 1, virtiotest.Next, (i+1)%size)
		r.SetHead(i, i)
	}
	r.SetAvailIdx(size)
	for refused := uint64(bound); refused <= size; refused += bound {
		if r.q.Pop(&r.c) {
			t.Fatal("a circle was taken for a chain")
		}
		r.q.Publish()
		if got := r.q.Stats().Malformed; got != refused {
			t.Fatalf("%d chains refused, want %d", got, refused)
		}
		if got, want := r.q.Rearm(), refused < size; got != want {
			t.Fatalf("Rearm returned %t after %d of %d chains", got, refused, size)
		}
	}
}

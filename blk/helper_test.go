package blk_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
	"github.com/calfvm/calf/virtio/virtiotest"
)

// Request types, states and features by their numbers in the specification.
const (
	tIn, tOut, tFlush, tSCSI, tGetID, tDiscard, tWriteZeroes = 0, 1, 4, 2, 8, 11, 13

	sOK, sIOErr, sUnsupp, sUntouched = 0, 1, 2, 0xee

	fSegMax, fRO, fBlkSize, fFlush, fTopology, fConfigWCE, fMQ, fDiscard, fWriteZeroes = 2, 5, 6, 9, 10, 11, 12, 13, 14

	allFeatures = ^uint64(0)
	lineBase    = 0x40
	bar         = virtiotest.Window
)

// rig is a block device with a driver that has probed it.
type rig struct {
	tb  testing.TB
	m   *virtiotest.Machine
	dev *blk.Device
	t   *pci.Transport
	d   *virtiotest.Driver
}

func newRig(tb testing.TB, cfg blk.Config) *rig {
	tb.Helper()
	return newRigOn(tb, virtiotest.NewMachine(), cfg)
}

func newRigOn(tb testing.TB, m *virtiotest.Machine, cfg blk.Config) *rig {
	tb.Helper()
	dev, err := blk.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	t, err := pci.New(m, m.Memory, dev, pci.Options{Line: noLine{}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.Close(); err != nil {
			tb.Error(err)
		}
		if n := m.Doorbells() + m.Ranges() + m.OpenInterrupts(); n != 0 {
			tb.Errorf("%d resources of the machine are left after Close", n)
		}
	})
	d, err := virtiotest.Probe(m, t, bar)
	if err != nil {
		tb.Fatal(err)
	}
	return &rig{tb, m, dev, t, d}
}

// noLine is a pin that leads nowhere.
type noLine struct{}

func (noLine) Set(bool) {}

// start sets DRIVER_OK with n queues of size descriptors.
func (r *rig) start(mask uint64, n, size int) {
	r.tb.Helper()
	if err := r.d.Start(mask, n, size, lineBase); err != nil {
		r.tb.Fatal(err)
	}
}

// call makes one chain available on ring, kicks, and waits for its completion.
func (r *rig) call(ring *virtiotest.Ring, bufs ...virtiotest.Buf) (used uint32) {
	r.tb.Helper()
	head, ok := ring.Add(bufs...)
	if !ok {
		r.tb.Fatal("the ring is full")
	}
	if ring.Publish() {
		ring.Kick()
	}
	got, used := r.wait(ring)
	if got != head {
		r.tb.Fatalf("chain %d completed, want %d", got, head)
	}
	return used
}

// wait waits for the next completion by interrupt, as a driver does.
func (r *rig) wait(ring *virtiotest.Ring) (head uint16, used uint32) {
	r.tb.Helper()
	head, used, ok := ring.Wait(r.m.Line(lineBase+1+uint32(ring.Index)), 10*time.Second)
	if !ok {
		r.tb.Fatalf("no interrupt for queue %d; status %#x", ring.Index, r.d.Get(virtiotest.Status, 1))
	}
	return head, used
}

// request is the guest memory of one request.
type request struct {
	m              *virtiotest.Machine
	header, status guest.GPA
	data           guest.GPA
	n              int
}

// newRequest allocates a request of type kind with n data bytes and a status
// byte that no device writes.
func (r *rig) newRequest(kind uint32, sector uint64, n int) *request {
	q := &request{m: r.m, header: r.m.Alloc(16, 16), status: r.m.Alloc(1, 1), n: n}
	if n > 0 {
		q.data = r.m.Alloc(uint64(n), 16)
	}
	q.set(kind, sector)
	return q
}

func (q *request) set(kind uint32, sector uint64) {
	b := q.m.Bytes(q.header, 16)
	binary.LittleEndian.PutUint32(b, kind)
	binary.LittleEndian.PutUint32(b[4:], 0x5a5a5a5a) // reserved, to be ignored
	binary.LittleEndian.PutUint64(b[8:], sector)
	q.m.Bytes(q.status, 1)[0] = sUntouched
}

func (q *request) bytes() []byte { return q.m.Bytes(q.data, uint64(q.n)) }
func (q *request) code() byte    { return q.m.Bytes(q.status, 1)[0] }

// bufs is the request framed as Linux does it: header, data, status.
func (q *request) bufs(in bool) []virtiotest.Buf {
	b := []virtiotest.Buf{{Addr: q.header, Len: 16}}
	if q.n > 0 {
		b = append(b, virtiotest.Buf{Addr: q.data, Len: uint32(q.n), Write: in})
	}
	return append(b, virtiotest.Buf{Addr: q.status, Len: 1, Write: true})
}

// do carries out one request and returns its status and used length.
func (r *rig) do(kind uint32, sector uint64, data []byte) (code byte, used uint32, out []byte) {
	r.tb.Helper()
	q := r.newRequest(kind, sector, len(data))
	if len(data) > 0 {
		copy(q.bytes(), data)
	}
	in := kind != tOut && kind != tDiscard && kind != tWriteZeroes
	used = r.call(r.d.Rings[0], q.bufs(in)...)
	if len(data) > 0 {
		out = q.bytes()
	}
	return q.code(), used, out
}

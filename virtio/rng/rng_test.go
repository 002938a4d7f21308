package rng_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/calfvm/calf/virtio/pci"
	"github.com/calfvm/calf/virtio/rng"
	"github.com/calfvm/calf/virtio/virtiotest"
)

type noLine struct{}

func (noLine) Set(bool) {}

const lineBase = 0x40

// start returns a machine with an entropy device whose driver is ready.
func start(t *testing.T) (*virtiotest.Machine, *virtiotest.Driver) {
	t.Helper()
	m := virtiotest.NewMachine()
	fn, err := pci.New(m, m.Memory, new(rng.Device), pci.Options{Line: noLine{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fn.Close(); err != nil {
			t.Error(err)
		}
	})
	d, err := virtiotest.Probe(m, fn, virtiotest.Window)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(^uint64(0), 1, 16, lineBase); err != nil {
		t.Fatal(err)
	}
	return m, d
}

// request makes the buffers available and returns the used length.
func request(t *testing.T, m *virtiotest.Machine, r *virtiotest.Ring, bufs ...virtiotest.Buf) uint32 {
	t.Helper()
	if _, ok := r.Add(bufs...); !ok {
		t.Fatal("the ring is full")
	}
	r.Publish()
	r.Kick()
	_, n, ok := r.Wait(m.Line(lineBase+1), 10*time.Second)
	if !ok {
		t.Fatal("no answer")
	}
	return n
}

// TestEntropy fills buffers of odd sizes, one larger than the device fills, and
// one that it must not write.
func TestEntropy(t *testing.T) {
	m, d := start(t)
	r := d.Rings[0]
	a, b := m.Alloc(1<<20, 1), m.Alloc(64, 1)
	if n := request(t, m, r, virtiotest.Buf{Addr: a, Len: 7, Write: true}, virtiotest.Buf{Addr: a + 100, Len: 57, Write: true}); n != 64 {
		t.Errorf("used length %d, want 64", n)
	}
	first := append(bytes.Clone(m.Bytes(a, 7)), m.Bytes(a+100, 57)...)
	if bytes.Equal(first, make([]byte, 64)) || !bytes.Equal(m.Bytes(a+7, 93), make([]byte, 93)) {
		t.Error("the buffers, and they alone, are not filled")
	}
	if n := request(t, m, r, virtiotest.Buf{Addr: a, Len: 1 << 20, Write: true}); n != 64<<10 {
		t.Errorf("used length %d, want 65536", n)
	}
	if tail := m.Bytes(a, 1<<20)[64<<10:]; !bytes.Equal(tail, make([]byte, len(tail))) {
		t.Error("more is written than is said")
	}
	if bytes.Contains(m.Bytes(a, 64<<10), first) {
		t.Error("the same bytes came twice")
	}
	if n := request(t, m, r, virtiotest.Buf{Addr: b, Len: 64}); n != 0 || !bytes.Equal(m.Bytes(b, 64), make([]byte, 64)) {
		t.Errorf("a buffer to read got %d bytes", n)
	}
}

// TestReset resets the device while buffers wait, and starts it anew.
func TestReset(t *testing.T) {
	m, d := start(t)
	a := m.Alloc(1<<20, 1)
	for range 100 {
		for range 10 {
			d.Rings[0].Add(virtiotest.Buf{Addr: a, Len: 64 << 10, Write: true})
		}
		d.Rings[0].Publish()
		d.Rings[0].Kick()
		if err := d.Reset(); err != nil {
			t.Fatal(err)
		}
		clear(m.Bytes(a, 1<<20)) // a race, if the device still writes
		if err := d.Start(^uint64(0), 1, 16, lineBase); err != nil {
			t.Fatal(err)
		}
	}
}

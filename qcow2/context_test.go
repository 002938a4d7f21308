package qcow2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"
)

// TestDiskStops ends the context while a request is in its second piece: that is
// finished and no other begun.
func TestDiskStops(t *testing.T) {
	const size = 16 << 20
	for name, do := range map[string]func(d *Disk, b []byte) error{
		"ReadAt":      func(d *Disk, b []byte) error { _, err := d.ReadAt(b, 100); return err },
		"WriteAt":     func(d *Disk, b []byte) error { _, err := d.WriteAt(b, 100); return err },
		"ReadvAt":     func(d *Disk, b []byte) error { return d.ReadvAt([][]byte{b[:5], b[5:]}, 100) },
		"WritevAt":    func(d *Disk, b []byte) error { return d.WritevAt([][]byte{b[:5], b[5:]}, 100) },
		"PunchHole":   func(d *Disk, b []byte) error { return d.PunchHole(100, int64(len(b))) },
		"Discard":     func(d *Disk, b []byte) error { return d.Discard(100, int64(len(b))) },
		"WriteZeroes": func(d *Disk, b []byte) error { return d.WriteZeroes(100, int64(len(b))) },
	} {
		t.Run(name, func(t *testing.T) {
			m := open(t, create(t, CreateOptions{Size: size, ClusterSize: 1 << 20}), Options{})
			must(t, m.WritevAt([][]byte{bytes.Repeat([]byte{1}, size)}, 0))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			beyond := atomic.Bool{}
			gate := newGate(m, func(_ bool, off, n int64) bool {
				if off >= 12<<20 && off < 16<<20 {
					beyond.Store(true)
				}
				if off >= 6<<20 && off < 16<<20 {
					cancel()
				}
				return false
			})
			close(gate.open)
			if name == "WriteZeroes" { // touches no data, so nothing is held up
				cancel()
			}
			err := do(m.WithContext(ctx), make([]byte, size-200))
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if e, ok := errors.AsType[*Error](err); !ok || e.Path != m.path {
				t.Errorf("the error names no file: %v", err)
			}
			if beyond.Load() {
				t.Error("it went on after its context was done")
			}
		})
	}
}

// TestDiskStopped begins requests when the context is done already.
func TestDiskStopped(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 1 << 20}), Options{})
	must(t, m.WritevAt([][]byte{bytes.Repeat([]byte{1}, 1<<20)}, 0))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d := m.WithContext(ctx)
	b := make([]byte, 1<<16)
	flushes := m.Stats().Flushes
	for name, err := range map[string]error{
		"flush": d.Flush(), "compressed": d.WriteCompressed(b, 0), "zeroes": d.WriteZeroes(0, 1<<16), "write": d.WritevAt([][]byte{b}, 0),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, err := range d.Map(0, 1<<20) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("map: %v", err)
		}
	}
	if _, err := m.ReadAt(b, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{1}, 1<<16)) || m.Stats().Flushes != flushes {
		t.Errorf("something was done, %v", err)
	}
	for _, err := range []error{d.WritevAt([][]byte{b}, 1<<20), d.Discard(-1, 5), d.ReadvAt([][]byte{b}, -1)} {
		if !errors.Is(err, ErrRange) {
			t.Errorf("outside the disk: %v", err)
		}
	}
}

// TestDiskRequests compares a view with a model over borders of pieces.
func TestDiskRequests(t *testing.T) {
	r := newSeed(t)
	const size = 9<<20 + 512
	m := open(t, create(t, CreateOptions{Size: size, ClusterSize: 4096}), Options{})
	d := m.WithContext(t.Context())
	model := make([]byte, size)
	for range 40 {
		off, n := randomRange(r, size, 6<<20)
		cut := r.Int64N(n + 1)
		switch r.IntN(4) {
		case 0:
			clear(model[off : off+n])
			must(t, d.PunchHole(off, n))
		case 1:
			fillRandom(r, model[off:off+n])
			must(t, d.WritevAt([][]byte{model[off : off+cut], nil, model[off+cut : off+n]}, off))
		default:
			got := make([]byte, n)
			must(t, d.ReadvAt([][]byte{got[:cut], got[cut:]}, off))
			if !bytes.Equal(got, model[off:off+n]) {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		}
	}
	got := make([]byte, size+10)
	if n, err := d.ReadAt(got, 0); n != size || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], model) {
		t.Errorf("ReadAt: %d, %v", n, err)
	}
	must(t, d.Flush())
	var at int64
	for part, err := range d.Map(0, size) {
		must(t, err)
		if part.Offset != at {
			t.Errorf("%d is mapped after %d", part.Offset, at)
		}
		at += part.Length
	}
	if at != size || d.Size() != size || d.ReadOnly() || d.DiscardGranularity() != 4096 {
		t.Errorf("mapped %d of %d bytes", at, d.Size())
	}
}

// TestDiskStopsWaiting ends the context of requests that wait: for a write to their
// cluster that is held up, and for what runs exclusively.
func TestDiskStopsWaiting(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	must(t, m.WritevAt([][]byte{{1}}, 0)) // so that there is an L2 table
	b := bytes.Repeat([]byte{2}, 4096)
	requests := func(d *Disk) map[string]error {
		return map[string]error{
			"write": d.WritevAt([][]byte{b}, 8192), "compressed": d.WriteCompressed(b, 8192), "zeroes": d.WriteZeroes(8192, 4096),
		}
	}
	stop := func() *Disk {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		t.Cleanup(cancel)
		return m.WithContext(ctx)
	}
	var first atomic.Bool
	gate := newGate(m, func(write bool, _, _ int64) bool { return write && first.CompareAndSwap(false, true) })
	done := make(chan error)
	go func() { done <- m.WritevAt([][]byte{b}, 4096) }()
	<-gate.held
	must(t, m.WithContext(t.Context()).WritevAt([][]byte{b}, 16384)) // another cluster
	for range 2 {
		d := stop()
		if err := d.WritevAt([][]byte{b, b}, 2048); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a write into a claim: %v", err)
		}
	}
	close(gate.open)
	must(t, <-done)
	must(t, m.exclusively(func() error {
		d := stop()
		all := requests(d)
		all["read"], all["flush"] = d.ReadvAt([][]byte{b}, 0), d.Flush()
		for name, err := range all {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s, while requests are kept out: %v", name, err)
			}
		}
		return nil
	}))
	for name, err := range requests(m.WithContext(t.Context())) {
		if err != nil {
			t.Errorf("%s, afterwards: %v", name, err)
		}
	}
	closeImage(t, m)
}

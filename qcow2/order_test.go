package qcow2

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// gateFile holds up the operations that hold picks, until open is closed.
type gateFile struct {
	file
	hold func(write bool, off, n int64) bool
	held chan struct{} // receives one value for each operation held up
	open chan struct{}
}

func newGate(m *Image, hold func(write bool, off, n int64) bool) *gateFile {
	g := &gateFile{file: m.file, hold: hold, held: make(chan struct{}, 100), open: make(chan struct{})}
	m.file = g
	return g
}

func (g *gateFile) pass(write bool, off, n int64) {
	if g.hold(write, off, n) {
		g.held <- struct{}{}
		<-g.open
	}
}

func (g *gateFile) ReadvAt(iov [][]byte, off int64) error {
	g.pass(false, off, length(iov))
	return g.file.ReadvAt(iov, off)
}

func (g *gateFile) WritevAt(iov [][]byte, off int64) error {
	g.pass(true, off, length(iov))
	return g.file.WritevAt(iov, off)
}

// TestPin holds up a read of compressed data while all that shares its host
// clusters is overwritten, flushed, and new clusters are allocated. The reader
// still gets what was there when it looked.
func TestPin(t *testing.T) {
	const size = 128 << 10
	run := compressedRun(t, size, 4096)
	m := run.open(t, &memFile{data: append([]byte(nil), run.start...)}, false)
	want := make([]byte, 8192)
	if _, err := m.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	m.decoded.Purge()
	var first atomic.Bool
	gate := newGate(m, func(write bool, off, n int64) bool { return !write && n < 4096 && first.CompareAndSwap(false, true) })
	got := make([]byte, 4096)
	done := make(chan error)
	go func() { _, err := m.ReadAt(got, 0); done <- err }()
	<-gate.held
	b := bytes.Repeat([]byte{0xff}, 4096)
	for range 3 { // the later rounds would write to what the first one freed
		for off := int64(0); off < size; off += 4096 {
			if _, err := m.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			if err := m.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(gate.open)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want[:4096]) {
		t.Error("the reader got other data")
	}
	closeImage(t, m)
}

// TestWaitOnlyForOverlap holds up the first write to one cluster. A write to
// the same cluster waits for it; reads of it, and writes to its neighbour in the
// same L2 slice, do not.
func TestWaitOnlyForOverlap(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	if _, err := m.WriteAt([]byte("x"), 0); err != nil { // so that the L2 table exists
		t.Fatal(err)
	}
	var first atomic.Bool
	gate := newGate(m, func(write bool, _, _ int64) bool { return write && first.CompareAndSwap(false, true) })
	done := make(chan error, 2)
	go func() { _, err := m.WriteAt([]byte("aa"), 8192); done <- err }()
	<-gate.held
	if _, err := m.WriteAt([]byte("b"), 8192+4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 2)
	if _, err := m.ReadAt(got, 8192); err != nil || got[0] != 0 {
		t.Errorf("read %q of what is not written yet, %v", got, err)
	}
	second := make(chan error, 1)
	go func() { _, err := m.WriteAt([]byte("c"), 8193); second <- err }()
	select {
	case err := <-second:
		t.Fatalf("a write to the same cluster did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(gate.open)
	if err := errors.Join(<-done, <-second); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(got, 8192); err != nil || string(got) != "ac" {
		t.Errorf("read %q, want ac, %v", got, err)
	}
	closeImage(t, m)
}

// TestSingleFlight lets many readers miss the same slice: one reads it, and a
// warm slice is read meanwhile.
func TestSingleFlight(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	m := open(t, path, Options{})
	if _, err := m.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	closeImage(t, m)
	m = open(t, path, Options{ReadOnly: true})
	warm := make([]byte, 512)
	if _, err := m.ReadAt(warm, 1<<19); err != nil {
		t.Fatal(err)
	}
	table := int64(m.l1[0] & entryOffset)
	gate := newGate(m, func(_ bool, off, _ int64) bool { return off == table })
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := m.ReadAt(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
		})
	}
	<-gate.held
	if _, err := m.ReadAt(warm, 1<<19); err != nil {
		t.Fatal(err)
	}
	close(gate.open)
	wg.Wait()
	if n := len(gate.held); n != 0 {
		t.Errorf("the slice was read %d times more", n)
	}
}

// TestCloseWaits closes an image while a read is held up.
func TestCloseWaits(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 1 << 20}), Options{})
	if _, err := m.WriteAt([]byte("data"), 0); err != nil {
		t.Fatal(err)
	}
	gate := newGate(m, func(write bool, _, _ int64) bool { return !write })
	read := make(chan error, 1)
	got := make([]byte, 4)
	go func() { _, err := m.ReadAt(got, 0); read <- err }()
	<-gate.held
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	select {
	case err := <-closed:
		t.Fatalf("Close did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	for _, err := range []error{m.Flush(), m.ReadvAt([][]byte{make([]byte, 1)}, 0), m.WritevAt([][]byte{make([]byte, 1)}, 0)} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("a request after Close: %v", err)
		}
	}
	close(gate.open)
	if err := errors.Join(<-read, <-closed, m.Close()); err != nil || string(got) != "data" {
		t.Errorf("%v, read %q", err, got)
	}
}

// TestEpochs follows two requests of neighbouring epochs.
func TestEpochs(t *testing.T) {
	e := epochs{now: firstEpoch}
	old := e.enter(0)
	e.advance()
	young := e.enter(1)
	e.advance() // does nothing: old is there
	freed := e.now
	old.leave()
	e.advance()
	if e.over(freed) {
		t.Error("an epoch is over while a request of it is under way")
	}
	e.advance()
	if e.over(freed) {
		t.Error("an epoch is over while a request of it is under way, two steps on")
	}
	young.leave()
	e.advance()
	if !e.over(freed) || !e.idle() {
		t.Error("an epoch is not over when nobody is left")
	}
}

package qcow2

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// gateFile holds up the operations that hold picks, until open is closed.
type gateFile struct {
	file
	hold func(write bool, off, n int64) bool
	held chan struct{} // receives one value for each operation held up
	open chan struct{}
}

func (g *gateFile) Punch(off, n int64) error {
	g.pass(true, off, n)
	return g.file.Punch(off, n)
}

func newGate(m *Image, hold func(write bool, off, n int64) bool) *gateFile {
	g := &gateFile{file: m.file, hold: hold, held: make(chan struct{}, 100), open: make(chan struct{})}
	m.file, m.data = g, g
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
	m.decoder.forget()
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

// TestClaimsStayApart holds up a write to one cluster. A write that begins before
// it does up to there, waits, and ends after it: neither loses what only one of
// them wrote.
func TestClaimsStayApart(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	must(t, m.WritevAt([][]byte{{1}}, 0)) // so that the L2 table exists
	var first atomic.Bool
	gate := newGate(m, func(write bool, _, _ int64) bool { return write && first.CompareAndSwap(false, true) })
	done := make(chan error, 2)
	go func() { _, err := m.WriteAt([]byte("held"), 3*4096+100); done <- err }()
	<-gate.held
	long := bytes.Repeat([]byte("x"), 4*4096)
	go func() { _, err := m.WriteAt(long, 4096); done <- err }()
	select {
	case err := <-done:
		t.Errorf("a write across the one held up did not wait: %v", err)
		done <- nil
	case <-time.After(20 * time.Millisecond):
	}
	close(gate.open)
	must(t, errors.Join(<-done, <-done))
	got := make([]byte, len(long))
	must(t, m.ReadvAt([][]byte{got}, 4096))
	if !bytes.Equal(got, long) { // the one held up was done first
		t.Error("a write was lost")
	}
	closeImage(t, m)
	if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Error(v)
	}
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

// unlockedFile fails the test if the metadata lock is held, on either side,
// during an operation of an otherwise idle image.
type unlockedFile struct {
	file
	t *testing.T
	m *Image
}

func (f *unlockedFile) check(op string) {
	// The background goroutine may hold the lock for a moment.
	for deadline := time.Now().Add(time.Second); !f.m.mu.TryLock(); {
		if time.Now().After(deadline) {
			f.t.Errorf("%s under the metadata lock", op)
			return
		}
	}
	f.m.mu.Unlock()
}

func (f *unlockedFile) ReadvAt(iov [][]byte, off int64) error {
	f.check("read")
	return f.file.ReadvAt(iov, off)
}

func (f *unlockedFile) WritevAt(iov [][]byte, off int64) error {
	f.check("write")
	return f.file.WritevAt(iov, off)
}

func (f *unlockedFile) Punch(off, n int64) error {
	f.check("punch")
	return f.file.Punch(off, n)
}

func (f *unlockedFile) Fdatasync() error {
	f.check("fdatasync")
	return f.file.Fdatasync()
}

// TestNoIOUnderLock goes through table loads and evictions, new tables, refcount
// blocks and a new refcount table, copy-on-write, flushes, snapshots, corruption and
// Close.
func TestNoIOUnderLock(t *testing.T) {
	r := newSeed(t)
	packed := compressedRun(t, 128<<10, 512)
	fresh := crashImage(t, CreateOptions{Size: 12 << 20, ClusterSize: 512, RefcountBits: 64}, make([]byte, 50000))
	for _, run := range []*crashRun{packed, fresh} {
		m, err := run.openIn(&memFile{data: append([]byte(nil), run.start...)}, Options{L2CacheBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		m.file = &unlockedFile{file: m.file, t: t, m: m}
		m.data = m.file
		for i := range 60 {
			off, n := randomRange(r, m.Size(), 1<<19)
			b := make([]byte, n)
			if _, err := m.ReadAt(b, off); err != nil {
				t.Fatal(err)
			}
			if _, err := m.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			off, n = randomRange(r, m.Size(), 1<<17)
			if err := eraser(m, r.IntN(3))(off, n); err != nil {
				t.Fatal(err)
			}
			if i%10 == 0 {
				if err := m.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			if i%25 == 0 {
				for _, how := range []string{"-c", "-a", "-d"} {
					must(t, changeSnapshot(m, how, "s"))
				}
			}
		}
		if err := m.explain(corruptf("a test")); err == nil || m.usable() == nil {
			t.Error("a corruption was ignored")
		}
		if err := m.Close(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("close: %v", err)
		}
	}
}

// TestCoalesce shows that what lies together in the file is moved by one call,
// and that a large write allocates in one go.
func TestCoalesce(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	b := make([]byte, 500000)
	if _, err := m.WriteAt([]byte("x"), 0); err != nil { // so that the L2 table exists
		t.Fatal(err)
	}
	calls := map[string]int{}
	run.f.setFail(func(op string) error { calls[op]++; return nil })
	for _, c := range []struct {
		name string
		do   func() error
		want map[string]int
	}{
		{"allocate", func() error { _, err := m.WriteAt(b, 4096+100); return err }, map[string]int{"write": 1}},
		{"overwrite", func() error { _, err := m.WriteAt(b, 4096+200); return err }, map[string]int{"write": 1}},
		{"read", func() error { _, err := m.ReadAt(b, 1000); return err }, map[string]int{"read": 1}},
		{"read zeros", func() error { _, err := m.ReadAt(b[:4096], 900000); return err }, map[string]int{}},
	} {
		clear(calls)
		if err := c.do(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.want, calls); d != "" {
			t.Errorf("%s: calls %s", c.name, d)
		}
	}
	run.f.setFail(nil)
	closeImage(t, m)
}

// TestDirtyLimit writes without a flush to more slices than may be dirty.
func TestDirtyLimit(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 64 << 20, ClusterSize: 512}), Options{L2CacheBytes: 40 * (512 + sliceOverhead)})
	for off := int64(0); off < m.Size(); off += 64 * 512 {
		if _, err := m.WriteAt([]byte("x"), off); err != nil {
			t.Fatal(err)
		}
		m.mu.RLock()
		dirty, all := len(m.cache.dirty), m.cache.lru.Len()
		m.mu.RUnlock()
		if dirty > 20 || all > 41 {
			t.Fatalf("%d dirty slices of %d, the bound is 40", dirty, all)
		}
	}
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", m.path)
}

// TestExclusively shows that what runs exclusively waits for the requests under
// way, keeps others and flushes out, and lets them in afterwards.
func TestExclusively(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	if _, err := m.WriteAt([]byte("first"), 0); err != nil { // so that the next is of one piece
		t.Fatal(err)
	}
	var first atomic.Bool
	gate := newGate(m, func(write bool, _, _ int64) bool { return write && first.CompareAndSwap(false, true) })
	write := make(chan error, 1)
	go func() { _, err := m.WriteAt([]byte("before"), 0); write <- err }()
	<-gate.held
	var running atomic.Bool
	begun, end, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- m.exclusively(func() error {
			running.Store(true)
			close(begun)
			<-end
			running.Store(false)
			return nil
		})
	}()
	select {
	case <-begun:
		t.Error("it ran beside a request")
	case <-time.After(20 * time.Millisecond):
	}
	close(gate.open)
	if err := <-write; err != nil {
		t.Fatal(err)
	}
	<-begun
	var wg sync.WaitGroup
	for _, f := range []func() error{
		func() error { _, err := m.ReadAt(make([]byte, 6), 0); return err },
		func() error { _, err := m.WriteAt([]byte("after"), 0); return err },
		func() error { return m.Discard(8192, 4096) },
		m.Flush,
	} {
		wg.Go(func() {
			if err := f(); err != nil || running.Load() {
				t.Errorf("a request ran beside it: %v", err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	close(end)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	closeImage(t, m)
	if err := m.exclusively(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The ways to make a range zero, by number.
const (
	eraseWrite = iota
	erasePunch
	eraseDiscard
)

func eraser(m *Image, how int) func(off, n int64) error {
	return [...]func(off, n int64) error{m.WriteZeroes, m.PunchHole, m.Discard}[how]
}

// erase applies eraser how to the image and the model.
func erase(t testing.TB, m *Image, model []byte, how int, off, n int64) {
	t.Helper()
	from, length, kept := off, n, func() {}
	if how == eraseDiscard {
		from, length = discarded(m, off, n)
		kept = keepsPacked(t, m, model, from, length)
	}
	if err := eraser(m, how)(off, n); err != nil {
		t.Fatal(err)
	}
	if length > 0 {
		clear(model[from : from+length])
	}
	kept()
}

// discarded returns the part of a range that Discard makes zero.
func discarded(m *Image, off, n int64) (int64, int64) {
	off, n = wholeClusters(m, off, n)
	for ; n > 0 && m.version == 2 && m.showsBacking(off); off, n = off+m.clusterSize, n-m.clusterSize {
	}
	return off, max(n, 0)
}

// keepsPacked returns a function that restores in the model what Discard leaves of
// a range: parts of compressed clusters.
func keepsPacked(t testing.TB, m *Image, model []byte, off, n int64) func() {
	t.Helper()
	kept := map[int64][]byte{}
	for _, c := range []int64{off &^ (m.clusterSize - 1), (off + n) &^ (m.clusterSize - 1)} {
		from, to := max(off, c), min(off+n, c+m.clusterSize)
		if from >= to || to-from == m.clusterSize || from == c && to == m.Size() {
			continue
		}
		s, err := m.lookup(from, to-from, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.pin.leave()
		if s.kind == kindCompressed {
			kept[from] = bytes.Clone(model[from:to])
		}
	}
	return func() {
		for at, b := range kept {
			copy(model[at:], b)
		}
	}
}

// wholeClusters returns the part of a range that is whole subclusters, the last of
// the disk included.
func wholeClusters(m *Image, off, n int64) (int64, int64) {
	end := off + n
	off = (off + m.grain() - 1) &^ (m.grain() - 1)
	if end < m.Size() {
		end &^= m.grain() - 1
	}
	return off, max(end-off, 0)
}

// entryOf returns the L2 entry of the guest cluster at off, as in memory.
func entryOf(t testing.TB, m *Image, off int64) uint64 {
	t.Helper()
	if _, err := m.ReadAt(make([]byte, 1), off); err != nil {
		t.Fatal(err)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := m.cluster(off)
	s := m.cache.find(m.sliceID(c))
	if s == nil {
		return 0
	}
	return s.entries[m.sliceIndex(c)]
}

// TestEraseEntries shows what each way to make a cluster zero does to each kind
// of entry, and how many holes it punches.
func TestEraseEntries(t *testing.T) {
	const host = 1 << 20 // stands for the cluster that was there before
	const own = entryCopied | host
	for _, c := range []struct {
		version int
		backing bool
		before  string
		want    [3]uint64 // after WriteZeroes, PunchHole, Discard
		punched [3]int
	}{
		{3, false, "nothing", [3]uint64{0, 0, 0}, [3]int{}},
		{3, true, "nothing", [3]uint64{1, 1, 1}, [3]int{}},
		{3, false, "data", [3]uint64{own | 1, own | 1, own | 1}, [3]int{0, 1, 1}},
		{3, true, "data", [3]uint64{own | 1, own | 1, own | 1}, [3]int{0, 1, 1}},
		{3, true, "zero", [3]uint64{1, 1, 1}, [3]int{}},
		{3, true, "reserved zero", [3]uint64{own | 1, own | 1, own | 1}, [3]int{0, 1, 1}},
		{3, true, "shared", [3]uint64{1, 1, 1}, [3]int{}},
		{2, false, "nothing", [3]uint64{0, 0, 0}, [3]int{}},
		{2, false, "data", [3]uint64{own, 0, 0}, [3]int{}},
		{2, true, "nothing", [3]uint64{own, own, 0}, [3]int{}},
		{2, true, "data", [3]uint64{own, own, own}, [3]int{}},
	} {
		for how := range 3 {
			t.Run(fmt.Sprintf("v%d %s backing=%v how=%d", c.version, c.before, c.backing, how), func(t *testing.T) {
				var under []byte
				if c.backing {
					under = bytes.Repeat([]byte{7}, 64<<10)
				}
				run := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096, Version: c.version}, under)
				m := run.open(t, run.f, false)
				const off = 8192
				if _, err := m.WriteAt([]byte("table"), 0); err != nil {
					t.Fatal(err)
				}
				prepareEntry(t, m, c.before, off)
				before := entryOf(t, m, off)
				punched := 0
				run.f.setFail(func(op string) error { punched += b2int(op == "punch"); return nil })
				model := make([]byte, 4096)
				if _, err := m.ReadAt(model, off); err != nil {
					t.Fatal(err)
				}
				if err := eraser(m, how)(off, 4096); err != nil {
					t.Fatal(err)
				}
				want := c.want[how]
				got := entryOf(t, m, off)
				if want&host != 0 && before&entryOffset != 0 {
					want = want&^host | before&entryOffset
				} else if want&host != 0 {
					want = want&^host | got&entryOffset // a new cluster
				}
				if got != want || punched != c.punched[how] {
					t.Errorf("entry %#x became %#x, want %#x, with %d holes, want %d", before, got, want, punched, c.punched[how])
				}
				if how != eraseDiscard || c.version == 3 || !c.backing {
					clear(model)
				}
				b := make([]byte, 4096)
				if _, err := m.ReadAt(b, off); err != nil || !bytes.Equal(b, model) {
					t.Errorf("reads wrong: %v", err)
				}
				if c.before != "shared" { // whose count this test made up
					closeImage(t, m)
					if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
						t.Error(v)
					}
				}
			})
		}
	}
}

func b2int(b bool) int { return int(b2u(b)) }

// prepareEntry gives the guest cluster at off an entry of the kind.
func prepareEntry(t *testing.T, m *Image, kind string, off int64) {
	t.Helper()
	if kind == "nothing" {
		return
	}
	if kind == "zero" {
		if err := m.PunchHole(off, m.clusterSize); err != nil {
			t.Fatal(err)
		}
		return
	}
	if _, err := m.WriteAt([]byte("data"), off+100); err != nil {
		t.Fatal(err)
	}
	switch kind {
	case "reserved zero":
		if err := m.WriteZeroes(off, m.clusterSize); err != nil {
			t.Fatal(err)
		}
	case "shared":
		m.mu.Lock()
		c := m.cluster(off)
		s := m.cache.find(m.sliceID(c))
		s.set(m.sliceIndex(c), s.entries[m.sliceIndex(c)]&^entryCopied)
		m.mu.Unlock()
	}
}

// TestDiscardGivesRoomBack writes, discards and writes again: the file's space
// shrinks, and its length does not grow.
func TestDiscardGivesRoomBack(t *testing.T) {
	const size = 8 << 20
	path := create(t, CreateOptions{Size: size})
	m := open(t, path, Options{})
	blocks := func() (int64, int64) {
		if err := m.Flush(); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Blocks * 512, fi.Size()
	}
	b := bytes.Repeat([]byte{1}, size)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	full, long := blocks()
	if err := m.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if m.unpunchable.Load() {
		t.Skip("the file system cannot punch holes")
	}
	if empty, _ := blocks(); empty > full-size+(64<<10) {
		t.Errorf("%d bytes after a discard of %d out of %d", empty, size, full)
	}
	for range 3 {
		if _, err := m.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if err := m.PunchHole(0, size); err != nil {
			t.Fatal(err)
		}
	}
	if _, again := blocks(); again != long {
		t.Errorf("the file grew from %d to %d bytes", long, again)
	}
}

// TestRegressionCH8624 holds up the punching of a hole while other queues flush,
// write to the cluster, and look for new ones. There, the late hole destroyed what
// had taken the cluster's place. Here a cluster is reused after its hole.
func TestRegressionCH8624(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	model := make([]byte, m.Size())
	fillRandom(newSeed(t), model[:128<<10])
	if _, err := m.WriteAt(model[:128<<10], 0); err != nil {
		t.Fatal(err)
	}
	hole := int64(entryOf(t, m, 8192) & entryOffset)
	var first atomic.Bool
	gate := newGate(m, func(write bool, off, _ int64) bool { return write && off == hole && first.CompareAndSwap(false, true) })
	discarded := make(chan error, 1)
	go func() { discarded <- m.Discard(8192, 4096) }()
	<-gate.held
	got := make([]byte, 4096)
	if _, err := m.ReadAt(got, 8192); err != nil || !bytes.Equal(got, make([]byte, 4096)) {
		t.Errorf("a read beside the discard: %v", err)
	}
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	fillRandom(newSeed(t), model[8192:8192+4096])
	go func() { _, err := m.WriteAt(model[8192:8192+4096], 8192); written <- err }()
	fillRandom(newSeed(t), model[128<<10:])
	for off := int64(128 << 10); off < m.Size(); off += 4096 {
		if _, err := m.WriteAt(model[off:off+4096], off); err != nil {
			t.Fatal(err)
		}
		if err := m.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-written:
		t.Fatalf("a write did not wait for the hole: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(gate.open)
	if err := errors.Join(<-discarded, <-written); err != nil {
		t.Fatal(err)
	}
	got = make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the late hole destroyed data (%v)", err)
	}
	closeImage(t, m)
}

// TestPunchBeforeReuse holds up the hole of a cluster that lost its last
// reference: nobody is given the cluster meanwhile.
func TestPunchBeforeReuse(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096, Version: 2}, nil)
	m := run.open(t, run.f, false)
	if _, err := m.WriteAt(make([]byte, 128<<10), 0); err != nil {
		t.Fatal(err)
	}
	hole := int64(entryOf(t, m, 8192) & entryOffset)
	if err := errors.Join(m.Flush(), m.Discard(8192, 4096), m.Flush(), m.Flush()); err != nil {
		t.Fatal(err)
	}
	var first atomic.Bool
	gate := newGate(m, func(write bool, off, _ int64) bool { return write && off == hole && first.CompareAndSwap(false, true) })
	flushed := make(chan error, 1)
	go func() { flushed <- m.Flush() }()
	<-gate.held
	b := []byte("new")
	for off := int64(128 << 10); off < 160<<10; off += 4096 {
		if _, err := m.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		if at := int64(entryOf(t, m, off) & entryOffset); at == hole {
			t.Errorf("the cluster at %#x is given away before its hole is punched", at)
		}
	}
	close(gate.open)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	if _, err := m.WriteAt(b, 200<<10); err != nil {
		t.Fatal(err)
	}
	if at := int64(entryOf(t, m, 200<<10) & entryOffset); at != hole {
		t.Errorf("the freed cluster at %#x is not reused: the next one is at %#x", hole, at)
	}
	closeImage(t, m)
}

// TestRegressionCHUnmapShowsBacking (39e253ff9) makes ranges of overlays zero.
// There, an entry that was emptied showed the backing file again. Here a zero flag
// hides it, after opening anew too. QEMU agrees.
func TestRegressionCHUnmapShowsBacking(t *testing.T) {
	for how := range 3 {
		for _, version := range []int{2, 3} {
			r := newSeed(t)
			dir := t.TempDir()
			const size = 256<<10 + 777
			model := makeBase(t, r, dir, "raw", 200<<10+512)
			fillRandom(r, model)
			writeFile(t, filepath.Join(dir, "base.raw"), model)
			model = append(model, make([]byte, size-len(model))...)
			path := filepath.Join(dir, "disk.qcow2")
			err := Create(path, CreateOptions{Size: size, ClusterSize: 4096, Version: version, BackingFile: "base.raw", BackingFormat: "raw"})
			if err != nil {
				t.Fatal(err)
			}
			m := open(t, path, Options{})
			erase(t, m, model, how, 4096, 100<<10)
			erase(t, m, model, how, 5000, 200)
			erase(t, m, model, how, 130<<10, size-130<<10)
			for range 2 {
				got := make([]byte, size)
				if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, model) {
					t.Errorf("version %d, how %d: reads wrong (%v)", version, how, err)
				}
				closeImage(t, m)
				m = open(t, path, Options{})
			}
			closeImage(t, m)
			qemu(t, "qemu-img", "check", "-q", path)
			ourBytes := make([]byte, len(model)&^511) // as QEMU floors the size
			copy(ourBytes, model)
			compare(t, dir, path, ourBytes)
		}
	}
}

// TestEraseFar makes all of a huge empty disk zero, which takes no metadata, and
// all of a full one.
func TestEraseFar(t *testing.T) {
	for _, version := range []int{2, 3} {
		path := create(t, CreateOptions{Size: 1 << 46, Version: version})
		m := open(t, path, Options{})
		if _, err := m.WriteAt([]byte("x"), 1<<45+5); err != nil {
			t.Fatal(err)
		}
		for how := range 3 {
			if err := eraser(m, how)(1000, m.Size()-1000); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			if _, err := m.ReadAt(b, 1<<45); err != nil || !bytes.Equal(b, make([]byte, 100)) {
				t.Errorf("reads wrong: %v", err)
			}
		}
		closeImage(t, m)
		fi, err := os.Stat(path)
		if err != nil || fi.Size() > 4<<20 {
			t.Errorf("the file has %d bytes (%v)", fi.Size(), err)
		}
		qemu(t, "qemu-img", "check", "-q", path)
	}
}

// TestEraseReadOnly shows that nothing is erased in an image open for reading,
// nor beside an image that is closed.
func TestEraseReadOnly(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	closed := open(t, path, Options{})
	closeImage(t, closed)
	m := open(t, path, Options{ReadOnly: true})
	for how := range 3 {
		if err := eraser(m, how)(0, 4096); !errors.Is(err, ErrReadOnly) {
			t.Errorf("read-only: %v", err)
		}
		if err := eraser(closed, how)(0, 1<<20); !errors.Is(err, ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
}

// TestEraseConcurrent lets goroutines that own neighbouring clusters write to
// them, make them zero, and read them, over compressed clusters, while another
// makes everything behind them zero and flushes.
func TestEraseConcurrent(t *testing.T) {
	const workers, ops = 6, 120
	r := newSeed(t)
	run := compressedRun(t, 256<<10, 4096)
	m := run.open(t, &memFile{data: append([]byte(nil), run.start...)}, false)
	model := make([]byte, m.Size())
	if _, err := m.ReadAt(model, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range workers {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			for range ops {
				c := int64(r.IntN(8)*workers+g) * 4096
				mine := model[c : c+4096]
				off, n := randomRange(r, 4096, 4096)
				switch r.IntN(6) {
				case 0:
					fillRandom(r, mine[off:off+n])
					if _, err := m.WriteAt(mine[off:off+n], c+off); err != nil {
						t.Error(err)
					}
				case 1:
					if err := m.Flush(); err != nil {
						t.Error(err)
					}
				case 2:
					if err := m.Discard(c, 4096); err != nil {
						t.Error(err)
					}
					clear(mine)
				case 3:
					if err := eraser(m, r.IntN(2))(c+off, n); err != nil {
						t.Error(err)
					}
					clear(mine[off : off+n])
				default:
					got := make([]byte, n)
					if _, err := m.ReadAt(got, c+off); err != nil || !bytes.Equal(got, mine[off:off+n]) {
						t.Errorf("%d bytes at %d differ: %v", n, c+off, err)
						return
					}
				}
			}
		})
	}
	wg.Go(func() {
		for range ops {
			if err := errors.Join(m.Discard(50*4096, m.Size()-50*4096), m.Flush()); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	clear(model[50*4096:])
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the disk differs from the model (%v)", err)
	}
	f := m.file.(*memFile)
	closeImage(t, m)
	if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Error(v)
	}
}

// TestEraseHostile points an entry at metadata: no hole is punched there.
func TestEraseHostile(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	for how := range 3 {
		for name, target := range map[string]uint64{"header": 1, "itself": uint64(l2), "refcount block": 0x20000, "far away": 0x80000000000000} {
			f := &memFile{data: append([]byte(nil), good...)}
			put(f.data, l2, 8, entryCopied|target)
			f.setFail(func(op string) error {
				if op == "punch" {
					t.Error("punched")
				}
				return nil
			})
			m, err := openFile(f, "memory", Options{}, &chain{})
			if err != nil {
				t.Fatal(err)
			}
			if err := eraser(m, how)(0, 64<<10); name != "header" && !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: %v", name, err)
			}
			_ = m.Close()
		}
	}
}

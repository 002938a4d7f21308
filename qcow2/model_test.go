package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
)

// TestModelConcurrent lets several goroutines write interleaved sectors and
// read what they own, with flushes, in rounds of one opening each. After each
// flush nothing else runs, and the file is checked.
func TestModelConcurrent(t *testing.T) {
	rounds, ops := 3, 200
	if testing.Short() {
		rounds, ops = 2, 60
	}
	for _, c := range []struct {
		opts CreateOptions
		base int64
	}{
		{CreateOptions{Size: 4 << 20}, 0},
		{CreateOptions{Size: 1<<20 + 512*3, ClusterSize: 512}, 300000},
		{CreateOptions{Size: 4 << 20, ClusterSize: 4096, RefcountBits: 1}, 2 << 20},
		{CreateOptions{Size: 16 << 20, ClusterSize: 2 << 20}, 20 << 20},
	} {
		t.Run(fmt.Sprint(c.opts.ClusterSize), func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			model := make([]byte, c.opts.Size)
			path := dir + "/disk.qcow2"
			if c.base > 0 {
				copy(model, makeBase(t, r, dir, "raw", c.base))
				c.opts.BackingFile, c.opts.BackingFormat = "base.raw", "raw"
			}
			if err := Create(path, c.opts); err != nil {
				t.Fatal(err)
			}
			for range rounds {
				m := open(t, path, Options{L2CacheBytes: 1})
				modelRound(t, m, r, model, ops)
				got := make([]byte, m.Size())
				if err := m.ReadvAt([][]byte{got}, 0); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, model) {
					t.Fatal("the disk differs from the model")
				}
				if err := m.Flush(); err != nil {
					t.Fatal(err)
				}
				checkFile(t, m, path)
				closeImage(t, m)
			}
			qemu(t, "qemu-img", "check", "-q", path)
			compare(t, dir, path, model)
		})
	}
}

// checkFile checks the file of an idle image: that it is consistent, and that no
// cluster in the pool is referred to.
func checkFile(t testing.TB, m *Image, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if v := checkImage(b); len(v.corruptions) > 0 {
		t.Fatalf("after a flush: %v", v.corruptions)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	seen := map[uint64]bool{}
	for _, list := range [][]extent{m.pool.fresh, m.pool.recycled} {
		for _, e := range list {
			for c := e.start; c < e.start+e.n; c++ {
				if seen[c] || m.meta.at(c) != metaNone {
					t.Fatalf("cluster %#x is in the pool twice, or holds the %s", c, m.meta.at(c))
				}
				seen[c] = true
			}
		}
	}
	for c := range referenced(b) {
		if seen[c] {
			t.Fatalf("cluster %#x is in the pool and in use", c)
		}
	}
}

// modelRound runs 8 goroutines, of which each owns the sectors of one residue.
func modelRound(t *testing.T, m *Image, r *rand.Rand, model []byte, ops int) {
	t.Helper()
	const workers = 8
	var wg sync.WaitGroup
	for g := range workers {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			sectors := (len(model) - sector) / sector / workers
			got := make([]byte, sector)
			for range ops {
				at := (r.IntN(sectors)*workers + g) * sector
				if r.IntN(3) == 0 {
					at = (r.IntN(min(sectors, 32))*workers + g) * sector
				}
				mine := model[at : at+sector]
				switch r.IntN(20) {
				case 0:
					if err := m.Flush(); err != nil {
						t.Error(err)
					}
				case 1, 2, 3, 4, 5:
					if _, err := m.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, mine) {
						t.Errorf("sector at %d differs: %v", at, err)
						return
					}
				case 6, 7:
					off, n := randomRange(r, sector, sector)
					clear(mine[off : off+n])
					if err := eraser(m, r.IntN(2))(int64(at)+off, n); err != nil {
						t.Error(err)
						return
					}
				default:
					part := mine[:1+r.IntN(sector)]
					fillRandom(r, part)
					if _, err := m.WriteAt(part, int64(at)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestOverlappingWriters lets goroutines write overlapping ranges, each write
// with one value: every sector then has the value of one of the writes to it.
func TestOverlappingWriters(t *testing.T) {
	r := newSeed(t)
	const size = 1 << 20
	path := create(t, CreateOptions{Size: size, ClusterSize: 4096})
	m := open(t, path, Options{})
	var mu sync.Mutex
	may := make([]map[byte]bool, size/sector)
	for i := range may {
		may[i] = map[byte]bool{0: true}
	}
	var wg sync.WaitGroup
	for g := range 6 {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			for i := range 40 {
				off := r.Int64N(size/sector-100) * sector
				n := (1 + r.Int64N(100)) * sector
				v := byte(1 + g*40 + i)
				mu.Lock()
				for s := off / sector; s < (off+n)/sector; s++ {
					may[s][v] = true
				}
				mu.Unlock()
				if _, err := m.WriteAt(bytes.Repeat([]byte{v}, int(n)), off); err != nil {
					t.Error(err)
				}
				if i%10 == 0 {
					if err := m.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, size)
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for s := range may {
		b := got[s*sector : (s+1)*sector]
		if v := b[0]; !may[s][v] || !bytes.Equal(b, bytes.Repeat([]byte{v}, sector)) {
			t.Fatalf("sector %d has value %d, which no write to it had, or a mixture", s, v)
		}
	}
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", path)
}

// TestHotPathDoesNotAllocate guards the reads and overwrites of a full disk.
func TestHotPathDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	m := open(t, create(t, CreateOptions{Size: 8 << 20}), Options{})
	b := make([]byte, 1<<20)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	iov := [][]byte{b[:4096], b[8192:12288], b[100000:300000]}
	for name, f := range map[string]func() error{
		"read":       func() error { _, err := m.ReadAt(b[:4096], 8192); return err },
		"overwrite":  func() error { _, err := m.WriteAt(b[:4096], 8192); return err },
		"readv":      func() error { return m.ReadvAt(iov, 60000) },
		"overwritev": func() error { return m.WritevAt(iov, 60000) },
		"read zeros": func() error { _, err := m.ReadAt(b[:4096], 4<<20); return err },
	} {
		if n := testing.AllocsPerRun(200, func() {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestHotPathIgnoresStuckFlush shows that reads, overwrites and even new
// allocations go on while an fdatasync hangs: no lock of theirs is held by it.
func TestHotPathIgnoresStuckFlush(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	run.f.rec = false
	m := run.open(t, run.f, false)
	b := make([]byte, 4096)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	stuck, release := make(chan struct{}), make(chan struct{})
	blocking := &blockingFile{file: m.file, stuck: stuck, release: release}
	m.file, m.data = blocking, blocking
	done := make(chan error)
	go func() { done <- m.Flush() }()
	<-stuck
	for _, off := range []int64{0, 8192} {
		if _, err := m.WriteAt(b, off); err != nil {
			t.Error(err)
		}
		if _, err := m.ReadAt(b, off); err != nil {
			t.Error(err)
		}
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	// The flush wrote the entries that it captured, not those made since,
	// whose clusters have no counts in the file yet.
	if v := checkImage(run.f.data); len(v.corruptions) > 0 {
		t.Error(v)
	}
	closeImage(t, m)
	if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Error(v)
	}
}

// blockingFile hangs in its first Fdatasync until released.
type blockingFile struct {
	file
	once           sync.Once
	stuck, release chan struct{}
}

func (f *blockingFile) Fdatasync() error {
	f.once.Do(func() {
		close(f.stuck)
		<-f.release
	})
	return f.file.Fdatasync()
}

// TestFlushCount shows how many barriers a flush takes.
func TestFlushCount(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	syncs := func() int {
		before := run.f.syncs
		if err := m.Flush(); err != nil {
			t.Fatal(err)
		}
		return run.f.syncs - before
	}
	if _, err := m.WriteAt(make([]byte, 9000), 100); err != nil {
		t.Fatal(err)
	}
	if n := syncs(); n != 2 {
		t.Errorf("after an allocation: %d barriers, want 2", n)
	}
	if _, err := m.WriteAt(make([]byte, 9000), 100); err != nil {
		t.Fatal(err)
	}
	if n := syncs(); n != 1 {
		t.Errorf("after an overwrite: %d barriers, want 1", n)
	}
	closeImage(t, m)
}

// TestCacheBound shows that the cache for L2 tables stays within its bound, and
// that a disk larger than it covers is read and written right.
func TestCacheBound(t *testing.T) {
	r := newSeed(t)
	const size = 4 << 20
	m := open(t, create(t, CreateOptions{Size: size, ClusterSize: 512}), Options{L2CacheBytes: 1})
	model := make([]byte, size)
	fillRandom(r, model)
	if _, err := m.WriteAt(model, 0); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		off, n := randomRange(r, size, 20000)
		got := make([]byte, n)
		if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, model[off:off+n]) {
			t.Fatal("wrong read", err)
		}
		if n := m.cache.lru.Len(); n > minSlices {
			t.Fatalf("%d slices in memory, bound %d", n, minSlices)
		}
	}
}

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// models are what many goroutines do at once. Their ranges overlap.
var models = []workload{
	{name: "64K", opts: CreateOptions{Size: 2 << 20}, queues: 8, ops: 150, mix: modelMix},
	{name: "512", opts: CreateOptions{Size: 512<<10 + 3*512, ClusterSize: 512}, under: 300 << 10, queues: 6, ops: 150, mix: modelMix + " discard"},
	{name: "1K, version 2", opts: CreateOptions{Size: 256 << 10, ClusterSize: 1024, Version: 2}, queues: 4, ops: 150, mix: modelMix},
	{name: "4K, counts of 1 bit", opts: CreateOptions{Size: 1 << 20, ClusterSize: 4096, RefcountBits: 1}, under: 600 << 10, packed: true, queues: 8, ops: 150, mix: modelMix},
	{name: "4K, counts of 2 bits, compressed", opts: CreateOptions{Size: 512 << 10, ClusterSize: 4096, RefcountBits: 2}, queues: 8, ops: 100, mix: modelMix + " pack pack pack pack discard"},
	{name: "4K, all compressed", opts: CreateOptions{Size: 512 << 10, ClusterSize: 4096}, full: true, queues: 4, ops: 150, mix: modelMix},
	{name: "8K, counts of 4 bits, resized", opts: CreateOptions{Size: 1 << 20, ClusterSize: 8 << 10, RefcountBits: 4}, queues: 4, ops: 150, mix: resizeMix + " clone audit settle"},
	{name: "512, counts of 64 bits, resized over backing", opts: CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 64}, under: 300 << 10, queues: 4, ops: 150, mix: resizeMix + " clone audit settle"},
	{name: "16K, counts of 32 bits", opts: CreateOptions{Size: 1 << 20, ClusterSize: 16 << 10, RefcountBits: 32}, queues: 1, ops: 300, mix: modelMix + " discard resize"},
	{name: "64K, counts of 8 bits, snapshot", opts: CreateOptions{Size: 2 << 20, RefcountBits: 8}, prepare: snapshotted(1 << 20), queues: 8, ops: 150, mix: modelMix},
	{name: "64K, subclusters", opts: CreateOptions{Size: 2 << 20, ExtendedL2: true}, under: 1 << 20, queues: 8, ops: 150, mix: modelMix + " pack"},
	{name: "64K, subclusters, discarded", opts: CreateOptions{Size: 2 << 20, ExtendedL2: true}, queues: 8, ops: 100, mix: modelMix + " discard"},
	{name: "4K, snapshots", opts: CreateOptions{Size: 512 << 10, ClusterSize: 4096}, under: 200 << 10, queues: 8, ops: 100, mix: modelMix + " snap snap discard"},
	{name: "4K, data file", opts: CreateOptions{Size: 512 << 10, ClusterSize: 4096}, data: true, queues: 8, ops: 100, mix: modelMix + " discard"},
	{name: "2M", opts: CreateOptions{Size: 6 << 20, ClusterSize: 2 << 20}, under: 3 << 20, queues: 8, ops: 24, mix: modelMix},
}

const modelMix = "write write write write write write write read read read read fill zero punch flush flush clone audit settle reopen"

// TestModel lets up to 8 goroutines write, read, erase, flush, resize and reopen an
// image whose cache holds a few tables only, where their ranges overlap. Each
// sector that is read has the value of a write that may be the last one. After
// each flush no cluster has two owners; a copy of the file, as a killed process
// leaves it, has all that was flushed.
func TestModel(t *testing.T) {
	for _, w := range models {
		t.Run(w.name, func(t *testing.T) {
			r := newSeed(t)
			if brief() {
				w.ops /= 3
			}
			run := newRun(t, w)
			run.opts.L2CacheBytes = 1
			run.f.rec = false
			run.f.pause = pauses(r.Uint64())
			run.m = run.open(t, run.f, false)
			run.play(t, w, r)
			run.sound(t, "at the end")
			must(t, run.close())
			run.noLeaks(t)
			run.reopened(t, "closed")
			o := newOracles(t, run, w, r)
			if _, err := exec.LookPath("qemu-img"); err != nil || t.Failed() {
				return
			}
			now := run.now()
			disk, err := run.verify(t, now)
			must(t, err)
			must(t, o.witness(now, disk))
		})
	}
}

// pauses returns a function that lets other goroutines run, now and then for long.
func pauses(seed uint64) func() {
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(seed, 2))
	return func() {
		mu.Lock()
		n := r.IntN(64)
		mu.Unlock()
		if n == 0 {
			time.Sleep(100 * time.Microsecond)
			return
		}
		for ; n > 48; n-- {
			runtime.Gosched()
		}
	}
}

// clone copies the file, at any instant, and opens the copy: what was flushed is
// there.
func (w *worker) clone() error {
	run := w.run
	run.mu.Lock()
	at := run.f.mark("clone")
	s := run.now()
	run.mu.Unlock()
	if err := checkState(s.data); err != nil {
		return err
	}
	m, err := run.openIn(s.file(), Options{ReadOnly: true})
	if err != nil {
		return err
	}
	disk := make([]byte, m.Size())
	err = errors.Join(m.ReadvAt([][]byte{disk}, 0), m.Close())
	run.mu.Lock()
	defer run.mu.Unlock()
	if err == nil {
		err = run.judgeDisk(disk, at)
	}
	return err
}

// audit flushes while others go on, and looks whether the image knows one owner of
// each cluster.
func (w *worker) audit() error {
	if err := w.flush(); err != nil {
		return err
	}
	return checkOwners(w.run.m)
}

// settle flushes, alone, until all that was freed is free: then the counts agree
// with the references.
func (w *worker) settle() error {
	run := w.run
	for range 3 {
		if err := w.flush(); err != nil {
			return err
		}
	}
	// What has room for more compressed data counts once more.
	if leaks := checkImage(run.f.data).leaks; leaks > len(run.m.packer.held) && !run.leaky {
		return fmt.Errorf("%d leaks while nobody else is at work", leaks)
	}
	return checkIdle(run.m, run.f.data)
}

// checkIdle checks an image that nobody else uses and that was flushed, whose file
// is b: it has no corruption, and no cluster in the pool is in use.
func checkIdle(m *Image, b []byte) error {
	v, refs := inspect(b)
	if len(v.corruptions) > 0 {
		return fmt.Errorf("after a flush: %v", v.corruptions)
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	free, err := poolOf(m)
	for c := range refs {
		if free[c] {
			return fmt.Errorf("cluster %#x is in the pool and in use", c)
		}
	}
	return err
}

// poolOf returns the clusters in the pool of an image, whose lock is held.
func poolOf(m *Image) (map[uint64]bool, error) {
	free := map[uint64]bool{}
	for _, e := range slices.Concat(m.pool.fresh, m.pool.recycled) {
		for c := e.start; c < e.start+e.n; c++ {
			if free[c] || m.meta.at(c) != metaNone {
				return nil, fmt.Errorf("cluster %#x is in the pool twice, or holds the %s", c, m.meta.at(c))
			}
			free[c] = true
		}
	}
	return free, nil
}

// checkOwners looks at one instant of an image in use: what is in the pool is
// nothing else, and what one entry in memory owns no other does.
func checkOwners(m *Image) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	free, err := poolOf(m)
	if err != nil {
		return err
	}
	gone := slices.Clone(m.freed)
	for _, b := range m.released {
		gone = append(gone, b.clusters...)
	}
	for _, c := range gone {
		if free[c] {
			return fmt.Errorf("cluster %#x is in the pool and is not free yet", c)
		}
	}
	if m.external {
		return nil // what its entries point to is no cluster of the image
	}
	owned := map[uint64]bool{}
	for _, s := range m.cache.lru.Values() {
		words := len(s.entries) >> m.sliceBits
		for i := 0; i < len(s.entries); i += words {
			e := s.entries[i]
			if e&entryCopied == 0 || e&entryCompressed != 0 || m.l1[m.l1Index(s.id)]&entryCopied == 0 {
				continue
			}
			c := e & entryOffset >> m.clusterBits
			if owned[c] || m.meta.at(c) != metaNone {
				return fmt.Errorf("cluster %#x has two owners, or holds the %s", c, m.meta.at(c))
			}
			owned[c] = true
		}
	}
	return nil
}

// checkFile checks the file of an idle image: that it is consistent, and that no
// cluster in the pool is referred to.
func checkFile(t testing.TB, m *Image, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	must(t, checkIdle(m, b))
}

// modelRound runs 8 goroutines that write parts of sectors. Each owns the sectors of
// one residue.
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

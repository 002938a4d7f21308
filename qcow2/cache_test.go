package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
)

// cacheChain opens a chain of images under a budget of so many slices, and
// returns what the disk holds. Each image has 128 slices, and some data of its own
// in each of them.
func cacheChain(t *testing.T, layers int, budget int64) (*Image, []byte) {
	t.Helper()
	r := newSeed(t)
	dir := t.TempDir()
	model := make([]byte, 4<<20)
	name := func(i int) string { return fmt.Sprintf("%d.qcow2", i) }
	for i := range layers {
		opts := CreateOptions{Size: int64(len(model)), ClusterSize: 512}
		if i > 0 {
			opts.BackingFile, opts.BackingFormat = name(i-1), "qcow2"
		}
		must(t, Create(filepath.Join(dir, name(i)), opts))
		m := open(t, filepath.Join(dir, name(i)), Options{})
		for off := int64(0); off < m.Size(); off += 32 << 10 {
			b := model[off+r.Int64N(64)*512:][:512]
			if i == 0 {
				b = model[off:][:32<<10]
			}
			fillRandom(r, b)
			must(t, m.WritevAt([][]byte{b}, int64(len(model)-cap(b))))
		}
		closeImage(t, m)
	}
	return open(t, filepath.Join(dir, name(layers-1)), Options{L2CacheBytes: budget * (512 + sliceOverhead)}), model
}

// cached returns how many slices each image of the chain has in memory.
func cached(t *testing.T, m *Image) (each []int, sum int64) {
	t.Helper()
	for _, m := range m.cache.budget.images {
		m.mu.RLock()
		n := m.cache.lru.Len()
		m.mu.RUnlock()
		each, sum = append(each, n), sum+int64(n)
	}
	if spent := m.cache.budget.spent.Load(); spent != sum*m.cache.cost {
		t.Errorf("%d slices are counted as %d bytes", sum, spent)
	}
	return each, sum
}

// TestCacheChainBound reads and writes a chain of ten images whose tables take
// four times what they may: all images together stay within the budget.
func TestCacheChainBound(t *testing.T) {
	const budget = 300
	m, model := cacheChain(t, 10, budget)
	r := newSeed(t)
	got := make([]byte, 40<<10)
	for range 400 {
		off, n := randomRange(r, m.Size(), int64(len(got)))
		if r.IntN(4) == 0 {
			fillRandom(r, model[off:off+n])
			must(t, m.WritevAt([][]byte{model[off : off+n]}, off))
		}
		must(t, m.ReadvAt([][]byte{got[:n]}, off))
		if !bytes.Equal(got[:n], model[off:off+n]) {
			t.Fatalf("%d bytes at %d differ", n, off)
		}
		if each, sum := cached(t, m); sum > budget {
			t.Fatalf("%d slices in memory, %v, may be %d", sum, each, budget)
		}
	}
	if each, sum := cached(t, m); len(each) != 10 || sum < budget*9/10 {
		t.Errorf("%d slices in memory, %v, of %d that may be", sum, each, budget)
	}
	closeImage(t, m)
}

// TestCacheChainShares lets one image of a chain need the cache and then another:
// the one that rests gives way.
func TestCacheChainShares(t *testing.T) {
	m, _ := cacheChain(t, 2, 100)
	for _, layer := range []int{1, 0, 1} {
		b := make([]byte, 512)
		for off := int64(0); off < m.Size(); off += 32 << 10 {
			must(t, m.cache.budget.images[layer].ReadvAt([][]byte{b}, off))
		}
		if each, _ := cached(t, m); each[layer] < 50 {
			t.Errorf("image %d, at work, has no half of the slices: %v", layer, each)
		}
	}
}

// TestCacheChainFloor shows what images keep of a budget that pays for nothing,
// with many readers at once.
func TestCacheChainFloor(t *testing.T) {
	m, model := cacheChain(t, 4, 1)
	r := newSeed(t)
	var wg sync.WaitGroup
	for range 8 {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			got := make([]byte, 2048)
			for range 100 {
				off, n := randomRange(r, m.Size(), int64(len(got)))
				if _, err := m.ReadAt(got[:n], off); err != nil || !bytes.Equal(got[:n], model[off:off+n]) {
					t.Errorf("%d bytes at %d differ, %v", n, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if each, sum := cached(t, m); sum > 4*minSlices {
		t.Errorf("%v slices in memory, %d may be in each image", each, minSlices)
	}
}

// TestCacheGivesBack shows that slices which go because their tables do are taken
// off what is spent.
func TestCacheGivesBack(t *testing.T) {
	m, _ := cacheChain(t, 1, 300)
	must(t, m.ReadvAt([][]byte{make([]byte, m.Size())}, 0))
	must(t, m.Resize(t.Context(), 1<<20, ResizeOptions{Shrink: true}))
	if _, sum := cached(t, m); sum > 40 {
		t.Errorf("%d slices of a disk that has 32", sum)
	}
	_, err := m.CreateSnapshot(t.Context(), "s")
	must(t, err)
	must(t, m.ReadvAt([][]byte{make([]byte, m.Size())}, 0))
	must(t, m.ApplySnapshot(t.Context(), "s"))
	cached(t, m)
}

// TestCacheScratch shows that a throw-away overlay and its base share a budget.
func TestCacheScratch(t *testing.T) {
	base := create(t, CreateOptions{Size: 1 << 20})
	m, err := OpenScratch("", base, "qcow2", Options{})
	must(t, err)
	if n := len(m.cache.budget.images); n != 2 {
		t.Errorf("%d images share the budget, want 2", n)
	}
	closeImage(t, m)
}

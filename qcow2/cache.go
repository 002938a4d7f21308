package qcow2

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// slice is a part of an L2 table, of at most 4 KiB, in memory. Everything in it
// but touched is guarded by Image.mu.
type slice struct {
	id      uint64
	entries []uint64
	// frozen means that a commit is writing entries to the file without the
	// lock: who changes the slice replaces entries by a copy first.
	frozen bool
	// dirty means changed since the last commit began; inCommit, that the
	// running commit has not finished with it. Such a slice is not evicted.
	dirty, inCommit bool
	// hollow means that it read as zeros, and may be a hole in the file; see
	// Image.secure. It is not changed before that is over.
	hollow  bool
	users   int // allocations under way that will change it
	touched atomic.Bool
}

// touch marks the slice as recently used, with a write to shared memory only if
// it is not marked yet.
func (s *slice) touch() {
	if !s.touched.Load() {
		s.touched.Store(true)
	}
}

// set changes entry i. Image.mu is held exclusively.
func (s *slice) set(i, e uint64) {
	if s.frozen {
		s.entries = append([]uint64(nil), s.entries...)
		s.frozen = false
	}
	s.entries[i] = e
}

func (s *slice) evictable() bool { return !s.dirty && !s.inCommit && s.users == 0 }

// sliceOverhead is what a cached slice costs beyond its entries, in bytes.
const sliceOverhead = 256

// minSlices is the number of slices that an image may keep however small the
// budget is.
const minSlices = 16

// cacheBudget bounds the memory for slices of all images of a chain together, in
// bytes. When it is spent, the image gives way first that has most slices which
// are not dirty, so that no image that rests keeps the memory from those at work.
//
// Beyond the bound there are only minSlices slices of each image, those that may
// not be evicted, and those being loaded.
type cacheBudget struct {
	bytes int64
	spent atomic.Int64 // by all, each under its Image.mu

	mu     sync.Mutex // with it none is taken
	images []*Image
}

func newCacheBudget(bytes int64) (*cacheBudget, error) {
	if bytes == 0 {
		bytes = DefaultL2CacheBytes
	}
	if bytes < 0 {
		return nil, invalidOption("an L2 cache of %d bytes is impossible", bytes)
	}
	return &cacheBudget{bytes: bytes}, nil
}

// join adds m to those that share the budget, and gives it its cache.
func (b *cacheBudget) join(m *Image) error {
	cost := m.sliceBytes() + sliceOverhead
	// Its own bound is never met: trim knows what must stay.
	lru, err := simplelru.NewLRU(1<<40, func(uint64, *slice) { b.spent.Add(-cost) })
	if err != nil {
		return err
	}
	m.cache = &sliceCache{lru: lru, budget: b, cost: cost, limit: int(max(b.bytes/cost, minSlices))}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.images = append(b.images, m)
	return nil
}

// trim evicts slices other than keep, which the caller has loaded, while the budget
// is exceeded and any may go. No lock is held.
func (b *cacheBudget) trim(keep *slice) {
	more := true
	for more && b.spent.Load() > b.bytes {
		more = slices.ContainsFunc(b.givers(), func(m *Image) bool { return m.evictSlice(keep) })
	}
}

// givers returns the images that have more slices than they may always keep, in
// the order in which they give way.
func (b *cacheBudget) givers() []*Image {
	b.mu.Lock()
	list := slices.Clone(b.images)
	b.mu.Unlock()
	clean := make(map[*Image]int64, len(list)) // in bytes
	list = slices.DeleteFunc(list, func(m *Image) bool {
		m.mu.RLock()
		defer m.mu.RUnlock()
		clean[m] = int64(m.cache.lru.Len()-len(m.cache.dirty)) * m.cache.cost
		return m.cache.lru.Len() <= minSlices
	})
	slices.SortFunc(list, func(x, y *Image) int { return cmp.Compare(clean[y], clean[x]) })
	return list
}

// evictSlice evicts one slice other than keep, and reports whether there was one
// that could go.
func (m *Image) evictSlice(keep *slice) bool {
	m.lock()
	defer m.mu.Unlock()
	return m.cache.evict(keep)
}

// sliceCache holds the slices of one image in memory. It is guarded by Image.mu:
// find needs the shared side, everything else the exclusive one.
//
// The order of eviction is golang-lru's with a second chance: a lookup only
// marks the slice, because moving it to the front would need the exclusive side.
type sliceCache struct {
	lru    *simplelru.LRU[uint64, *slice]
	budget *cacheBudget
	cost   int64    // of a slice, in bytes
	limit  int      // slices that the whole budget would pay
	dirty  []*slice // exactly those with dirty set
}

// find returns the slice, or nil if it is not in memory.
func (c *sliceCache) find(id uint64) *slice {
	s, ok := c.lru.Peek(id)
	if !ok {
		return nil
	}
	s.touch()
	return s
}

// add puts s in the cache. The caller trims the budget once it has given back the
// lock.
func (c *sliceCache) add(s *slice) {
	c.lru.Add(s.id, s)
	c.budget.spent.Add(c.cost)
}

// evict evicts one slice other than keep, if the cache has more than it may always
// keep and one that may go.
func (c *sliceCache) evict(keep *slice) bool {
	// Each slice gets at most two looks, so the loop ends even if none may go.
	for looks := 2 * c.lru.Len(); c.lru.Len() > minSlices && looks > 0; looks-- {
		id, old, _ := c.lru.GetOldest()
		if old != keep && !old.touched.Load() && old.evictable() {
			c.lru.Remove(id)
			return true
		}
		old.touched.Store(false)
		c.lru.Get(id) // to the front
	}
	return false
}

// markDirty notes that s has to be written by the next commit.
func (c *sliceCache) markDirty(s *slice) {
	if !s.dirty {
		s.dirty = true
		c.dirty = append(c.dirty, s)
	}
}

// Dirty slices cannot be evicted, so they are kept few: from a quarter of the
// budget on, a commit is started in the background; from half of it on, writers
// wait for one. Only the first image of a chain has any.
func (c *sliceCache) commitSoon() bool { return len(c.dirty) >= max(c.limit/4, 1) }
func (c *sliceCache) commitNow() bool  { return len(c.dirty) >= max(c.limit/2, 2) }

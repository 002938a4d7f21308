package qcow2

import (
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
	users           int // allocations under way that will change it
	touched         atomic.Bool
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

// minSlices is the least number of slices that a cache holds.
const minSlices = 16

// sliceCache holds the slices in memory, within a bound in bytes. It is guarded
// by Image.mu: find needs the shared side, everything else the exclusive one.
//
// The order of eviction is golang-lru's with a second chance: a lookup only
// marks the slice, because moving it to the front would need the exclusive side.
type sliceCache struct {
	lru   *simplelru.LRU[uint64, *slice]
	limit int
	dirty []*slice // exactly those with dirty set
}

func newSliceCache(g *geometry, bytes int64) (*sliceCache, error) {
	limit := max(bytes/(g.sliceBytes()+sliceOverhead), minSlices)
	lru, err := simplelru.NewLRU[uint64, *slice](1<<40, nil) // bounded by add, which knows what must stay
	if err != nil {
		return nil, err
	}
	return &sliceCache{lru: lru, limit: int(limit)}, nil
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

// add puts s in the cache and evicts what exceeds the bound. The cache is over
// its bound only by slices that allocations under way or dirty.
func (c *sliceCache) add(s *slice) {
	c.lru.Add(s.id, s)
	// Each slice gets at most two looks, so the loop ends even if none may go.
	for looks := 2 * c.lru.Len(); c.lru.Len() > c.limit && looks > 0; looks-- {
		id, old, _ := c.lru.GetOldest()
		if old != s && !old.touched.Load() && old.evictable() {
			c.lru.Remove(id)
			continue
		}
		old.touched.Store(false)
		c.lru.Get(id) // to the front
	}
}

// markDirty notes that s has to be written by the next commit.
func (c *sliceCache) markDirty(s *slice) {
	if !s.dirty {
		s.dirty = true
		c.dirty = append(c.dirty, s)
	}
}

// Dirty slices cannot be evicted, so they are kept few: from a quarter of the
// cache on, a commit is started in the background; from half of it on, writers
// wait for one.
func (c *sliceCache) commitSoon() bool { return len(c.dirty) >= max(c.limit/4, 1) }
func (c *sliceCache) commitNow() bool  { return len(c.dirty) >= max(c.limit/2, 2) }

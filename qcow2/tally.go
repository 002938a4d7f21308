package qcow2

import (
	"fmt"
	"maps"
	"math"
	"slices"
)

// tallyChunk is how many neighbouring clusters share a chunk.
const tallyChunk = 64

// page is a number of neighbouring chunks, nil where nothing is referred to.
type page [256]*chunk

// chunk is what is known of tallyChunk clusters that follow each other, mostly as
// a bit for each.
type chunk struct {
	used uint64              // those with references
	more *[tallyChunk]uint32 // the references to each beyond the first; nil if there are none

	// Those that the image counts once, and those that it counts not at all. Both
	// are empty if the counts are lost.
	once, none uint64
}

// at returns the references to cluster c; a chunk that is nil has none.
func (k *chunk) at(c uint64) uint32 {
	switch i := c % tallyChunk; {
	case k == nil || k.used>>i&1 == 0:
		return 0
	case k.more == nil:
		return 1
	default:
		return 1 + k.more[i]
	}
}

// agrees reports whether it is known that each count is the number of references.
func (k *chunk) agrees() bool { return k.more == nil && k.once == k.used && k.none == ^k.used }

// What a chunk, a page and an L2 table cost in memory with their places in a map, and an
// extent in a list, in bytes.
const (
	chunkCost  = 40
	moreCost   = 4 * tallyChunk
	pageCost   = 8*256 + 64
	tableCost  = 96
	extentCost = 48
)

// tally counts references to host clusters in bounded memory: it has chunks only
// for what is referred to.
type tally struct {
	pages  map[uint64]*page
	chunks int                            // how many there are
	load   func(c uint64, k *chunk) error // tells a new chunk what the image counts from cluster c on
	room   []chunk                        // for new ones
	left   int64                          // bytes of memory

	// The chunk that was asked for last: references have neighbours.
	last  *chunk
	index uint64 // of last
}

func newTally(bytes int64, load func(uint64, *chunk) error) tally {
	if bytes == 0 {
		bytes = defaultCheckMemory
	}
	return tally{pages: map[uint64]*page{}, load: load, left: bytes}
}

// chunk returns the chunk of cluster c, nil if it has no references.
func (t *tally) chunk(c uint64) *chunk {
	if t.last != nil && t.index == c/tallyChunk {
		return t.last
	}
	return t.find(c / tallyChunk)
}

func (t *tally) find(index uint64) *chunk {
	p := t.pages[index/uint64(len(page{}))]
	if p == nil {
		return nil
	}
	k := p[index%uint64(len(p))]
	if k != nil {
		t.last, t.index = k, index
	}
	return k
}

// grow makes the chunk of cluster c, which has no references so far.
func (t *tally) grow(c uint64) (*chunk, error) {
	index := c / tallyChunk
	p := t.pages[index/uint64(len(page{}))]
	if p == nil {
		if err := t.spend(pageCost); err != nil {
			return nil, err
		}
		p = new(page)
		t.pages[index/uint64(len(p))] = p
	}
	if err := t.spend(chunkCost); err != nil {
		return nil, err
	}
	if len(t.room) == 0 {
		t.room = make([]chunk, 64)
	}
	k := &t.room[0]
	t.room = t.room[1:]
	if err := t.load(index*tallyChunk, k); err != nil {
		return nil, err
	}
	t.chunks++
	p[index%uint64(len(p))] = k
	return k, nil
}

// at returns the references to cluster c.
func (t *tally) at(c uint64) uint32 { return t.chunk(c).at(c) }

// spend takes bytes from the memory that is left.
func (t *tally) spend(bytes int64) error {
	if t.left -= bytes; t.left < 0 {
		return &Error{
			Kind: ErrUnsupported, What: "checking the image takes more memory than is allowed",
			Mend: fmt.Sprintf("allow more, or suspect the image: %d pieces of the file are in use", t.chunks),
		}
	}
	return nil
}

// add counts n references, at least one, to cluster c. Beyond 2^32 it stops
// counting.
func (t *tally) add(c uint64, n uint32) error {
	k := t.chunk(c)
	if k == nil {
		var err error
		if k, err = t.grow(c); err != nil {
			return err
		}
	}
	i := c % tallyChunk
	if k.used>>i&1 == 0 {
		k.used |= 1 << i
		n--
	}
	if n == 0 {
		return nil
	}
	if k.more == nil {
		if err := t.spend(moreCost); err != nil {
			return err
		}
		k.more = new([tallyChunk]uint32)
	}
	k.more[i] += min(n, math.MaxUint32-1-k.more[i])
	return nil
}

// drop takes back one reference to cluster c, which has one.
func (t *tally) drop(c uint64) {
	k, i := t.chunk(c), c%tallyChunk
	if k.more != nil && k.more[i] > 0 {
		k.more[i]--
		return
	}
	k.used &^= 1 << i
}

// sorted returns the indexes of the chunks that there are, ascending: cluster c is
// in c/tallyChunk.
func (t *tally) sorted() []uint64 {
	all := make([]uint64, 0, t.chunks)
	for _, i := range slices.Sorted(maps.Keys(t.pages)) {
		for j, k := range t.pages[i] {
			if k != nil {
				all = append(all, i*uint64(len(page{}))+uint64(j))
			}
		}
	}
	return all
}

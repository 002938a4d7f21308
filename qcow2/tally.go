package qcow2

import (
	"fmt"
	"math"
	"slices"
)

// tallyChunk is how many neighbouring clusters share a chunk.
const tallyChunk = 64

// chunk is the number of references to each of tallyChunk clusters.
type chunk [tallyChunk]uint32

// at returns the references to cluster c; a chunk that is nil has none.
func (k *chunk) at(c uint64) uint32 {
	if k == nil {
		return 0
	}
	return k[c%tallyChunk]
}

// What a chunk and an L2 table cost in memory with their places in a map, and an
// extent in a list, in bytes.
const (
	chunkCost  = 4*tallyChunk + 64
	tableCost  = 64
	extentCost = 48
)

// tally counts references to host clusters in bounded memory: it has chunks only
// for what is referred to.
type tally struct {
	chunks map[uint64]*chunk
	left   int64 // bytes of memory
}

func newTally(bytes int64) tally {
	if bytes == 0 {
		bytes = defaultCheckMemory
	}
	return tally{chunks: map[uint64]*chunk{}, left: bytes}
}

// chunk returns the chunk of cluster c, nil if it has no references.
func (t *tally) chunk(c uint64) *chunk { return t.chunks[c/tallyChunk] }

// at returns the references to cluster c.
func (t *tally) at(c uint64) uint32 { return t.chunk(c).at(c) }

// spend takes bytes from the memory that is left.
func (t *tally) spend(bytes int64) error {
	if t.left -= bytes; t.left < 0 {
		return &Error{
			Kind: ErrUnsupported, What: "checking the image takes more memory than is allowed",
			Mend: fmt.Sprintf("allow more, or suspect the image: %d pieces of the file are in use", len(t.chunks)),
		}
	}
	return nil
}

// add counts n references to cluster c. Beyond 2^32 it stops counting.
func (t *tally) add(c uint64, n uint32) error {
	k := t.chunks[c/tallyChunk]
	if k == nil {
		if err := t.spend(chunkCost); err != nil {
			return err
		}
		k = new(chunk)
		t.chunks[c/tallyChunk] = k
	}
	v := &k[c%tallyChunk]
	*v += min(n, math.MaxUint32-*v)
	return nil
}

// drop takes back one reference to cluster c, which has one.
func (t *tally) drop(c uint64) { t.chunk(c)[c%tallyChunk]-- }

// sorted returns the chunks that there are, ascending: cluster c is in c/tallyChunk.
func (t *tally) sorted() []uint64 {
	all := make([]uint64, 0, len(t.chunks))
	for c := range t.chunks {
		all = append(all, c)
	}
	slices.Sort(all)
	return all
}

package qcow2

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// extent is the run [start, start+n) of host clusters. In a virgin extent every
// byte reads as zero because nothing was ever written there.
type extent struct {
	start, n uint64
	virgin   bool
}

// refSlices is how many slices of refcount blocks stay in memory.
const refSlices = 256

// refSlice is a part of a refcount block, of at most 4 KiB, in the file's own
// encoding.
type refSlice struct {
	off   int64 // in the file
	b     []byte
	dirty bool
}

// refcounts is the reference count structure of an image. Only two things use
// it: the commit, which applies the counts that publishing and freeing clusters
// has brought about, and the search for free clusters. Neither runs under the
// metadata lock, so its own lock may be held across reads and writes.
//
// A dirty slice may be written at any time: counts are raised before a commit
// publishes pointers and lowered after another has made their removal durable.
type refcounts struct {
	img *Image

	mu     sync.Mutex // taken before Image.mu, never while it is held
	table  []uint64
	offset int64 // of the table in the file
	slices *simplelru.LRU[uint64, *refSlice]
	// cursor divides the clusters: those below it have been searched, and the
	// free ones among them are the pool's; those above belong to the search.
	cursor uint64
	virgin uint64 // clusters from here on were beyond the end of the file at open
	run    uint64 // the most contiguous clusters that were asked for
}

func (r *refcounts) sliceBytes() int64 { return min(r.img.clusterSize, 4096) }

// perSlice is log2 of the counts in a slice.
func (r *refcounts) perSlice() uint { return min(r.img.refBlockBits, 15-r.img.refcountOrder) }

// covered is the number of clusters that the table can count.
func (r *refcounts) covered() uint64 { return uint64(len(r.table)) << r.img.refBlockBits }

// decodeRefTable checks entry e with index i of the reference count table and
// returns the offset of the block, 0 if there is none.
func (g *geometry) decodeRefTable(e uint64, i int) (int64, error) {
	if e&0x1ff != 0 || e > math.MaxInt64 || g.inCluster(int64(e)) != 0 {
		return 0, corruptf("entry %d of the reference count table, %#x, points to no block", i, e)
	}
	return int64(e), nil
}

// slice returns the slice that holds the count of cluster c, nil if all counts
// around it are zero because the block does not exist. mu is held.
func (r *refcounts) slice(c uint64) (*refSlice, error) {
	id := c >> r.perSlice()
	if s, ok := r.slices.Get(id); ok {
		return s, nil
	}
	block := c >> r.img.refBlockBits
	if block >= uint64(len(r.table)) || r.table[block] == 0 {
		return nil, nil
	}
	off, err := r.img.decodeRefTable(r.table[block], int(block)) //nolint:gosec // G115: an index
	if err != nil {
		return nil, err
	}
	within := id & (1<<(r.img.refBlockBits-r.perSlice()) - 1)
	s := &refSlice{off: off + int64(within)*r.sliceBytes(), b: make([]byte, r.sliceBytes())} //nolint:gosec // G115: less than a block
	if err := readFull(r.img.file, s.b, s.off); err != nil {
		return nil, err
	}
	for r.slices.Len() >= refSlices {
		_, old, _ := r.slices.GetOldest()
		if err := r.write(old); err != nil {
			return nil, err
		}
		r.slices.RemoveOldest()
	}
	r.slices.Add(id, s)
	return s, nil
}

func (r *refcounts) write(s *refSlice) error {
	if !s.dirty {
		return nil
	}
	if err := writeFull(r.img.file, s.b, s.off); err != nil {
		return err
	}
	s.dirty = false
	return nil
}

// writeDirty writes every dirty slice. mu is held.
func (r *refcounts) writeDirty() error {
	for _, s := range r.slices.Values() {
		if err := r.write(s); err != nil {
			return err
		}
	}
	return nil
}

// count reads count i of a slice whose counts have 2^order bits.
func count(b []byte, order uint, i uint64) uint64 {
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(b[8*i:])
	}
	bit := i << order
	return uint64(b[bit/8]) >> (bit % 8) & (1<<(1<<order) - 1)
}

// setCount writes count i; v fits.
func setCount(b []byte, order uint, i, v uint64) {
	switch order {
	case 3:
		b[i] = byte(v) //nolint:gosec // G115: v fits
	case 4:
		binary.BigEndian.PutUint16(b[2*i:], uint16(v)) //nolint:gosec // G115: v fits
	case 5:
		binary.BigEndian.PutUint32(b[4*i:], uint32(v)) //nolint:gosec // G115: v fits
	case 6:
		binary.BigEndian.PutUint64(b[8*i:], v)
	default:
		bit := i << order
		mask := byte(1<<(1<<order)-1) << (bit % 8)
		b[bit/8] = b[bit/8]&^mask | byte(v<<(bit%8))&mask //nolint:gosec // G115: v fits
	}
}

// add adds delta, 1 or -1, to the count of cluster c and returns the new one. A
// count that would leave its range is a corruption. mu is held.
func (r *refcounts) add(c uint64, delta int) (uint64, error) {
	s, err := r.slice(c)
	if err != nil {
		return 0, err
	}
	if s == nil {
		return 0, corruptf("the cluster at %#x is in use but has no reference count", r.img.offset(c))
	}
	order := r.img.refcountOrder
	i := c & (1<<r.perSlice() - 1)
	v := count(s.b, order, i)
	switch {
	case delta < 0 && v == 0:
		return 0, corruptf("the cluster at %#x is in use but has a reference count of zero", r.img.offset(c))
	case delta > 0 && v == r.img.maxCount():
		return 0, corruptf("the reference count of the cluster at %#x overflows", r.img.offset(c))
	case delta < 0:
		v--
	default:
		v++
	}
	setCount(s.b, order, i, v)
	s.dirty = true
	return v, nil
}

// end is the cluster after the last one that counts a reference, which lies below
// limit. mu is held.
func (r *refcounts) end(limit uint64) (uint64, error) {
	mask := uint64(1)<<r.perSlice() - 1
	for c := min(limit, r.covered()); c > 0; c = (c - 1) &^ mask {
		s, err := r.slice(c - 1)
		if err != nil {
			return 0, err
		}
		for i := c; s != nil && i > (c-1)&^mask; i-- {
			if count(s.b, r.img.refcountOrder, (i-1)&mask) != 0 {
				return i, nil
			}
		}
	}
	return 0, nil
}

// raise adds one reference to each cluster of the extents. It returns those it
// could not treat. mu is held.
func (r *refcounts) raise(extents []extent) ([]extent, error) {
	for len(extents) > 0 {
		e := &extents[0]
		for ; e.n > 0; e.start, e.n = e.start+1, e.n-1 {
			if _, err := r.add(e.start, 1); err != nil {
				return extents, err
			}
		}
		extents = extents[1:]
	}
	return nil, nil
}

// lower takes one reference from each cluster. It returns the clusters that are
// free now, and those it could not treat. mu is held.
func (r *refcounts) lower(clusters []uint64) (free, rest []uint64, err error) {
	slices.Sort(clusters)
	for i, c := range clusters {
		v, err := r.add(c, -1)
		if err != nil {
			return free, clusters[i:], err
		}
		if v == 0 {
			free = append(free, c)
		}
	}
	return free, nil, nil
}

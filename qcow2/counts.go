package qcow2

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// stored returns the count of cluster c in the file; known is false if it is
// lost with its block. Where the image has no block, all counts are zero.
func (x *checker) stored(c uint64) (n uint64, known bool, err error) {
	if x.lost(c) {
		return 0, false, nil
	}
	s, err := x.refs.slice(c)
	return x.countIn(s, c), err == nil, err
}

// countIn returns the count of cluster c in its slice, which may be nil.
func (x *checker) countIn(s *refSlice, c uint64) uint64 {
	if s == nil {
		return 0
	}
	return count(s.b, x.refcountOrder, c&(1<<x.refs.perSlice()-1))
}

// loadCounts tells chunk k, which begins with cluster c, what the image counts. All
// its counts are in one slice.
func (x *checker) loadCounts(c uint64, k *chunk) error {
	if x.lost(c) {
		return nil
	}
	s, err := x.refs.slice(c)
	if err != nil {
		return err
	}
	if s == nil {
		k.none = math.MaxUint64
		return nil
	}
	first := c & (1<<x.refs.perSlice() - 1)
	for i := uint64(0); i < tallyChunk; i++ {
		if x.refcountOrder == 4 && i%4 == 0 { // four at once, as most are
			switch binary.BigEndian.Uint64(s.b[2*(first+i):]) {
			case 0:
				k.none |= 15 << i
				i += 3
				continue
			case 0x0001_0001_0001_0001:
				k.once |= 15 << i
				i += 3
				continue
			}
		}
		switch count(s.b, x.refcountOrder, first+i) {
		case 0:
			k.none |= 1 << i
		case 1:
			k.once |= 1 << i
		}
	}
	return nil
}

// lost reports whether the table of the counts, or its entry for cluster c,
// leads nowhere.
func (x *checker) lost(c uint64) bool {
	b := c >> x.refBlockBits
	if b >= uint64(len(x.refTable)) {
		return x.refTable == nil
	}
	return x.refs.table[b] != x.refTable[b]
}

// checkBlocks counts the references to the refcount blocks, after all others: a
// block must have no other.
func (x *checker) checkBlocks() error {
	for i, e := range x.refTable {
		if e == 0 {
			continue
		}
		at := x.h.refTableOffset + uint64(i)*8
		switch off, err := x.decodeRefTable(e, i); {
		case err != nil:
			x.foundBlock(at, "entry %d of the reference count table, %#x, points to no block", i, e)
			continue
		case off >= x.fileSize:
			x.foundBlock(at, "the reference count block %d at %#x lies beyond the end of the file", i, off)
			continue
		}
		if err := x.refer(e, uint64(x.clusterSize), 1, "reference count block"); err != nil { //nolint:gosec // G115: positive
			return err
		}
		if c := e >> x.clusterBits; x.used.at(c) != 1 {
			x.foundBlock(e, "the reference count block %d at %#x is something else, too", i, e)
		}
	}
	return nil
}

// foundBlock notes a corruption of the structure of counts at off, which a new
// structure mends.
func (x *checker) foundBlock(off uint64, format string, args ...any) {
	x.found(Corruption, off, format, args...)
	x.mendable++
	x.rebuild = true
}

// compare compares the references with the stored counts.
func (x *checker) compare() error {
	return x.eachChunk(func(c, end uint64, k *chunk) error {
		if k == nil || !k.agrees() {
			return x.compareChunk(c, end, k)
		}
		if k.used != 0 {
			x.result.ImageEnd = x.offset(c + uint64(bits.Len64(k.used))) //nolint:gosec // G115: at most 64
		}
		return nil
	})
}

// compareChunk compares the references to clusters [c, end), which k has, with
// their counts.
func (x *checker) compareChunk(c, end uint64, k *chunk) error {
	s, err := x.refs.slice(c)
	if err != nil {
		return err
	}
	lost := x.lost(c)
	for ; c < end; c++ {
		have, used := x.countIn(s, c), uint64(k.at(c))
		if have == 0 && used == 0 {
			continue
		}
		x.result.ImageEnd = x.offset(c + 1)
		if lost {
			x.rebuild = true // reported by checkBlocks
		} else if have != used {
			x.compareCluster(c, have, used, s != nil)
		}
	}
	return nil
}

// compareCluster notes that cluster c is counted have times and used another number
// of times. The count is zero if there is no block for it.
func (x *checker) compareCluster(c, have, used uint64, block bool) {
	off := x.pointer(c)
	if have > used {
		x.found(Leak, off, "the cluster at %#x is counted %d times and used %d times", off, have, used)
		return
	}
	x.found(Corruption, off, "the cluster at %#x is counted %d times but used %d times", off, have, used)
	if used <= x.maxCount() {
		x.mendable++
	}
	x.rebuild = x.rebuild || !block
}

// eachChunk calls do with the clusters [c, end) of each chunk of the file that has
// references or a block for its counts, ascending, with the chunk, which is nil if
// there are no references. The length of the file says nothing about how many
// there are.
func (x *checker) eachChunk(do func(c, end uint64, k *chunk) error) error {
	chunks, blocks := x.used.sorted(), x.blocks()
	end := x.end(chunks)
	for c := uint64(0); ; c += tallyChunk {
		for len(chunks) > 0 && chunks[0]*tallyChunk < c {
			chunks = chunks[1:]
		}
		for len(blocks) > 0 && (blocks[0]+1)<<x.refBlockBits <= c {
			blocks = blocks[1:]
		}
		next := end
		if len(chunks) > 0 {
			next = min(next, chunks[0]*tallyChunk)
		}
		if len(blocks) > 0 {
			next = min(next, max(c, blocks[0]<<x.refBlockBits))
		}
		if c = next; c >= end {
			return nil
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		if err := do(c, min(c+tallyChunk, end), x.used.chunk(c)); err != nil {
			return err
		}
	}
}

// eachCluster calls do with each cluster c that eachChunk finds, and the slice that
// has its count.
func (x *checker) eachCluster(do func(s *refSlice, c uint64) error) error {
	return x.eachChunk(func(c, end uint64, _ *chunk) error {
		s, err := x.refs.slice(c)
		for ; c < end && err == nil; c++ {
			err = do(s, c)
		}
		return err
	})
}

// end is the cluster after the last of the file, and after the last in use, which
// the file may end before. Chunks are those with references, of which the header
// has one.
func (x *checker) end(chunks []uint64) uint64 {
	end := x.cluster(x.fileSize + x.clusterSize - 1)
	last := chunks[len(chunks)-1]
	for i := range uint64(tallyChunk) {
		if c := last*tallyChunk + i; x.used.at(c) > 0 {
			end = max(end, c+1)
		}
	}
	return end
}

// blocks returns the indexes of the refcount blocks that exist, ascending.
func (x *checker) blocks() []uint64 {
	var all []uint64
	for i, e := range x.refs.table {
		if e != 0 {
			all = append(all, uint64(i))
		}
	}
	return all
}

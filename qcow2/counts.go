package qcow2

import (
	"math"
	"slices"
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
	return x.eachCluster(func(s *refSlice, c, used uint64) error {
		if !x.lost(c) {
			x.compareCluster(c, x.countIn(s, c), used, s != nil)
		} else if used > 0 {
			x.rebuild = true // reported by checkBlocks
			x.result.ImageEnd = x.offset(c + 1)
		}
		return nil
	})
}

// compareCluster compares the references to cluster c with its stored count,
// which is zero if there is no block for it.
func (x *checker) compareCluster(c, have, used uint64, block bool) {
	if have > 0 || used > 0 {
		x.result.ImageEnd = x.offset(c + 1)
	}
	off := x.pointer(c)
	switch {
	case have > used:
		x.found(Leak, off, "the cluster at %#x is counted %d times and used %d times", off, have, used)
	case have < used:
		x.found(Corruption, off, "the cluster at %#x is counted %d times but used %d times", off, have, used)
		if used <= x.maxCount() {
			x.mendable++
		}
		x.rebuild = x.rebuild || !block
	}
}

// eachCluster calls do with each cluster c of the file that is used or that has a
// block for its count, ascending, with the number of references to it and the
// slice that has its count, nil if there is none.
func (x *checker) eachCluster(do func(s *refSlice, c, used uint64) error) error {
	x.index()
	end := x.end()
	for c := x.nextChunk(0); c < end; c = x.nextChunk(c + tallyChunk) {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		s, err := x.refs.slice(c)
		if err != nil {
			return err
		}
		used := x.used.chunk(c)
		for i := c; i < min(c+tallyChunk, end); i++ {
			if err := do(s, i, uint64(used.at(i))); err != nil {
				return err
			}
		}
	}
	return nil
}

// end is the cluster after the last of the file, and after the last in use, which
// the file may end before.
func (x *checker) end() uint64 {
	end := x.cluster(x.fileSize + x.clusterSize - 1)
	last := x.chunks[len(x.chunks)-1] // there is one: the header's
	for i := range uint64(tallyChunk) {
		if c := last*tallyChunk + i; x.used.at(c) > 0 {
			end = max(end, c+1)
		}
	}
	return end
}

// index prepares nextChunk and end.
func (x *checker) index() {
	x.chunks = x.used.sorted()
	x.blocks = x.blocks[:0]
	for i, e := range x.refs.table {
		if e != 0 {
			x.blocks = append(x.blocks, uint64(i))
		}
	}
}

// nextChunk returns the first cluster from c on, where a chunk begins, that
// begins a chunk with clusters that are used or have a block. The length of the
// file says nothing about how many there are.
func (x *checker) nextChunk(c uint64) uint64 {
	next := uint64(math.MaxUint64)
	if i, _ := slices.BinarySearch(x.chunks, c/tallyChunk); i < len(x.chunks) {
		next = x.chunks[i] * tallyChunk
	}
	if i, _ := slices.BinarySearch(x.blocks, c>>x.refBlockBits); i < len(x.blocks) {
		next = min(next, max(c, x.blocks[i]<<x.refBlockBits))
	}
	return next
}

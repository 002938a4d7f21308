package qcow2

import (
	"cmp"
	"errors"
	"slices"
	"sort"
)

// layout is where a new structure of reference counts will be.
type layout struct {
	blocks map[uint64]uint64 // cluster of each block by index; 0 while it has none
	wanted []uint64          // indexes of blocks that have none
	table  extent
}

// maxBlocks is the number of refcount blocks that a table can lead to.
const maxBlocks = maxRefTable / 8

// errNoRoom means that the counts of an image do not fit into the greatest table.
var errNoRoom = errors.New("qcow2: the reference counts need too large a table")

// rebuildCounts writes a new structure of reference counts into clusters that
// nobody uses, the first ones in the file, makes it durable, and switches the
// header to it, in one sector. The old structure stays intact until then, and
// leaks afterwards. It reports whether there is room for a new one.
func (x *checker) rebuildCounts() (bool, error) {
	l, err := x.layOut()
	if errors.Is(err, errNoRoom) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	table := make([]uint64, x.pointer(l.table.n)/8)
	indexes := make([]uint64, 0, len(l.blocks))
	for b := range l.blocks {
		indexes = append(indexes, b)
	}
	slices.Sort(indexes)
	for _, b := range indexes {
		if err := x.writeBlock(b, l.blocks[b]); err != nil {
			return false, err
		}
		table[b] = x.pointer(l.blocks[b])
	}
	if err := writeFull(x.file, encodeEntries(nil, table), x.offset(l.table.start)); err != nil {
		return false, err
	}
	if err := x.datasync(); err != nil {
		return false, err
	}
	field := refTableField(x.offset(l.table.start), l.table.n)
	if err := writeFull(x.file, field, offRefTable); err != nil {
		return false, err
	}
	return true, x.datasync()
}

// layOut finds places for all blocks and for the table. Whatever it places has
// to be counted itself, and may need another block.
func (x *checker) layOut() (*layout, error) {
	l := &layout{blocks: map[uint64]uint64{}}
	for _, c := range x.used.sorted() {
		if err := x.want(l, c*tallyChunk); err != nil {
			return nil, err
		}
	}
	if x.distrust {
		end := x.cluster(x.fileSize + x.clusterSize - 1)
		for c := uint64(0); c < end; c += 1 << x.refBlockBits {
			if err := x.want(l, c); err != nil {
				return nil, err
			}
		}
	}
	free := x.firstFree()
	for {
		for len(l.wanted) > 0 {
			c, err := x.take(1, free)
			if err != nil {
				return nil, err
			}
			l.blocks[l.wanted[0]], l.wanted, free = c, l.wanted[1:], c+1
			if err := x.want(l, c); err != nil {
				return nil, err
			}
		}
		n := x.tableClusters(l)
		if n <= l.table.n {
			return l, nil
		}
		for c := range l.table.n {
			x.used.drop(l.table.start + c)
		}
		start, err := x.take(n, x.firstFree())
		if err != nil {
			return nil, err
		}
		l.table = extent{start: start, n: n}
		for c := start; c < start+n; c++ {
			if err := x.want(l, c); err != nil {
				return nil, err
			}
		}
	}
}

// tableClusters is the length of a table that leads to all blocks of l.
func (x *checker) tableClusters(l *layout) uint64 {
	last := uint64(0)
	for b := range l.blocks {
		last = max(last, b)
	}
	return ((last+1)*8 + uint64(x.clusterSize) - 1) >> x.clusterBits //nolint:gosec // G115: positive
}

// want makes l have a block for the count of cluster c.
func (x *checker) want(l *layout, c uint64) error {
	b := c >> x.refBlockBits
	if _, ok := l.blocks[b]; ok {
		return nil
	}
	if b >= maxBlocks {
		return errNoRoom
	}
	l.blocks[b] = 0
	l.wanted = append(l.wanted, b)
	return x.used.spend(2 * tableCost)
}

// firstFree is where the search for clusters that nobody uses begins: beyond the
// file, if what looks unused may be wanted.
func (x *checker) firstFree() uint64 {
	if x.distrust {
		return x.cluster(x.fileSize + x.clusterSize - 1)
	}
	return 1
}

// take finds n clusters in a row that nobody uses, from cluster c on, and counts
// a reference to each. It returns the first.
func (x *checker) take(n, c uint64) (uint64, error) {
	start := c
	for c < start+n {
		if past := x.pastOutside(c); past != c {
			start, c = past, past
			continue
		}
		c++
		if x.used.at(c-1) != 0 {
			start = c
		}
	}
	for c := start; c < start+n; c++ {
		if err := x.used.add(c, 1); err != nil {
			return 0, err
		}
	}
	return start, nil
}

// sortOutside prepares endOutside.
func (x *checker) sortOutside() {
	slices.SortFunc(x.outside, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	merged := x.outside[:0]
	for _, e := range x.outside {
		if k := len(merged) - 1; k >= 0 && e.start <= merged[k].start+merged[k].n {
			merged[k].n = max(merged[k].n, e.start+e.n-merged[k].start)
			continue
		}
		merged = append(merged, e)
	}
	x.outside = merged
}

// pastOutside returns the first cluster from c on, beyond the end of the file, to
// which no broken pointer leads: what the guest sees there, zeros, has to stay.
func (x *checker) pastOutside(c uint64) uint64 {
	i := sort.Search(len(x.outside), func(i int) bool { return x.outside[i].start+x.outside[i].n > c })
	if i == len(x.outside) || x.outside[i].start > c {
		return c
	}
	return x.outside[i].start + x.outside[i].n
}

// takeCounted is take for clusters that a repair is going to use. If there is no
// block for their counts, it needs a new structure.
func (x *checker) takeCounted(n uint64) (uint64, error) {
	first, err := x.take(n, x.firstFree())
	for c := first; c < first+n && err == nil; c++ {
		var s *refSlice
		s, err = x.refs.slice(c)
		x.rebuild = x.rebuild || s == nil
	}
	return first, err
}

// writeBlock writes the refcount block with index b to a cluster.
func (x *checker) writeBlock(b, cluster uint64) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	block := make([]byte, x.clusterSize)
	first := b << x.refBlockBits
	for i := range uint64(1) << x.refBlockBits {
		n, err := x.target(first + i)
		if err != nil {
			return err
		}
		if n != 0 {
			setCount(block, x.refcountOrder, i, n)
		}
	}
	return writeFull(x.file, block, x.offset(cluster))
}

// target is the count that cluster c should have: the number of references to
// it. If what looks unused may be wanted, no count of a cluster in the file is
// lowered, and a count that is lost is taken for one.
func (x *checker) target(c uint64) (uint64, error) {
	used := uint64(x.used.at(c))
	if x.distrust && x.offset(c) < x.fileSize {
		have, known, err := x.stored(c)
		if err != nil {
			return 0, err
		}
		if !known {
			have = 1
		}
		used = max(used, have)
	}
	return min(used, x.maxCount()), nil
}

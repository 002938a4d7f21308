package qcow2

import (
	"encoding/binary"
	"fmt"
)

// refillClusters and refillBytes say how much the search for free clusters
// looks for at a time: whichever is less, but at least one slice of counts.
const (
	refillClusters = 4096
	refillBytes    = 64 << 20
)

// newBlocksBytes is how much room the refcount blocks that are made together
// cover at least, where the table has room for them.
const newBlocksBytes = 8 << 20

// refill makes sure that the pool is not empty.
func (m *Image) refill() error { return m.findFree(1) }

// findFree makes sure that the pool had n contiguous clusters, or finds some more
// free ones for it, making refcount blocks and a larger table where the image has
// to grow. Image.mu is not held.
func (m *Image) findFree(n uint64) error {
	r := m.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	m.mu.RLock()
	enough := m.pool.has(n)
	m.mu.RUnlock()
	if enough {
		return nil // another caller was faster
	}
	r.run = max(r.run, n)
	found, err := r.search()
	m.lock()
	defer m.mu.Unlock()
	for _, e := range found { // even if err is set: the cursor is past them
		m.pool.put(e)
	}
	return err
}

// checkFree is the last line of defence against an image whose counts lie: a
// cluster that holds metadata is never handed out. mu is held.
func (m *Image) checkFree(e extent) error {
	for c := e.start; c < e.start+e.n; c++ {
		if k := m.meta.at(c); k != metaNone {
			return corruptf("the cluster at %#x has a reference count of zero but holds the %s", m.offset(c), k)
		}
	}
	return nil
}

// checkFree is Image.checkFree for a caller that holds mu, and not Image.mu.
func (r *refcounts) checkFree(e extent) error {
	r.img.mu.RLock()
	defer r.img.mu.RUnlock()
	return r.img.checkFree(e)
}

// search moves the cursor until it has found some free clusters. It returns those
// it found before an error too. mu is held.
func (r *refcounts) search() ([]extent, error) {
	var found []extent
	want := uint64(min(refillClusters, max(refillBytes>>r.img.clusterBits, 1)))
	for n := uint64(0); n < want; {
		block := r.cursor >> r.img.refBlockBits
		var err error
		switch {
		case block < uint64(len(r.table)) && r.table[block] != 0:
			found, n, err = r.searchSlice(found, n)
		case n > 0:
			return found, nil
		case block < uint64(len(r.table)):
			err = r.newBlocks(block)
		default:
			_, err = r.growTable(0)
		}
		if err != nil {
			return found, err
		}
	}
	return found, nil
}

// searchSlice appends the free clusters of the slice at the cursor to found and
// adds their number to n.
func (r *refcounts) searchSlice(found []extent, n uint64) ([]extent, uint64, error) {
	s, err := r.slice(r.cursor)
	if err == nil && isZero(s.b) {
		err = r.img.secure(s.off, r.sliceBytes())
	}
	if err != nil {
		return found, n, err
	}
	mask := uint64(1)<<r.perSlice() - 1
	end := r.cursor | mask
	for c := r.cursor; c <= end; c++ {
		if count(s.b, r.img.refcountOrder, c&mask) != 0 {
			continue
		}
		if c == 0 {
			return nil, 0, corruptf("the header has a reference count of zero")
		}
		n++
		virgin := c >= r.virgin
		if k := len(found) - 1; k >= 0 && found[k].start+found[k].n == c && found[k].virgin == virgin {
			found[k].n++
		} else {
			found = append(found, extent{start: c, n: 1, virgin: virgin})
		}
	}
	r.cursor = end + 1
	return found, n, nil
}

// perSector is how many entries of the refcount table share a sector.
const perSector = 512 / 8

// longestRun is how many contiguous clusters can be found: what the blocks that
// are made together count, beside themselves.
func (r *refcounts) longestRun() uint64 {
	perBlock := uint64(1) << r.img.refBlockBits
	return min(perSector, perBlock) * (perBlock - 1)
}

// newBlocks makes refcount blocks for the entries of the table from first on,
// which are empty. The blocks lie at the beginning of the range that they count
// and count themselves. They are durable before the table points to them; that
// pointer becomes durable with the first barrier of the commit that uses the
// range. The entries written together share a sector, so none becomes durable
// without the first, whose block counts them all. mu is held.
func (r *refcounts) newBlocks(first uint64) error {
	most := min(max(max(newBlocksBytes>>r.img.clusterBits, 2*r.run)>>r.img.refBlockBits, 1),
		1<<r.img.refBlockBits, perSector-first%perSector, uint64(len(r.table))-first)
	n := uint64(1)
	for n < most && r.table[first+n] == 0 {
		n++
	}
	start := first << r.img.refBlockBits
	if start == 0 {
		return corruptf("the reference count table has no block for the header")
	}
	if err := r.claim(extent{start: start, n: n}, metaRefBlock); err != nil {
		return err
	}
	if err := r.writeNewBlocks(start, n, n, nil); err != nil {
		r.disclaim(extent{start: start, n: n})
		return err
	}
	entries := make([]byte, 8*n)
	for i := range n {
		binary.BigEndian.PutUint64(entries[8*i:], r.img.pointer(start+i))
	}
	if err := writeFull(r.img.file, entries, r.offset+int64(8*first)); err != nil { //nolint:gosec // G115: an index
		// Whether or not the entries are in the file, it is valid, and
		// another attempt writes the same.
		r.disclaim(extent{start: start, n: n})
		return err
	}
	for i := range n {
		r.table[first+i] = r.img.pointer(start + i)
	}
	return nil
}

// writeNewBlocks writes blocks refcount blocks at cluster start, of which the
// first used counts are one and all others zero, then table behind them, and
// makes both durable.
func (r *refcounts) writeNewBlocks(start, blocks, used uint64, table []byte) error {
	b := make([]byte, int64(blocks)*r.img.clusterSize) //nolint:gosec // G115: at most 8 MiB
	for i := range used {
		setCount(b, r.img.refcountOrder, i, 1)
	}
	if err := r.img.file.WritevAt([][]byte{b, table}, r.img.offset(start)); err != nil {
		// Any part of it may be there, so nothing there is known to be zero.
		end := r.img.offset(start) + int64(len(b)+len(table))
		r.virgin = max(r.virgin, r.img.cluster(end+r.img.clusterSize-1))
		return err
	}
	return r.img.datasync()
}

// growTable replaces the table by a longer one, which has room for more, and
// takes run clusters, which it returns. The new table lies just beyond all that
// the old one counts, behind the blocks that count it and before those clusters.
// mu is held.
func (r *refcounts) growTable(run uint64) (extent, error) {
	cs := uint64(r.img.clusterSize) //nolint:gosec // G115: positive
	start := r.covered()
	entries := uint64(len(r.table)) + uint64(len(r.table))/2 + cs/8 + run>>r.img.refBlockBits
	clusters := min((entries*8+cs-1)/cs, maxRefTable/cs)
	perBlock := uint64(1) << r.img.refBlockBits
	blocks := uint64(1)
	for blocks*perBlock < blocks+clusters+run {
		blocks++
	}
	if uint64(len(r.table))+blocks > clusters*cs/8 {
		return extent{}, &Error{Kind: ErrUnsupported, What: "the file has reached the greatest size that its cluster size allows"}
	}
	table := make([]uint64, clusters*cs/8)
	copy(table, r.table)
	for i := range blocks {
		table[uint64(len(r.table))+i] = r.img.pointer(start + i)
	}
	area := extent{start: start, n: blocks + clusters}
	taken := extent{start: start + area.n, n: run, virgin: true}
	if err := r.checkFree(taken); err != nil {
		return extent{}, err
	}
	if err := r.claim(area, metaRefBlock); err != nil {
		return extent{}, err
	}
	if err := r.writeNewBlocks(start, blocks, area.n+run, encodeEntries(nil, table)); err != nil {
		r.disclaim(area)
		return extent{}, err
	}
	return taken, r.switchTable(table, r.img.offset(start+blocks))
}

// switchTable makes the header point to the new table, which is durable, and
// frees the old one. On an error the header may point to either; then neither
// may change any more, and the image takes no further writes.
func (r *refcounts) switchTable(table []uint64, off int64) error {
	field := refTableField(off, uint64(len(table))*8>>r.img.clusterBits)
	err := writeFull(r.img.file, field, offRefTable)
	if err == nil {
		err = r.img.datasync()
	}
	if err != nil {
		return r.img.fail(fmt.Errorf("switching to a larger reference count table: %w", err))
	}
	m := r.img
	old := extent{start: m.cluster(r.offset), n: uint64(len(r.table)) * 8 >> m.clusterBits}
	r.table, r.offset = table, off
	m.lock()
	defer m.mu.Unlock()
	m.meta.remove(old)
	batch := freeBatch{} // no request reads the table, so any epoch will do
	for c := old.start; c < old.start+old.n; c++ {
		batch.clusters = append(batch.clusters, c)
	}
	m.released = append(m.released, batch)
	m.covered = r.covered()
	return nil
}

// refTableField is the part of the header that says where the reference count
// table is. It lies in one sector.
func refTableField(off int64, clusters uint64) []byte {
	field := binary.BigEndian.AppendUint64(nil, uint64(off))      //nolint:gosec // G115: an offset
	return binary.BigEndian.AppendUint32(field, uint32(clusters)) //nolint:gosec // G115: at most 8 MiB of them
}

// claim registers new metadata clusters, which must not hold any yet.
func (r *refcounts) claim(e extent, k metaKind) error {
	r.img.lock()
	defer r.img.mu.Unlock()
	if err := r.img.checkFree(e); err != nil {
		return err
	}
	r.img.meta.add(e, k)
	return nil
}

func (r *refcounts) disclaim(e extent) {
	r.img.lock()
	defer r.img.mu.Unlock()
	r.img.meta.remove(e)
}

func decodeTable(b []byte) []uint64 {
	t := make([]uint64, len(b)/8)
	for i := range t {
		t[i] = binary.BigEndian.Uint64(b[8*i:])
	}
	return t
}

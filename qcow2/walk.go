package qcow2

import "slices"

// l2Entry is an entry of an L2 table as the file has it.
type l2Entry struct {
	e      uint64
	bitmap uint64 // of an extended entry: which subclusters are data, and above that which are zero
	at     uint64 // offset in the file
	guest  uint64 // offset in the disk
	active bool   // the table belongs to the disk, not to snapshots only
}

// words is the number of 8-byte words in an L2 entry.
func (x *checker) words() int { return 1 << x.wordBits }

// referL1 counts the references to an L1 table at off and from its entries.
func (x *checker) referL1(l1 []uint64, off uint64) error {
	if err := x.refer(off, uint64(len(l1))*8, 1, "L1 table"); err != nil {
		return err
	}
	for i, e := range l1 {
		if e == 0 {
			continue
		}
		at := off + uint64(i)*8
		if e&l1Reserved&^0x1ff != 0 {
			x.found(Corruption, at, "L1 entry %d, %#x, has reserved bits set", i, e)
		}
		table := e & entryOffset
		if table == 0 || x.inCluster(int64(table)) != 0 || e&0x1ff != 0 {
			x.found(Corruption, at, "L1 entry %d points to %#x, where no table can be", i, e&^entryCopied)
			continue
		}
		if err := x.refer(table, uint64(x.clusterSize), 1, "L2 table"); err != nil { //nolint:gosec // G115: positive
			return err
		}
		if table >= uint64(x.fileSize) { //nolint:gosec // G115: not negative
			continue
		}
		c := table >> x.clusterBits
		t := x.tables[c]
		if t.refs == 0 {
			if err := x.used.spend(tableCost); err != nil {
				return err
			}
		}
		t.refs++
		x.tables[c] = t
	}
	return nil
}

// checkActive walks the L2 tables of the disk, in guest order.
func (x *checker) checkActive() error {
	for i, e := range x.l1 {
		table := e & entryOffset
		t := x.tables[table>>x.clusterBits]
		if t.refs == 0 || x.inCluster(int64(table)) != 0 {
			continue // none, or reported
		}
		if err := x.checkCopied(e, x.h.l1Offset+uint64(i)*8); err != nil {
			return err
		}
		if t.walked {
			continue
		}
		if err := x.checkL2(table, x.pointer(uint64(i)<<x.l2Bits), true); err != nil {
			return err
		}
	}
	return nil
}

// checkShared walks the L2 tables that only snapshots have.
func (x *checker) checkShared() error {
	for _, c := range x.sortedTables() {
		if x.tables[c].walked {
			continue
		}
		if err := x.checkL2(x.pointer(c), 0, false); err != nil {
			return err
		}
	}
	return nil
}

// sortedTables returns the host clusters of all L2 tables, ascending.
func (x *checker) sortedTables() []uint64 {
	all := make([]uint64, 0, len(x.tables))
	for c := range x.tables {
		all = append(all, c)
	}
	slices.Sort(all)
	return all
}

// checkL2 counts the references from the L2 table at off, which maps the disk
// from guest on.
func (x *checker) checkL2(off, guest uint64, active bool) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	table, err := x.loadTable(off, x.clusterSize)
	if err != nil {
		return err
	}
	x.next = 0
	t := x.tables[off>>x.clusterBits]
	t.walked, t.active = true, active
	x.tables[off>>x.clusterBits] = t
	for i := 0; i < len(table); i += x.words() {
		e := l2Entry{e: table[i], at: off + uint64(i)*8, guest: guest + x.pointer(uint64(i>>x.wordBits)), active: active} //nolint:gosec // G115: an index
		if x.subBits > 0 {
			e.bitmap = table[i+1]
		}
		if e.e == 0 && e.bitmap == 0 {
			continue
		}
		if err := x.checkEntry(e, t.refs); err != nil {
			return err
		}
	}
	return nil
}

// checkEntry counts times references from an L2 entry.
func (x *checker) checkEntry(e l2Entry, times uint32) error {
	if e.e&entryCompressed != 0 {
		return x.checkCompressed(e, times)
	}
	if e.e&l2Reserved != 0 || x.version == 2 && e.e&entryZero != 0 {
		x.found(Corruption, e.at, "the L2 entry %#x has reserved bits set", e.e)
	}
	host := e.e & entryOffset
	data, zero := uint32(e.bitmap), uint32(e.bitmap>>32) //nolint:gosec // G115: its halves
	if host == 0 && (!x.external || e.e&entryCopied == 0) {
		if data != 0 {
			x.found(Corruption, e.at, "the L2 entry without a cluster has subclusters with data (%#x)", e.bitmap)
		}
		return nil
	}
	if data&zero != 0 {
		x.found(Corruption, e.at, "the L2 entry %#x has subclusters that are data and zero at once (%#x)", e.e, e.bitmap)
	}
	if x.inCluster(int64(host)) != 0 {
		x.found(Corruption, e.at, "the L2 entry %#x points into the middle of a cluster", e.e)
		if x.dataless(e) {
			x.zeroes++
			x.mendable++
		}
	}
	x.shape(e.active, false, host)
	if x.external {
		x.checkExternal(e, host)
		return nil
	}
	if e.active {
		if err := x.checkCopied(e.e, e.at); err != nil {
			return err
		}
	}
	return x.refer(host, uint64(x.clusterSize), times, "data") //nolint:gosec // G115: positive
}

// checkExternal checks the entry e of a cluster at host in an external data
// file, whose clusters have no counts and lie where the guest sees them.
func (x *checker) checkExternal(e l2Entry, host uint64) {
	if !e.active {
		return // reported: such an image has no snapshots
	}
	x.compareCopied(e.e, e.at, 1)
	if host != e.guest {
		x.found(Corruption, e.at, "the L2 entry of guest offset %#x points to %#x in the external data file", e.guest, host)
	}
}

// dataless reports whether the allocated cluster of e holds no guest data, so
// that the entry can do without it.
func (x *checker) dataless(e l2Entry) bool {
	if x.subBits > 0 {
		return uint32(e.bitmap) == 0 //nolint:gosec // G115: its lower half
	}
	return x.version > 2 && e.e&entryZero != 0
}

// checkCompressed counts times references from the entry of a compressed
// cluster. Readers ignore the flags it must not have, so a repair can clear them.
func (x *checker) checkCompressed(e l2Entry, times uint32) error {
	if e.e&entryCopied != 0 {
		x.found(Corruption, e.at, "the compressed cluster with entry %#x is marked as not shared", e.e)
		x.mendable++
	}
	if e.bitmap != 0 {
		x.found(Corruption, e.at, "the compressed cluster with entry %#x has subclusters (%#x)", e.e, e.bitmap)
		x.mendable++
	}
	off, n := x.compressedRange(e.e)
	switch {
	case x.external:
		x.found(Corruption, e.at, "the L2 entry %#x is of a compressed cluster, in an image with an external data file", e.e)
		return nil
	case off < uint64(x.clusterSize): //nolint:gosec // G115: positive
		x.found(Corruption, e.at, "the compressed cluster with entry %#x has its data in the header", e.e)
		return nil
	}
	x.shape(e.active, true, off)
	return x.refer(off, n, times, "compressed data")
}

// shape counts an allocated cluster of the disk.
func (x *checker) shape(active, compressed bool, off uint64) {
	if !active {
		return
	}
	r := &x.result
	r.Allocated++
	if compressed {
		r.Compressed++
		r.Fragmented++ // by nature
		return
	}
	if x.next != 0 && x.next != int64(off) { //nolint:gosec // G115: masked
		r.Fragmented++
	}
	x.next = int64(off) + x.clusterSize //nolint:gosec // G115: masked
}

// checkCopied compares the COPIED flag of the L1 or L2 entry e at offset at with
// the count of its cluster, unless that is lost.
func (x *checker) checkCopied(e, at uint64) error {
	n, known, err := x.stored(e & entryOffset >> x.clusterBits)
	if err == nil && known {
		x.compareCopied(e, at, n)
	}
	return err
}

// compareCopied compares the COPIED flag of the entry e at offset at with n, the
// count of its cluster.
func (x *checker) compareCopied(e, at, n uint64) {
	if (n == 1) != (e&entryCopied != 0) {
		x.flags++
		x.mendable++
		x.found(Corruption, at, "the entry %#x says wrongly whether its cluster, counted %d times, is shared", e, n)
	}
}

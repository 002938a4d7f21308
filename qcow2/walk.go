package qcow2

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"
)

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

// l2Table is where an L2 table is in the file, and what it maps.
type l2Table struct {
	at     uint64 // offset in the file
	guest  uint64 // offset in the disk
	active bool   // it belongs to the disk, not to snapshots only
}

// checkTables walks all L2 tables, those of the disk first, in guest order.
func (x *checker) checkTables() error {
	all := make([]l2Table, 0, len(x.tables))
	for i, e := range x.l1 {
		table := e & entryOffset
		t := x.tables[table>>x.clusterBits]
		if t.refs == 0 || x.inCluster(int64(table)) != 0 {
			continue // none, or reported
		}
		if err := x.checkCopied(e, x.h.l1Offset+uint64(i)*8); err != nil {
			return err
		}
		if !t.active {
			t.active = true
			x.tables[table>>x.clusterBits] = t
			all = append(all, l2Table{at: table, guest: x.pointer(uint64(i) << x.l2Bits), active: true})
		}
	}
	for _, c := range x.sortedTables() {
		if !x.tables[c].active {
			all = append(all, l2Table{at: x.pointer(c)})
		}
	}
	return x.eachTable(all, x.checkL2)
}

// aheadBytes is how much of the L2 tables is read at a time.
const aheadBytes = 1 << 18

// eachTable calls do with each of the tables and its contents, while another
// goroutine, which ends before it returns, reads those that come next.
func (x *checker) eachTable(all []l2Table, do func(t l2Table, b []byte) error) error {
	type batch struct {
		b   []byte
		err error
	}
	size := int(x.clusterSize)
	atOnce := max(aheadBytes/size, 1)
	empty, full := make(chan []byte, 2), make(chan batch, 2)
	for range cap(empty) {
		empty <- make([]byte, min(atOnce, len(all))*size)
	}
	var reader sync.WaitGroup
	defer reader.Wait()
	defer close(empty)
	reader.Go(func() {
		for tables := range slices.Chunk(all, atOnce) {
			b, ok := <-empty
			if !ok {
				return
			}
			full <- batch{b, x.readTables(tables, b)}
		}
	})
	for tables := range slices.Chunk(all, atOnce) {
		read := <-full
		if read.err != nil {
			return read.err
		}
		for i, t := range tables {
			if err := do(t, read.b[i*size:][:size]); err != nil {
				return err
			}
		}
		empty <- read.b
	}
	return nil
}

// readTables reads the tables into b, neighbours in the file together.
func (x *checker) readTables(tables []l2Table, b []byte) error {
	for len(tables) > 0 {
		n := 1
		for n < len(tables) && tables[n].at == tables[0].at+x.pointer(uint64(n)) {
			n++
		}
		bytes := n << x.clusterBits
		if err := readFull(x.file, b[:bytes], int64(tables[0].at)); err != nil { //nolint:gosec // G115: inside the file
			return err
		}
		tables, b = tables[n:], b[bytes:]
	}
	return x.ctx.Err()
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

// checkL2 counts the references from the L2 table t, whose contents are b.
func (x *checker) checkL2(t l2Table, b []byte) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	x.next = 0
	refs := x.tables[t.at>>x.clusterBits].refs
	step := 8 * x.words()
	for i := 0; i < len(b); {
		e := l2Entry{e: binary.BigEndian.Uint64(b[i:]), active: t.active}
		if step > 8 {
			e.bitmap = binary.BigEndian.Uint64(b[i+8:])
		}
		if e.e == 0 && e.bitmap == 0 {
			i += step
			continue
		}
		if refs == 1 {
			if n := x.checkRun(&e, b[i:]); n > 0 {
				i += n * step
				continue
			}
		}
		e.at = t.at + uint64(i)
		e.guest = t.guest + x.pointer(uint64(i)>>3>>x.wordBits)
		if err := x.checkEntry(e, refs); err != nil {
			return err
		}
		i += step
	}
	return nil
}

// checkRun counts one reference from each of the entries at the beginning of table
// that are as most are: without fault, to clusters of one chunk that follow each
// other and that nothing else refers to. It returns how many there are. If the
// first, e, is not like that, or the first of all to refer to its chunk, it is left
// to checkEntry.
func (x *checker) checkRun(e *l2Entry, table []byte) int {
	host := e.e & entryOffset
	if e.e&^(entryOffset|entryCopied) != 0 || e.bitmap&(e.bitmap>>32) != 0 || x.external ||
		host == 0 || x.inCluster(int64(host)) != 0 || int64(host) > x.fileSize-x.clusterSize {
		return 0
	}
	k := x.used.chunk(host >> x.clusterBits)
	if k == nil {
		return 0
	}
	first := host >> x.clusterBits % tallyChunk
	n := 1
	if x.subBits == 0 {
		n = x.runLength(e.e, table, tallyChunk-first)
	}
	run := uint64(math.MaxUint64) >> (tallyChunk - n) << first
	copied := run // what is counted once must be
	if e.e&entryCopied == 0 {
		copied = 0
	}
	if k.used&run != 0 || e.active && k.once&run != copied {
		return 0
	}
	k.used |= run
	x.shape(e.active, false, host, int64(n))
	return n
}

// runLength returns how many of the entries in table, of which e is the first, are
// as e and point to clusters of the file that follow each other; at most most.
func (x *checker) runLength(e uint64, table []byte, most uint64) int {
	inFile := uint64(x.fileSize-int64(e&entryOffset)) >> x.clusterBits //nolint:gosec // G115: e points into the file
	most = min(most, inFile, uint64(len(table))/8)
	n := uint64(1)
	for n < most && binary.BigEndian.Uint64(table[8*n:]) == e+n<<x.clusterBits {
		n++
	}
	return int(n)
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
	x.shape(e.active, false, host, 1)
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
	x.shape(e.active, true, off, 1)
	return x.refer(off, n, times, "compressed data")
}

// shape counts n allocated clusters of the disk that follow each other in the file
// from off on.
func (x *checker) shape(active, compressed bool, off uint64, n int64) {
	if !active {
		return
	}
	r := &x.result
	r.Allocated += n
	if compressed {
		r.Compressed += n
		r.Fragmented += n // by nature
		return
	}
	if x.next != 0 && x.next != int64(off) { //nolint:gosec // G115: masked
		r.Fragmented++
	}
	x.next = int64(off) + n<<x.clusterBits //nolint:gosec // G115: masked
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

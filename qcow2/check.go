package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// FindingKind tells what Check has found.
type FindingKind uint8

const (
	// Leak is a host cluster that is counted more often than it is used. It
	// costs room and nothing else.
	Leak FindingKind = iota
	// Corruption is anything that breaks the format, and may cost data.
	Corruption
)

func (k FindingKind) String() string { return [...]string{"leak", "corruption"}[k] }

// Finding is one fault of an image.
type Finding struct {
	Kind   FindingKind
	Offset int64 // in the file, of what is concerned
	What   string
}

// maxFindings is how many findings a result keeps. All are counted.
const maxFindings = 1000

// CheckResult is what Check found. Its counts are those of qemu-img check.
type CheckResult struct {
	Leaks, Corruptions int64
	// Findings are the first of them, at most 1000.
	Findings []Finding
	// ImageEnd is the end in the file of the last cluster in use, in bytes.
	ImageEnd int64
	// Of the clusters of the disk, Total exist and Allocated have data of
	// their own, among which Fragmented do not follow their neighbour in the
	// file and Compressed are compressed.
	Total, Allocated, Fragmented, Compressed int64
}

// Clean reports whether nothing was found.
func (r *CheckResult) Clean() bool { return r.Leaks == 0 && r.Corruptions == 0 }

// CheckOptions limit a check. The zero value is the default.
type CheckOptions struct {
	// MemoryBytes bounds the memory for counting references; default 1 GiB,
	// enough for a dozen terabytes of data in clusters of 64 KiB. An image
	// that needs more is refused with ErrUnsupported.
	MemoryBytes int64
}

const defaultCheckMemory = 1 << 30

// Check counts the references to each cluster of the image at path, from the
// disk, the internal snapshots and the bitmaps, and compares them with the
// reference counts. It opens nothing but the image, locks it like a reader, and
// writes nothing. An error means that the image could not be checked, not that
// something was found. Canceling ctx ends the check.
func Check(ctx context.Context, path string, opts CheckOptions) (*CheckResult, error) {
	f, err := openRegular(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if err := lockImage(f, path, false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	of := newOSFile(f)
	r, err := checkIn(ctx, of, path, opts)
	return r, errors.Join(inFile(path, err), of.Close())
}

// checkIn checks the image in f, which is locked.
func checkIn(ctx context.Context, f file, path string, opts CheckOptions) (*CheckResult, error) {
	x, err := newChecker(ctx, f, path, opts)
	if err != nil {
		return nil, err
	}
	return &x.result, x.check()
}

// checker is a check under way, of one goroutine.
type checker struct {
	*Image   // its geometry, file and refcounts only
	ctx      context.Context
	h        *header
	bitmaps  []byte // the header extension, nil if there is none
	fileSize int64
	result   CheckResult
	used     tally
	tables   map[uint64]uint32 // references to each L2 table, by host cluster
	flags    int64             // corruptions that are wrong COPIED flags
	next     int64             // where the cluster would be that follows the last of a table
}

func newChecker(ctx context.Context, f file, path string, opts CheckOptions) (*checker, error) {
	x := &checker{Image: &Image{path: path, file: f, data: f, readOnly: true}, ctx: ctx, tables: map[uint64]uint32{}}
	var err error
	if x.fileSize, err = f.Size(); err != nil {
		return nil, err
	}
	if x.h, err = x.loadHeader(x.fileSize); err != nil {
		return nil, err
	}
	first := make([]byte, min(int64(1)<<x.h.clusterBits, x.fileSize))
	if err := readFull(f, first, 0); err != nil {
		return nil, err
	}
	ext, err := parseExtensions(x.h, first)
	if err != nil {
		return nil, err
	}
	if err := x.h.checkFeatures(ext.features); err != nil {
		return nil, err
	}
	if x.h.autoclear>>autoclearBitmaps&1 != 0 { // otherwise they are void
		x.bitmaps = ext.bitmaps
	}
	x.geometry = newGeometry(x.h)
	x.features = x.h.incompatible
	x.size.Store(int64(x.h.size)) //nolint:gosec // G115: validated
	if x.l1, err = x.loadTable(x.h.l1Offset, int64(x.h.l1Size)*8); err != nil {
		return nil, err
	}
	table, err := x.loadTable(x.h.refTableOffset, int64(x.h.refTableClusters)<<x.clusterBits)
	if err != nil {
		return nil, err
	}
	lru, err := simplelru.NewLRU[uint64, *refSlice](refSlices, nil)
	if err != nil {
		return nil, err
	}
	x.refs = &refcounts{img: x.Image, table: table, offset: int64(x.h.refTableOffset), slices: lru} //nolint:gosec // G115: validated
	x.used = newTally(opts.MemoryBytes)
	return x, nil
}

// check does all of it: first every L1 table, so that each L2 table is read once
// however many snapshots share it.
func (x *checker) check() error {
	x.result.Total = (x.Size() + x.clusterSize - 1) >> x.clusterBits
	h := x.h
	for _, step := range []func() error{
		func() error { return x.refer(0, 1, 1, "header") },
		func() error { return x.referL1(x.l1, h.l1Offset) },
		x.checkSnapshots,
		func() error {
			return x.refer(h.refTableOffset, uint64(len(x.refs.table))*8, 1, "reference count table")
		},
		x.checkBitmaps,
		x.checkActive,
		x.checkShared,
		x.checkBlocks,
		x.compare,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// found notes a fault of what lies at off.
func (x *checker) found(kind FindingKind, off uint64, format string, args ...any) {
	if kind == Leak {
		x.result.Leaks++
	} else {
		x.result.Corruptions++
	}
	if len(x.result.Findings) < maxFindings {
		x.result.Findings = append(x.result.Findings, Finding{Kind: kind, Offset: int64(off), What: fmt.Sprintf(format, args...)}) //nolint:gosec // G115: masked or checked
	}
}

// refer counts times references to each cluster of the n bytes at off. The end
// of the last may lie beyond the end of the file, by less than a cluster.
func (x *checker) refer(off, n uint64, times uint32, what string) error {
	if n == 0 {
		return nil
	}
	end := uint64(x.fileSize + x.clusterSize) //nolint:gosec // G115: positive
	if off >= end || n > end-1-off {
		x.found(Corruption, off, "the %s at %#x lies beyond the end of the file", what, off)
		return nil
	}
	for c := off >> x.clusterBits; c <= (off+n-1)>>x.clusterBits; c++ {
		if err := x.used.add(c, times); err != nil {
			return err
		}
	}
	return nil
}

// referL1 counts the references to an L1 table at off and from its entries.
func (x *checker) referL1(l1 []uint64, off uint64) error {
	if err := x.refer(off, uint64(len(l1))*8, 1, "L1 table"); err != nil {
		return err
	}
	for i, e := range l1 {
		if e&entryOffset == 0 {
			continue
		}
		if e&l1Reserved&^0x1ff != 0 {
			x.found(Corruption, off+uint64(i)*8, "L1 entry %d, %#x, has reserved bits set", i, e)
		}
		table := e & entryOffset
		if x.inCluster(int64(table)) != 0 || e&0x1ff != 0 {
			x.found(Corruption, off+uint64(i)*8, "L1 entry %d points to %#x, which is not aligned to a cluster", i, table)
			continue
		}
		if err := x.refer(table, uint64(x.clusterSize), 1, "L2 table"); err != nil { //nolint:gosec // G115: positive
			return err
		}
		if table >= uint64(x.fileSize) { //nolint:gosec // G115: not negative
			continue
		}
		c := table >> x.clusterBits
		if x.tables[c] == 0 {
			if err := x.used.spend(tableCost); err != nil {
				return err
			}
		}
		x.tables[c]++
	}
	return nil
}

// checkActive walks the L2 tables of the disk, in guest order.
func (x *checker) checkActive() error {
	for i, e := range x.l1 {
		table := int64(e & entryOffset)
		if e == 0 || x.inCluster(table) != 0 || x.tables[x.cluster(table)] == 0 {
			continue // reported, or walked because two entries point to it
		}
		if err := x.checkCopied(e, x.h.l1Offset+uint64(i)*8); err != nil {
			return err
		}
		if err := x.checkL2(table, true); err != nil {
			return err
		}
	}
	return nil
}

// checkShared walks the L2 tables that only snapshots have.
func (x *checker) checkShared() error {
	rest := make([]uint64, 0, len(x.tables))
	for c := range x.tables {
		rest = append(rest, c)
	}
	slices.Sort(rest)
	for _, c := range rest {
		if err := x.checkL2(x.offset(c), false); err != nil {
			return err
		}
	}
	return nil
}

// checkL2 counts the references from the L2 table at off, and takes it from the
// tables to walk.
func (x *checker) checkL2(off int64, active bool) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	table, err := x.loadTable(uint64(off), x.clusterSize) //nolint:gosec // G115: an offset
	if err != nil {
		return err
	}
	x.next = 0
	times := x.tables[x.cluster(off)]
	delete(x.tables, x.cluster(off))
	for i, e := range table {
		if e == 0 {
			continue
		}
		at := uint64(off) + uint64(i)*8 //nolint:gosec // G115: an offset
		if err := x.checkEntry(e, at, times, active); err != nil {
			return err
		}
	}
	return nil
}

// checkEntry counts the references from the L2 entry e at offset at.
func (x *checker) checkEntry(e, at uint64, times uint32, active bool) error {
	if e&entryCompressed != 0 {
		if e&entryCopied != 0 {
			x.found(Corruption, at, "the compressed cluster with entry %#x is marked as not shared", e)
		}
		off, n := x.compressedRange(e)
		x.shape(active, true, off)
		return x.refer(off, n, times, "compressed data")
	}
	if e&l2Reserved != 0 || x.version == 2 && e&entryZero != 0 {
		x.found(Corruption, at, "the L2 entry %#x has reserved bits set", e)
	}
	host := e & entryOffset
	if host == 0 {
		return nil
	}
	if x.inCluster(int64(host)) != 0 {
		x.found(Corruption, at, "the L2 entry %#x points into the middle of a cluster", e)
	}
	x.shape(active, false, host)
	if active {
		if err := x.checkCopied(e, at); err != nil {
			return err
		}
	}
	return x.refer(host, uint64(x.clusterSize), times, "data") //nolint:gosec // G115: positive
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
// the count of its cluster.
func (x *checker) checkCopied(e, at uint64) error {
	n, err := x.stored(e & entryOffset >> x.clusterBits)
	if errors.Is(err, ErrCorrupt) {
		return nil // reported by checkBlocks
	}
	if err == nil && (n == 1) != (e&entryCopied != 0) {
		x.flags++
		x.found(Corruption, at, "the entry %#x says wrongly whether its cluster, counted %d times, is shared", e, n)
	}
	return err
}

// stored returns the count of cluster c in the file.
func (x *checker) stored(c uint64) (uint64, error) {
	s, err := x.refs.slice(c)
	if err != nil || s == nil {
		return 0, err
	}
	return count(s.b, x.refcountOrder, c&(1<<x.refs.perSlice()-1)), nil
}

// checkBlocks counts the references to the refcount blocks, after all others: a
// block must have no other.
func (x *checker) checkBlocks() error {
	for i, e := range x.refs.table {
		if e == 0 {
			continue
		}
		at := x.h.refTableOffset + uint64(i)*8
		off, err := x.decodeRefTable(e, i)
		switch {
		case err != nil:
			x.found(Corruption, at, "entry %d of the reference count table, %#x, points to no block", i, e)
			continue
		case off >= x.fileSize:
			x.found(Corruption, at, "the reference count block %d at %#x lies beyond the end of the file", i, off)
			continue
		}
		if err := x.refer(e, uint64(x.clusterSize), 1, "reference count block"); err != nil { //nolint:gosec // G115: positive
			return err
		}
		if c := e >> x.clusterBits; x.used.chunk(c).at(c) != 1 {
			x.found(Corruption, e, "the reference count block %d at %#x is something else, too", i, off)
		}
	}
	return nil
}

// compare compares the references with the stored counts.
func (x *checker) compare() error {
	end := uint64(x.fileSize+x.clusterSize-1) >> x.clusterBits //nolint:gosec // G115: positive
	for c := uint64(0); c < end; c += tallyChunk {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		used := x.used.chunk(c)
		s, err := x.refs.slice(c)
		if errors.Is(err, ErrCorrupt) {
			continue // reported by checkBlocks
		}
		if err != nil {
			return err
		}
		if used == nil && s == nil {
			continue
		}
		for i := range uint64(tallyChunk) {
			if c+i >= end {
				break
			}
			have, err := x.stored(c + i)
			if err != nil {
				return err
			}
			x.compareCluster(c+i, have, uint64(used.at(c+i)))
		}
	}
	return nil
}

// compareCluster compares the references to cluster c with its stored count.
func (x *checker) compareCluster(c, have, used uint64) {
	if have > 0 || used > 0 {
		x.result.ImageEnd = x.offset(c + 1)
	}
	off := x.pointer(c)
	switch {
	case have > used:
		x.found(Leak, off, "the cluster at %#x is counted %d times and used %d times", off, have, used)
	case have < used:
		x.found(Corruption, off, "the cluster at %#x is counted %d times but used %d times", off, have, used)
	}
}

// checkSnapshots counts the references from the snapshot table.
func (x *checker) checkSnapshots() error {
	begin := x.h.snapshotsOffset
	off := begin
	for i := range x.h.snapshots {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		var b [snapshotFixed]byte
		if err := readFull(x.file, b[:], int64(off)); err != nil { //nolint:gosec // G115: checked by checkTable
			return err
		}
		l1 := binary.BigEndian.Uint64(b[0:])
		entries := binary.BigEndian.Uint32(b[8:])
		extra := uint64(binary.BigEndian.Uint32(b[36:]))
		if extra > maxSnapshotExtra {
			x.found(Corruption, off, "snapshot %d has %d bytes of extra data, more than %d", i, extra, maxSnapshotExtra)
		} else if x.version == 3 && extra < 16 {
			x.found(Corruption, off, "snapshot %d has only %d bytes of extra data, which lack the size of its disk", i, extra)
		}
		names := uint64(binary.BigEndian.Uint16(b[12:])) + uint64(binary.BigEndian.Uint16(b[14:]))
		entry := off
		if off += (snapshotFixed + extra + names + 7) &^ 7; off-begin > maxSnapshotTable {
			x.found(Corruption, begin, "the snapshot table is larger than 64 MiB")
			return nil
		}
		if err := x.checkSnapshotL1(l1, entries, entry); err != nil {
			return err
		}
	}
	return x.refer(begin, off-begin, 1, "snapshot table")
}

// checkSnapshotL1 counts the references from the L1 table at off of the snapshot
// with the given entry.
func (x *checker) checkSnapshotL1(off uint64, entries uint32, entry uint64) error {
	bytes := uint64(entries) * 8
	if bytes == 0 {
		return nil
	}
	if bytes > maxL1Bytes {
		x.found(Corruption, entry, "the L1 table of a snapshot, %d bytes, is larger than 32 MiB", bytes)
		return nil
	}
	if x.h.checkTable("table", off, bytes, x.fileSize) != nil {
		x.found(Corruption, entry, "the L1 table of a snapshot, %d bytes at %#x, lies where no table can be", bytes, off)
		return nil
	}
	l1, err := x.loadTable(off, int64(bytes))
	if err != nil {
		return err
	}
	return x.referL1(l1, off)
}

package qcow2

import "encoding/binary"

// The extra data of a snapshot that this package knows: the size of the saved
// machine state, the size of the disk, and a counter of instructions, 8 bytes
// each. Version 3 demands the first two.
const (
	snapshotExtraLeast = 16
	snapshotExtraKnown = 24
	offSnapshots       = 60 // in the header: their number, then the table's offset: 12 bytes
)

// snapshotPlan is what a repair makes of a snapshot table with faults that it
// can mend.
type snapshotPlan struct {
	kept uint32 // snapshots, from the first on
	size uint64 // of the new table, in bytes
	at   uint64 // where it will be
}

// snapshotHead is the fixed part of an entry of the snapshot table.
type snapshotHead [snapshotFixed]byte

func (b *snapshotHead) l1() (off uint64, entries uint32) {
	return binary.BigEndian.Uint64(b[0:]), binary.BigEndian.Uint32(b[8:])
}

func (b *snapshotHead) extra() uint64 { return uint64(binary.BigEndian.Uint32(b[36:])) }

// names is the length of the identifier and the name together.
func (b *snapshotHead) names() uint64 {
	return uint64(binary.BigEndian.Uint16(b[12:])) + uint64(binary.BigEndian.Uint16(b[14:]))
}

// size is the length of the entry with extra bytes of extra data.
func (b *snapshotHead) size(extra uint64) uint64 { return (snapshotFixed + extra + b.names() + 7) &^ 7 }

// mendedExtra is the length of the extra data once it is mended.
func (x *checker) mendedExtra(extra uint64) uint64 {
	if extra > maxSnapshotExtra || x.version == 3 && extra < snapshotExtraLeast {
		return snapshotExtraKnown
	}
	return extra
}

// checkSnapshots counts the references from the snapshot table.
func (x *checker) checkSnapshots() error {
	begin, n := x.h.snapshotsOffset, min(x.h.snapshots, maxSnapshots)
	if err := x.h.placeSnapshots(n, x.fileSize); err != nil {
		x.foundError(begin, err)
		return nil
	}
	if n > 0 && x.external {
		x.found(Corruption, begin, "the image has snapshots and an external data file")
	}
	plan, faults := snapshotPlan{}, int64(0)
	off, l1Bytes := begin, uint64(0)
	for i := range n {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		var b snapshotHead
		if off > uint64(x.fileSize) || snapshotFixed > uint64(x.fileSize)-off { //nolint:gosec // G115: not negative
			x.found(Corruption, off, "the snapshot table ends beyond the end of the file, with snapshot %d of %d", i, n)
			return x.refer(begin, off-begin, 1, "snapshot table")
		}
		if err := readFull(x.file, b[:], int64(off)); err != nil { //nolint:gosec // G115: inside the file
			return err
		}
		extra := x.mendedExtra(b.extra())
		if plan.size+b.size(extra) > maxSnapshotTable {
			break
		}
		if extra != b.extra() {
			faults++
			x.found(Corruption, off, "snapshot %d has %d bytes of extra data instead of %d to %d", i, b.extra(), snapshotExtraLeast, maxSnapshotExtra)
		}
		plan.kept, plan.size = i+1, plan.size+b.size(extra)
		if err := x.checkSnapshotL1(&b, off, &l1Bytes); err != nil {
			return err
		}
		off += b.size(b.extra())
	}
	if plan.kept < x.h.snapshots {
		faults++
		x.found(Corruption, begin, "the snapshot table is larger than 64 MiB or %d snapshots: it has room for %d of %d", maxSnapshots, plan.kept, x.h.snapshots)
	}
	if faults > 0 {
		x.mendable += faults
		x.snaps = &plan
	}
	return x.refer(begin, off-begin, 1, "snapshot table")
}

// checkSnapshotL1 counts the references from the L1 table of the snapshot whose
// entry b is at offset at. sum is the length of all such tables so far.
func (x *checker) checkSnapshotL1(b *snapshotHead, at uint64, sum *uint64) error {
	off, entries := b.l1()
	bytes := uint64(entries) * 8
	if bytes == 0 {
		return nil
	}
	if bytes > maxL1Bytes || bytes > maxSnapshotL1s-*sum {
		x.found(Corruption, at, "the L1 table of a snapshot, %d bytes, is too large", bytes)
		return nil
	}
	*sum += bytes
	if x.h.checkTable("table", off, bytes, x.fileSize) != nil {
		x.found(Corruption, at, "the L1 table of a snapshot, %d bytes at %#x, lies where no table can be", bytes, off)
		return nil
	}
	if err := x.used.spend(2 * int64(bytes)); err != nil {
		return err
	}
	l1, err := x.loadTable(off, int64(bytes))
	if err == nil {
		err = x.referL1(l1, off)
	}
	x.used.left += 2 * int64(bytes)
	return err
}

// placeSnapshotTable finds room for the mended snapshot table, and counts it.
func (x *checker) placeSnapshotTable() error {
	p := x.snaps
	if p == nil || p.size == 0 {
		return nil
	}
	n := (p.size + uint64(x.clusterSize) - 1) >> x.clusterBits //nolint:gosec // G115: positive
	c, err := x.takeCounted(n)
	p.at = x.pointer(c)
	return err
}

// writeSnapshotTable writes the mended snapshot table, whose clusters are counted
// durably, and makes the header point to it. The old one leaks.
func (x *checker) writeSnapshotTable() error {
	p := x.snaps
	if err := x.used.spend(int64(p.size)); err != nil { //nolint:gosec // G115: at most 64 MiB
		return err
	}
	table, off := make([]byte, 0, p.size), x.h.snapshotsOffset
	for range p.kept {
		var b snapshotHead
		if err := readFull(x.file, b[:], int64(off)); err != nil { //nolint:gosec // G115: checked by checkSnapshots
			return err
		}
		var err error
		if table, err = x.mendSnapshot(table, &b, int64(off)); err != nil { //nolint:gosec // G115: as above
			return err
		}
		off += b.size(b.extra())
	}
	if err := writeFull(x.file, table, int64(p.at)); err != nil { //nolint:gosec // G115: an offset
		return err
	}
	if err := x.datasync(); err != nil {
		return err
	}
	field := binary.BigEndian.AppendUint32(nil, p.kept)
	field = binary.BigEndian.AppendUint64(field, p.at)
	if err := writeFull(x.file, field, offSnapshots); err != nil {
		return err
	}
	return x.datasync()
}

// mendSnapshot appends the mended form of the entry b at off to table.
func (x *checker) mendSnapshot(table []byte, b *snapshotHead, off int64) ([]byte, error) {
	be := binary.BigEndian
	begin, old := len(table), b.extra()
	extra := x.mendedExtra(old)
	table = append(table, b[:]...)
	be.PutUint32(table[begin+36:], uint32(extra)) //nolint:gosec // G115: at most 1024
	data, kept := make([]byte, extra), min(old, extra)
	if old < extra {
		be.PutUint64(data, uint64(be.Uint32(b[32:]))) // the machine state's size in its short form
		be.PutUint64(data[8:], x.h.size)
		be.PutUint64(data[16:], ^uint64(0)) // instructions are not counted
		kept &^= 7                          // half a field says nothing
	}
	if err := readFull(x.file, data[:kept], off+snapshotFixed); err != nil {
		return nil, err
	}
	names := make([]byte, b.names())
	if err := readFull(x.file, names, off+snapshotFixed+int64(old)); err != nil { //nolint:gosec // G115: 32 bits
		return nil, err
	}
	table = append(append(table, data...), names...)
	return append(table, make([]byte, -len(table)&7)...), nil
}

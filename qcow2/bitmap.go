package qcow2

import "errors"

// Limits of persistent bitmaps.
const (
	maxBitmaps         = 65535
	maxBitmapDirectory = 64 << 20  // bytes
	maxBitmapTable     = 0x8000000 // entries, of all tables together
	maxBitmapData      = 512 << 20 // bytes of one bitmap, as QEMU loads it
	maxBitmapName      = 1023      // bytes
	minBitmapGrainBits = 9         // log2 of the bytes for each bit
	maxBitmapGrainBits = 31
	bitmapFixed        = 24 // bytes before the extra data of an entry
)

// Bits of the entries of a bitmap's table.
const (
	bitmapOnes     = 1 // there is no data: all bits are ones
	bitmapReserved = 0xff000000000001fe
)

// checkBitmaps counts the references from the directory of bitmaps.
func (x *checker) checkBitmaps() error {
	d, err := x.h.bitmapDirectory(x.bitmapsExt, x.fileSize)
	if err != nil {
		x.foundError(d.offset, err)
		return nil
	}
	if d.n == 0 {
		return nil
	}
	if err := x.refer(d.offset, d.bytes, 1, "directory of bitmaps"); err != nil {
		return err
	}
	memory := 2 * int64(d.bytes) //nolint:gosec // G115: at most 64 MiB
	if err := x.used.spend(memory); err != nil {
		return err
	}
	rows, err := d.load(x.file)
	if errors.Is(err, ErrCorrupt) {
		x.foundError(d.offset, err)
		err = nil
	}
	for i := 0; i < len(rows) && err == nil; i++ {
		off, entries := rows[i].table()
		err = x.checkBitmap(off, entries, i)
	}
	x.used.left += memory
	return err
}

// checkBitmap counts the references from the table at off of bitmap i.
func (x *checker) checkBitmap(off uint64, entries uint32, i int) error {
	if int64(entries) > maxBitmapTable-x.bitmapEntries || entries > 0 && x.h.checkTable("table", off, uint64(entries)*8, x.fileSize) != nil {
		x.found(Corruption, off, "the table of bitmap %d, %d entries at %#x, is impossible", i, entries, off)
		return nil
	}
	if err := x.refer(off, uint64(entries)*8, 1, "table of a bitmap"); err != nil {
		return err
	}
	x.bitmapEntries += int64(entries)
	const most = 1 << 16 // entries read at a time
	for done := uint32(0); done < entries; done += most {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		at := off + uint64(done)*8
		table, err := x.loadTable(at, int64(min(most, entries-done))*8)
		if err != nil {
			return err
		}
		for _, e := range table {
			data, err := x.decodeBitmap(e)
			if err != nil {
				x.found(Corruption, at, "the table of bitmap %d has the entry %#x, which has reserved bits set", i, e)
				continue
			}
			if data == 0 {
				continue
			}
			if err := x.refer(data, uint64(x.clusterSize), 1, "data of a bitmap"); err != nil { //nolint:gosec // G115: positive
				return err
			}
		}
	}
	return nil
}

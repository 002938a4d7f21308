package qcow2

import "encoding/binary"

// Limits of persistent bitmaps.
const (
	maxBitmaps         = 65535
	maxBitmapDirectory = 64 << 20  // bytes
	maxBitmapTable     = 0x8000000 // entries
	bitmapFixed        = 24        // bytes before the extra data of an entry
	bitmapReserved     = 0xff000000000001fe
)

// checkBitmaps counts the references from the directory of bitmaps.
func (x *checker) checkBitmaps() error {
	if x.bitmaps == nil {
		return nil
	}
	be := binary.BigEndian
	if len(x.bitmaps) != 24 {
		x.found(Corruption, 0, "the header extension for bitmaps has %d bytes instead of 24", len(x.bitmaps))
		return nil
	}
	number, bytes, begin := be.Uint32(x.bitmaps), be.Uint64(x.bitmaps[8:]), be.Uint64(x.bitmaps[16:])
	if number == 0 || number > maxBitmaps || bytes == 0 || bytes > maxBitmapDirectory ||
		x.h.checkTable("directory", begin, bytes, x.fileSize) != nil {
		x.found(Corruption, begin, "the directory of bitmaps, %d in %d bytes at %#x, is impossible", number, bytes, begin)
		return nil
	}
	if err := x.refer(begin, bytes, 1, "directory of bitmaps"); err != nil {
		return err
	}
	memory := int64(bytes)
	if err := x.used.spend(memory); err != nil {
		return err
	}
	defer func() { x.used.left += memory }()
	dir := make([]byte, bytes)
	if err := readFull(x.file, dir, int64(begin)); err != nil { //nolint:gosec // G115: checked
		return err
	}
	for i := range number {
		if len(dir) < bitmapFixed {
			x.found(Corruption, begin, "the directory of bitmaps ends before entry %d", i)
			return nil
		}
		n := (bitmapFixed + uint64(be.Uint16(dir[18:])) + uint64(be.Uint32(dir[20:])) + 7) &^ 7
		if n > uint64(len(dir)) {
			x.found(Corruption, begin, "entry %d of the directory of bitmaps is too long", i)
			return nil
		}
		if err := x.checkBitmap(be.Uint64(dir), be.Uint32(dir[8:]), i); err != nil {
			return err
		}
		dir = dir[n:]
	}
	return nil
}

// checkBitmap counts the references from the table at off of bitmap i.
func (x *checker) checkBitmap(off uint64, entries, i uint32) error {
	if entries > maxBitmapTable || entries > 0 && x.h.checkTable("table", off, uint64(entries)*8, x.fileSize) != nil {
		x.found(Corruption, off, "the table of bitmap %d, %d entries at %#x, is impossible", i, entries, off)
		return nil
	}
	if err := x.refer(off, uint64(entries)*8, 1, "table of a bitmap"); err != nil {
		return err
	}
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
			data := e & entryOffset
			if e&bitmapReserved != 0 || data != 0 && e&1 != 0 || x.inCluster(int64(data)) != 0 {
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

package qcow2

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
)

// Range is the range [Offset, Offset+Length) of a disk, in bytes.
type Range struct{ Offset, Length int64 }

// DirtyRanges returns the ranges of the disk that the persistent bitmap with the
// given name says have changed, in order, none next to another, and cut off where
// the disk ends. It reads the bitmap a cluster at a time, and ends with the first
// error. One that is in use is refused with ErrBitmapInUse. A write meanwhile makes no
// difference, but a change of the bitmaps ends it with an error.
func (m *Image) DirtyRanges(name string) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		var b *storedBitmap
		var changes uint64
		err := m.pinned(func() (err error) {
			changes = m.bitmapChanges
			b, err = m.loadBitmap(name)
			return err
		})
		if err != nil {
			yield(Range{}, err)
			return
		}
		b.ranges(func(i int, buf []byte) error {
			return m.pinned(func() error {
				if changes != m.bitmapChanges {
					return &Error{What: fmt.Sprintf("the persistent bitmap %q was read while bitmaps changed", name)}
				}
				return m.readBits(b, i, buf)
			})
		})(yield)
	}
}

// pinned runs read like a request, so that no change of the image as a whole runs
// meanwhile.
func (m *Image) pinned(read func() error) error {
	p, err := m.hold(0)
	if err != nil {
		return err
	}
	defer p.leave()
	return inFile(m.path, read())
}

// bitmapShape says how the bits of a bitmap lie: each stands for grain bytes of the
// disk, and each entry of the table has those for piece bytes.
type bitmapShape struct {
	size, grain, piece int64
}

func (m *Image) newBitmapShape(size, grain int64) bitmapShape {
	return bitmapShape{size: size, grain: grain, piece: grain * 8 * m.clusterSize}
}

// entries is the number of entries of the table.
func (s *bitmapShape) entries() int { return int(ceilDiv(s.size, s.piece)) }

// bits is the number of bits that entry i of the table has.
func (s *bitmapShape) bits(i int) int64 {
	return ceilDiv(min(s.piece, s.size-int64(i)*s.piece), s.grain)
}

func ceilDiv(n, by int64) int64 {
	q := n / by
	if n%by > 0 {
		q++
	}
	return q
}

// nextBit returns the index of the first bit in [from, n) of b, whose length is a
// multiple of 8 bytes, that is set or not as asked for, n if there is none.
func nextBit(b []byte, from, n int64, set bool) int64 {
	for from < n {
		w := binary.LittleEndian.Uint64(b[from/64*8:])
		if !set {
			w = ^w
		}
		if w >>= from % 64; w != 0 {
			return min(from+int64(bits.TrailingZeros64(w)), n)
		}
		from = (from/64 + 1) * 64
	}
	return n
}

// setBits sets the bits [from, to) of b.
func setBits(b []byte, from, to int64) {
	for ; from < to && from%8 != 0; from++ {
		b[from/8] |= 1 << (from % 8)
	}
	for ; to-from >= 8; from += 8 {
		b[from/8] = 0xff
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}

// clearTail clears all bits of b but the first n.
func clearTail(b []byte, n int64) {
	clear(b[ceilDiv(n, 8):])
	if n%8 != 0 {
		b[n/8] &= 1<<(n%8) - 1
	}
}

// storedBitmap is a bitmap in the file that can be used.
type storedBitmap struct {
	bitmapShape
	table []uint64
}

// ranges returns the ranges of the disk whose bits are set, in order and none next
// to another. read reads the bits of an entry of the table.
func (b *storedBitmap) ranges(read func(i int, buf []byte) error) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		var last Range // not yielded yet, if it has a length
		buf := make([]byte, b.piece/b.grain/8)
		for i := range b.table {
			if err := read(i, buf); err != nil {
				yield(Range{}, err)
				return
			}
			n, begin := b.bits(i), int64(i)*b.piece
			for from := nextBit(buf, 0, n, true); from < n; {
				to := nextBit(buf, from, n, false)
				off, end := begin+from*b.grain, min(begin+to*b.grain, b.size)
				from = nextBit(buf, to, n, true)
				if last.Length > 0 && last.Offset+last.Length == off {
					last.Length += end - off
					continue
				}
				if last.Length > 0 && !yield(last, nil) {
					return
				}
				last = Range{Offset: off, Length: end - off}
			}
		}
		if last.Length > 0 {
			yield(last, nil)
		}
	}
}

// loadBitmap reads the table of the bitmap with the given name.
func (m *Image) loadBitmap(name string) (*storedBitmap, error) {
	l, err := m.readBitmaps()
	if err != nil {
		return nil, err
	}
	i, err := l.find(name)
	if err != nil {
		return nil, err
	}
	return m.loadBitmapOf(&l, i)
}

// loadBitmapOf reads the table of bitmap i of the list.
func (m *Image) loadBitmapOf(l *bitmapList, i int) (*storedBitmap, error) {
	row := l.rows[i]
	if err := m.checkBitmapUse(row); err != nil {
		return nil, err
	}
	b := &storedBitmap{bitmapShape: m.newBitmapShape(m.Size(), 1<<row[17])}
	off, entries := row.table()
	if int64(entries) != int64(b.entries()) || int64(entries)*m.clusterSize > maxBitmapData {
		return nil, bitmapFault("the table of the persistent bitmap %q has %d entries, which does not agree with the disk", row.name(), entries)
	}
	if entries == 0 {
		return b, nil
	}
	err := inactive(true, l.h.checkTable("table of a bitmap", off, uint64(entries)*8, l.fileSize))
	if err == nil {
		b.table, err = m.loadTable(off, int64(entries)*8)
	}
	return b, err
}

// checkBitmapUse refuses bitmaps with which nothing can be done but to keep them,
// or to remove them.
func (m *Image) checkBitmapUse(row bitmapRow) error {
	switch {
	case row.inUse():
		return &Error{
			Kind: ErrBitmapInUse, What: fmt.Sprintf("the persistent bitmap %q has not followed the disk and cannot be used", row.name()),
			Mend: "to remove it, run: calf image bitmap -f qcow2 --remove " + shellWord(m.path) + " " + shellWord(row.name()),
		}
	case row[16] != bitmapDirty || row.flags()&^knownBitmapFlags != 0 || row.extra() > 0 && row.flags()&bitmapExtra == 0:
		return &Error{Kind: ErrUnsupported, What: fmt.Sprintf("the persistent bitmap %q is of an unknown kind", row.name())}
	case row[17] < minBitmapGrainBits || row[17] > maxBitmapGrainBits:
		return bitmapFault("the persistent bitmap %q has a granularity of 2^%d bytes", row.name(), row[17])
	}
	return nil
}

// readBits reads the bits that entry i of b's table leads to. What is behind the
// end of the bitmap is zero.
func (m *Image) readBits(b *storedBitmap, i int, buf []byte) error {
	data, err := m.decodeBitmap(b.table[i])
	if err != nil {
		return err
	}
	n := b.bits(i)
	if data == 0 {
		clear(buf)
		if b.table[i]&bitmapOnes != 0 {
			setBits(buf, 0, n)
		}
		return nil
	}
	if err := readFull(m.file, buf, int64(data)); err != nil { //nolint:gosec // G115: masked
		return err
	}
	clearTail(buf, n)
	return nil
}

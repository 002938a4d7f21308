package ext4

import (
	"bytes"
	"encoding/binary"
	"math"
)

// run is a piece of a file: n blocks from the one asked for on, which lie at disk
// or read as zero.
type run struct {
	disk uint64
	n    uint64
	zero bool
}

// mapper finds the blocks of a file. It belongs to one call and remembers the
// last node that it has read, so that what is read in order is found in order.
type mapper struct {
	fs   *FS
	file inode

	leaf     []byte
	from, to uint64 // the blocks [from, to) of the file are those of leaf
}

// find returns the piece that begins with a block of the file. Its n is positive.
func (m *mapper) find(block uint64) (run, error) {
	if !m.file.has(flagExtents) {
		return m.indirect(block)
	}
	if m.leaf == nil || block < m.from || block >= m.to {
		if err := m.descend(block); err != nil {
			return run{}, err
		}
	}
	return m.extent(block), nil
}

// An extent tree has a header and entries of 12 bytes, in the inode and in blocks
// of their own. Depth counts down to the leaves.
const (
	extentMagic    = 0xF30A
	extentSize     = 12
	extentMaxDepth = 5
	// extentWritten is the greatest length of an extent that holds data; one
	// that is longer by that much has been allocated and not written.
	extentWritten = 32768
)

// descend finds the leaf that a block of the file belongs to.
func (m *mapper) descend(block uint64) error {
	node := m.file.raw[inodeBlock : inodeBlock+60]
	m.from, m.to = 0, math.MaxUint64
	for level := 0; ; level++ {
		n := binary.LittleEndian.Uint16(node[2:])
		depth := binary.LittleEndian.Uint16(node[6:])
		if binary.LittleEndian.Uint16(node) != extentMagic || int(n) > len(node)/extentSize-1 || int(depth) > extentMaxDepth-level {
			return corrupt("inode %d has a broken extent tree", m.file.number)
		}
		entries := node[extentSize:][:int(n)*extentSize]
		if depth == 0 {
			m.leaf = entries
			return nil
		}
		child, next := last(entries, block)
		m.to = min(m.to, next)
		if child == nil {
			m.leaf = []byte{} // a hole before the first entry
			return nil
		}
		m.from = max(m.from, uint64(binary.LittleEndian.Uint32(child)))
		disk := uint64(binary.LittleEndian.Uint32(child[4:])) | uint64(binary.LittleEndian.Uint16(child[8:]))<<32
		node = make([]byte, m.fs.blockSize)
		if err := m.fs.read(node, disk, 0); err != nil {
			return err
		}
	}
}

// last returns the last entry that begins at or before block, or nil, and where
// the next one begins.
func last(entries []byte, block uint64) (entry []byte, next uint64) {
	for ; len(entries) > 0; entries = entries[extentSize:] {
		begin := uint64(binary.LittleEndian.Uint32(entries))
		if begin > block {
			return entry, begin
		}
		entry = entries[:extentSize]
	}
	return entry, math.MaxUint64
}

// extent returns the piece at block, whose leaf has been found.
func (m *mapper) extent(block uint64) run {
	e, next := last(m.leaf, block)
	hole := run{n: min(m.to, next) - block, zero: true}
	if e == nil {
		return hole
	}
	past := block - uint64(binary.LittleEndian.Uint32(e))
	length := uint64(binary.LittleEndian.Uint16(e[4:]))
	unwritten := length > extentWritten
	if unwritten {
		length -= extentWritten
	}
	if past >= length {
		return hole
	}
	disk := uint64(binary.LittleEndian.Uint32(e[8:])) | uint64(binary.LittleEndian.Uint16(e[6:]))<<32
	return run{disk: disk + past, n: min(length-past, hole.n), zero: unwritten}
}

// indirect finds a block by the maps of ext2: 12 blocks in the inode, then one
// block, a tree of two levels and one of three. Zero is a hole.
func (m *mapper) indirect(block uint64) (run, error) {
	const direct = 12
	pointers := m.file.raw[inodeBlock : inodeBlock+60]
	at := func(i uint64) uint64 { return uint64(binary.LittleEndian.Uint32(pointers[4*i:])) }
	if block < direct {
		return run{disk: at(block), n: 1, zero: at(block) == 0}, nil
	}
	perBlock := uint64(m.fs.blockSize / 4) //nolint:gosec // G115: positive
	left, span := block-direct, uint64(1)  // span: what a pointer of the level above the data covers
	for level := range uint64(3) {
		if covered := span * perBlock; left >= covered {
			left, span = left-covered, covered
			continue
		}
		disk := at(direct + level)
		for ; disk != 0; span /= perBlock {
			var pointer [4]byte
			if err := m.fs.read(pointer[:], disk, int64(left/span*4)); err != nil { //nolint:gosec // G115: less than a block
				return run{}, err
			}
			disk, left = uint64(binary.LittleEndian.Uint32(pointer[:])), left%span
			if span == 1 {
				break
			}
		}
		return run{disk: disk, n: 1, zero: disk == 0}, nil
	}
	return run{}, corrupt("inode %d is longer than its map", m.file.number)
}

// inlineData returns what a file holds that lies in its inode: the place of the
// map, and the extended attribute system.data.
func (n inode) inlineData() []byte {
	data := bytes.Clone(n.raw[inodeBlock : inodeBlock+60])
	return append(data, n.attribute(7, "data")...)
}

// attribute returns the value of an extended attribute that lies in the inode, or
// nothing.
func (n inode) attribute(index byte, name string) []byte {
	const attributeMagic = 0xEA020000
	le := binary.LittleEndian
	if len(n.raw) < inodeExtra+4 {
		return nil
	}
	begin := inodeExtra + int(le.Uint16(n.raw[inodeExtra:]))
	if begin+4 > len(n.raw) || le.Uint32(n.raw[begin:]) != attributeMagic {
		return nil
	}
	values := n.raw[begin+4:] // offsets count from the first entry
	for b := values; len(b) >= 16 && le.Uint32(b) != 0; {
		length := int(b[0])
		if 16+length > len(b) {
			return nil
		}
		if b[1] == index && string(b[16:16+length]) == name {
			off, size := int(le.Uint16(b[2:])), uint64(le.Uint32(b[8:]))
			if off > len(values) || size > uint64(len(values)-off) { //nolint:gosec // G115: not negative
				return nil
			}
			return values[off : off+int(size)] //nolint:gosec // G115: bounded above
		}
		b = b[min(len(b), (16+length+3)&^3):]
	}
	return nil
}

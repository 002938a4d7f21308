package qcow2

// Bits of L1 and standard L2 entries.
const (
	entryCopied     = 1 << 63 // the cluster's refcount is exactly one
	entryCompressed = 1 << 62
	entryZero       = 1 // version 3 only
	entryOffset     = 0x00fffffffffffe00
	l1Reserved      = 0x7f000000000001ff
	l2Reserved      = 0x3f000000000001fe
)

// geometry is the arithmetic that follows from the header. It never changes while
// an image is open.
type geometry struct {
	clusterBits   uint
	clusterSize   int64
	subBits       uint // log2 of the subclusters in a cluster; 0 without extended L2 entries
	wordBits      uint // log2 of the 8-byte words in an L2 entry
	l2Bits        uint // log2 of the entries of an L2 table
	sliceBits     uint // log2 of the entries of a slice of it
	refcountOrder uint
	refBlockBits  uint // log2 of the counts in a refcount block
	version       uint32
	external      bool // guest data is in a file of its own, at the guest's offsets
}

// maxSliceBits makes slices of at most 4 KiB: 512 words.
const maxSliceBits = 9

// extendedSubBits makes 32 subclusters in a cluster with an extended L2 entry.
const extendedSubBits = 5

func newGeometry(h *header) geometry {
	g := geometry{
		clusterBits:   uint(h.clusterBits),
		clusterSize:   1 << h.clusterBits,
		refcountOrder: uint(h.refcountOrder),
		refBlockBits:  uint(h.clusterBits) + 3 - uint(h.refcountOrder),
		version:       h.version,
		external:      h.incompat(incompatDataFile),
	}
	if h.incompat(incompatExtendedL2) {
		g.subBits, g.wordBits = extendedSubBits, 1
	}
	g.l2Bits = g.clusterBits - 3 - g.wordBits
	g.sliceBits = min(g.l2Bits, maxSliceBits-g.wordBits)
	return g
}

// sliceBytes is the size of a slice in bytes.
func (g *geometry) sliceBytes() int64 { return 8 << g.wordBits << g.sliceBits }

// grain is the size of a subcluster in bytes: the unit in which guest data is
// there or not. Without extended L2 entries it is the cluster.
func (g *geometry) grain() int64 { return g.clusterSize >> g.subBits }

// sub is the subcluster, in its cluster, that holds the byte at off.
func (g *geometry) sub(off int64) uint { return uint(g.inCluster(off) >> (g.clusterBits - g.subBits)) } //nolint:gosec // G115: below 32

// allSubs is the set of all subclusters of a cluster.
func (g *geometry) allSubs() uint32 { return uint32(1<<(1<<g.subBits) - 1) }

// subs is the set of the subclusters of guest cluster c that [from, to) touches.
func (g *geometry) subs(c uint64, from, to int64) uint32 {
	begin := g.offset(c)
	from, to = max(from-begin, 0), min(to-begin, g.clusterSize)
	if from >= to {
		return 0
	}
	first, last := g.sub(from), g.sub(to-1)
	return uint32(uint64(2)<<last - uint64(1)<<first) //nolint:gosec // G115: at most bit 31
}

// cluster is the index of the cluster that holds the byte at off.
func (g *geometry) cluster(off int64) uint64 { return uint64(off) >> g.clusterBits } //nolint:gosec // G115: offsets are not negative

// offset is where cluster c begins.
func (g *geometry) offset(c uint64) int64 { return int64(c << g.clusterBits) } //nolint:gosec // G115: below 2^63, like all offsets

// pointer is offset in the form of a table's entry.
func (g *geometry) pointer(c uint64) uint64 { return c << g.clusterBits }

// inCluster is the distance of off from the beginning of its cluster.
func (g *geometry) inCluster(off int64) int64 { return off & (g.clusterSize - 1) }

// sliceID names the slice that maps guest cluster c: slices are numbered through
// all L2 tables in guest order.
func (g *geometry) sliceID(c uint64) uint64 { return c >> g.sliceBits }

// l1Index is the L1 entry above the slice.
func (g *geometry) l1Index(id uint64) uint64 { return id >> (g.l2Bits - g.sliceBits) }

// sliceOffset is where the slice lies in its table, in bytes.
func (g *geometry) sliceOffset(id uint64) int64 {
	return int64(id&(1<<(g.l2Bits-g.sliceBits)-1)) * g.sliceBytes() //nolint:gosec // G115: less than a cluster
}

// sliceIndex is the entry of cluster c in its slice.
func (g *geometry) sliceIndex(c uint64) uint64 { return c & (1<<g.sliceBits - 1) }

// kind says where a part of the disk has its data.
type kind uint8

const (
	kindUnallocated kind = iota // in the backing file, or zeros
	kindZero                    // zeros
	kindNormal
	kindCompressed
)

// entry is an L2 entry that has been checked. A cluster with a standard entry has
// one subcluster. Bit n of data is set iff subcluster n is in the host cluster;
// bit n of zero, iff it reads as zero. A host cluster may be allocated with room
// for subclusters that are not in it.
type entry struct {
	allocated  bool  // there is a host cluster
	compressed bool  // the cluster is compressed; data is all, no other is set
	copied     bool  // the image owns the host cluster alone; iff allocated
	host       int64 // offset of the host cluster, or of the compressed data
	size       int64 // bytes of compressed data
	data, zero uint32
}

// kindOf says where subcluster i has its data.
func (e *entry) kindOf(i uint) kind {
	switch {
	case e.compressed:
		return kindCompressed
	case e.data>>i&1 != 0:
		return kindNormal
	case e.zero>>i&1 != 0:
		return kindZero
	}
	return kindUnallocated
}

// owned reports whether the image may write to the host cluster of e, if it owns
// the table of e.
func (e *entry) owned() bool { return e.allocated && e.copied }

// decode checks and decodes the L2 entry of guest cluster c, whose descriptor is
// desc. bitmap is the second word of an extended entry, else it is ignored.
func (g *geometry) decode(desc, bitmap, c uint64) (entry, error) {
	if g.wordBits == 0 {
		// The descriptor's bit says what the bitmaps of one subcluster would.
		bitmap = 0
		switch {
		case desc == 0:
			return entry{}, nil
		case desc&entryZero != 0:
			bitmap = 1 << 32
		case g.hasHost(desc):
			bitmap = 1
		}
	}
	if desc&entryCompressed != 0 {
		return g.decodeCompressed(desc, c)
	}
	if desc&l2Reserved != 0 || g.version == 2 && desc&entryZero != 0 {
		return entry{}, corruptf("the L2 entry %#x of guest offset %#x has reserved bits set", desc, g.offset(c))
	}
	e := entry{
		allocated: g.hasHost(desc), host: int64(desc & entryOffset),
		data: uint32(bitmap), zero: uint32(bitmap >> 32), //nolint:gosec // G115: one half each
	}
	if e.data&e.zero != 0 || !e.allocated && e.data != 0 {
		return entry{}, corruptf("the L2 entry of guest offset %#x has the impossible subclusters %#x", g.offset(c), bitmap)
	}
	if !e.allocated {
		return entry{zero: e.zero}, nil
	}
	return e, g.checkHost(&e, desc, c)
}

// hasHost reports whether the descriptor has a host cluster. In a data file that
// may be the one at 0, which only the flag tells from none.
func (g *geometry) hasHost(desc uint64) bool {
	return desc&entryOffset != 0 || g.external && desc&entryCopied != 0 && desc&entryZero == 0
}

// checkHost checks the host cluster of e, the entry of guest cluster c, and says
// whose it is.
func (g *geometry) checkHost(e *entry, desc, c uint64) error {
	e.copied = desc&entryCopied != 0
	if g.external {
		e.copied = true // nothing shares a data file
		if e.host != g.offset(c) {
			return corruptf("the L2 entry of guest offset %#x points to %#x in the data file", g.offset(c), e.host)
		}
		return nil
	}
	if g.inCluster(e.host) != 0 || e.host < g.clusterSize {
		return corruptf("the L2 entry of guest offset %#x points to %#x, which is no data cluster", g.offset(c), e.host)
	}
	return nil
}

// encode returns the two words of the L2 entry e. The second is 0 without extended
// L2 entries.
func (g *geometry) encode(e entry) (desc, bitmap uint64) {
	desc = uint64(e.host) //nolint:gosec // G115: not negative
	switch {
	case e.compressed:
		sectors := (e.host+e.size-1)>>9 - e.host>>9                            // beside the first
		return desc | entryCompressed | uint64(sectors)<<(70-g.clusterBits), 0 //nolint:gosec // G115: not negative
	case e.copied:
		desc |= entryCopied
	}
	if g.wordBits == 0 {
		return desc | uint64(e.zero), 0
	}
	return desc, uint64(e.zero)<<32 | uint64(e.data)
}

// decodeCompressed decodes the descriptor of a compressed cluster: a byte offset
// and the number of 512-byte sectors that its data touches. The bitmap of an
// extended entry has no meaning there.
func (g *geometry) decodeCompressed(desc, c uint64) (entry, error) {
	off, n := g.compressedRange(desc)
	host, size := int64(off), int64(n) //nolint:gosec // G115: below 2^62 and 2^22
	if g.external || host < g.clusterSize || host >= 1<<56 {
		return entry{}, corruptf("the compressed cluster at guest offset %#x has its data at %#x, which is no data cluster", g.offset(c), host)
	}
	return entry{compressed: true, host: host, size: size, data: g.allSubs()}, nil
}

// compressedRange returns where the n bytes of data of the compressed cluster
// with the descriptor are.
func (g *geometry) compressedRange(desc uint64) (off, n uint64) {
	sizeBits := g.clusterBits - 8
	offBits := 62 - sizeBits
	off = desc & (1<<offBits - 1)
	return off, (desc>>offBits&(1<<sizeBits-1)+1)*512 - off&511
}

// hostClusters returns the host clusters [first, first+n) that the entry refers
// to, each of which counts one reference. Those in a data file are not counted.
func (g *geometry) hostClusters(e *entry) (first, n uint64) {
	switch {
	case e.compressed:
		first = g.cluster(e.host)
		return first, g.cluster(e.host+e.size-1) - first + 1
	case e.allocated && !g.external:
		return g.cluster(e.host), 1
	}
	return 0, 0
}

// decodeL1 checks the L1 entry e with index i and returns the offset of the L2
// table, 0 if there is none.
func (g *geometry) decodeL1(e, i uint64) (int64, error) {
	if e == 0 {
		return 0, nil
	}
	off := int64(e & entryOffset)
	if e&l1Reserved != 0 || g.inCluster(off) != 0 || off < g.clusterSize {
		return 0, corruptf("L1 entry %d, %#x, points to no L2 table", i, e)
	}
	return off, nil
}

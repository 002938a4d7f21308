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

// geometry is the arithmetic that follows from the cluster size and the refcount
// width. It never changes while an image is open.
type geometry struct {
	clusterBits   uint
	clusterSize   int64
	l2Bits        uint // log2 of the entries of an L2 table
	sliceBits     uint // log2 of the entries of a slice of it
	refcountOrder uint
	refBlockBits  uint // log2 of the counts in a refcount block
	version       uint32
}

// maxSliceBits makes slices of at most 4 KiB: 512 entries.
const maxSliceBits = 9

func newGeometry(h *header) geometry {
	g := geometry{
		clusterBits:   uint(h.clusterBits),
		clusterSize:   1 << h.clusterBits,
		l2Bits:        uint(h.clusterBits) - 3,
		refcountOrder: uint(h.refcountOrder),
		refBlockBits:  uint(h.clusterBits) + 3 - uint(h.refcountOrder),
		version:       h.version,
	}
	g.sliceBits = min(g.l2Bits, maxSliceBits)
	return g
}

// sliceBytes is the size of a slice in bytes.
func (g *geometry) sliceBytes() int64 { return 8 << g.sliceBits }

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

// kind says where the data of a guest cluster is.
type kind uint8

const (
	kindUnallocated kind = iota // in the backing file, or zeros
	kindZero                    // zeros; no host cluster
	kindZeroAlloc               // zeros; a host cluster is reserved
	kindNormal
	kindCompressed
)

// entry is an L2 entry that has been checked.
type entry struct {
	kind   kind
	copied bool  // the image owns the host cluster alone
	host   int64 // offset of the host cluster, or of the compressed data
	size   int64 // bytes of compressed data
}

// decode checks and decodes the L2 entry e of guest cluster c.
func (g *geometry) decode(e, c uint64) (entry, error) {
	if e == 0 {
		return entry{}, nil
	}
	if e&entryCompressed != 0 {
		return g.decodeCompressed(e, c)
	}
	if e&l2Reserved != 0 || g.version == 2 && e&entryZero != 0 {
		return entry{}, corruptf("the L2 entry %#x of guest offset %#x has reserved bits set", e, g.offset(c))
	}
	x := entry{kind: kindNormal, copied: e&entryCopied != 0, host: int64(e & entryOffset)}
	if e&entryZero != 0 {
		x.kind = kindZeroAlloc
	}
	if x.host == 0 {
		if x.kind == kindZeroAlloc {
			return entry{kind: kindZero}, nil
		}
		return entry{}, nil
	}
	if g.inCluster(x.host) != 0 || x.host < g.clusterSize {
		return entry{}, corruptf("the L2 entry of guest offset %#x points to %#x, which is no data cluster", g.offset(c), x.host)
	}
	return x, nil
}

// decodeCompressed decodes the descriptor of a compressed cluster: a byte offset
// and the number of 512-byte sectors that its data touches.
func (g *geometry) decodeCompressed(e, c uint64) (entry, error) {
	off, n := g.compressedRange(e)
	host, size := int64(off), int64(n) //nolint:gosec // G115: below 2^62 and 2^22
	if host < g.clusterSize || host >= 1<<56 {
		return entry{}, corruptf("the compressed cluster at guest offset %#x has its data at %#x, which is no data cluster", g.offset(c), host)
	}
	return entry{kind: kindCompressed, host: host, size: size}, nil
}

// compressedRange returns where the n bytes of data of the compressed cluster
// with L2 entry e are.
func (g *geometry) compressedRange(e uint64) (off, n uint64) {
	sizeBits := g.clusterBits - 8
	offBits := 62 - sizeBits
	off = e & (1<<offBits - 1)
	return off, (e>>offBits&(1<<sizeBits-1)+1)*512 - off&511
}

// hostClusters returns the host clusters [first, first+n) that the entry refers
// to, each of which counts one reference.
func (g *geometry) hostClusters(e entry) (first, n uint64) {
	switch e.kind {
	case kindNormal, kindZeroAlloc:
		return g.cluster(e.host), 1
	case kindCompressed:
		first = g.cluster(e.host)
		return first, g.cluster(e.host+e.size-1) - first + 1
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

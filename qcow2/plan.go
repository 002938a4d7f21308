package qcow2

import (
	"encoding/binary"
	"math"
)

// plan is a new image that is not written yet. Its parts lie one after the
// other: header, refcount table, refcount blocks, L1 table; and if the disk is
// preallocated, the L2 tables and the data, unless that has a file of its own.
type plan struct {
	geometry
	h     *header
	first []byte // the first cluster: header, extensions, name of the backing file
	mode  Preallocation

	table, blocks, l1, l2, data uint64 // clusters of each part
}

// plan checks the options and lays out an image with them.
func (o CreateOptions) plan() (*plan, error) {
	o = o.withDefaults()
	p, err := o.layout()
	if err != nil {
		return nil, err
	}
	if p.pointer(p.table) > maxRefTable {
		return nil, invalidOption("preallocating a disk of %d bytes takes more reference counts than clusters of %d bytes allow", o.Size, p.clusterSize)
	}
	p.h.refTableClusters = uint32(p.table) //nolint:gosec // G115: at most 8 MiB in bytes
	p.h.refTableOffset = p.pointer(1)      // behind the header
	p.h.l1Offset = p.pointer(1 + p.table + p.blocks)
	p.first, err = p.h.encode(o)
	return p, err
}

// layout checks the options, which have their defaults, and says how large the
// parts of an image with them are.
func (o *CreateOptions) layout() (*plan, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	h := o.format()
	p := &plan{geometry: newGeometry(h), h: h, mode: o.Preallocation}
	tables := h.l1Entries(h.size)
	if tables*8 > maxL1Bytes {
		return nil, invalidOption("a disk of %d bytes is too large for clusters of %d bytes", o.Size, p.clusterSize)
	}
	h.l1Size = uint32(tables)
	p.l1 = p.clusters(tables * 8)
	if p.mode != PreallocateOff {
		p.l2 = tables
		if o.DataFile == "" {
			p.data = p.clusters(h.size)
		}
	}
	p.sizeRefcounts()
	return p, nil
}

// sizeRefcounts makes the refcount table and the blocks as large as it takes to
// count all parts, themselves among them.
func (p *plan) sizeRefcounts() {
	for p.blocks, p.table = 1, 1; ; {
		perBlock := uint64(1) << p.refBlockBits
		b := (p.end() + perBlock - 1) / perBlock
		t := p.clusters(b * 8)
		if b == p.blocks && t == p.table {
			return
		}
		p.blocks, p.table = b, t
	}
}

// end is the number of clusters of the image.
func (p *plan) end() uint64 { return 1 + p.table + p.blocks + p.l1 + p.l2 + p.data }

// clusters is the number of clusters that n bytes take.
func (g *geometry) clusters(n uint64) uint64 {
	return n>>g.clusterBits + b2u(n&(1<<g.clusterBits-1) != 0)
}

// writeData makes the data file, f, and makes it durable.
func (p *plan) writeData(f file) error {
	size := int64(p.h.size) //nolint:gosec // G115: bounded by the L1 table
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := p.mode.prepare(f, 0, size); err != nil {
		return err
	}
	return f.Fdatasync()
}

// write makes f, which is empty, the image and makes it durable.
func (p *plan) write(f file) error {
	if err := f.Truncate(p.offset(p.end())); err != nil {
		return err
	}
	if err := p.mode.prepare(f, p.offset(p.end()-p.data), p.offset(p.data)); err != nil {
		return err
	}
	blocksAt := 1 + p.table
	if err := writeEntries(f, p.offset(1), p.blocks, func(i uint64) uint64 { return p.pointer(blocksAt + i) }); err != nil {
		return err
	}
	if err := p.writeCounts(f, p.offset(blocksAt)); err != nil {
		return err
	}
	if err := p.writeTables(f, blocksAt+p.blocks); err != nil {
		return err
	}
	if err := f.Fdatasync(); err != nil {
		return err
	}
	if err := writeFull(f, p.first, 0); err != nil {
		return err
	}
	return f.Fdatasync()
}

// writeCounts writes the reference counts, at off: one for each cluster.
func (p *plan) writeCounts(f file, off int64) error {
	most := uint64(pieceBytes) * 8 >> p.refcountOrder
	var b []byte
	for left := p.end(); left > 0; {
		n := min(left, most)
		if b == nil || n < most {
			b = make([]byte, (n<<p.refcountOrder+7)/8)
			for i := range n {
				setCount(b, p.refcountOrder, i, 1)
			}
		}
		if err := writeFull(f, b, off); err != nil {
			return err
		}
		off, left = off+int64(len(b)), left-n
	}
	return nil
}

// writeTables writes the L1 table, at cluster l1, and the L2 tables behind it, if
// the disk is preallocated: then all entries point to clusters of their own.
// Without that all tables are zero, which is what the file holds.
func (p *plan) writeTables(f file, l1 uint64) error {
	l2 := l1 + p.l1
	if err := writeEntries(f, p.offset(l1), p.l2, func(i uint64) uint64 { return p.pointer(l2+i) | entryCopied }); err != nil || p.l2 == 0 {
		return err
	}
	data := uint64(0) // in a data file, at the guest's offset
	if p.data > 0 {
		data = l2 + p.l2
	}
	guest := p.clusters(p.h.size)
	if !p.h.incompat(incompatExtendedL2) {
		return writeEntries(f, p.offset(l2), guest, func(i uint64) uint64 { return p.pointer(data+i) | entryCopied })
	}
	// No subcluster is in use, so that the backing file shows, and zeros
	// without one. In a raw data file all are, as it must hold all by itself.
	subclusters := b2u(p.h.autoclear != 0) * math.MaxUint32
	return writeEntries(f, p.offset(l2), 2*guest, func(i uint64) uint64 {
		if i%2 == 1 {
			return subclusters
		}
		return p.pointer(data+i/2) | entryCopied
	})
}

// writeEntries writes n entries of a table, the first at off.
func writeEntries(f file, off int64, n uint64, entry func(i uint64) uint64) error {
	b := make([]byte, 0, min(8*n, pieceBytes))
	for i := range n {
		b = binary.BigEndian.AppendUint64(b, entry(i))
		if len(b) < pieceBytes && i+1 < n {
			continue
		}
		if err := writeFull(f, b, off); err != nil {
			return err
		}
		off, b = off+int64(len(b)), b[:0]
	}
	return nil
}

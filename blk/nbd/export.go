package nbd

import (
	"encoding/binary"
	"iter"
	"math/bits"

	"github.com/calfvm/calf/blk"
)

// What a range of a disk is, in the metadata context base:allocation.
const (
	// StateHole ranges have no room of their own.
	StateHole = 1 << 0 // NBD_STATE_HOLE
	// StateZero ranges read as zero.
	StateZero = 1 << 1 // NBD_STATE_ZERO
)

// maxWriting bounds the writes to a disk that are under way. The host lets only one
// at a time into a file's page cache, and the more of them wait for that, the longer
// it takes all of them.
const maxWriting = 4

// baseAllocation is the metadata context that every export has.
const baseAllocation = "base:allocation"

// Extent is a range of a disk that is alike throughout.
type Extent struct {
	Length int64 // in bytes, at least 1
	// Status is in the terms of a metadata context: in base:allocation, StateHole
	// and StateZero, or 0 for data.
	Status uint32
}

// Mapper is a Disk that knows what its ranges are. Clients can then ask for it, and
// are told of ranges that are zero instead of being sent zeros. A server finds out
// when it is made.
type Mapper interface {
	// Extents yields what the n bytes at off are, in order and without gaps, in
	// the terms of base:allocation, and ends with the first error. Writes at the
	// same time may show or not, extent by extent.
	Extents(off, n int64) iter.Seq2[Extent, error]
}

// Context is a metadata context: a property of the ranges of a disk that clients
// can ask for by its name.
type Context struct {
	// Name is a namespace and a name in it, such as qemu:allocation-depth.
	Name string
	// Extents is as in Mapper, with the context's own terms.
	Extents func(off, n int64) iter.Seq2[Extent, error]
}

// export is an Export, and what was found out about it.
type export struct {
	Export
	readOnly bool
	flags    uint16 // what it can do, but for what needs structured replies
	mapper   Mapper // nil if the disk is none
	discard  blk.Discarder
	zero     blk.ZeroWriter
	contexts []Context // base:allocation is the first
	// writing holds one token for each write under way.
	writing chan struct{}
}

func newExport(e Export, multi bool) *export {
	x := &export{Export: e, readOnly: e.ReadOnly || e.Disk.ReadOnly(), writing: make(chan struct{}, maxWriting)}
	x.flags = canHasFlags | canFlush | canFUA | canCache
	if multi {
		x.flags |= canMultiConn
	}
	all := allData
	if mapper, ok := e.Disk.(Mapper); ok {
		x.mapper, all = mapper, mapper.Extents
	}
	x.contexts = append([]Context{{baseAllocation, all}}, e.Contexts...)
	if x.readOnly {
		x.flags |= canReadOnly
		return x
	}
	x.flags |= canWriteZeroes | canFastZero
	x.zero, _ = e.Disk.(blk.ZeroWriter)
	if d, ok := e.Disk.(blk.Discarder); ok && !e.NoDiscard && d.DiscardGranularity() > 0 {
		x.discard = d
		x.flags |= canTrim
	}
	return x
}

// allData is what is known of a disk that is no Mapper.
func allData(_, n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) { yield(Extent{Length: n}, nil) }
}

// write writes to the disk, once there are few enough others that do.
func (x *export) write(iov [][]byte, off int64) error {
	x.writing <- struct{}{}
	defer func() { <-x.writing }()
	return x.Disk.WritevAt(iov, off)
}

// transmission are the transmission flags for a client.
func (x *export) transmission(structured bool) uint16 {
	if structured {
		return x.flags | canDF
	}
	return x.flags
}

// preferredBlock is the size in bytes of requests that suit the disk: a power of 2
// of at least 4 KiB.
func (x *export) preferredBlock() uint32 {
	const page = 4096
	best := int64(page)
	if d, ok := x.Disk.(blk.Hinter); ok {
		physical, _, optimal := d.IOHints()
		best = max(best, physical)
		if optimal > best && optimal <= maxPayload {
			best = optimal
		}
	}
	if best > maxPayload {
		return page
	}
	return 1 << (bits.Len64(uint64(best)) - 1)
}

// describe appends the ranges of [off, off+n) to b as descriptors of a block
// status, at most most of them. n is positive and has 32 bits.
func (c Context) describe(b []byte, off, n int64, most int) ([]byte, error) {
	var last Extent // not appended yet, if it has a length
	flush := func() {
		b = binary.BigEndian.AppendUint32(b, uint32(last.Length)) //nolint:gosec // G115: at most n
		b = binary.BigEndian.AppendUint32(b, last.Status)
		most--
	}
	for e, err := range clipped(c.Extents(off, n), n) {
		switch {
		case err != nil && last.Length == 0:
			return b, err
		case err != nil: // What is known already is an answer.
			flush()
			return b, nil
		case last.Length > 0 && e.Status == last.Status:
			last.Length += e.Length
			continue
		case last.Length > 0:
			if flush(); most == 0 {
				return b, nil
			}
		}
		last = e
	}
	flush()
	return b, nil
}

// clipped yields extents that are n bytes long altogether. What a Mapper leaves out
// at the end is data; what it has too much is left out.
func clipped(extents iter.Seq2[Extent, error], n int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		left := n
		for e, err := range extents {
			if err == nil && e.Length <= 0 {
				continue
			}
			e.Length = min(e.Length, left)
			left -= e.Length
			if !yield(e, err) || err != nil || left == 0 {
				return
			}
		}
		yield(Extent{Length: left}, nil)
	}
}

package virtio

import (
	"encoding/binary"

	"github.com/calfvm/calf/guest"
)

// Descriptor flags (section 2.7.5).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	descSize = 16

	maxChainBytes = 1 << 32
)

// Chain is one request of a driver: a list of buffers in guest memory, first
// those the device may read, then those it may write. How the bytes are divided
// into buffers means nothing (V2); TakeReadable and TakeStatus cut across the
// division.
//
// The zero Chain is ready for Queue.Pop, and is best reused for many. Its
// buffers are guest memory, which the guest may change at any time.
type Chain struct {
	// Readable and Writable are what is left of the two halves. No buffer is
	// empty.
	Readable, Writable [][]byte

	head    uint16
	refused bool     // it is malformed; see Queue.Pop
	bufs    [][]byte // all buffers in order; Readable and Writable are slices of it
}

// reset forgets the buffers but keeps their storage.
func (c *Chain) reset(head uint16) {
	c.head = head
	c.refused = false
	c.bufs = c.bufs[:0]
	c.Readable, c.Writable = nil, nil
}

// TakeReadable moves len(p) bytes from the front of the readable half into p.
// It reports false, and moves nothing, if there are fewer.
func (c *Chain) TakeReadable(p []byte) bool {
	if Len(c.Readable) < uint64(len(p)) {
		return false
	}
	for len(p) > 0 {
		b := c.Readable[0]
		n := copy(p, b)
		p = p[n:]
		if n < len(b) {
			c.Readable[0] = b[n:]
			break
		}
		c.Readable = c.Readable[1:]
	}
	return true
}

// TakeStatus cuts the last byte off the writable half and returns it, as a
// slice of length 1. It is nil if the half is empty.
func (c *Chain) TakeStatus() []byte {
	last := len(c.Writable) - 1
	if last < 0 {
		return nil
	}
	b := c.Writable[last]
	n := len(b) - 1
	if n == 0 {
		c.Writable = c.Writable[:last]
	} else {
		c.Writable[last] = b[:n]
	}
	return b[n:]
}

// Len is the number of bytes in bufs.
func Len(bufs [][]byte) uint64 {
	var n uint64
	for _, b := range bufs {
		n += uint64(len(b))
	}
	return n
}

// desc is a descriptor in private memory.
type desc struct {
	addr  guest.GPA
	len   uint32
	flags uint16
	next  uint16
}

func makeDesc(lo, hi uint64) desc {
	return desc{addr: guest.GPA(lo), len: uint32(hi), flags: uint16(hi >> 32), next: uint16(hi >> 48)} //nolint:gosec // G115: the fields of the word
}

// The ways in which a chain can be malformed. They are values so that refusing
// a chain allocates nothing.
var (
	errTooLong     = &GuestError{"V4", "descriptor chain is longer than the queue"}
	errTooBig      = &GuestError{"V4", "descriptor chain holds more than 4 GiB"}
	errNext        = &GuestError{"V5", "next descriptor is outside the table"}
	errEmptyBuffer = &GuestError{"V5", "descriptor of length 0"}
	errNotRAM      = &GuestError{"V5", "buffer is not wholly in guest RAM"}
	errOrder       = &GuestError{"V3", "readable descriptor after a writable one"}
	errNoIndirect  = &GuestError{"V6", "indirect descriptor was not negotiated"}
	errIndirectLen = &GuestError{"V6", "length of an indirect table is no positive multiple of 16"}
	errIndirectIn  = &GuestError{"V6", "indirect descriptor inside an indirect table"}
	errIndirectNxt = &GuestError{"V6", "indirect descriptor has a next one"}
)

// walk fills c with the chain whose first descriptor is head, which is below
// the queue size. If the chain is malformed but its last writable byte can be
// found all the same, c is that byte and refused; else there is an error.
func (q *Queue) walk(c *Chain, head uint16) *GuestError {
	c.reset(head)
	w := walker{mem: q.mem, c: c, max: q.limit}
	next := head
	// V4: a chain of more hops than the table has entries runs in a circle. One
	// that goes on in an indirect table may be longer than that.
	for range q.size {
		d := makeDesc(loadDesc(q.desc, int(next)*descSize))
		if d.flags&descIndirect != 0 {
			if !q.indirect {
				return errNoIndirect
			}
			if d.flags&descNext != 0 {
				return errIndirectNxt
			}
			if err := w.addIndirect(d); err != nil {
				return err
			}
			return w.finish()
		}
		if err := w.add(d); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return w.finish()
		}
		if next = d.next; int(next) >= q.size {
			return errNext
		}
	}
	return errTooLong
}

// walker gathers the buffers of one chain.
type walker struct {
	mem      *guest.Memory
	c        *Chain
	max      int    // most buffers allowed
	count    int    // buffers so far
	total    uint64 // bytes so far
	readable int    // buffers before the first writable one
	writable bool   // a writable one has been seen

	fault *GuestError // the first thing wrong with a buffer; the walk goes on for last
	last  []byte      // last writable buffer, or nil if it cannot be used
}

// add appends the buffer that d describes. The error means that the walk cannot
// go on; what is wrong with the buffer itself is a fault.
func (w *walker) add(d desc) *GuestError {
	if w.count == w.max {
		return errTooLong
	}
	w.count++
	b, fault := w.buffer(d)
	if d.flags&descWrite != 0 {
		w.writable = true
		w.last = b
	} else if w.writable {
		fault = errOrder
	} else {
		w.readable++
	}
	if w.fault == nil {
		w.fault = fault
	}
	if w.fault == nil {
		w.c.bufs = append(w.c.bufs, b)
	}
	return nil
}

// buffer is the guest memory that d describes, unless there is something wrong
// with it.
func (w *walker) buffer(d desc) ([]byte, *GuestError) {
	if d.len == 0 {
		return nil, errEmptyBuffer
	}
	if w.total += uint64(d.len); w.total > maxChainBytes {
		return nil, errTooBig
	}
	b, err := w.mem.Slice(d.addr, uint64(d.len))
	if err != nil {
		return nil, errNotRAM
	}
	return b, nil
}

// addIndirect appends the buffers of the table that d points at. The WRITE flag
// of d is ignored (V6). Each entry is copied before it is looked at: the guest
// may be rewriting it.
func (w *walker) addIndirect(d desc) *GuestError {
	if d.len == 0 || d.len%descSize != 0 {
		return errIndirectLen
	}
	table, err := w.mem.Slice(d.addr, uint64(d.len))
	if err != nil {
		return errNotRAM
	}
	// A table that runs in a circle ends when add has counted enough buffers.
	for i := 0; ; {
		var e [descSize]byte
		copy(e[:], table[i*descSize:])
		d := makeDesc(binary.LittleEndian.Uint64(e[:]), binary.LittleEndian.Uint64(e[8:]))
		if d.flags&descIndirect != 0 {
			return errIndirectIn
		}
		if err := w.add(d); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return nil
		}
		if i = int(d.next); i >= len(table)/descSize {
			return errNext
		}
	}
}

// finish divides the buffers into the two halves, at the end of the chain. Of one
// with a fault only the last writable byte is left.
func (w *walker) finish() *GuestError {
	c := w.c
	if w.fault == nil {
		c.Readable, c.Writable = c.bufs[:w.readable], c.bufs[w.readable:]
		return nil
	}
	if w.last == nil {
		return w.fault
	}
	c.refused = true
	c.bufs = append(c.bufs[:0], w.last[len(w.last)-1:])
	c.Writable = c.bufs
	return nil
}

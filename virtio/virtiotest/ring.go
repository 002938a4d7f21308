package virtiotest

import (
	"encoding/binary"
	"time"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
)

// Descriptor flags.
const (
	Next     = 1
	Write    = 2
	Indirect = 4
)

// Buf is one buffer of a chain.
type Buf struct {
	Addr  guest.GPA
	Len   uint32
	Write bool // by the device
}

// Ring is the driver side of a split virtqueue. Its well-behaved methods are
// Add, Publish, Used and Arm; SetDesc, SetHead, SetAvailIdx and SetAvailFlags
// write anything. It is for one goroutine.
type Ring struct {
	Index             int
	Size              int
	Desc, Avail, Used guest.GPA
	EventIdx          bool

	m                 *Machine
	desc, avail, used []byte
	free              []uint16 // descriptors
	chains            map[uint16][]uint16
	tables            map[uint16]guest.GPA // indirect tables by head, kept for reuse

	availIdx  uint16 // of the next chain added
	shown     uint16 // avail.idx
	lastUsed  uint16
	notifyOff guest.GPA
}

// NewRing returns an empty ring of size descriptors in m's memory.
func NewRing(m *Machine, size int, features uint64) *Ring {
	return NewRingAt(m, size, features, m.Alloc(uint64(16*size), 16), m.Alloc(uint64(8+2*size), 4), m.Alloc(uint64(8+8*size), 4))
}

// NewRingAt returns a ring whose areas, which it clears, are where the caller
// wants them.
func NewRingAt(m *Machine, size int, features uint64, desc, avail, used guest.GPA) *Ring {
	r := &Ring{
		Size: size, Desc: desc, Avail: avail, Used: used,
		EventIdx: features&(1<<virtio.FeatureEventIdx) != 0,
		m:        m,
		desc:     m.Bytes(desc, uint64(16*size)),
		avail:    m.Bytes(avail, uint64(6+2*size)),
		used:     m.Bytes(used, uint64(6+8*size)),
		chains:   make(map[uint16][]uint16),
		tables:   make(map[uint16]guest.GPA),
	}
	clear(r.desc)
	clear(r.avail)
	clear(r.used)
	for i := range size {
		r.free = append(r.free, uint16(size-1-i))
	}
	return r
}

// SetDesc writes descriptor i.
func (r *Ring) SetDesc(i int, addr guest.GPA, n uint32, flags, next uint16) {
	storeDesc(r.desc, 16*i, uint64(addr), uint64(n)|uint64(flags)<<32|uint64(next)<<48)
}

// SetHead writes the element of the available ring for index i.
func (r *Ring) SetHead(i, head uint16) { store16(r.avail, 4+2*(int(i)%r.Size), head) }

// SetAvailIdx writes avail.idx.
func (r *Ring) SetAvailIdx(i uint16) { store16(r.avail, 2, i) }

// SetAvailFlags writes avail.flags.
func (r *Ring) SetAvailFlags(f uint16) { store16(r.avail, 0, f) }

// SetUsedEvent writes used_event.
func (r *Ring) SetUsedEvent(i uint16) { store16(r.avail, 4+2*r.Size, i) }

// AvailEvent reads avail_event.
func (r *Ring) AvailEvent() uint16 { return load16(r.used, 4+8*r.Size) }

// UsedIdx reads used.idx.
func (r *Ring) UsedIdx() uint16 { return load16(r.used, 2) }

// UsedFlags reads used.flags.
func (r *Ring) UsedFlags() uint16 { return load16(r.used, 0) }

// Table writes bufs as a descriptor table at addr, each linked to the one after
// it.
func (r *Ring) Table(addr guest.GPA, bufs ...Buf) {
	t := r.m.Bytes(addr, uint64(16*len(bufs)))
	for i, b := range bufs {
		e := t[16*i:]
		binary.LittleEndian.PutUint64(e, uint64(b.Addr))
		binary.LittleEndian.PutUint32(e[8:], b.Len)
		flags := uint16(0)
		if b.Write {
			flags |= Write
		}
		if i < len(bufs)-1 {
			flags |= Next
		}
		binary.LittleEndian.PutUint16(e[12:], flags)
		binary.LittleEndian.PutUint16(e[14:], uint16(i+1))
	}
}

// Add makes a chain of bufs from free descriptors, and reports false if there
// are too few. The device sees it after Publish.
func (r *Ring) Add(bufs ...Buf) (head uint16, ok bool) {
	if len(bufs) > len(r.free) {
		return 0, false
	}
	ids := append([]uint16(nil), r.free[len(r.free)-len(bufs):]...)
	r.free = r.free[:len(r.free)-len(bufs)]
	for i, b := range bufs {
		flags, next := uint16(0), uint16(0)
		if b.Write {
			flags |= Write
		}
		if i < len(bufs)-1 {
			flags |= Next
			next = ids[i+1]
		}
		r.SetDesc(int(ids[i]), b.Addr, b.Len, flags, next)
	}
	r.chains[ids[0]] = ids
	r.show(ids[0])
	return ids[0], true
}

// AddIndirect is Add with the chain in an indirect table.
func (r *Ring) AddIndirect(bufs ...Buf) (head uint16, ok bool) {
	if len(r.free) == 0 {
		return 0, false
	}
	head = r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	table, ok := r.tables[head]
	if !ok {
		table = r.m.Alloc(uint64(16*max(r.Size, len(bufs))), 16)
		r.tables[head] = table
	}
	r.Table(table, bufs...)
	r.SetDesc(int(head), table, uint32(16*len(bufs)), Indirect, 0)
	r.chains[head] = []uint16{head}
	r.show(head)
	return head, true
}

func (r *Ring) show(head uint16) {
	r.SetHead(r.availIdx, head)
	r.availIdx++
}

// Publish shows the device what has been added and reports whether it wants a
// kick.
func (r *Ring) Publish() (kick bool) {
	before := r.shown
	r.shown = r.availIdx
	r.SetAvailIdx(r.shown)
	if r.EventIdx {
		event := r.AvailEvent()
		return r.shown-event-1 < r.shown-before
	}
	return r.UsedFlags()&1 == 0
}

// TakeUsed returns the next chain the device has completed, and frees its
// descriptors.
func (r *Ring) TakeUsed() (head uint16, n uint32, ok bool) {
	if r.lastUsed == r.UsedIdx() {
		return 0, 0, false
	}
	e := r.used[4+8*(int(r.lastUsed)%r.Size):]
	head = uint16(binary.LittleEndian.Uint32(e))
	n = binary.LittleEndian.Uint32(e[4:])
	r.lastUsed++
	r.free = append(r.free, r.chains[head]...)
	delete(r.chains, head)
	return head, n, true
}

// Arm asks for an interrupt at the next completion, and reports whether there
// is one already.
func (r *Ring) Arm() (pending bool) {
	if r.EventIdx {
		r.SetUsedEvent(r.lastUsed)
	} else {
		r.SetAvailFlags(0)
	}
	return r.lastUsed != r.UsedIdx()
}

// Wait is TakeUsed, which waits for the interrupt on line. ok is false if there is
// none within the timeout.
func (r *Ring) Wait(line *Line, timeout time.Duration) (head uint16, n uint32, ok bool) {
	late := time.After(timeout)
	for {
		if head, n, ok := r.TakeUsed(); ok {
			return head, n, true
		}
		if r.Arm() {
			continue
		}
		select {
		case <-line.Raised():
		case <-late:
			return 0, 0, false
		}
	}
}

// Free is how many descriptors are free.
func (r *Ring) Free() int { return len(r.free) }

// Kick notifies the device.
func (r *Ring) Kick() { r.m.Write(r.notifyOff, 2, uint64(r.Index)) }

// Moved says that the notify address of the ring is now at.
func (r *Ring) Moved(at guest.GPA) { r.notifyOff = at }

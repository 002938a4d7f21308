package virtio

import (
	"fmt"
	"sync/atomic"

	"github.com/calfvm/calf/guest"
)

// Offsets in the rings (sections 2.7.6 and 2.7.8). The 16-bit event field of
// each follows its last element.
const (
	ringIdx   = 2 // of the 16-bit index in either ring
	ringElems = 4 // of the first element in either ring

	availElemSize = 2
	usedElemSize  = 8

	availNoInterrupt = 1 // VIRTQ_AVAIL_F_NO_INTERRUPT
	usedNoNotify     = 1 // VIRTQ_USED_F_NO_NOTIFY

	// maxMalformed is the most chains one Pop refuses: each may cost as many
	// steps as the queue has descriptors.
	maxMalformed = 16
)

// QueueConfig is what a driver has chosen for a queue by the time it enables
// it, and what the transport adds.
type QueueConfig struct {
	Index             int
	Size              uint16 // a power of 2, at most MaxQueueSize
	MaxSize           uint16 // what the device offered, which bounds indirect chains; 0 means Size
	Desc, Avail, Used guest.GPA
	Features          uint64 // as negotiated
	Doorbell          *Doorbell
	Events            QueueEvents
}

// Queue is the device side of one split virtqueue, from the moment the driver
// enables it until a reset. Its geometry never changes (P4).
//
// The goroutine that works the queue alternates between Wait and a drain:
//
//	for more := true; more; more = q.Rearm() == nil && … {
//		for q.Pop(&c) { …; q.Push(&c, n) }
//		q.Publish()
//	}
//
// Pop, Unpop, Push, Publish and Rearm are for one goroutine at a time, Wait
// likewise. Kick and Stats are safe from any.
type Queue struct {
	mem    *guest.Memory
	index  int
	size   int
	limit  int // most buffers of a chain
	events QueueEvents
	bell   *Doorbell

	// The three areas in host memory, resolved once. Only the functions of
	// ring_unsafe.go read or write them.
	desc, avail, used []byte

	indirect bool // INDIRECT_DESC was negotiated
	eventIdx bool // EVENT_IDX was negotiated

	// Free-running indices (V8).
	availIdx  uint16 // avail.idx as last read
	lastAvail uint16 // of the next chain to pop
	usedIdx   uint16 // of the next element to push
	published uint16 // used.idx as the driver sees it
	decided   uint16 // published at the last interrupt decision
	everRung  bool   // there has been such a decision (V11)
	noNotify  bool   // used.flags asks for no kicks (without EVENT_IDX)

	inFlight []uint64    // bitmap by head: popped and not yet pushed (V9)
	err      *GuestError // why the queue is broken, or nil

	stats queueCounters
}

type queueCounters struct {
	kicks, interrupts, suppressed, malformed atomic.Uint64
}

// QueueStats counts what has happened on a queue.
type QueueStats struct {
	Kicks      uint64 // wake-ups of the worker
	Interrupts uint64 // notifications sent to the driver
	Suppressed uint64 // publications the driver asked not to be notified of
	Malformed  uint64 // chains refused, which were completed with length 0
}

// NewQueue checks cfg and resolves the rings in mem. What is wrong with them is
// the driver's doing, and the error a *GuestError, except where mem itself is
// not aligned.
func NewQueue(mem *guest.Memory, cfg QueueConfig) (*Queue, error) {
	n := uint64(cfg.Size)
	if n == 0 || n&(n-1) != 0 || n > MaxQueueSize {
		return nil, &GuestError{"P3", fmt.Sprintf("queue %d has size %d", cfg.Index, n)}
	}
	q := &Queue{
		mem:      mem,
		index:    cfg.Index,
		size:     int(n),
		limit:    int(max(cfg.Size, cfg.MaxSize)),
		events:   cfg.Events,
		bell:     cfg.Doorbell,
		indirect: cfg.Features&(1<<FeatureIndirectDesc) != 0,
		eventIdx: cfg.Features&(1<<FeatureEventIdx) != 0,
		inFlight: make([]uint64, (n+63)/64),
	}
	areas := []struct {
		name        string
		addr        guest.GPA
		size, align uint64
		view        *[]byte
	}{
		{"descriptor table", cfg.Desc, n * descSize, 16, &q.desc},
		{"available ring", cfg.Avail, ringElems + n*availElemSize + 2, 2, &q.avail},
		// The 2 bytes after avail_event are in the ring's last aligned word.
		{"used ring", cfg.Used, ringElems + n*usedElemSize + 4, 4, &q.used},
	}
	for _, a := range areas {
		if uint64(a.addr)%a.align != 0 {
			return nil, &GuestError{"P5", fmt.Sprintf("%s of queue %d at %v is not aligned to %d", a.name, cfg.Index, a.addr, a.align)}
		}
		b, err := mem.Slice(a.addr, a.size)
		if err != nil {
			return nil, &GuestError{"P5", fmt.Sprintf("%s of queue %d at %v is not in guest RAM", a.name, cfg.Index, a.addr)}
		}
		if !alignedTo(b, uintptr(min(a.align, 8))) {
			return nil, fmt.Errorf("virtio: host memory of the %s of queue %d is not aligned to %d", a.name, cfg.Index, a.align)
		}
		*a.view = b
	}
	return q, nil
}

// Wait parks the caller until the driver kicks the queue, Kick is called, or
// the doorbell is closed, which is its only error. Spurious wake-ups are
// normal (V12).
func (q *Queue) Wait() error {
	err := q.bell.Wait()
	q.stats.kicks.Add(1)
	return err
}

// Kick wakes the goroutine in Wait, as a kick of the driver does.
func (q *Queue) Kick() { q.bell.Ring() }

// Size is the number of descriptors, and the most chains that can be in flight.
func (q *Queue) Size() int { return q.size }

// Stats returns the counters since the queue was enabled.
func (q *Queue) Stats() QueueStats {
	return QueueStats{
		Kicks:      q.stats.kicks.Load(),
		Interrupts: q.stats.interrupts.Load(),
		Suppressed: q.stats.suppressed.Load(),
		Malformed:  q.stats.malformed.Load(),
	}
}

// Pop moves the next available chain into c and reports whether there was one.
// avail.idx is read only when the chains known from the last reading are used
// up, so a batch costs one reading.
//
// A malformed chain is counted, and completed with length 0 whatever is pushed for
// it. Where its last writable byte can be found, it reaches the caller as a chain
// of that byte alone, which lacks whatever a request begins with: the caller can
// answer. Else Pop completes it itself and goes on with the next, so Publish must
// be called even if no chain came (B10). Damage to the ring itself breaks the queue: it is reported
// to the transport once, and Pop finds nothing from then on (P22).
//
// So that its caller stays in command, Pop returns after maxMalformed such chains
// in a row. It then reports that there is none, but Rearm that there are more.
func (q *Queue) Pop(c *Chain) bool {
	for refused := 0; q.err == nil && refused < maxMalformed; {
		if q.lastAvail == q.availIdx && !q.readAvailIdx() {
			return false
		}
		// V13(a): availIdx was loaded with acquire order.
		slot := int(q.lastAvail) & (q.size - 1)
		head := load16(q.avail, ringElems+slot*availElemSize)
		if int(head) >= q.size {
			q.fail("V5", "head %d is outside the descriptor table of %d", head, q.size)
			return false
		}
		if !q.claim(head) {
			q.fail("V9", "head %d is made available while it is in flight", head)
			return false
		}
		q.lastAvail++
		if err := q.walk(c, head); err != nil {
			q.stats.malformed.Add(1)
			q.push(head, 0)
			refused++
			continue
		}
		if c.refused {
			q.stats.malformed.Add(1)
		}
		return true
	}
	return false
}

// readAvailIdx refreshes availIdx and reports whether it shows new chains.
func (q *Queue) readAvailIdx() bool {
	q.availIdx = load16(q.avail, ringIdx)
	// V8, V9: chains popped or pushed but not yet published count as well, for
	// the driver cannot have reused their descriptors. This also bounds what
	// one drain can pop without publishing.
	ahead := q.availIdx - q.lastAvail
	if int(ahead)+int(q.lastAvail-q.published) > q.size {
		q.fail("V8", "avail.idx is %d ahead in a queue of %d", ahead, q.size)
		return false
	}
	if ahead != 0 && !q.eventIdx && !q.noNotify {
		q.setNoNotify(true)
	}
	return ahead != 0
}

// claim marks head as in flight. It reports false if it is already.
func (q *Queue) claim(head uint16) bool {
	w, bit := &q.inFlight[head/64], uint64(1)<<(head%64)
	if *w&bit != 0 {
		return false
	}
	*w |= bit
	return true
}

// Unpop gives back c, the chain that was popped last and has not been pushed:
// the next Pop returns it again, read anew from guest memory.
func (q *Queue) Unpop(c *Chain) {
	q.inFlight[c.head/64] &^= 1 << (c.head % 64)
	q.lastAvail--
}

// Push completes c: n bytes were written to it, counted from its first writable
// byte without a gap (V7). The driver sees it after Publish.
func (q *Queue) Push(c *Chain, n uint32) {
	if c.refused {
		n = 0 // its only byte need not be the first writable one
	}
	q.push(c.head, n)
}

func (q *Queue) push(head uint16, n uint32) {
	q.inFlight[head/64] &^= 1 << (head % 64)
	slot := int(q.usedIdx) & (q.size - 1)
	storeUsedElem(q.used, ringElems+slot*usedElemSize, uint32(head), n)
	q.usedIdx++
}

// Publish shows the driver every chain pushed since the last Publish, with one
// barrier, and notifies it once if it wants to be.
func (q *Queue) Publish() {
	if q.usedIdx == q.published {
		return
	}
	q.published = q.usedIdx
	// V13(b) and (c): a release before used.idx, a full barrier after it.
	storeFlagsIdx(q.used, q.usedFlags(), q.usedIdx)
	if q.wantsInterrupt() {
		q.stats.interrupts.Add(1)
		q.events.UsedBuffers(q.index)
	} else {
		q.stats.suppressed.Add(1)
	}
}

// wantsInterrupt is the notification decision of V10 and V11 for everything
// published since the last one.
func (q *Queue) wantsInterrupt() bool {
	before := q.decided
	q.decided = q.published
	first := !q.everRung
	q.everRung = true
	if !q.eventIdx {
		return load16(q.avail, 0)&availNoInterrupt == 0
	}
	event := load16(q.avail, ringElems+q.size*availElemSize)
	return first || crosses(event, q.published, before)
}

// crosses is the rule of sections 2.7.7.2 and 2.7.10: an index that has moved
// from before to now has passed the one after event.
func crosses(event, now, before uint16) bool {
	return now-event-1 < now-before
}

// Rearm asks the driver to kick the queue at the next chain it makes available.
// It reports whether there is one already, for which no kick will come: the
// caller then goes on popping instead of waiting (V12).
func (q *Queue) Rearm() (pending bool) {
	if q.err != nil {
		return false
	}
	if q.eventIdx {
		store16(q.used, ringElems+q.size*usedElemSize, q.lastAvail)
	} else {
		q.setNoNotify(false)
	}
	// V13(d): either store is followed by a full barrier.
	if q.lastAvail != q.availIdx {
		return true
	}
	return q.readAvailIdx()
}

func (q *Queue) usedFlags() uint16 {
	if q.noNotify {
		return usedNoNotify
	}
	return 0
}

// setNoNotify tells a driver without EVENT_IDX whether kicks are wanted (V10).
// With EVENT_IDX used.flags stays 0 (V11).
func (q *Queue) setNoNotify(v bool) {
	q.noNotify = v
	storeFlagsIdx(q.used, q.usedFlags(), q.published)
}

// fail breaks the queue and tells the transport.
func (q *Queue) fail(rule, format string, args ...any) {
	q.err = &GuestError{rule, fmt.Sprintf("queue %d: ", q.index) + fmt.Sprintf(format, args...)}
	q.events.QueueBroken(q.index, q.err)
}

package qcow2

import "sync/atomic"

// Pins keep a host cluster from being reused while input or output on it is
// under way without the metadata lock. They are counted by epoch rather than by
// cluster, so that a pin costs one uncontended addition: a request that looked
// its clusters up in epoch e counts in slot e%2 until its I/O ends. The epoch
// moves from e to e+1 only when the slot of e-1 is empty. So, once the epoch is
// e+2, every request that could have seen a pointer removed in epoch e is over.

// pinShards spreads the counters over cache lines; a request keeps to one.
const pinShards = 16

// growShard is the shard of what Resize does to prepare a growing disk. It alone
// may reach beyond the end.
const growShard = pinShards

// pin is what one shard of requests holds in one epoch: how many are under way
// in the low bits, and above them how many there have been, so that one addition
// counts both.
type pin struct {
	n atomic.Uint64
	_ [56]byte // a cache line of its own
}

const (
	pinBits = 24 // more requests under way than a host has threads and memory for
	pinOne  = 1<<pinBits + 1
)

func (p *pin) active() uint64  { return p.n.Load() & (1<<pinBits - 1) }
func (p *pin) entered() uint64 { return p.n.Load() >> pinBits }

// firstEpoch is where the count begins, so that epoch 0 is over from the start.
const firstEpoch = 2

// epochs counts the pins of one image.
type epochs struct {
	now   uint64 // guarded by Image.mu
	past  uint64 // guarded by Image.mu; pins of epochs that are over
	slots [2][pinShards + 1]pin
}

// enter pins the present epoch. Image.mu is held, shared or not. The caller
// ends the pin with leave.
func (e *epochs) enter(shard int) *pin {
	p := &e.slots[e.now&1][shard]
	p.n.Add(pinOne)
	return p
}

func (p *pin) leave() { p.n.Add(^uint64(0)) }

// advance moves to the next epoch if no request of the one before the present
// is left. Image.mu is held exclusively.
func (e *epochs) advance() {
	if !e.slotEmpty(e.now + 1) {
		return
	}
	e.now++
	slot := &e.slots[e.now&1]
	for i := range slot {
		e.past += slot[i].entered()
		slot[i].n.Store(0) // nobody can be in it, so this loses nothing
	}
}

// entered is the number of pins that there have been. Image.mu is held.
func (e *epochs) entered() uint64 {
	n := e.past
	for s := range e.slots {
		for i := range e.slots[s] {
			n += e.slots[s][i].entered()
		}
	}
	return n
}

// over reports whether no request begun in epoch or earlier is left. Image.mu is
// held.
func (e *epochs) over(epoch uint64) bool { return e.now >= epoch+2 }

// idle reports whether no request is under way. Image.mu is held exclusively.
func (e *epochs) idle() bool { return e.slotEmpty(0) && e.slotEmpty(1) }

func (e *epochs) slotEmpty(epoch uint64) bool {
	slot := &e.slots[epoch&1]
	for i := range slot {
		if slot[i].active() != 0 {
			return false
		}
	}
	return true
}

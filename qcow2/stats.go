package qcow2

import (
	"sync/atomic"
	"time"
)

// Stats are counts since the image was opened.
type Stats struct {
	// Hits are lookups of a range answered from memory, one for each piece
	// that lies together in the file; Misses are slices of L2 tables, of at
	// most 4 KiB, that were read for others.
	Hits, Misses uint64
	// Allocated are host clusters put to use, for data and for L2 tables;
	// Freed are those that lost their last reference.
	Allocated, Freed uint64
	// Punched is the room offered back to the host, in bytes.
	Punched uint64
	// Flushes are calls of Flush. Commits are how often metadata was made
	// durable for them, or because too much was dirty; Syncs, the barriers
	// that all that took.
	Flushes, Commits, Syncs uint64
	// LockWaits is how often the exclusive side of the metadata lock was not
	// to be had at once, and LockWaited how long that took in all.
	LockWaits  uint64
	LockWaited time.Duration
}

// Stats returns the present counts. They are exact when nothing is under way.
func (m *Image) Stats() Stats {
	m.mu.RLock()
	pins := m.epochs.entered()
	m.mu.RUnlock()
	n := &m.counts
	return Stats{
		Hits:       pins - n.held.Load(),
		Misses:     n.misses.Load(),
		Allocated:  n.allocated.Load(),
		Freed:      n.freed.Load(),
		Punched:    n.punched.Load(),
		Flushes:    n.flushes.Load(),
		Commits:    n.commits.Load(),
		Syncs:      n.syncs.Load(),
		LockWaits:  n.lockWaits.Load(),
		LockWaited: time.Duration(n.lockWaited.Load()),
	}
}

// counters are the parts of Stats that are counted one by one, none of them in a
// hot read or overwrite. A hit is counted by its pin.
type counters struct {
	held             atomic.Uint64 // pins that are not of a lookup
	misses           atomic.Uint64
	allocated, freed atomic.Uint64 // clusters
	punched          atomic.Uint64 // bytes
	flushes, commits atomic.Uint64
	syncs, lockWaits atomic.Uint64
	lockWaited       atomic.Int64 // nanoseconds
}

// lock takes the exclusive side of the metadata lock and counts the waits for
// it.
func (m *Image) lock() {
	if m.mu.TryLock() {
		return
	}
	begin := time.Now()
	m.mu.Lock()
	m.counts.lockWaits.Add(1)
	m.counts.lockWaited.Add(int64(time.Since(begin)))
}

package blk

import (
	"sync/atomic"

	"github.com/calfvm/calf/virtio"
)

// QueueStats counts what has happened on one queue since the device was made.
type QueueStats struct {
	virtio.QueueStats

	// Requests, by type. One that is served again after Device.Resume counts
	// again.
	Reads, Writes, Flushes, Discards, ZeroWrites, Others uint64
	// Bytes of requests that succeeded.
	BytesRead, BytesWritten, BytesDiscarded, BytesZeroed uint64

	// How long requests took, from when the worker had them until they were
	// answered. RangeTime is of discards and zero writes.
	ReadTime, WriteTime, FlushTime, RangeTime Histogram

	Throttled    uint64 // waits because Config's rates were used up
	Errors       uint64 // requests answered with IOERR
	Unsupported  uint64 // requests answered with UNSUPP
	Unanswerable uint64 // without header or status byte (B10)
}

// counters are the part of QueueStats that the worker counts. Written by the
// worker, read by Stats.
type counters struct {
	reads, writes, flushes, discards, zeroWrites, others atomic.Uint64
	bytesRead, bytesWritten, bytesDiscarded, bytesZeroed atomic.Uint64
	throttled, errors, unsupported, unanswerable         atomic.Uint64
	readTime, writeTime, flushTime, rangeTime            histogram
}

// Stats returns the counters of every queue.
func (d *Device) Stats() []QueueStats {
	all := make([]QueueStats, len(d.queues))
	for i := range d.queues {
		q := &d.queues[i]
		c := &q.counters
		all[i] = QueueStats{
			Reads:          c.reads.Load(),
			Writes:         c.writes.Load(),
			Flushes:        c.flushes.Load(),
			Discards:       c.discards.Load(),
			ZeroWrites:     c.zeroWrites.Load(),
			Others:         c.others.Load(),
			BytesRead:      c.bytesRead.Load(),
			BytesWritten:   c.bytesWritten.Load(),
			BytesDiscarded: c.bytesDiscarded.Load(),
			BytesZeroed:    c.bytesZeroed.Load(),
			ReadTime:       c.readTime.load(),
			WriteTime:      c.writeTime.load(),
			FlushTime:      c.flushTime.load(),
			RangeTime:      c.rangeTime.load(),
			Throttled:      c.throttled.Load(),
			Errors:         c.errors.Load(),
			Unsupported:    c.unsupported.Load(),
			Unanswerable:   c.unanswerable.Load(),
		}
		q.mu.Lock()
		all[i].QueueStats = q.past
		if q.worker != nil {
			all[i].QueueStats = addStats(q.past, q.worker.ended())
		}
		q.mu.Unlock()
	}
	return all
}

func addStats(a, b virtio.QueueStats) virtio.QueueStats {
	a.Kicks += b.Kicks
	a.Interrupts += b.Interrupts
	a.Suppressed += b.Suppressed
	a.Malformed += b.Malformed
	return a
}

// sinceStart is what s counts beyond base.
func sinceStart(s, base virtio.QueueStats) virtio.QueueStats {
	s.Kicks -= base.Kicks
	s.Interrupts -= base.Interrupts
	s.Suppressed -= base.Suppressed
	s.Malformed -= base.Malformed
	return s
}

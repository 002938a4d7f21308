package blk

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Rate bounds how fast a guest may use something. The zero Rate does not.
type Rate struct {
	// PerSecond is how much it may use in the long run. 0 means any amount.
	PerSecond uint64
	// Burst is how much it may use at once after having used less. 0 means
	// what PerSecond makes in a tenth of a second.
	Burst uint64
}

const (
	defaultBurst = 100 * time.Millisecond

	// maxDebt bounds a debt and a burst so that times can be added. It is beyond
	// what requests on every queue, each as large as one can be, run up at a KiB
	// per second: a debt that is cut short lets the guest exceed its rate.
	maxDebt = 100 * 365 * 24 * time.Hour

	// minWait is how long a worker waits at least, if the burst makes up for
	// it: timers are too coarse for the share of a single request.
	minWait = time.Millisecond
)

// bucket is a token bucket that can be overdrawn: whoever finds something in it
// takes what he needs, and then nobody gets anything until that is paid back. So
// a request need not be sized before it is admitted, and one that is larger than
// the burst passes. The zero bucket has no bound.
//
// Times are since the start of the device. All methods are safe for concurrent
// use.
type bucket struct {
	perSecond uint64        // constant, as is burst
	burst     time.Duration // that it takes to fill the bucket
	// even is when the bucket holds neither tokens nor debt. Before that it is
	// overdrawn; after it, it fills.
	even atomic.Int64
}

func (b *bucket) init(r Rate) {
	b.perSecond = r.PerSecond
	b.burst = defaultBurst
	if r.Burst > 0 && r.PerSecond > 0 {
		b.burst = b.worth(r.Burst)
	}
	b.even.Store(-int64(b.burst)) // it starts full
}

// worth is how long it takes to earn n, at most maxDebt.
func (b *bucket) worth(n uint64) time.Duration {
	hi, lo := bits.Mul64(n, uint64(time.Second))
	if hi >= b.perSecond {
		return maxDebt
	}
	ns, rest := bits.Div64(hi, lo, b.perSecond)
	if rest > 0 {
		ns++
	}
	return time.Duration(min(ns, uint64(maxDebt)))
}

// take takes n out of the bucket, at the time now.
func (b *bucket) take(now time.Duration, n uint64) {
	if b.perSecond == 0 || n == 0 {
		return
	}
	worth := b.worth(n)
	for {
		old := b.even.Load()
		even := max(time.Duration(old), now-b.burst)
		if b.even.CompareAndSwap(old, int64(min(even+worth, now+maxDebt))) {
			return
		}
	}
}

// debt is how long it takes until the bucket is not overdrawn any more.
func (b *bucket) debt(now time.Duration) time.Duration {
	if b.perSecond == 0 {
		return 0
	}
	return max(time.Duration(b.even.Load())-now, 0)
}

// wait is how long a worker should wait if the bucket is overdrawn, else 0.
func (b *bucket) wait(now time.Duration) time.Duration {
	d := b.debt(now)
	if d == 0 {
		return 0
	}
	return max(d, min(b.burst, minWait))
}

// rates are the bounds of a device, shared by its queues.
type rates struct {
	limited bool // there are any
	start   time.Time
	bytes   bucket
	ops     bucket
}

func (r *rates) init(bytes, ops Rate) {
	r.start = time.Now()
	r.bytes.init(bytes)
	r.ops.init(ops)
	r.limited = bytes.PerSecond != 0 || ops.PerSecond != 0
}

// spend accounts for operations and the bytes they move.
func (r *rates) spend(ops, bytes uint64) {
	if !r.limited {
		return
	}
	now := time.Since(r.start)
	r.ops.take(now, ops)
	r.bytes.take(now, bytes)
}

// overdrawn reports whether another request has to wait.
func (r *rates) overdrawn() bool {
	if !r.limited {
		return false
	}
	now := time.Since(r.start)
	return r.ops.debt(now) > 0 || r.bytes.debt(now) > 0
}

// wait is how long it should wait.
func (r *rates) wait() time.Duration {
	if !r.limited {
		return 0
	}
	now := time.Since(r.start)
	return max(r.ops.wait(now), r.bytes.wait(now))
}

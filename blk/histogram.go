package blk

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// histogramSize is the number of buckets of a Histogram: 2^35 ns are 34 s.
const histogramSize = 37

// Histogram counts durations by powers of 2: element i is how many were shorter
// than 2^i ns but not shorter than half of that. The last element has all longer
// ones as well.
type Histogram [histogramSize]uint64

// Count is how many durations there are.
func (h *Histogram) Count() uint64 {
	var n uint64
	for _, c := range h {
		n += c
	}
	return n
}

// Quantile returns a duration that the fraction q of all, from 0 to 1, does not
// exceed: the true one, or at most twice as long. Without any it is 0.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(min(max(q, 0), 1) * float64(h.Count())))
	var n uint64
	for i, c := range h {
		if n += c; c > 0 && n >= rank {
			return time.Duration(1)<<i - 1
		}
	}
	return 0
}

// histogram is a Histogram that is being filled. It is written by one goroutine
// and read by any.
type histogram [histogramSize]atomic.Uint64

func (h *histogram) add(d time.Duration) {
	h[min(bits.Len64(uint64(max(d, 0))), histogramSize-1)].Add(1)
}

func (h *histogram) load() (copied Histogram) {
	for i := range h {
		copied[i] = h[i].Load()
	}
	return copied
}

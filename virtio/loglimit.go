package virtio

import (
	"sync/atomic"
	"time"
)

// LogLimit holds back log lines that a guest can cause at will: one is let
// through per interval. The zero value lets the first one through. It is safe
// for concurrent use.
type LogLimit struct {
	next    atomic.Int64 // when the next line may pass, in Unix nanoseconds
	dropped atomic.Uint64
}

const logInterval = 5 * time.Second

// Allow reports whether a line may be logged now and, if so, how many have been
// held back since the last one.
func (l *LogLimit) Allow() (dropped uint64, ok bool) {
	now := time.Now().UnixNano()
	next := l.next.Load()
	if now < next || !l.next.CompareAndSwap(next, now+int64(logInterval)) {
		l.dropped.Add(1)
		return 0, false
	}
	return l.dropped.Swap(0), true
}

package blk

import "sync"

// flushes runs the flushes of a file one at a time, each for all who wait for
// one by then. The kernel tells of lost pages once for an open file and then
// forgets them, and it may tell any of those who flush at the same time: an
// error is therefore kept, and known to all before anyone is told of success
// (B13).
type flushes struct {
	mu    sync.Mutex
	ended sync.Cond // on mu: running has become false
	// Guarded by mu. Flushes are numbered from 1.
	running     bool
	begun, done uint64 // the last to begin, and to end
	failed      error  // of the first that failed; all later ones fail with it
}

func newFlushes() *flushes {
	f := &flushes{}
	f.ended.L = &f.mu
	return f
}

// do returns once a flush that began after the call has ended. It calls flush
// unless another caller's serves both.
func (f *flushes) do(flush func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	// The one under way, if any, may have passed what this caller has written.
	want := f.begun + 1
	for f.failed == nil && f.done < want {
		if f.running {
			f.ended.Wait()
			continue
		}
		f.running = true
		f.begun++
		f.mu.Unlock()
		err := flush()
		f.mu.Lock()
		f.failed = err
		f.done = f.begun
		f.running = false
		f.ended.Broadcast()
	}
	return f.failed
}

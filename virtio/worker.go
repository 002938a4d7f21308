package virtio

import (
	"runtime"
	"sync/atomic"
)

// Next is what a Worker does after a batch.
type Next int

const (
	// Again serves another batch at once.
	Again Next = iota
	// AwaitDriver waits until the driver makes a chain available.
	AwaitDriver
	// AwaitKick waits until Queue.Kick is called: there is nothing to put into
	// the chains that are available. A kick of the driver may end it, too.
	AwaitKick
)

// Worker serves a queue in a goroutine of its own, from StartWorker to Stop. It is
// for devices that need no more than that; Stop is for one goroutine.
type Worker struct {
	q        *Queue
	batch    func(*Queue) Next
	stopping atomic.Bool
	done     chan struct{} // closed when the goroutine has ended
}

// StartWorker starts a worker of q. Its goroutine calls batch whenever there may
// be something to do. batch pops and pushes a bounded number of chains (V17), and
// never blocks; what it has pushed is published when it returns.
func StartWorker(q *Queue, batch func(*Queue) Next) *Worker {
	w := &Worker{q: q, batch: batch, done: make(chan struct{})}
	go w.run()
	return w
}

// Stop returns once the batch under way, if there is one, is over and published.
// There is none afterwards. A nil Worker is stopped.
func (w *Worker) Stop() {
	if w == nil {
		return
	}
	w.stopping.Store(true)
	w.q.Kick()
	<-w.done
}

func (w *Worker) run() {
	defer close(w.done)
	for !w.stopping.Load() {
		if w.q.Wait() != nil {
			return
		}
		w.drain()
	}
}

// drain serves batches until there is nothing to do but to wait.
func (w *Worker) drain() {
	for !w.stopping.Load() {
		next := w.batch(w.q)
		w.q.Publish()
		switch {
		case next == AwaitKick:
			return
		case next == AwaitDriver && !w.q.Rearm():
			return
		}
		runtime.Gosched()
	}
}

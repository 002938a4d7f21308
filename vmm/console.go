package vmm

import (
	"io"
	"sync"
	"time"
)

// Console is the far end of the guest's serial port.
type Console struct {
	// In is what the guest reads; nil: nothing. It is read from the first Run
	// on, by a goroutine that ends when In does: closing In, or reading it no
	// more, is the caller's part.
	In io.Reader
	// Out gets what the guest writes; nil: nothing does. A Write that blocks
	// makes the guest wait once consoleBuffer bytes are pending.
	Out io.Writer
}

const (
	consoleBuffer = 64 << 10
	// consoleDelay is how long output that ends in no line may wait.
	consoleDelay = 5 * time.Millisecond
	// consoleChunk is how much output is enough not to wait.
	consoleChunk = 4 << 10
)

// consoleOutput collects what the guest writes byte by byte and passes it on
// in large writes from a goroutine of its own, so that a vCPU pays for an
// append and no system call.
type consoleOutput struct {
	w io.Writer

	mu      sync.Mutex // guards what follows; not held while w is written
	room    sync.Cond  // signalled when pending has been taken, or at close
	pending []byte
	err     error // of the first write that failed; from then on output is dropped
	waived  bool  // nothing waits for room: a guest is being stopped
	closed  bool

	wake chan struct{} // holds one token; has the writer look at pending
	done chan struct{} // closed when the writer has ended
}

func newConsoleOutput(w io.Writer) *consoleOutput {
	if w == nil {
		w = io.Discard
	}
	o := &consoleOutput{w: w, wake: make(chan struct{}, 1), done: make(chan struct{})}
	o.room.L = &o.mu
	go o.run()
	return o
}

// write takes p. It waits only while consoleBuffer bytes are pending.
func (o *consoleOutput) write(p []byte) {
	o.mu.Lock()
	for len(o.pending) >= consoleBuffer && !o.waived && o.err == nil {
		o.room.Wait()
	}
	before := len(o.pending)
	if o.err == nil {
		o.pending = append(o.pending, p...)
	}
	// The writer is woken by a first byte, waits consoleDelay for more, and is
	// hurried once by consoleChunk bytes.
	wake := before == 0 && len(o.pending) > 0 || before < consoleChunk && len(o.pending) >= consoleChunk
	o.mu.Unlock()
	if wake {
		select {
		case o.wake <- struct{}{}:
		default:
		}
	}
}

func (o *consoleOutput) run() {
	defer close(o.done)
	var buf []byte
	for {
		o.mu.Lock()
		n, closed := len(o.pending), o.closed
		o.mu.Unlock()
		if n == 0 && closed {
			return
		}
		if n == 0 {
			<-o.wake
			continue
		}
		if n < consoleChunk && !closed {
			select {
			case <-o.wake:
			case <-time.After(consoleDelay):
			}
		}
		o.mu.Lock()
		buf, o.pending = o.pending, buf[:0]
		o.room.Broadcast()
		o.mu.Unlock()
		if _, err := o.w.Write(buf); err != nil {
			o.mu.Lock()
			o.err = err
			o.pending = o.pending[:0]
			o.room.Broadcast()
			o.mu.Unlock()
		}
	}
}

// waive lets writers go on without room, or has them wait again.
func (o *consoleOutput) waive(on bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waived = on
	o.room.Broadcast()
}

// close passes on what is pending and returns the first error of Out.
func (o *consoleOutput) close() error {
	o.waive(true)
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
	<-o.done
	return o.err
}

// consoleInput holds what the guest has yet to read. It outlives a reboot.
type consoleInput struct {
	// callMu is held while arrived is called, and while it is changed: when
	// attach returns, the one before is not called any more. It is taken
	// before mu.
	callMu sync.Mutex

	mu      sync.Mutex // guards what follows
	room    sync.Cond
	pending []byte
	closed  bool

	arrived func() // guarded by callMu; tells the serial port of the running guest
}

// start reads r until it ends.
func (in *consoleInput) start(r io.Reader) {
	in.room.L = &in.mu
	if r == nil {
		return
	}
	go func() {
		buf := make([]byte, 4<<10)
		for {
			n, err := r.Read(buf)
			if !in.add(buf[:n]) || err != nil {
				return
			}
		}
	}()
}

// add waits until the guest has read what came before.
func (in *consoleInput) add(p []byte) bool {
	in.mu.Lock()
	for len(in.pending) > 0 && !in.closed {
		in.room.Wait()
	}
	in.pending = append(in.pending, p...)
	closed := in.closed
	in.mu.Unlock()
	in.callMu.Lock()
	defer in.callMu.Unlock()
	if in.arrived != nil && len(p) > 0 {
		in.arrived()
	}
	return !closed
}

// attach has f called, on any goroutine, whenever input has arrived.
func (in *consoleInput) attach(f func()) {
	in.callMu.Lock()
	defer in.callMu.Unlock()
	in.arrived = f
}

func (in *consoleInput) ready() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.pending) > 0
}

// next takes one byte; 0 where there is none.
func (in *consoleInput) next() byte {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.pending) == 0 {
		return 0
	}
	c := in.pending[0]
	in.pending = in.pending[1:]
	if len(in.pending) == 0 {
		in.pending = nil
		in.room.Broadcast()
	}
	return c
}

func (in *consoleInput) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	in.room.Broadcast()
}

package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errTimeout ends a run that has taken too long.
var errTimeout = errors.New("launch: timeout")

// errEscape ends a run whose console was left; to a script it is an interrupt.
var errEscape = &killedError{signal: unix.SIGINT, why: "the console was left with Ctrl-A x, and the guest was ended"}

// killedError ends a run on behalf of a user.
type killedError struct {
	signal unix.Signal
	why    string
}

func (e *killedError) Error() string { return e.why }

// endingSignals are the signals by which users end a run.
var endingSignals = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT}

// watched is the context of a run. It ends with the run's timeout, or when a
// signal or the console says so.
type watched struct {
	context.Context
	end      context.CancelCauseFunc
	messages io.Writer
	last     func() // called before a signal ends the run: one more ends a calf that hangs

	mu      sync.Mutex // guards what follows
	machine controls   // nil while no guest runs
	command *command   // nil if the guest runs none
	asked   bool       // the guest has been asked to power off
}

// controls are what signals work on: a *vmm.Machine.
type controls interface {
	PowerButton() error
	ResumeDisks()
}

// watcher is the part of a run that listens to signals.
type watcher struct {
	stop   func()        // gives the signals back
	quit   chan struct{} // closed by release
	done   chan struct{} // closed when nobody listens any more
	cancel context.CancelFunc
}

// Notify has c receive the signals that a run answers to: those by which users end
// it, and SIGCONT. SIGHUP and SIGINT stay ignored if the process was started to ignore
// them; of the others, Go does not keep that.
func Notify(c chan<- os.Signal) {
	signal.Notify(c, unix.SIGCONT)
	for _, sig := range endingSignals {
		if !signal.Ignored(sig) {
			signal.Notify(c, sig)
		}
	}
}

// Release takes back what Notify does to the signals that end a run, for everybody: one
// more ends the process.
func Release() { signal.Reset(endingSignals...) }

// watch begins a run: its timeout, and the signals that end it, which are those of the
// process if signals is nil. The first interrupt asks the guest to power off; the
// second ends it. SIGCONT lets disks go on that have stopped.
func watch(messages io.Writer, timeout time.Duration, signals <-chan os.Signal) (*watched, *watcher) {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, errTimeout)
	}
	ctx, end := context.WithCancelCause(ctx)
	w := &watched{Context: ctx, end: end, messages: messages, last: func() {}}
	s := &watcher{stop: func() {}, quit: make(chan struct{}), done: make(chan struct{}), cancel: cancel}
	if signals == nil {
		own := make(chan os.Signal, 8)
		Notify(own)
		signals, w.last, s.stop = own, Release, func() { signal.Stop(own) }
	}
	go func() {
		defer close(s.done)
		for {
			select {
			case sig := <-signals:
				w.handle(sig.(unix.Signal))
			case <-s.quit:
				return
			}
		}
	}()
	return w, s
}

// release ends the watch and gives the signals back.
func (s *watcher) release() {
	s.stop()
	close(s.quit)
	<-s.done
	s.cancel()
}

// control sets the machine that signals work on, and its command, if it has one; nil
// while none runs.
func (w *watched) control(machine controls, cmd *command) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.machine, w.command = machine, cmd
}

// handle acts on one signal.
func (w *watched) handle(sig unix.Signal) {
	w.mu.Lock()
	machine, cmd := w.machine, w.command
	again := w.asked
	w.asked = again || machine != nil && sig != unix.SIGCONT // the next signal ends the run
	w.mu.Unlock()
	if sig == unix.SIGCONT {
		if machine != nil {
			machine.ResumeDisks()
		}
		return
	}
	killed := &killedError{signal: sig, why: fmt.Sprintf("the run was ended by signal %d (%v)", int(sig), sig)}
	if machine == nil || again || sig == unix.SIGQUIT {
		w.last()
		w.end(killed)
		return
	}
	if cmd.signal(sig) {
		_, _ = fmt.Fprintf(w.messages, "calf: %v is passed on to the command; a second signal ends the guest\n", sig)
		return
	}
	if cmd != nil { // which is not there yet
		w.end(killed)
		return
	}
	if err := machine.PowerButton(); err != nil {
		w.end(killed)
	}
	// A message that cannot be written must not keep the guest running.
	_, _ = fmt.Fprintf(w.messages, "calf: %v: the guest is asked to power off; a second signal ends it\n", sig)
}

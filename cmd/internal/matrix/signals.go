package matrix

import (
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/launch"
)

// relay passes signals on to whoever has joined.
type relay struct {
	mu     sync.Mutex // guards what follows; held for no wait
	joined map[<-chan os.Signal]chan<- os.Signal
	last   unix.Signal // that ends runs; 0 if none has come
}

// join returns a channel for the signals of one run, or the signal that came before.
func (r *relay) join() (<-chan os.Signal, unix.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != 0 {
		return nil, r.last
	}
	if r.joined == nil {
		r.joined = map[<-chan os.Signal]chan<- os.Signal{}
	}
	c := make(chan os.Signal, 8)
	r.joined[c] = c
	return c, 0
}

// leave ends what join began.
func (r *relay) leave(c <-chan os.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.joined, c)
}

// pass passes sig on. It reports whether it is the first one that ends runs, and, of
// one that does, whether nothing more can be asked for: no run is there, or each has
// been told to end at once.
func (r *relay) pass(sig unix.Signal) (first, final bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.joined {
		select {
		case c <- sig:
		default: // a run that has not answered so many will not answer this one
		}
	}
	if sig == unix.SIGCONT {
		return false, false
	}
	first = r.last == 0
	r.last = sig
	return first, !first || sig == unix.SIGQUIT || len(r.joined) == 0
}

// listen passes the signals of the process on until stop is called. After the last that
// can be answered, abort is called soon, which is to end every wait for the screen.
func (m *matrix) listen(abort func()) (stop func()) {
	signals, quit := make(chan os.Signal, 8), make(chan struct{})
	launch.Notify(signals)
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-quit:
				return
			case sig := <-signals:
				first, final := m.signals.pass(sig.(unix.Signal))
				if final {
					launch.Release()
					time.AfterFunc(drainTime, abort)
				}
				if first && !final {
					// A screen that nobody reads must not hold up the next signal.
					group.Go(func() {
						m.screen.say("calf: %v: no further target is started; a second signal ends all guests\n", sig)
					})
				}
			}
		}
	})
	return func() {
		signal.Stop(signals)
		close(quit)
		group.Wait()
	}
}

// Package progress tells people how far long work is: how much of it is done, how
// fast it goes, and when it will end.
package progress

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/docker/go-units"
)

// Meter counts the bytes of some work. The zero Meter is ready for use, and a nil
// one counts nothing. Its methods are safe for concurrent use.
type Meter struct{ total, done atomic.Int64 }

// Expect adds n bytes to what there is to do.
func (m *Meter) Expect(n int64) {
	if m != nil {
		m.total.Add(n)
	}
}

// Add adds n bytes to what is done.
func (m *Meter) Add(n int64) {
	if m != nil {
		m.done.Add(n)
	}
}

// How often the bar on a terminal changes, and how often a line is written
// elsewhere, at first after as long.
const (
	barEvery  = 200 * time.Millisecond
	lineEvery = 5 * time.Second
)

// Show writes how far m is to w, until stop is called: a line that changes in
// place, and goes away at the end, if w is a terminal; else a line every few
// seconds.
func Show(w io.Writer, terminal bool, m *Meter) (stop func()) {
	every := lineEvery
	if terminal {
		every = barEvery
	}
	return show(w, terminal, m, time.Tick(every))
}

// show is Show at the given ticks.
func show(w io.Writer, terminal bool, m *Meter, ticks <-chan time.Time) (stop func()) {
	quit, over := make(chan struct{}), make(chan struct{})
	start := time.Now()
	go func() {
		defer close(over)
		shown := false
		for {
			select {
			case <-ticks:
				s := m.state(time.Since(start))
				if terminal {
					s = "\r" + s + "\x1b[K"
				} else {
					s += "\n"
				}
				shown = true
				_, _ = io.WriteString(w, s) // who cannot be told is not told
			case <-quit:
				if shown && terminal {
					_, _ = io.WriteString(w, "\r\x1b[K")
				}
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-over
	}
}

// state says how far m is after a time: "42.0 %  1.2 GiB of 2.9 GiB  310 MiB/s
// 6s left".
func (m *Meter) state(after time.Duration) string {
	done, total := m.done.Load(), m.total.Load()
	if total > 0 {
		done = min(done, total)
	}
	rate := float64(done) / max(after.Seconds(), 1e-3)
	if total <= 0 {
		return fmt.Sprintf("%s  %s/s", units.BytesSize(float64(done)), units.BytesSize(rate))
	}
	s := fmt.Sprintf("%5.1f %%  %s of %s  %s/s", 100*float64(done)/float64(total),
		units.BytesSize(float64(done)), units.BytesSize(float64(total)), units.BytesSize(rate))
	if done > 0 && done < total {
		left := time.Duration(float64(after) * float64(total-done) / float64(done))
		s += "  " + left.Round(time.Second).String() + " left"
	}
	return s
}

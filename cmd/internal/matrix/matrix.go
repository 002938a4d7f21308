// Package matrix runs the targets of a matrix side by side: it gives each its own
// streams, passes signals on, shows how far they are, and says how all of them went.
//
// A target has no terminal and no standard input. What it says is shown line by line
// under its name as it comes, or, on a terminal, where one line for each target says
// how far it is, at the end if it has failed. The last part of it is kept for reports.
package matrix

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
)

// Target is one run of a matrix.
type Target struct {
	Name string
	Run  func(Slot) launch.Result
}

// Slot is what a run gets from its matrix.
type Slot struct {
	Streams console.Streams
	Signals <-chan os.Signal
	// Running is to be called when the target's command runs.
	Running func()
}

// Outcome says how a target went.
type Outcome struct {
	Name string `json:"name"`
	launch.Result
	log log
}

// Report says how a matrix went.
type Report struct {
	Targets []Outcome `json:"targets"` // in the order in which they were given
	// ExitCode is 0 if that of every target is 0; else 128 and the number of the
	// signal that ended the matrix, if one did, or that of the first target that
	// failed.
	ExitCode int     `json:"exit_code"`
	Seconds  float64 `json:"duration_seconds"`
}

// matrix is a matrix that runs.
type matrix struct {
	none    *os.File // the standard input of every target
	signals relay
	screen  *screen
}

// drainTime is how long what targets have said may take to be shown when they have been
// ended.
const drainTime = time.Second

// Run runs targets, at most jobs at a time, and shows them on std. The error says what
// of their output could not be shown.
func Run(targets []Target, jobs int, std console.Streams) (Report, error) {
	began := time.Now()
	none, err := os.Open(os.DevNull)
	if err != nil {
		return Report{}, err
	}
	// Whatever waits to be shown can be let go of.
	shown, err := console.OpenCommand(std, false, nil)
	if err != nil {
		return Report{}, errors.Join(err, none.Close())
	}
	m := &matrix{none: none, screen: newScreen(std, shown, targets)}
	stopListening := m.listen(shown.Abort)
	stopTicking := m.screen.tick()
	m.runAll(targets, jobs)
	stopTicking()
	err = m.screen.finish()
	stopListening()
	r := m.report()
	r.Seconds = time.Since(began).Seconds()
	return r, errors.Join(err, shown.Close(), none.Close())
}

// runAll runs all targets, in order, each as soon as there is room for it.
func (m *matrix) runAll(targets []Target, jobs int) {
	var group sync.WaitGroup
	room := make(chan struct{}, jobs)
	for i, t := range targets {
		room <- struct{}{}
		group.Go(func() {
			row := m.screen.rows[i]
			m.screen.end(row, m.run(t, row))
			<-room
		})
	}
	group.Wait()
}

// run runs one target on pipes of its own, unless a signal has come before. It returns
// when all that the target has said is shown or kept.
func (m *matrix) run(t Target, row *row) launch.Result {
	var readers sync.WaitGroup
	var open []*os.File
	defer func() {
		for _, f := range open {
			_ = f.Close() // a pipe keeps nothing
		}
		readers.Wait()
	}()
	pipe := func(s stream) (*os.File, error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		open = append(open, w)
		readers.Go(func() {
			to := m.screen.lines(row, s)
			_, _ = io.Copy(to, r) // neither side fails
			to.end()
			_ = r.Close() // it was read to its end
		})
		return w, nil
	}
	out, errOut := pipe(stdout)
	errs, errErrs := pipe(stderr)
	if err := errors.Join(errOut, errErrs); err != nil {
		return launch.Failed(err)
	}
	signals, last := m.signals.join()
	if last != 0 {
		return launch.NotStarted(last)
	}
	defer m.signals.leave(signals)
	said := m.screen.lines(row, message)
	defer said.end()
	m.screen.begin(row)
	return t.Run(Slot{
		Streams: console.Streams{In: m.none, Out: out, Err: errs, Messages: console.MessagesTo(said)},
		Signals: signals,
		Running: func() { m.screen.running(row) },
	})
}

// report says how the targets went, all of which have ended.
func (m *matrix) report() Report {
	r := Report{Targets: m.screen.outcomes()}
	for _, t := range r.Targets {
		if r.ExitCode == 0 {
			r.ExitCode = t.ExitCode
		}
	}
	if last := m.signals.last; last != 0 {
		r.ExitCode = launch.ExitSignal(last)
	}
	return r
}

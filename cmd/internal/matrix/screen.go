package matrix

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/progress"
)

// The states of a target.
type state string

const (
	waiting state = "waiting"
	booting state = "booting"
	running state = "running"
	passed  state = "PASS"
	failed  state = "FAIL"
	skipped state = "skipped"
)

// row is what is known of a target.
type row struct {
	name   string
	state  state
	began  time.Time
	latest string // line that it has said
	log    log
	result launch.Result // once it has ended
}

const (
	statusEvery = 100 * time.Millisecond
	// maxShown is how many lines of a target that has failed are shown at the end.
	maxShown = 200
	// maxLatest is how much of its latest line is shown beside the status, in columns.
	maxLatest = 500
)

// screen shows how the targets are and what they say.
type screen struct {
	terminal *os.File          // that shows the status; nil if standard error is none that can
	quiet    bool              // what targets say is not shown as it comes
	messages *console.Messages // for what is to be said when nothing is waited for any more

	mu       sync.Mutex // guards what follows; held while it is shown
	out, err io.Writer
	block    *progress.Block // nil if the status does not change in place
	rows     []*row          // the slice itself does not change
	broken   error           // why something could not be shown
}

func newScreen(std console.Streams, to *console.Console, targets []Target) *screen {
	s := &screen{out: to.Out, err: to.Err, messages: std.Messages}
	if s.err == nil {
		s.err = io.Discard
	}
	if std.Err != nil && term.IsTerminal(int(std.Err.Fd())) && os.Getenv("TERM") != "dumb" {
		s.terminal, s.quiet = std.Err, term.IsTerminal(int(std.Out.Fd()))
		s.block = progress.NewBlock(s.err)
	}
	for _, t := range targets {
		s.rows = append(s.rows, &row{name: t.Name, state: waiting})
	}
	return s
}

// tick keeps the status up to date until stop is called.
func (s *screen) tick() (stop func()) {
	if s.block == nil {
		return func() {}
	}
	ticks, quit, over := time.NewTicker(statusEvery), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for {
			s.mu.Lock()
			s.drawLocked()
			s.mu.Unlock()
			select {
			case <-ticks.C:
			case <-quit:
				return
			}
		}
	}()
	return func() {
		ticks.Stop()
		close(quit)
		<-over
	}
}

// begin, running and end say how far a target is.
func (s *screen) begin(r *row) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.state, r.began = booting, time.Now()
}

func (s *screen) running(r *row) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.state == booting {
		r.state = running
	}
}

func (s *screen) end(r *row, result launch.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.result = result
	switch {
	case result.Skipped():
		r.state = skipped
	case result.ExitCode == 0:
		r.state = passed
	default:
		r.state = failed
	}
	if s.block == nil {
		s.showLocked(s.err, r.verdict())
	}
}

// lines takes what a target says on one of its streams.
func (s *screen) lines(r *row, from stream) *lines {
	return &lines{take: func(whole []string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		var text strings.Builder
		shown := !s.quiet && (from == stdout || s.block == nil) || from == message
		for _, n := range whole {
			r.log.add(line{stream: from, text: n, shown: shown})
			text.WriteString(r.prefixed(n))
		}
		if words := latest(whole[len(whole)-1]); words != "" {
			r.latest = words
		}
		if shown {
			s.showLocked(s.writer(from), text.String())
		}
	}}
}

// latest is what the status shows of a line: the end of one that was written over.
func latest(text string) string {
	text = strings.TrimSpace(text)
	return strings.TrimSpace(progress.Cut(text[strings.LastIndexByte(text, '\r')+1:], maxLatest))
}

// say shows a message that is of no target.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.showLocked(s.err, fmt.Sprintf(format, args...))
}

// finish shows what is left to be said when all targets have ended.
func (s *screen) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.block != nil {
		s.noteLocked(s.block.Draw(s.statusLocked(len(s.rows))))
		s.block = nil // it stays
		for _, r := range s.rows {
			s.failureLocked(r)
		}
	}
	s.showLocked(s.err, s.summary())
	return s.broken
}

// outcomes says how the targets have ended.
func (s *screen) outcomes() []Outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Outcome
	for _, r := range s.rows {
		o := Outcome{Name: r.name, Result: r.result, log: r.log}
		o.log.lines = slices.Clone(r.log.lines) // somebody may still have something to say
		list = append(list, o)
	}
	return list
}

// failureLocked shows what a target that has failed has said and was not shown.
func (s *screen) failureLocked(r *row) {
	if r.state != failed {
		return
	}
	s.showLocked(s.err, r.verdict())
	left := r.log.dropped
	var lines []line
	for _, n := range r.log.lines {
		if !n.shown {
			lines = append(lines, n)
		}
	}
	if more := len(lines) - maxShown; more > 0 {
		left, lines = left+more, lines[more:]
	}
	if left > 0 {
		s.showLocked(s.err, fmt.Sprintf("calf: %s: the first %d lines are left out\n", r.name, left))
	}
	for _, n := range lines {
		s.showLocked(s.writer(n.stream), r.prefixed(n.text))
	}
}

// writer is where lines of a stream go.
func (s *screen) writer(from stream) io.Writer {
	if from == stdout {
		return s.out
	}
	return s.err
}

// showLocked writes whole lines to w, above the status if that is there. What cannot be
// shown ends no target: the first reason is kept, unless it is that nobody reads.
func (s *screen) showLocked(w io.Writer, text string) {
	above := s.block != nil && w == s.err
	if above {
		s.noteLocked(s.block.Clear())
	}
	_, err := io.WriteString(w, text)
	if errors.Is(err, unix.EPIPE) && w == s.err {
		_, err = io.WriteString(s.messages, text)
	}
	s.noteLocked(err)
	if above {
		s.drawLocked()
	}
}

func (s *screen) noteLocked(err error) {
	if s.broken == nil && err != nil && !errors.Is(err, unix.EPIPE) {
		s.broken = err
	}
}

// prefixed is a line of the target under its name.
func (r *row) prefixed(text string) string {
	return r.name + " | " + strings.TrimSuffix(text, "\n") + "\n"
}

// verdict says how the target has ended.
func (r *row) verdict() string {
	var s string
	switch r.state {
	case skipped:
		s = "not started"
	case passed:
		s = "passed in " + seconds(r.result.Seconds)
	default:
		s = fmt.Sprintf("failed with %d in %s", r.result.ExitCode, seconds(r.result.Seconds))
	}
	if r.result.Message != "" {
		s += ": " + oneLine(r.result.Message)
	}
	return fmt.Sprintf("calf: %s: %s\n", r.name, s)
}

// oneLine is a message of several lines as one.
func oneLine(message string) string {
	return strings.NewReplacer("\n", "; ", "\t", " ").Replace(message)
}

// summary counts the targets by how they have ended.
func (s *screen) summary() string {
	count := map[state]int{}
	for _, r := range s.rows {
		count[r.state]++
	}
	text := fmt.Sprintf("calf: %d targets: %d passed, %d failed", len(s.rows), count[passed], count[failed])
	if len(s.rows) == 1 {
		text = strings.Replace(text, "targets", "target", 1)
	}
	if n := count[skipped]; n > 0 {
		text += fmt.Sprintf(", %d not started", n)
	}
	return text + "\n"
}

// seconds is a time for people.
func seconds(s float64) string {
	if s < 60 {
		return fmt.Sprintf("%.1f s", s)
	}
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

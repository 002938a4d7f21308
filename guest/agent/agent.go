// Package agent is the host's side of the agent in a guest (package pid1): it puts
// the agent into an initramfs, tells it what to run, and carries the command's input
// and output, its signals and its files.
//
// It knows streams only. That they go through the guest's socket device is up to the
// caller, who has Session.Serve called for each connection that the guest opens to
// Port.
//
// A guest is not trusted: what it says is bounded, each of its streams is taken once,
// and what it sends as files stays where it is to go.
package agent

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/archive"
	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// Port is the port of the host to which the agent connects.
const Port = wire.Port

// ErrNoStatus means that the guest has ended, or has broken the connection, before
// it said how the command ended.
var ErrNoStatus = errors.New("the guest ended without a status of the command")

// errArtifact stands for what Result.Lost says of an artifact.
var errArtifact = errors.New("an artifact could not be written")

// errUnsent is why an artifact is lost of which the guest says nothing.
var errUnsent = errors.New("the guest has not sent it")

// Conn is a connection that the guest has opened.
type Conn interface {
	io.ReadWriteCloser
	// Accept lets the guest use it.
	Accept()
	// CloseWrite ends the direction to the guest.
	CloseWrite() error
}

// Size is the size of a terminal, in characters.
type Size struct{ Rows, Cols uint16 }

// Transfer is a file or tree to be copied.
type Transfer struct{ From, To string }

// Command is what is run in the guest.
type Command struct {
	// Args are the command and its arguments. There is at least the command.
	Args []string
	// Env are variables as NAME=VALUE, over those that a login sets.
	Env []string
	// Workdir is where it runs, "/" if it is empty; User as whom, by name or
	// number, and :GROUP if need be, root if it is empty.
	Workdir, User string
	// Terminal, if not nil, gives it a terminal of this size.
	Terminal *Size
	Hostname string
	// Keep says that the guest's root is kept.
	Keep bool
	// Copies go to the guest before the command runs, Artifacts to the host after
	// it. A tree becomes the directory To; a file becomes the file To, or goes into
	// it if it is a directory or ends in a slash.
	Copies, Artifacts []Transfer
}

// Streams are the host's ends of a command's. Err is not used with a terminal.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Result is how a command ended.
type Result struct {
	// Code is its exit status, or 128 and the number of the signal that ended it,
	// which is Signal then.
	Code, Signal int
	// Ran says that it was started. If it was not, Problem says why, and Code is
	// 126 or 127.
	Ran     bool
	Problem string
	// Uncopied is why a file of the host could not be copied to the guest, empty if
	// all were. The command was not started then.
	Uncopied string
	// Lost are artifacts that could not be had, and why.
	Lost []string
	// Unwritten is why output of the command, or an artifact, could not be written
	// here, nil if all was, or if only the reader of the output has left.
	Unwritten error
	// Kernel is the release of the guest's kernel.
	Kernel string
	// Began is when the agent did in the guest, and Ready when it was ready for the
	// command, both since the guest's kernel began.
	Began, Ready time.Duration
}

// Session is the run of one command. Its methods are safe for concurrent use.
type Session struct {
	command Command
	streams Streams

	out, err *stream // from the guest
	control  chan Conn
	up       chan struct{} // closed when the guest is ready
	started  chan struct{} // closed when the command runs
	over     chan struct{} // closed when Run returns

	// messages are for the guest, which may not read them: nobody waits for that but
	// the goroutine that writes them. The first one is Start.
	messages chan wire.ToGuest

	mu       sync.Mutex            // never held across I/O
	taken    map[wire.Opening]bool // guarded by mu
	begun    bool                  // guarded by mu; messages has Start, and the command has not ended
	size     *Size                 // guarded by mu; of the terminal, if it has changed
	uncopied string                // guarded by mu

	artifacts []*artifact
	came      chan struct{} // receives one for each artifact that has come or failed
}

// stream is a stream from the guest; done is closed at its end.
type stream struct {
	to   io.Writer
	done chan struct{}
	err  error // of to; valid after done
}

// artifact is a file or tree that comes from the guest.
type artifact struct {
	Transfer
	place *archive.Place // nil if there is none; closed by who takes the stream
	// Why it is lost, which is empty if it is not: what is wrong here, as the guest
	// says, and that it ended early, for which the guest has a reason. Guarded by
	// Session.mu.
	here, told, cut string
}

// NewSession returns the run of a command. Where its artifacts go is found out now,
// before a guest can have a part in it. The caller closes it.
func NewSession(c Command, s Streams) *Session {
	session := &Session{
		command: c, streams: s,
		out: &stream{to: s.Out, done: make(chan struct{})}, err: &stream{to: s.Err, done: make(chan struct{})},
		control: make(chan Conn, 1), up: make(chan struct{}), started: make(chan struct{}), over: make(chan struct{}),
		messages: make(chan wire.ToGuest, maxMessages),
		taken:    map[wire.Opening]bool{}, came: make(chan struct{}, len(c.Artifacts)),
	}
	for _, t := range c.Artifacts {
		place, err := archive.Find(t.To)
		a := &artifact{Transfer: t, place: place}
		if err != nil {
			a.here = t.lost(err)
		}
		session.artifacts = append(session.artifacts, a)
	}
	return session
}

// lost says why t, an artifact, cannot be had.
func (t Transfer) lost(err error) string {
	return fmt.Sprintf("artifact %s to %s: %v", t.From, t.To, err)
}

// Up is closed when the guest is ready to be told what to run.
func (s *Session) Up() <-chan struct{} { return s.up }

// Started is closed when the command runs.
func (s *Session) Started() <-chan struct{} { return s.started }

const (
	// maxIdle bounds the wait for the first line on a connection.
	maxIdle = 10 * time.Second
	// maxMessages bounds what waits for a guest that does not read its messages.
	maxMessages = 64
)

// Serve takes a connection of the guest to Port, and returns when it is of no more
// use.
func (s *Session) Serve(c Conn) {
	in, o, err := accept(c)
	if err != nil || !s.take(o) {
		_ = c.Close()
		return
	}
	switch o.Stream {
	case wire.Control:
		s.control <- in
		<-s.over
	case wire.Stdin:
		s.feed(c)
	case wire.Stdout:
		s.out.drain(in)
	case wire.Stderr:
		s.err.drain(in)
	case wire.Copy:
		s.pack(c, s.command.Copies[o.Index])
	case wire.Artifact:
		s.unpack(in, o.Index)
	}
	_ = c.Close()
}

// opened is a connection whose first line has been read.
type opened struct {
	Conn
	r *bufio.Reader
}

func (c *opened) Read(p []byte) (int, error) { return c.r.Read(p) }

// WriteTo implements io.WriterTo, as Conn may.
func (c *opened) WriteTo(w io.Writer) (int64, error) { return c.r.WriteTo(w) }

// take reports whether the guest may open the stream, which it may once.
func (s *Session) take(o wire.Opening) bool {
	limit := 1
	switch o.Stream {
	case wire.Control, wire.Stdin, wire.Stdout, wire.Stderr:
	case wire.Copy:
		limit = len(s.command.Copies)
	case wire.Artifact:
		limit = len(s.command.Artifacts)
	default:
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.Index < 0 || o.Index >= limit || s.taken[o] {
		return false
	}
	s.taken[o] = true
	return true
}

// feed gives the guest the input, in a goroutine that ends with it: nobody can end
// a Read of it.
func (s *Session) feed(c Conn) {
	if s.streams.In != nil {
		_, err := io.Copy(c, s.streams.In) // what the guest does not read, it does not want
		if err != nil && s.command.Terminal != nil {
			_, _ = io.Copy(io.Discard, s.streams.In) // a key may end the run
		}
	}
	_ = c.CloseWrite()
	_, _ = c.Read(make([]byte, 1)) // until the guest is done with it
}

// drain takes output of the guest. If the host's end takes no more, the guest is
// told so, as by a pipe that nobody reads.
func (st *stream) drain(c Conn) {
	_, _ = io.Copy(st, c)
	close(st.done)
}

// Write implements io.Writer.
func (st *stream) Write(p []byte) (int, error) {
	n, err := st.to.Write(p)
	if err != nil && !errors.Is(err, unix.EPIPE) {
		st.err = err
	}
	return n, err
}

// pack sends files to the guest. What goes wrong breaks the archive, which the
// guest notices. Of a guest that takes no more, it knows better why.
func (s *Session) pack(c Conn, t Transfer) {
	w := &toGuest{Writer: c}
	if err := archive.Pack(w, t.From); err != nil {
		if !w.refused {
			s.mu.Lock()
			s.uncopied = fmt.Sprintf("copying %s to the guest: %v", t.From, err)
			s.mu.Unlock()
		}
		return
	}
	_ = c.CloseWrite()
	_, _ = c.Read(make([]byte, 1)) // until the guest has it
}

// toGuest knows whether the guest has refused what was written.
type toGuest struct {
	io.Writer
	refused bool
}

// Write implements io.Writer.
func (w *toGuest) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.refused = w.refused || err != nil
	return n, err
}

// unpack takes files of the guest.
func (s *Session) unpack(c Conn, i int) {
	defer func() { s.came <- struct{}{} }()
	a := s.artifacts[i]
	if a.place == nil {
		return
	}
	r := &fromGuest{Reader: c}
	err := errors.Join(a.place.Unpack(r, nil), a.place.Close())
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
	case r.ended:
		a.cut = printable(a.lost(err)) // it has names that the guest has chosen
	default:
		a.here = printable(a.lost(err))
	}
}

// fromGuest knows whether the guest sends no more.
type fromGuest struct {
	io.Reader
	ended bool
}

// Read implements io.Reader.
func (r *fromGuest) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.ended = r.ended || err != nil
	return n, err
}

// Run waits for the guest, has it run the command, and returns how that ended, with
// everything that it has written. It ends early with the cause of ctx, which is to be
// done when the guest has ended. It is called once.
func (s *Session) Run(ctx context.Context) (*Result, error) {
	defer close(s.over)
	defer s.Close()
	var c Conn
	select {
	case c = <-s.control:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	var writing sync.WaitGroup
	defer writing.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer func() { _ = c.Close() }() // twice, if ctx ends
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	writing.Go(func() { s.write(ctx, c) })
	r, artifacts, err := s.talk(c)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrNoStatus, err)
	}
	if err := s.finish(ctx, r, artifacts); err != nil {
		return nil, err
	}
	return r, nil
}

// write sends the guest its messages until ctx ends.
func (s *Session) write(ctx context.Context, c Conn) {
	for {
		select {
		case m := <-s.messages:
			if wire.Write(c, m) != nil {
				return // the connection has broken, which talk notices
			}
		case <-ctx.Done():
			return
		}
	}
}

// Close closes the places of artifacts that have not come, which none can any more. It
// may be called more than once.
func (s *Session) Close() {
	for i, a := range s.artifacts {
		if a.place != nil && s.take(wire.Opening{Stream: wire.Artifact, Index: i}) {
			_ = a.place.Close() // nothing was done with it
		}
	}
}

// talk is the exchange of messages. artifacts is how many are to come.
func (s *Session) talk(c Conn) (result *Result, artifacts int, err error) {
	in := c.(*opened).r
	result = &Result{}
	greeted := false
	for {
		var m wire.ToHost
		if err := wire.Read(in, &m); err != nil {
			return nil, 0, err
		}
		switch {
		case m.Hello != nil && !greeted:
			greeted = true
			result.Kernel = printable(m.Hello.Kernel)
			result.Began, result.Ready = time.Duration(m.Hello.Began), time.Duration(m.Hello.Ready)
			close(s.up)
			s.begin()
		case m.Hello != nil:
			return nil, 0, errors.New("the guest has begun anew")
		case m.Started && !result.Ran:
			result.Ran = true
			close(s.started)
		case m.Problem != nil && m.Problem.Kind == wire.ArtifactLost:
			if i := m.Problem.Index; i < 0 || i >= len(s.command.Artifacts) {
				return nil, 0, fmt.Errorf("there is no artifact %d", i)
			}
			s.mu.Lock()
			s.artifacts[m.Problem.Index].told = printable(m.Problem.Text)
			s.mu.Unlock()
		case m.Problem != nil && m.Problem.Kind == wire.Uncopied:
			result.Uncopied = printable(m.Problem.Text)
		case m.Problem != nil:
			result.Problem = printable(m.Problem.Text)
		case m.Ended:
			s.mu.Lock()
			s.begun = false
			s.mu.Unlock()
		case m.Exit != nil:
			result.Code, result.Signal = m.Exit.Code&0xff, m.Exit.Signal
			return result, min(m.Exit.Artifacts, len(s.command.Artifacts)), nil
		}
	}
}

// printable is what a guest says as it may be shown on a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, wire.Clip(text))
}

// begin tells the guest what to run, and what has been said to it before that.
func (s *Session) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	start := &wire.Start{
		Args: s.command.Args, Env: s.command.Env, Workdir: wire.Text(s.command.Workdir), User: s.command.User,
		Hostname: s.command.Hostname, Keep: s.command.Keep, Time: time.Now().UnixNano(),
	}
	if s.command.Terminal != nil {
		size := cmp.Or(s.size, s.command.Terminal)
		start.Terminal = &wire.Size{Rows: size.Rows, Cols: size.Cols}
	}
	for _, t := range s.command.Copies {
		start.Copies = append(start.Copies, t.To)
	}
	for _, t := range s.command.Artifacts {
		start.Artifacts = append(start.Artifacts, t.From)
	}
	s.begun = true
	s.messages <- wire.ToGuest{Start: start} // the first one, for which there is room
}

// finish waits for what the command has written, and for its artifacts.
func (s *Session) finish(ctx context.Context, r *Result, artifacts int) error {
	var streams []*stream
	if r.Ran {
		streams = append(streams, s.out)
	}
	if r.Ran && s.command.Terminal == nil {
		streams = append(streams, s.err)
	}
	var waits []<-chan struct{}
	for _, st := range streams {
		waits = append(waits, st.done)
	}
	for range artifacts {
		waits = append(waits, s.came)
	}
	for _, w := range waits {
		select {
		case <-w:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for _, st := range streams {
		if st.err != nil {
			r.Unwritten = errors.Join(r.Unwritten, fmt.Errorf("output of the command is lost: %w", st.err))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Uncopied = cmp.Or(s.uncopied, r.Uncopied)
	for i, a := range s.artifacts {
		if a.here != "" {
			r.Unwritten = errors.Join(r.Unwritten, errArtifact)
		}
		why := cmp.Or(a.here, a.told, a.cut)
		if why == "" && r.Ran && !s.taken[wire.Opening{Stream: wire.Artifact, Index: i}] {
			why = a.lost(errUnsent)
		}
		if why != "" {
			r.Lost = append(r.Lost, why)
		}
	}
	return nil
}

// Signal sends the command a signal, by its number. It reports false if there is
// nobody to tell, yet or any more.
func (s *Session) Signal(number int) bool { return s.tell(wire.ToGuest{Signal: number}) }

// Resize tells the command that its terminal has another size.
func (s *Session) Resize(size Size) {
	s.mu.Lock()
	s.size = &size
	s.mu.Unlock()
	s.tell(wire.ToGuest{Size: &wire.Size{Rows: size.Rows, Cols: size.Cols}}) // or Start does
}

// tell has a message sent to the guest. It reports false if it is too early, or the
// guest reads none.
func (s *Session) tell(m wire.ToGuest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.begun {
		return false
	}
	select {
	case s.messages <- m:
		return true
	default:
		return false
	}
}

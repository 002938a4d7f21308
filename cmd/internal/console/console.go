// Package console is the host's end of the guest's console: the terminal or the
// pipes that calf was started with, a file, a pseudo-terminal, or nothing.
//
// Input and output can always be brought to an end from outside: no guest waits
// for a reader that is gone, and no goroutine is left behind in a read.
package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Kind is a sort of console.
type Kind string

// The kinds of console.
const (
	Stdio Kind = "stdio" // standard input and output
	File  Kind = "file"  // output to a file, no input
	PTY   Kind = "pty"   // a new pseudo-terminal
	None  Kind = "none"  // output is dropped, no input
)

// Spec says which console a guest gets.
type Spec struct {
	Kind Kind
	Path string // of the file; only for File
}

// ParseSpec reads "stdio", "file:PATH", "pty" or "none".
func ParseSpec(s string) (Spec, error) {
	if path, ok := strings.CutPrefix(s, "file:"); ok && path != "" {
		return Spec{File, path}, nil
	}
	switch k := Kind(s); k {
	case Stdio, PTY, None:
		return Spec{Kind: k}, nil
	}
	return Spec{}, fmt.Errorf("%q is not a console: use stdio, file:PATH, pty or none", s)
}

// Streams are the files that the process was started with. Close does not close
// them.
type Streams struct {
	In, Out  *os.File
	Err      *os.File // of a command in the guest; nil: what it says there is dropped
	Messages *Messages
}

// Console is an open console.
type Console struct {
	// In is what the guest reads; nil if it reads nothing. It ends at Close.
	In io.Reader
	// Out is where the guest's output goes; nil if it is dropped. A write
	// waits for a slow reader until Abort; a reader that is gone is no error.
	Out io.Writer
	// Err is where a command's errors go; nil if there is no such thing. A write
	// to Out or Err of a command fails with EPIPE once their readers are gone.
	Err io.Writer
	// Name is the path of the pseudo-terminal of a PTY.
	Name string
	// Escape says that typing Ctrl-A x leaves the console.
	Escape bool

	file *os.File // of a File console

	in, out, errs gate
	gates         []*gate        // those of in and out that could be made
	closers       []func() error // called in reverse order
	once          sync.Once
	err           error // of Close
}

// ptyPatience is how long a guest waits for the reader of a PTY that has fallen
// behind, until output is dropped.
const ptyPatience = 100 * time.Millisecond

// Open opens a console. If standard input is a terminal, a Stdio console makes
// it raw, so that every key goes to the guest, but for the escape Ctrl-A x,
// which calls leave. Close puts the terminal back.
func Open(spec Spec, std Streams, leave func()) (*Console, error) {
	c := &Console{}
	if err := c.open(spec, std, leave); err != nil {
		return nil, errors.Join(fmt.Errorf("open console %s: %w", spec.Kind, err), c.Close())
	}
	return c, nil
}

func (c *Console) open(spec Spec, std Streams, leave func()) error {
	if err := c.openGates(); err != nil {
		return err
	}
	switch spec.Kind {
	case File:
		// A pipe that nobody reads is an error rather than a wait.
		f, err := os.OpenFile(spec.Path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o666)
		if err != nil {
			return err
		}
		c.closers = append(c.closers, f.Close)
		c.file = f
		c.Out = &writer{end: endOf(f, true), gate: &c.out}
	case PTY:
		return c.openPTY()
	case Stdio:
		return c.openStdio(std, leave)
	}
	return nil
}

func (c *Console) openGates() error {
	for _, g := range []*gate{&c.in, &c.out, &c.errs} {
		if err := g.init(); err != nil {
			return err
		}
		c.gates = append(c.gates, g)
		c.closers = append(c.closers, g.close)
	}
	return nil
}

func (c *Console) openPTY() error {
	master, slave, err := pty.Open()
	if err != nil {
		return err
	}
	// The slave stays open, so that the master goes on when a user leaves.
	c.closers = append(c.closers, slave.Close, master.Close)
	if _, err := term.MakeRaw(int(slave.Fd())); err != nil {
		return err
	}
	// A blocking write would wait for all of its bytes to fit.
	if err := withFd(master, func(fd int) error { return unix.SetNonblock(fd, true) }); err != nil {
		return err
	}
	c.Name = slave.Name()
	c.In = &reader{end: endOf(master, true), gate: &c.in}
	c.Out = &writer{end: endOf(master, true), gate: &c.out, patience: ptyPatience}
	return nil
}

func (c *Console) openStdio(std Streams, leave func()) error {
	c.Out = &writer{end: c.own(std.Out, unix.O_WRONLY), gate: &c.out}
	isTerminal := term.IsTerminal(int(std.In.Fd()))
	if isTerminal && !inForeground(std.In) {
		return nil // a job in the background must leave the terminal alone
	}
	in := &reader{end: c.own(std.In, unix.O_RDONLY), gate: &c.in}
	if !isTerminal {
		c.In = in
		return nil
	}
	restore, err := makeRaw(std.In)
	if err != nil {
		return err
	}
	std.Messages.setRaw(true)
	c.closers = append(c.closers, func() error {
		std.Messages.setRaw(false)
		return restore()
	})
	c.In = &escapeReader{r: in, leave: leave}
	c.Escape = true
	return nil
}

// OpenCommand opens the streams of a command in the guest. With a terminal, standard
// input is made raw as by Open, once it is read, and there is no Err.
func OpenCommand(std Streams, terminal bool, leave func()) (*Console, error) {
	c := &Console{}
	if err := c.openCommand(std, terminal, leave); err != nil {
		return nil, errors.Join(fmt.Errorf("open the streams of the command: %w", err), c.Close())
	}
	return c, nil
}

func (c *Console) openCommand(std Streams, terminal bool, leave func()) error {
	if err := c.openGates(); err != nil {
		return err
	}
	if terminal {
		return c.openTerminal(std, leave)
	}
	c.Out = &writer{end: c.own(std.Out, unix.O_WRONLY), gate: &c.out, strict: true}
	if std.Err != nil {
		c.Err = &writer{end: c.own(std.Err, unix.O_WRONLY), gate: &c.errs, strict: true}
	}
	if !term.IsTerminal(int(std.In.Fd())) || inForeground(std.In) {
		c.In = &reader{end: c.own(std.In, unix.O_RDONLY), gate: &c.in}
	}
	return nil
}

// openTerminal opens the terminal of a command. Until that asks for what is typed, which
// is after the boot of its guest, the keys are the terminal's: Ctrl-C is a signal.
func (c *Console) openTerminal(std Streams, leave func()) error {
	c.Out = &writer{end: c.own(std.Out, unix.O_WRONLY), gate: &c.out}
	if !inForeground(std.In) {
		return nil // a job in the background must leave the terminal alone
	}
	in := &rawReader{Reader: &reader{end: c.own(std.In, unix.O_RDONLY), gate: &c.in}, std: std}
	c.closers = append(c.closers, in.close)
	c.In = &escapeReader{r: in, leave: leave}
	c.Escape = true
	return nil
}

// own is reopen for a console, which closes what it opened.
func (c *Console) own(f *os.File, access int) end {
	again := reopen(f, access)
	if again != f {
		c.closers = append(c.closers, again.Close)
	}
	return endOf(again, again != f)
}

// reopen returns a terminal or a pipe opened anew, so that it can be read or
// written without blocking, even where another process competes for it: the
// mode of the descriptor that calf was given is shared with other processes and
// is not calf's to change. Any other file is returned as it is, and so is what
// cannot be opened again, such as the pipe of another user.
func reopen(f *os.File, access int) *os.File {
	fd := int(f.Fd())
	var stat unix.Stat_t
	isPipe := unix.Fstat(fd, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFIFO
	if !isPipe && !term.IsTerminal(fd) {
		return f
	}
	again, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), access|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return f
	}
	// A pipe whose writers have gone blocks nobody, but opened only now it does
	// not say that they were there: a wait for its end would be in vain.
	fds := []unix.PollFd{{Fd: int32(fd)}} //nolint:gosec // G115: a descriptor
	if _, err := unix.Poll(fds, 0); err != nil || fds[0].Revents&unix.POLLHUP != 0 {
		_ = unix.Close(again) // nothing was done with it
		return f
	}
	return os.NewFile(uintptr(again), f.Name())
}

// Empty removes what an earlier run left in the file of a File console, which
// Open leaves as it is.
func (c *Console) Empty() error {
	if c.file == nil {
		return nil
	}
	if info, err := c.file.Stat(); err != nil || !info.Mode().IsRegular() {
		return err
	}
	return c.file.Truncate(0)
}

// Lost reports whether Abort has cost output. It is final after Close.
func (c *Console) Lost() bool {
	w, ok := c.Out.(*writer)
	if !ok {
		return false
	}
	c.out.use.Lock()
	defer c.out.use.Unlock()
	return w.aborted
}

// Abort ends every write that waits, and drops all further output. It may be
// called at any time, from any goroutine.
func (c *Console) Abort() {
	c.out.open()
	c.errs.open()
}

// Close ends the input, waits for a read or a write under way, and puts the
// terminal back. It may be called more than once.
func (c *Console) Close() error {
	c.once.Do(func() {
		var errs []error
		for _, g := range c.gates {
			g.open()
			g.join()
		}
		for _, f := range slices.Backward(c.closers) {
			errs = append(errs, f())
		}
		c.err = errors.Join(errs...)
	})
	return c.err
}

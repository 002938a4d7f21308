package console

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// GuardCommand is the argument with which calf, started by itself, guards a
// terminal: see Guard.
const GuardCommand = "guard-terminal"

// inForeground reports whether this process may use the terminal without being
// stopped for it.
func inForeground(tty *os.File) bool {
	owner, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err != nil || owner == unix.Getpgrp()
}

// makeRaw makes the terminal raw. restore puts it back, and so does a guard,
// where one can be started, should this process die before it can.
func makeRaw(tty *os.File) (restore func() error, err error) {
	fd := int(tty.Fd())
	saved, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("read the terminal's settings: %w", err)
	}
	g, err := startGuard(tty, saved)
	if err != nil {
		// A host that cannot start one more process can still run a guest: it
		// is only a crash that would leave the terminal raw.
		g = nil
	}
	if _, err := term.MakeRaw(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("make the terminal raw: %w", err), g.dismiss())
	}
	raw, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err = errors.Join(err, g.tell(raw)); err != nil {
		return nil, errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETS, saved), g.dismiss())
	}
	return func() error { return errors.Join(putBack(fd, saved, raw), g.dismiss()) }, nil
}

// rawReader reads a terminal, and makes it raw before it does so for the first time.
type rawReader struct {
	io.Reader
	std Streams

	mu      sync.Mutex
	begun   bool         // guarded by mu
	restore func() error // guarded by mu; nil while the terminal is not raw
}

// Read implements io.Reader.
func (r *rawReader) Read(p []byte) (int, error) {
	if err := r.begin(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func (r *rawReader) begin() (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.begun {
		return nil
	}
	if !inForeground(r.std.In) {
		return io.EOF // calf has been put in the background meanwhile
	}
	r.begun = true
	if r.restore, err = makeRaw(r.std.In); err == nil {
		r.std.Messages.setRaw(true)
	}
	return err
}

// close puts the terminal back, and keeps it so.
func (r *rawReader) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun = true
	if r.restore == nil {
		return nil
	}
	r.std.Messages.setRaw(false)
	return r.restore()
}

// putBack restores a terminal, unless its settings are no longer the raw ones:
// then they are somebody else's.
func putBack(fd int, saved, raw *unix.Termios) error {
	now, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil || *now != *raw {
		return err
	}
	return unix.IoctlSetTermios(fd, unix.TCSETS, saved)
}

// guard is a process that puts a terminal back when this one crashes or is
// killed. Its nil value guards nothing.
//
// It listens to a pipe. Go writes the report of a crash into it before the
// process ends, so that the terminal is whole again before the shell looks at
// it; a process that is killed closes it.
type guard struct {
	cmd   *exec.Cmd
	speak *os.File
}

// startGuard starts a guard of tty, whose settings are saved.
func startGuard(tty *os.File, saved *unix.Termios) (*guard, error) {
	hear, speak, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// The link leads to this program even if its file has been replaced.
	g := &guard{cmd: exec.Command("/proc/self/exe", GuardCommand), speak: speak}
	g.cmd.Stdin = hear
	g.cmd.ExtraFiles = []*os.File{tty}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // out of reach of the terminal's signals
	err = g.cmd.Start()
	err = errors.Join(err, hear.Close())
	if err == nil {
		err = errors.Join(g.tell(saved), debug.SetCrashOutput(speak, debug.CrashOptions{}))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("guard the terminal: %w", err), g.dismiss())
	}
	return g, nil
}

// tell sends settings: first those to restore, then those to restore them from.
func (g *guard) tell(t *unix.Termios) error {
	if g == nil {
		return nil
	}
	return json.NewEncoder(g.speak).Encode(t)
}

// dismiss sends the guard home and waits for it.
func (g *guard) dismiss() error {
	if g == nil {
		return nil
	}
	_, err := g.speak.WriteString(dismissal)
	err = errors.Join(err, debug.SetCrashOutput(nil, debug.CrashOptions{}), g.speak.Close())
	if g.cmd.Process != nil {
		err = errors.Join(err, g.cmd.Wait())
	}
	return err
}

// dismissal tells a guard that the terminal has been put back. No report of a
// crash begins with it.
const dismissal = "\n."

// Guard is the guard of a terminal: it reads settings from standard input and
// applies them to descriptor 3 when something that is not its dismissal
// follows, or nothing ever will.
func Guard() error {
	// Setting a terminal from the background stops a process that does not
	// ignore this.
	signal.Ignore(unix.SIGTTOU, unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	dec := json.NewDecoder(os.Stdin)
	var saved, raw unix.Termios
	if err := dec.Decode(&saved); err != nil {
		return err // before the terminal was made raw
	}
	if err := dec.Decode(&raw); err != nil {
		// In between, the terminal is made raw.
		return errors.Join(err, unix.IoctlSetTermios(3, unix.TCSETS, &saved))
	}
	word := make([]byte, len("\n"+dismissal))
	n, _ := io.ReadFull(io.MultiReader(dec.Buffered(), os.Stdin), word)
	if string(word[:n]) == "\n"+dismissal {
		return nil
	}
	err := putBack(3, &saved, &raw)
	// The report is read to its end, so that writing it meets no broken pipe.
	_, _ = io.Copy(io.Discard, os.Stdin)
	return err
}

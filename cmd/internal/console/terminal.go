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
	dismiss, err := startGuard(tty, saved)
	if err != nil {
		// A host that cannot start one more process can still run a guest: it
		// is only a crash that would leave the terminal raw.
		dismiss = func() error { return nil }
	}
	if _, err := term.MakeRaw(fd); err != nil {
		return nil, errors.Join(fmt.Errorf("make the terminal raw: %w", err), dismiss())
	}
	return func() error {
		err := unix.IoctlSetTermios(fd, unix.TCSETS, saved)
		return errors.Join(err, dismiss())
	}, nil
}

// startGuard starts a guard that puts the settings back when this process
// crashes or is killed. dismiss sends it home and waits for it.
//
// The guard listens to a pipe. Go writes the report of a crash into it before
// the process ends, so that the terminal is whole again before the shell looks
// at it; a process that is killed closes it.
func startGuard(tty *os.File, saved *unix.Termios) (dismiss func() error, err error) {
	hear, speak, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// The link leads to this program even if its file has been replaced.
	guard := exec.Command("/proc/self/exe", GuardCommand)
	guard.Stdin = hear
	guard.ExtraFiles = []*os.File{tty}
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // out of reach of the terminal's signals
	err = guard.Start()
	err = errors.Join(err, hear.Close())
	if err == nil {
		err = errors.Join(json.NewEncoder(speak).Encode(saved), debug.SetCrashOutput(speak, debug.CrashOptions{}))
	}
	dismiss = func() error {
		_, err := speak.WriteString(dismissal)
		err = errors.Join(err, debug.SetCrashOutput(nil, debug.CrashOptions{}), speak.Close())
		if guard.Process != nil {
			err = errors.Join(err, guard.Wait())
		}
		return err
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("guard the terminal: %w", err), dismiss())
	}
	return dismiss, nil
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
	var saved unix.Termios
	if err := dec.Decode(&saved); err != nil {
		return err // before the terminal was made raw
	}
	word := make([]byte, len("\n"+dismissal))
	n, _ := io.ReadFull(io.MultiReader(dec.Buffered(), os.Stdin), word)
	if string(word[:n]) == "\n"+dismissal {
		return nil
	}
	err := unix.IoctlSetTermios(3, unix.TCSETS, &saved)
	// The report is read to its end, so that writing it meets no broken pipe.
	_, _ = io.Copy(io.Discard, os.Stdin)
	return err
}

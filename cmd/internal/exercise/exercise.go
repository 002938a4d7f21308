// Package exercise runs commands on disk images in the language of qemu-io, with
// its output and its messages: what was written for qemu-io, and what reads what
// it prints, works here. The command help describes the others.
//
// A Session takes lines, one after the other, and runs each as one command. What a
// command answers, the report of a transfer or what is wrong with its arguments,
// goes to Config.Out; messages about the line or the image go to Config.Messages.
//
// Asynchronous transfers run on goroutines, as many at once as there is memory for
// them. Nothing is ordered between them. Their reports are printed by the session's
// own goroutine: by commands that wait, and while it waits for a line. A Session is
// for one goroutine, and Close joins all others.
package exercise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/calfvm/calf/qcow2"
)

// Config says how a Session works.
type Config struct {
	Out      io.Writer // for what commands print
	Messages io.Writer // for errors
	// Name is that of the program, before some of the messages.
	Name string
	// Open opens an image for the commands; OpenImage is one that does.
	Open func(Options) (Disk, error)
	// BackingDirs are those of the images that the command open opens.
	BackingDirs []string
	// ImageOpts makes the argument of open a list of options.
	ImageOpts bool
	// Misalign puts the buffers of transfers at odd places in memory.
	Misalign bool
}

// Session runs commands. It begins without a file.
type Session struct {
	Config

	out      *bufio.Writer
	disk     Disk    // nil without a file
	options  Options // of the open file
	inflight inflight
	quit     bool
	failed   bool
}

// New returns a Session. It has to be closed.
func New(c Config) *Session {
	return &Session{Config: c, out: bufio.NewWriter(c.Out), inflight: newInflight()}
}

// The ends of a command that need no message, or one of their own.
var (
	// errUsage makes the session print how the command is used.
	errUsage = errors.New("exercise: wrong usage")
	// errFailed means that all has been said.
	errFailed = errors.New("exercise: a command failed")
)

// answer is an error that belongs to the output.
type answer string

func (a answer) Error() string { return string(a) }

func answerf(format string, args ...any) error { return answer(fmt.Sprintf(format, args...)) }

// quotef is fmt.Errorf for qemu-io's words, which begin with a capital letter.
func quotef(format string, args ...any) error { return fmt.Errorf(format, args...) }

// remark is an error whose message stands without the name of the program.
type remark string

func (r remark) Error() string { return string(r) }

func remarkf(format string, args ...any) error { return remark(fmt.Sprintf(format, args...)) }

// Do runs one line. It reports whether the session goes on.
func (s *Session) Do(ctx context.Context, line string) bool {
	var err error
	words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' })
	if len(words) > 0 {
		err = s.do(ctx, words)
	}
	stopped := context.Cause(ctx)
	if err == nil {
		err = stopped
	}
	s.failed = s.failed || err != nil
	s.say(err)
	return s.flush() && !s.quit && stopped == nil
}

// flush writes out what has been printed. It reports whether that could be done.
func (s *Session) flush() bool {
	err := s.out.Flush()
	s.failed = s.failed || err != nil
	return err == nil
}

// say prints how something ended.
func (s *Session) say(err error) {
	switch err := err.(type) { //nolint:errorlint // these are never wrapped
	case answer:
		s.printf("%s\n", err)
	case remark:
		_, _ = fmt.Fprintln(s.Messages, err) // There is nowhere else to complain.
	default:
		if err != nil && !errors.Is(err, errFailed) {
			s.complain(err)
		}
	}
}

// complain says what is wrong, each line under the name of the program.
func (s *Session) complain(err error) {
	for line := range strings.Lines(err.Error()) {
		_, _ = fmt.Fprintf(s.Messages, "%s: %s\n", s.Name, strings.TrimSuffix(line, "\n")) // There is nowhere else to complain.
	}
}

func (s *Session) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(s.out, format, args...) // flush has the error
}

// do runs the command that words are.
func (s *Session) do(ctx context.Context, words []string) error {
	c := find(words[0])
	if c == nil {
		return remarkf("command \"%s\" not found", words[0])
	}
	if s.disk == nil && !c.fileless {
		return remark("no file open, try 'help open'")
	}
	if err := c.count(words[0], len(words)-1); err != nil {
		return err
	}
	if c.changes && s.options.ReadOnly {
		return quotef("Block node is read-only")
	}
	err := c.run(s, ctx, words)
	if errors.Is(err, errUsage) {
		s.printf("%s\n", c.usage(c.name))
		return errFailed
	}
	return err
}

// getopt is the function getopt with the session's messages.
func (s *Session) getopt(args []string, letters string, set func(letter byte, value string) error) ([]string, error) {
	return getopt(s.Messages, args, letters, set)
}

// Close waits for what runs, closes the file and reports whether every command
// succeeded.
func (s *Session) Close() bool {
	s.settle()
	err := s.closeDisk()
	s.failed = s.failed || err != nil
	s.say(err)
	s.flush()
	return !s.failed
}

// closeDisk closes the file, if there is one.
func (s *Session) closeDisk() error {
	if s.disk == nil {
		return nil
	}
	err := s.disk.Close()
	s.disk = nil
	return err
}

// failure is what a command prints of err, in the words of the C library. What
// these do not tell is said to people.
func (s *Session) failure(what string, err error) error {
	number, known := errors.AsType[syscall.Errno](err)
	switch {
	case known:
	case errors.Is(err, context.Canceled):
		number = syscall.EINTR
	case errors.Is(err, qcow2.ErrUnsupported):
		number = syscall.EOPNOTSUPP
	default:
		number = syscall.EIO
	}
	if _, bare := err.(syscall.Errno); !bare { //nolint:errorlint // a bare one has no more to tell
		s.complain(err)
	}
	return answerf("%s failed: %s", what, sentence(number))
}

// sentence is the message of err with a capital letter, as C has it.
func sentence(err error) error {
	text := err.Error()
	return errors.New(strings.ToUpper(text[:1]) + text[1:])
}

package exercise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/term"
)

// Prompt is what a terminal shows before each line, which is what programs that
// talk to qemu-io wait for.
const Prompt = "qemu-io> "

// maxLine bounds the length of a line.
const maxLine = 64 << 10

// Run does the lines that next returns until there are no more, with io.EOF, a
// command ends the session or ctx is done. next runs on a goroutine of its own; one
// that is still waiting for its line when Run returns ends with what it reads from.
func (s *Session) Run(ctx context.Context, next func() (string, error)) error {
	type line struct {
		text string
		err  error
	}
	for {
		lines := make(chan line, 1)
		go func() {
			text, err := next()
			lines <- line{text, err}
		}()
		got, err := wait(ctx, s, lines)
		switch {
		case err != nil:
			return err
		case errors.Is(got.err, io.EOF):
			return nil
		case got.err != nil:
			return fmt.Errorf("read a command: %w", got.err)
		case !s.Do(ctx, got.text):
			return nil
		}
	}
}

// wait returns what comes from c, and meanwhile prints reports.
func wait[T any](ctx context.Context, s *Session, c <-chan T) (got T, err error) {
	for {
		select {
		case got = <-c:
			return got, nil
		case t := <-s.inflight.finished:
			s.reportNext(t)
			s.flush()
		case <-ctx.Done():
			return got, context.Cause(ctx)
		}
	}
}

// Lines returns a function that reads the next line from r, for Run.
func Lines(r io.Reader) func() (string, error) {
	scanner := bufio.NewScanner(r)
	scanner.Buffer(nil, maxLine)
	return func() (string, error) {
		if scanner.Scan() {
			return scanner.Text(), nil
		}
		if err := scanner.Err(); err != nil {
			return "", err
		}
		return "", io.EOF
	}
}

// Terminal reads lines from a terminal, where they can be edited, and shows what is
// written to it. While it reads none, the terminal works as usual, so that its keys
// for signals do.
type Terminal struct {
	in   *os.File
	out  io.Writer
	edit *term.Terminal

	mu    sync.Mutex
	saved *term.State // while a line is read
}

// NewTerminal returns a Terminal that reads from in and shows on out, which are the
// same terminal.
func NewTerminal(in *os.File, out io.Writer) *Terminal {
	t := &Terminal{in: in, out: out}
	t.edit = term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{in, out}, Prompt)
	t.edit.AutoCompleteCallback = complete
	return t
}

// complete completes the name of a command that ends at pos.
func complete(line string, pos int, key rune) (string, int, bool) {
	if key != '\t' || strings.Contains(line[:pos], " ") {
		return "", 0, false
	}
	names := Complete(line[:pos])
	if len(names) == 0 {
		return "", 0, false
	}
	word := names[0]
	for _, name := range names[1:] {
		for !strings.HasPrefix(name, word) {
			word = word[:len(word)-1]
		}
	}
	if len(names) == 1 {
		word += " "
	}
	return word + line[pos:], len(word), true
}

// ReadLine prompts for a line and reads it, for Run.
func (t *Terminal) ReadLine() (string, error) {
	if err := t.begin(); err != nil {
		return "", err
	}
	line, err := t.edit.ReadLine()
	if errors.Is(err, io.EOF) {
		_, _ = t.edit.Write([]byte("\n")) // so that a shell's prompt has a line of its own
	}
	if e := t.Restore(); e != nil && err == nil {
		err = e
	}
	return line, err
}

// begin makes the terminal give each key to the editor.
func (t *Terminal) begin() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if width, height, err := term.GetSize(int(t.in.Fd())); err == nil && width > 0 {
		if err := t.edit.SetSize(width, height); err != nil {
			return err
		}
	}
	saved, err := term.MakeRaw(int(t.in.Fd()))
	t.saved = saved
	return err
}

// Restore makes the terminal work as usual, if a line is being read.
func (t *Terminal) Restore() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.saved == nil {
		return nil
	}
	err := term.Restore(int(t.in.Fd()), t.saved)
	t.saved = nil
	return err
}

// Write shows p, above the line that is being read.
func (t *Terminal) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.saved == nil {
		return t.out.Write(p)
	}
	return t.edit.Write(p)
}

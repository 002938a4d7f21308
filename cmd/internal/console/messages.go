package console

import (
	"bytes"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Messages is standard error, which must hold up nobody: what a reader that has
// fallen behind has no room for is dropped, and so is everything once the reader
// is gone. While the terminal is raw, when it no longer returns the carriage by
// itself, Messages does. It is safe for concurrent use.
type Messages struct {
	w          io.Writer
	isTerminal bool
	raw        atomic.Bool // set while the terminal is raw
}

// messagePatience is how long a message waits for its reader.
const messagePatience = 500 * time.Millisecond

// NewMessages returns Messages over f, which stays open as long as they are
// used.
func NewMessages(f *os.File) *Messages {
	again := reopen(f, unix.O_WRONLY)
	return &Messages{
		w:          &writer{end: endOf(again, again != f), gate: &gate{fd: -1}, patience: messagePatience},
		isTerminal: term.IsTerminal(int(f.Fd())),
	}
}

// MessagesTo returns Messages that are written to w, which is no terminal and holds up
// nobody either.
func MessagesTo(w io.Writer) *Messages { return &Messages{w: w} }

// IsTerminal reports whether somebody may be watching.
func (m *Messages) IsTerminal() bool { return m.isTerminal }

func (m *Messages) setRaw(raw bool) { m.raw.Store(raw && m.isTerminal) }

func (m *Messages) Write(p []byte) (int, error) {
	if !m.raw.Load() {
		return m.w.Write(p)
	}
	if _, err := m.w.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n"))); err != nil {
		return 0, err
	}
	return len(p), nil
}

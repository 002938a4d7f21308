package console

import (
	"bytes"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/term"
)

// Messages is standard error. While the terminal is raw, when it no longer
// returns the carriage by itself, Messages does. It is safe for concurrent use
// if the writer under it is.
type Messages struct {
	w          io.Writer
	isTerminal bool
	raw        atomic.Bool // set while the terminal is raw
}

// NewMessages returns Messages over w.
func NewMessages(w io.Writer) *Messages {
	f, ok := w.(*os.File)
	return &Messages{w: w, isTerminal: ok && term.IsTerminal(int(f.Fd()))}
}

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

package matrix

import (
	"bytes"
	"slices"
	"strings"
	"sync"
)

// stream is where a target says something.
type stream int

const (
	stdout  stream = iota
	stderr         // of its command
	message        // of calf, about it
)

// maxLine is how much of a line is waited for before it is shown.
const maxLine = 64 << 10 // bytes

// lines cuts what is written to it into lines. It is safe for concurrent use.
type lines struct {
	take func(whole []string)

	mu   sync.Mutex
	part []byte // guarded by mu; the beginning of a line
}

// Write implements io.Writer.
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var whole []string
	for rest := p; len(rest) > 0; {
		n := bytes.IndexByte(rest, '\n') + 1
		if n == 0 {
			n = len(rest)
		}
		n = min(n, maxLine-len(l.part))
		l.part = append(l.part, rest[:n]...)
		rest = rest[n:]
		if len(l.part) == maxLine || bytes.HasSuffix(l.part, []byte("\n")) {
			whole = append(whole, string(l.part))
			l.part = l.part[:0]
		}
	}
	if len(whole) > 0 {
		l.take(whole)
	}
	return len(p), nil
}

// end makes a line of what has none.
func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.part) > 0 {
		l.take([]string{string(l.part)})
		l.part = nil
	}
}

// line is a line that a target has said, with its end if it had one.
type line struct {
	stream stream
	text   string
	shown  bool
}

const (
	maxLog   = 256 << 10 // bytes of a log
	lineCost = 64        // bytes that a line takes beside its own
)

// log is the last part of what a target has said.
type log struct {
	lines   []line
	size    int
	dropped int // lines before those
}

// add adds a line, for which others may have to go.
func (l *log) add(n line) {
	l.lines = append(l.lines, n)
	l.size += len(n.text) + lineCost
	drop := 0
	for ; l.size > maxLog; drop++ {
		l.size -= len(l.lines[drop].text) + lineCost
	}
	l.dropped += drop
	clear(l.lines[:drop]) // the array may stay
	l.lines = l.lines[drop:]
}

// of returns what l has of the given streams.
func (l *log) of(streams ...stream) string {
	var s strings.Builder
	for _, n := range l.lines {
		if slices.Contains(streams, n.stream) {
			s.WriteString(n.text)
		}
	}
	return s.String()
}

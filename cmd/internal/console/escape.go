package console

import "io"

// The escape: prefix, then leaveKey leaves; the prefix twice stands for itself.
const (
	prefix   = 0x01 // Ctrl-A
	leaveKey = 'x'
)

// escapeReader passes on what is typed until the escape is. A prefix is held
// back until the key after it is known; with any other key than those of the
// escape, both are passed on.
type escapeReader struct {
	r     io.Reader
	leave func()
	held  bool   // the last key was a prefix
	out   []byte // what has been typed and not yet read
	end   error  // what to report once out is empty
}

func (e *escapeReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(e.out) == 0 {
		if e.end != nil {
			return 0, e.end
		}
		buf := make([]byte, len(p))
		n, err := e.r.Read(buf)
		e.end = err
		if e.filter(buf[:n]) {
			e.end = io.EOF
			e.leave()
		}
	}
	n := copy(p, e.out)
	e.out = e.out[n:]
	return n, nil
}

// filter appends to e.out what keys mean, and reports whether they leave. What
// comes after the escape is dropped.
func (e *escapeReader) filter(keys []byte) bool {
	for _, k := range keys {
		switch {
		case !e.held && k == prefix:
			e.held = true
			continue
		case e.held && k == leaveKey:
			return true
		case e.held && k != prefix:
			e.out = append(e.out, prefix)
		}
		e.held = false
		e.out = append(e.out, k)
	}
	return false
}

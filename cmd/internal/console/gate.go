package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errAborted ends a wait whose gate has been opened.
var errAborted = errors.New("console: aborted")

// gate ends waits for a file: once open, it stays open, and every wait that
// goes through it, now or later, ends at once.
type gate struct {
	use sync.Mutex // held for the length of a read or a write

	mu     sync.Mutex // guards opened
	opened bool
	fd     int // an eventfd, readable once the gate is open; -1 for a gate that stays shut
}

func (g *gate) init() (err error) {
	g.fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	return err
}

// open opens the gate. It may be called at any time, even after close.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened {
		return
	}
	g.opened = true
	one := [8]byte{1}
	// It can fail only if the counter is at its limit, when the gate is open.
	_, _ = unix.Write(g.fd, one[:])
}

func (g *gate) isOpen() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.opened
}

// join returns when nobody is inside a read or a write.
func (g *gate) join() {
	g.use.Lock()
	defer g.use.Unlock()
}

// close frees the gate, which must be open and have been joined.
func (g *gate) close() error { return unix.Close(g.fd) }

// forever is a wait without a limit.
const forever = -1 * time.Millisecond

// await waits until fd is ready for events. It reports false if it is not
// within limit, and errAborted if the gate is open.
func (g *gate) await(fd int, events int16, limit time.Duration) (bool, error) {
	for {
		if g.isOpen() {
			return false, errAborted // g.fd may be closed by now
		}
		fds := []unix.PollFd{
			{Fd: int32(g.fd), Events: unix.POLLIN}, //nolint:gosec // G115: a descriptor
			{Fd: int32(fd), Events: events},        //nolint:gosec // G115: a descriptor
		}
		_, err := unix.Poll(fds, int(limit.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, fmt.Errorf("poll: %w", err)
		case fds[0].Revents != 0:
			return false, errAborted
		}
		return fds[1].Revents != 0, nil
	}
}

// reader reads a file, blocking or not, until it ends or the gate opens.
type reader struct {
	file *os.File
	gate *gate
	done bool // guarded by gate.use
}

var _ io.Reader = (*reader)(nil)

func (r *reader) Read(p []byte) (int, error) {
	r.gate.use.Lock()
	defer r.gate.use.Unlock()
	for !r.done {
		var n int
		err := withFd(r.file, func(fd int) error {
			_, err := r.gate.await(fd, unix.POLLIN, forever)
			if err == nil {
				n, err = readNow(fd, p)
			}
			return err
		})
		switch {
		case isRetry(err):
			continue
		case err == nil && n > 0:
			return n, nil
		}
		// The end, an abort, or EIO of a terminal that is gone: to the guest
		// it is all one. Its console falls silent.
		r.done = true
	}
	return 0, io.EOF
}

// writeChunk is what a pipe that is ready takes without blocking (PIPE_BUF).
const writeChunk = 4096

// writer writes to a file, blocking or not, until the gate opens. From then on,
// and once the file's reader is gone, it drops what it is given.
type writer struct {
	file *os.File
	gate *gate
	// patience is how long a write waits until it drops the rest; 0 = for
	// good.
	patience time.Duration
	strict   bool // a reader that is gone is an error
	behind   bool // the last write ran out of patience; guarded by gate.use
	gone     bool // nobody will read any more; guarded by gate.use
	aborted  bool // the gate has cost output; guarded by gate.use
}

func (w *writer) Write(p []byte) (int, error) {
	w.gate.use.Lock()
	defer w.gate.use.Unlock()
	for rest := p; len(rest) > 0 && !w.gone; {
		var n int
		ready := true
		err := withFd(w.file, func(fd int) (err error) {
			if ready, err = w.gate.await(fd, unix.POLLOUT, w.limit()); err == nil && ready {
				n, err = writeNow(fd, rest[:min(len(rest), writeChunk)])
			}
			return err
		})
		w.behind = !ready
		switch {
		case isRetry(err):
		case errors.Is(err, errAborted):
			w.gone, w.aborted = true, true
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EIO) && !w.strict: // a terminal that is gone
			w.gone = true
		case err != nil:
			return len(p) - len(rest), fmt.Errorf("write %s: %w", w.file.Name(), err)
		case !ready:
			return len(p), nil
		}
		rest = rest[max(n, 0):] // a failed write gives -1
	}
	if w.strict && w.gone {
		return 0, unix.EPIPE
	}
	return len(p), nil
}

// limit is how long to wait for room. A reader that was not there a moment ago
// is not waited for again.
func (w *writer) limit() time.Duration {
	switch {
	case w.patience == 0:
		return forever
	case w.behind:
		return 0
	}
	return w.patience
}

// readNow reads from a descriptor that is ready. Another reader may have been
// faster; a socket is then not waited for.
func readNow(fd int, p []byte) (int, error) {
	n, _, err := unix.Recvfrom(fd, p, unix.MSG_DONTWAIT)
	if errors.Is(err, unix.ENOTSOCK) {
		return unix.Read(fd, p)
	}
	return n, err
}

// writeNow writes to a descriptor that has room. Another writer may have taken
// it; a socket is then not waited for.
func writeNow(fd int, p []byte) (int, error) {
	n, err := unix.SendmsgN(fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if errors.Is(err, unix.ENOTSOCK) {
		return unix.Write(fd, p)
	}
	return n, err
}

func isRetry(err error) bool { return errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) }

// withFd calls f with the descriptor of file, which stays open meanwhile and
// keeps its blocking mode.
func withFd(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

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

// manner is how a file is used without waiting for it longer than a gate lets it.
type manner int

const (
	// polite: it may block, so it is asked first whether it is ready.
	polite manner = iota
	// direct: it never blocks.
	direct
	// socket: it is a socket, which does not block if it is told so.
	socket
)

// end is a file of the host.
type end struct {
	file   *os.File
	manner manner
}

// endOf returns the end f, which blocks unless own says that its descriptor is calf's
// and does not. A regular file never does for long, nor does /dev/null or another of
// the devices that are only memory.
func endOf(f *os.File, own bool) end {
	const memoryDevices = 1 // their major number
	var stat unix.Stat_t
	err := withFd(f, func(fd int) error { return unix.Fstat(fd, &stat) })
	kind := stat.Mode & unix.S_IFMT
	switch {
	case err == nil && kind == unix.S_IFSOCK:
		return end{f, socket}
	case own, err == nil && kind == unix.S_IFREG,
		err == nil && kind == unix.S_IFCHR && unix.Major(stat.Rdev) == memoryDevices:
		return end{f, direct}
	}
	return end{f, polite}
}

// read reads into p. Another reader may have been faster where the file was ready; a
// socket is then not waited for.
func (e end) read(fd int, p []byte) (int, error) {
	if e.manner == socket {
		n, _, err := unix.Recvfrom(fd, p, unix.MSG_DONTWAIT)
		return n, err
	}
	return unix.Read(fd, p)
}

// writeChunk is what a pipe that is ready takes without blocking (PIPE_BUF).
const writeChunk = 4096

// write writes some of p, likewise.
func (e end) write(fd int, p []byte) (int, error) {
	switch e.manner {
	case socket:
		return unix.SendmsgN(fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	case polite:
		p = p[:min(len(p), writeChunk)]
	}
	return unix.Write(fd, p)
}

// use calls f, which reads from the file or writes to it: at once where that cannot
// block, and when the file is ready for events where it has to wait. It reports false
// if it is not within limit, and errAborted if the gate is open.
func (e end) use(g *gate, events int16, limit time.Duration, f func(fd int) error) (ready bool, err error) {
	err = withFd(e.file, func(fd int) error {
		if e.manner != polite && !g.isOpen() {
			ready = true
			if err := f(fd); !errors.Is(err, unix.EAGAIN) {
				return err
			}
		}
		var err error
		if ready, err = g.await(fd, events, limit); err != nil || !ready {
			return err
		}
		return f(fd)
	})
	return ready, err
}

// reader reads a file until it ends or the gate opens.
type reader struct {
	end
	gate *gate
	done bool // guarded by gate.use
}

var _ io.Reader = (*reader)(nil)

func (r *reader) Read(p []byte) (int, error) {
	r.gate.use.Lock()
	defer r.gate.use.Unlock()
	for !r.done {
		var n int
		_, err := r.use(r.gate, unix.POLLIN, forever, func(fd int) (err error) {
			n, err = r.read(fd, p)
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

// writer writes to a file until the gate opens. From then on, and once the file's
// reader is gone, it drops what it is given.
type writer struct {
	end
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
		ready, err := w.use(w.gate, unix.POLLOUT, w.limit(), func(fd int) (err error) {
			n, err = w.write(fd, rest)
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

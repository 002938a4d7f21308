package pid1

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// initPaths are where an image has its own first process.
var initPaths = []string{"/sbin/init", "/etc/init", "/bin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd"}

// serve does what the host asks for.
func serve() error {
	control, err := dial(wire.Control, 0)
	if err != nil {
		return err
	}
	defer func() { _ = control.Close() }() // twice, if the image's init takes over
	h := &host{f: control}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if err := h.send(wire.ToHost{Hello: &wire.Hello{Kernel: unix.ByteSliceToString(name.Release[:])}}); err != nil {
		return err
	}
	r := bufio.NewReaderSize(control, maxStart)
	var m wire.ToGuest
	if err := wire.Read(r, &m); err != nil {
		return fmt.Errorf("the host says nothing: %w", err)
	}
	if m.Start == nil {
		return errors.New("the host does not say what to run")
	}
	if err := setUp(m.Start); err != nil {
		return err
	}
	if len(m.Start.Args) == 0 {
		return errors.Join(control.Close(), handOver())
	}
	exit := runCommand(h, r, m.Start)
	if m.Start.Keep {
		unix.Sync()
	}
	if err := h.send(wire.ToHost{Exit: &exit}); err != nil {
		return err
	}
	// The host closes the connection once it has everything.
	_, _ = control.Read(make([]byte, 1))
	if m.Start.Keep {
		return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	return nil
}

// maxStart bounds a message of the host: arguments and environment of a command.
const maxStart = 8 << 20

// host is the other end of the control connection.
type host struct {
	mu sync.Mutex // held while a message is written
	f  *os.File
}

func (h *host) send(m wire.ToHost) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return wire.Write(h.f, m)
}

// tell tells the host what went wrong.
func (h *host) tell(p wire.Problem) {
	_ = h.send(wire.ToHost{Problem: &p}) // if the host is gone, the guest ends anyway
}

func (h *host) problem(kind string, err error) { h.tell(wire.Problem{Kind: kind, Text: err.Error()}) }

// dial opens a connection to the host.
func dial(stream string, index int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	err = unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: wire.Port})
	if err != nil {
		return nil, fmt.Errorf("the host does not answer: %w", errors.Join(err, unix.Close(fd)))
	}
	f := os.NewFile(uintptr(fd), stream)
	return f, wire.Write(f, wire.Opening{Stream: stream, Index: index})
}

// setUp makes the guest what the host says.
func setUp(s *wire.Start) error {
	const small = 50 * time.Millisecond
	if now := time.Unix(0, s.Time); s.Time != 0 && time.Until(now).Abs() > small {
		tv := unix.NsecToTimeval(s.Time)
		if err := unix.Settimeofday(&tv); err != nil {
			return fmt.Errorf("setting the clock: %w", err)
		}
	}
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return fmt.Errorf("setting the host name: %w", err)
		}
	}
	return nil
}

// handOver runs the init of the image in the place of this process.
func handOver() error {
	for _, path := range initPaths {
		err := unix.Exec(path, []string{path}, []string{"HOME=/", "TERM=linux", "PATH=" + defaultPath})
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("the image's %s cannot be run: %w", path, err)
		}
	}
	return errors.New("the image has no init; give a command to run in it")
}

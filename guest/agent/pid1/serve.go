package pid1

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// initPaths are where an image has its own first process.
var initPaths = []string{"/sbin/init", "/etc/init", "/bin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/bin/sh"}

// meet tells the host that the guest is up, and makes it what the host says. The
// caller closes control. loaded is why the driver that it takes could not be loaded,
// which may be part of the kernel. began is when the agent did.
func meet(began time.Duration, loaded error) (control *os.File, r *bufio.Reader, start *wire.Start, err error) {
	if control, err = dial(wire.Control, 0); err != nil {
		if loaded != nil {
			err = fmt.Errorf("the kernel %s has no driver of the socket device, and neither the image's initramfs nor its root has one for it: %w", kernelRelease(), loaded)
		}
		return nil, nil, nil, err
	}
	var m wire.ToGuest
	r = bufio.NewReaderSize(control, wire.MaxStart)
	if err = wire.Write(control, wire.ToHost{Hello: &wire.Hello{Kernel: kernelRelease(), Began: int64(began), Ready: int64(sinceBoot())}}); err == nil {
		err = wire.Read(r, &m)
	}
	if err == nil && m.Start == nil {
		err = errors.New("it does not say what to run")
	}
	if err != nil {
		return nil, nil, nil, fmt.Errorf("the host: %w", errors.Join(err, control.Close()))
	}
	if err = setUp(m.Start); err != nil {
		return nil, nil, nil, errors.Join(err, control.Close())
	}
	return control, r, m.Start, nil
}

// sinceBoot is for how long the kernel has run, 0 if it does not say.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// announce tells the host that the guest is up, and no more.
func announce(began time.Duration, loaded error) error {
	control, _, _, err := meet(began, loaded)
	if err != nil {
		return err
	}
	return control.Close()
}

// serve runs the command that the host names.
func serve(began time.Duration, loaded error) error {
	control, r, start, err := meet(began, loaded)
	if err != nil {
		return err
	}
	defer func() { _ = control.Close() }() // the host has closed its end
	h := &host{f: control}
	exit := runCommand(h, r, start)
	if start.Keep {
		if err := settle(); err != nil {
			h.problem(wire.NotSettled, err)
		}
	}
	if err := h.send(wire.ToHost{Exit: &exit}); err != nil {
		return err
	}
	// The host closes the connection once it has everything.
	_, _ = control.Read(make([]byte, 1))
	return nil
}

// settle makes all file systems of devices clean, once nobody is left who writes to
// them: there is no process but this one.
func settle() error {
	for start := time.Now(); time.Since(start) < reapTime; time.Sleep(time.Millisecond) {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
	}
	unix.Sync()
	list, err := os.ReadFile("/proc/self/mounts")
	if err = errors.Join(err, os.Chdir("/")); err != nil {
		return err
	}
	var errs []error
	for _, line := range slices.Backward(strings.Split(string(list), "\n")) {
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[0], "/dev/") && f[2] != "overlay" {
			continue
		}
		at := unescape(f[1])
		if at != "/" && unix.Unmount(at, 0) == nil {
			continue
		}
		if err := unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			errs = append(errs, fmt.Errorf("the guest's %s is kept as after a power cut: %w", at, err))
		}
	}
	return errors.Join(errs...)
}

// reapTime is how long processes may take to end that have been killed.
const reapTime = 10 * time.Second

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
	p.Text = wire.Clip(p.Text)
	_ = h.send(wire.ToHost{Problem: &p}) // if the host is gone, the guest ends anyway
}

func (h *host) problem(kind string, err error) {
	h.tell(wire.Problem{Kind: kind, Text: strings.ReplaceAll(err.Error(), "\n", "; ")})
}

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
	if name := cmp.Or(s.Hostname, ownHostname()); name != "" {
		if err := unix.Sethostname([]byte(name)); err != nil {
			return fmt.Errorf("setting the host name %q: %w", name, err)
		}
	}
	return nil
}

// ownHostname is the name that the image gives itself, or empty.
func ownHostname() string {
	const maxName = 64
	b, err := os.ReadFile("/etc/hostname")
	if name := strings.TrimSpace(string(b)); err == nil && len(name) <= maxName {
		return name
	}
	return ""
}

// handOver runs the init of the image in the place of this process, with what the
// kernel would have told it. named is the one that init= names, if it does.
func handOver(named string) error {
	paths := initPaths
	if named != "" {
		paths = []string{named}
	}
	env := os.Environ()
	if os.Getenv("PATH") == "" {
		env = append(env, "PATH="+defaultPath)
	}
	for _, path := range paths {
		err := unix.Exec(path, append([]string{path}, os.Args[1:]...), env)
		if named != "" || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("the image's %s cannot be run: %w", path, err)
		}
	}
	return errors.New("the image has no init; give a command to run in it")
}

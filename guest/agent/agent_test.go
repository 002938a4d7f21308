package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/archive"
	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// hostEnd is the host's end of a connection.
type hostEnd struct {
	*net.UnixConn
	accepted atomic.Bool
}

func (c *hostEnd) Accept() { c.accepted.Store(true) }

// fakeGuest opens connections to a session.
type fakeGuest struct {
	t *testing.T
	s *Session
	h *HandOver // instead, if it is not nil
}

// dial opens a connection, and says what it is for unless that is empty.
func (g *fakeGuest) dial(stream string, index int) *net.UnixConn {
	g.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err = errors.Join(err, f.Close()); err != nil {
			g.t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		defer ends[1].Close()
		if g.h != nil {
			g.h.Serve(&hostEnd{UnixConn: ends[1]})
			return
		}
		g.s.Serve(&hostEnd{UnixConn: ends[1]})
	}()
	g.t.Cleanup(func() {
		_ = ends[0].Close()
		select {
		case <-served:
		case <-time.After(10 * time.Second):
			g.t.Error("a connection is served for ever")
		}
	})
	if stream != "" {
		g.say(ends[0], wire.Opening{Stream: stream, Index: index})
	}
	return ends[0]
}

func (g *fakeGuest) say(c io.Writer, v any) {
	g.t.Helper()
	if err := wire.Write(c, v); err != nil {
		g.t.Fatal(err)
	}
}

// begin says hello, and returns what it is told to start.
func (g *fakeGuest) begin() (*net.UnixConn, *bufio.Reader, *wire.Start) {
	g.t.Helper()
	control := g.dial(wire.Control, 0)
	g.say(control, wire.ToHost{Hello: &wire.Hello{Kernel: "6.6.6"}})
	r := bufio.NewReaderSize(control, 1<<20)
	var m wire.ToGuest
	if err := wire.Read(r, &m); err != nil || m.Start == nil {
		g.t.Fatalf("the guest is told %+v, %v", m, err)
	}
	return control, r, m.Start
}

// run runs a session, whose guest is played by guest.
func run(t *testing.T, c Command, in string, guest func(g *fakeGuest)) (out, errs string, r *Result, err error) {
	t.Helper()
	var o, e bytes.Buffer
	s := NewSession(c, Streams{In: strings.NewReader(in), Out: &o, Err: &e})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	type result struct {
		*Result
		err error
	}
	done := make(chan result)
	go func() {
		r, err := s.Run(ctx)
		done <- result{r, err}
	}()
	guest(&fakeGuest{t: t, s: s})
	got := <-done
	return o.String(), e.String(), got.Result, got.err
}

func read(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestSession plays a guest that does what it is told.
func TestSession(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("for the guest"), 0o600); err != nil {
		t.Fatal(err)
	}
	command := Command{
		Args: []string{"cmd", "arg"}, Env: []string{"A=b"}, Workdir: "/w", User: "u", Hostname: "h", Keep: true,
		Copies:    []Transfer{{filepath.Join(dir, "in"), "/in"}},
		Artifacts: []Transfer{{"/out", filepath.Join(dir, "out")}, {"/none", filepath.Join(dir, "none")}},
	}
	guestDir := t.TempDir()
	var signal, size wire.ToGuest
	out, errs, r, err := run(t, command, "input", func(g *fakeGuest) {
		if g.s.Signal(15) {
			t.Error("a signal reaches a guest that is not there")
		}
		control, in, start := g.begin()
		if start.Args[1] != "arg" || start.Env[0] != "A=b" || start.Workdir != "/w" || start.User != "u" || start.Hostname != "h" ||
			!start.Keep || start.Copies[0] != "/in" || start.Artifacts[0] != "/out" || start.Terminal != nil || time.Since(time.Unix(0, start.Time)) > time.Minute {
			t.Errorf("the guest is told %+v", start)
		}
		if err := archive.Unpack(g.dial(wire.Copy, 0), filepath.Join(guestDir, "in"), nil); err != nil {
			t.Error(err)
		}
		stdin, stdout, stderr := g.dial(wire.Stdin, 0), g.dial(wire.Stdout, 0), g.dial(wire.Stderr, 0)
		g.say(control, wire.ToHost{Started: true})
		<-g.s.Started()
		if got := read(t, stdin); got != "input" {
			t.Errorf("the guest reads %q", got)
		}
		if !g.s.Signal(15) || wire.Read(in, &signal) != nil {
			t.Error("a signal does not reach the guest")
		}
		g.s.Resize(Size{Rows: 10, Cols: 20})
		if err := wire.Read(in, &size); err != nil {
			t.Error(err)
		}
		_, _ = stdout.Write([]byte("output"))
		_, _ = stderr.Write([]byte("errors"))
		g.say(control, wire.ToHost{Ended: true})
		for start := time.Now(); g.s.Signal(15); time.Sleep(time.Millisecond) {
			if time.Since(start) > 10*time.Second {
				t.Fatal("a signal is passed on to a command that has ended")
			}
			if err := wire.Read(in, &wire.ToGuest{}); err != nil { // one that came before
				t.Fatal(err)
			}
		}
		artifact := g.dial(wire.Artifact, 0)
		if err := archive.Pack(artifact, filepath.Join(guestDir, "in")); err != nil {
			t.Error(err)
		}
		_ = artifact.Close()
		g.say(control, wire.ToHost{Problem: &wire.Problem{Kind: wire.ArtifactLost, Text: "artifact /none: no such file", Index: 1}})
		g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 7, Artifacts: 1}})
		_, _ = stdout.Write([]byte(" and more")) // which comes after the status
		_, _ = stdout.Close(), stderr.Close()
		if got := read(t, in); got != "" {
			t.Errorf("the guest is told %q at the end", got)
		}
	})
	if err != nil || r.Code != 7 || !r.Ran || r.Kernel != "6.6.6" || len(r.Lost) != 1 || !strings.Contains(r.Lost[0], "/none") {
		t.Errorf("%+v, %v", r, err)
	}
	if out != "output and more" || errs != "errors" {
		t.Errorf("the command wrote %q and %q", out, errs)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "out")); string(b) != "for the guest" {
		t.Errorf("the artifact has %q, %v", b, err)
	}
	if signal.Signal != 15 || size.Size == nil || size.Size.Rows != 10 {
		t.Errorf("the guest was told %+v, %+v", signal, size)
	}
}

// TestTerminal has a terminal whose size changes before the guest is up.
func TestTerminal(t *testing.T) {
	out, _, r, err := run(t, Command{Args: []string{"sh"}, Terminal: &Size{Rows: 1, Cols: 2}}, "", func(g *fakeGuest) {
		g.s.Resize(Size{Rows: 30, Cols: 40})
		control, _, start := g.begin()
		if start.Terminal == nil || start.Terminal.Cols != 40 {
			t.Errorf("the terminal is %+v", start.Terminal)
		}
		tty := g.dial(wire.Stdout, 0)
		g.say(control, wire.ToHost{Started: true})
		_, _ = tty.Write([]byte("$ "))
		_ = tty.Close()
		g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 130, Signal: 2}})
	})
	if err != nil || out != "$ " || r.Signal != 2 || r.Code != 130 {
		t.Errorf("%q, %+v, %v", out, r, err)
	}
}

// typist is a terminal at which somebody types.
type typist struct{ keys chan struct{} }

func (k typist) Read(p []byte) (int, error) {
	if _, more := <-k.keys; !more {
		return 0, io.EOF
	}
	return copy(p, "x"), nil
}

// TestKeysAfterTheCommand: a terminal is read on when the command is over, for the keys
// that end the run.
func TestKeysAfterTheCommand(t *testing.T) {
	k := typist{make(chan struct{})}
	g := &fakeGuest{t: t, s: NewSession(Command{Args: []string{"sh"}, Terminal: &Size{}}, Streams{In: k, Out: io.Discard})}
	if err := g.dial(wire.Stdin, 0).Close(); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		select {
		case k.keys <- struct{}{}:
		case <-time.After(5 * time.Second):
			t.Fatalf("nobody listens after %d keys", i)
		}
	}
	close(k.keys)
}

// TestNotRun plays guests that cannot run the command, that end before it, and that
// break the protocol.
func TestNotRun(t *testing.T) {
	t.Run("not found", func(t *testing.T) {
		_, _, r, err := run(t, Command{Args: []string{"x"}}, "", func(g *fakeGuest) {
			control, _, _ := g.begin()
			g.say(control, wire.ToHost{Problem: &wire.Problem{Kind: wire.NotFound, Text: "x: not found"}})
			g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 127}})
		})
		if err != nil || r.Code != 127 || r.Ran || r.Problem != "x: not found" {
			t.Errorf("%+v, %v", r, err)
		}
	})
	t.Run("a file that is not there", func(t *testing.T) {
		_, _, r, err := run(t, Command{Args: []string{"x"}, Copies: []Transfer{{"/no/such/file", "/in"}}}, "", func(g *fakeGuest) {
			control, _, _ := g.begin()
			if err := archive.Unpack(g.dial(wire.Copy, 0), filepath.Join(t.TempDir(), "in"), nil); err == nil {
				t.Error("nothing is unpacked as something")
			}
			g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 126}})
		})
		if err != nil || !strings.Contains(r.Uncopied, "/no/such/file") {
			t.Errorf("%+v, %v", r, err)
		}
	})
	for name, say := range map[string]string{
		"the end":         "",
		"nonsense":        "nonsense\n",
		"an endless line": strings.Repeat("x", wire.MaxLine+1),
	} {
		t.Run(name, func(t *testing.T) {
			_, _, _, err := run(t, Command{Args: []string{"x"}}, "", func(g *fakeGuest) {
				control, _, _ := g.begin()
				_, _ = control.Write([]byte(say))
				_ = control.Close()
			})
			if !errors.Is(err, ErrNoStatus) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a guest that never comes", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		why := errors.New("it has ended")
		cancel(why)
		if _, err := NewSession(Command{}, Streams{}).Run(ctx); !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
	})
}

// TestGreedyGuest opens streams that there are none of, or twice.
func TestGreedyGuest(t *testing.T) {
	_, _, _, err := run(t, Command{Args: []string{"x"}, Copies: []Transfer{{"/etc/hostname", "/in"}}}, "secret", func(g *fakeGuest) {
		control, _, _ := g.begin()
		if got := read(t, g.dial(wire.Stdin, 0)); got != "secret" {
			t.Errorf("the input is %q", got)
		}
		for _, o := range []wire.Opening{
			{Stream: wire.Control},
			{Stream: wire.Stdin},
			{Stream: wire.Stdin, Index: 1},
			{Stream: wire.Copy, Index: 1},
			{Stream: wire.Copy, Index: -1},
			{Stream: wire.Artifact},
			{Stream: "shell"},
			{},
		} {
			c := g.dial("", 0)
			g.say(c, o)
			if got := read(t, c); got != "" {
				t.Errorf("%+v gives the guest %q", o, got)
			}
		}
		g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 0}})
	})
	if err != nil {
		t.Error(err)
	}
}

// TestHandOver plays two boots of a guest whose init takes over, and one that asks for
// more.
func TestHandOver(t *testing.T) {
	var kernels []string
	g := &fakeGuest{t: t, h: &HandOver{Hostname: "h", Up: func(kernel string) { kernels = append(kernels, kernel) }}}
	for boot := range 2 {
		control, _, start := g.begin()
		if len(start.Args) != 0 || start.Hostname != "h" || time.Since(time.Unix(0, start.Time)).Abs() > time.Minute || len(kernels) != boot+1 {
			t.Errorf("boot %d: the guest is told %+v, and %q are up", boot, start, kernels)
		}
		_ = control.Close()
	}
	for _, o := range []wire.Opening{{Stream: wire.Stdin}, {Stream: wire.Control, Index: 1}, {Stream: wire.Copy}} {
		c := g.dial(o.Stream, o.Index)
		if got := read(t, c); got != "" {
			t.Errorf("%+v gives the guest %q", o, got)
		}
	}
	if len(kernels) != 2 {
		t.Errorf("%q are up", kernels)
	}
}

// TestInitramfs refuses programs that a guest may not be able to run.
func TestInitramfs(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{script: "no program in ELF format", "/no/such/program": "no such file", "/usr/bin/qemu-img": "shared libraries"} {
		if _, err := Initramfs(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

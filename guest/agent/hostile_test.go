package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/archive"
	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// TestBytes sends strings to the guest that are not Unicode.
func TestBytes(t *testing.T) {
	var all []byte
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	odd := string(all)
	c := Command{
		Args: []string{odd, "", "\xff"}, Env: []string{"A=" + odd}, Workdir: "/" + odd,
		Artifacts: []Transfer{{"/" + odd, t.TempDir()}},
	}
	_, _, _, err := run(t, c, "", func(g *fakeGuest) {
		control, _, start := g.begin()
		want := wire.Start{Args: c.Args, Env: c.Env, Workdir: wire.Text(c.Workdir), Artifacts: wire.Texts{"/" + odd}, Time: start.Time}
		if diff := cmp.Diff(want, *start); diff != "" {
			t.Errorf("(-sent +received)\n%s", diff)
		}
		g.say(control, wire.ToHost{Exit: &wire.Exit{}})
	})
	if err != nil {
		t.Error(err)
	}
}

// TestCheck refuses commands before a guest runs.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	fifo, gone := filepath.Join(dir, "fifo"), filepath.Join(dir, "gone")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string]Command{
		"empty string":          {Args: []string{""}},
		`"a\x00b" has a NUL`:    {Args: []string{"sh", "a\x00b"}},
		`"A=\x00" has a NUL`:    {Args: []string{"sh"}, Env: []string{"A=\x00"}},
		`variable "=b"`:         {Args: []string{"sh"}, Env: []string{"=b"}},
		"5 MiB of arguments":    {Args: []string{"sh", strings.Repeat("x", 5<<20)}},
		"9 MiB of arguments":    {Args: slices.Repeat([]string{"x"}, 1<<20)},
		fifo + " is neither":    {Args: []string{"sh"}, Copies: []Transfer{{fifo, "/x"}}},
		"/dev/null is neither":  {Args: []string{"sh"}, Copies: []Transfer{{"/dev/null", "/x"}}},
		gone + ": no such file": {Args: []string{"sh"}, Copies: []Transfer{{gone, "/x"}}},
		"": {
			Args: []string{"sh", "", "\xff", strings.Repeat("x", 2<<20)}, Env: []string{"A=b=c"},
			Copies: []Transfer{{dir, "/x"}},
		},
	} {
		err := c.Check()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// full is a file that takes no more after a few bytes.
type full struct{ room int }

func (f *full) Write(p []byte) (int, error) {
	n := min(len(p), f.room)
	if f.room -= n; n < len(p) {
		return n, fmt.Errorf("write out: %w", unix.ENOSPC)
	}
	return n, nil
}

// left is a pipe whose reader has left.
type left struct{}

func (left) Write([]byte) (int, error) { return 0, unix.EPIPE }

// TestUnwritten writes output to where there is no room, and where nobody reads.
func TestUnwritten(t *testing.T) {
	for _, c := range []struct {
		name     string
		out, err io.Writer
		want     error
	}{
		{"room", &full{100}, &full{100}, nil},
		{"no room for output", &full{3}, io.Discard, unix.ENOSPC},
		{"no room for errors", io.Discard, &full{3}, unix.ENOSPC},
		{"nobody reads", left{}, left{}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := NewSession(Command{Args: []string{"x"}}, Streams{Out: c.out, Err: c.err})
			g := &fakeGuest{t: t, s: s}
			go func() {
				control, _, _ := g.begin()
				out, errs := g.dial(wire.Stdout, 0), g.dial(wire.Stderr, 0)
				g.say(control, wire.ToHost{Started: true})
				_, _ = out.Write([]byte("output"))
				_, _ = errs.Write([]byte("errors"))
				_, _ = out.Close(), errs.Close()
				g.say(control, wire.ToHost{Exit: &wire.Exit{}})
			}()
			r, err := s.Run(t.Context())
			if err != nil || !errors.Is(r.Unwritten, c.want) {
				t.Errorf("%+v, %v; want %v", r, err, c.want)
			}
		})
	}
}

// TestWhoseFault copies a tree that ends early, and one that the guest has no room for.
func TestWhoseFault(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Command{Args: []string{"x"}, Copies: []Transfer{{dir, "/in"}}}
	_, _, r, err := run(t, c, "", func(g *fakeGuest) {
		control, _, _ := g.begin()
		in := g.dial(wire.Copy, 0)
		_, _ = in.Read(make([]byte, 1000))
		_ = in.Close()
		g.say(control, wire.ToHost{Problem: &wire.Problem{Kind: wire.Uncopied, Text: "copying to /in: \x1b[2J\nno room"}})
		g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 126}})
	})
	if err != nil || r.Uncopied != "copying to /in:  [2J no room" {
		t.Errorf("%+v, %v", r, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	_, _, r, err = run(t, c, "", func(g *fakeGuest) {
		control, _, _ := g.begin()
		if err := archive.Unpack(g.dial(wire.Copy, 0), filepath.Join(t.TempDir(), "in"), nil); err == nil {
			t.Error("nothing is unpacked as something")
		}
		g.say(control, wire.ToHost{Problem: &wire.Problem{Kind: wire.Uncopied, Text: "the archive is empty"}})
		g.say(control, wire.ToHost{Exit: &wire.Exit{Code: 126}})
	})
	if err != nil || !strings.Contains(r.Uncopied, dir) {
		t.Errorf("%+v, %v", r, err)
	}
}

// recording is a connection whose guest says what is recorded.
type recording struct {
	io.Reader
	once   sync.Once
	closed chan struct{}
}

func (c *recording) Accept()           {}
func (c *recording) CloseWrite() error { return nil }
func (c *recording) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *recording) Write(p []byte) (int, error) {
	select {
	case <-c.closed:
		return 0, unix.EPIPE
	default:
		return len(p), nil
	}
}

// FuzzServe has a guest say anything on several connections at once, which zero
// lines separate.
func FuzzServe(f *testing.F) {
	const apart = "\n\n"
	var packed bytes.Buffer
	if err := archive.Pack(&packed, "agent.go"); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(strings.Join([]string{
		`{"stream":"control"}` + "\n" + `{"hello":{"kernel":"6"}}` + "\n" + `{"started":true}` + "\n" + `{"problem":{"kind":"artifact","index":1}}` + "\n" + `{"exit":{"code":3,"artifacts":2}}` + "\n",
		`{"stream":"stdout"}` + "\nout",
		`{"stream":"stderr"}` + "\nerr",
		`{"stream":"stdin"}` + "\n",
		`{"stream":"copy"}` + "\n",
		`{"stream":"artifact"}` + "\n" + packed.String(),
		`{"stream":"artifact","index":1}` + "\n",
	}, apart)))
	f.Add([]byte(`{"stream":"control"}` + "\n" + strings.Repeat(`{"hello":{}}`+"\n", 2)))
	f.Add([]byte(`{"stream":"control"}` + "\n" + strings.Repeat(`{"hello":{}, "started":true, "exit":{"code":-1,"artifacts":-1}}`+"\n", 3)))
	f.Fuzz(func(t *testing.T, said []byte) {
		home := t.TempDir()
		s := NewSession(Command{
			Args: []string{"x"}, Copies: []Transfer{{"agent.go", "/in"}},
			Artifacts: []Transfer{{"/a", filepath.Join(home, "in", "a")}, {"/b", filepath.Join(home, "in", "b")}},
		}, Streams{In: strings.NewReader("in"), Out: io.Discard, Err: io.Discard})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		defer cancel()
		var serving sync.WaitGroup
		for b := range bytes.SplitSeq(said, []byte(apart)) {
			serving.Go(func() {
				s.Serve(&recording{Reader: bytes.NewReader(b), closed: make(chan struct{})})
			})
		}
		served := make(chan struct{})
		go func() {
			serving.Wait()
			close(served)
		}()
		ran := make(chan struct{})
		go func() {
			defer close(ran)
			if r, err := s.Run(ctx); (r == nil) == (err == nil) {
				t.Errorf("%+v, %v", r, err)
			}
		}()
		select {
		case <-served: // all but the control connection, which a Run ends
			cancel()
			<-ran
		case <-ran:
			<-served
		}
		entries, err := os.ReadDir(home)
		if err != nil || len(entries) > 1 || len(entries) == 1 && entries[0].Name() != "in" {
			t.Errorf("%v, %v", entries, err)
		}
	})
}

// TestEndsLate ends a run whose command has ended, but not what it sends.
func TestEndsLate(t *testing.T) {
	c := Command{Args: []string{"x"}, Artifacts: []Transfer{{"/a", filepath.Join(t.TempDir(), "a")}}}
	for name, exit := range map[string]*wire.Exit{"output": {}, "artifact": {Artifacts: 1}} {
		t.Run(name, func(t *testing.T) {
			s := NewSession(c, Streams{Out: io.Discard, Err: io.Discard})
			g := &fakeGuest{t: t, s: s}
			late := errors.New("it takes too long")
			ctx, cancel := context.WithCancelCause(t.Context())
			go func() {
				control, in, _ := g.begin()
				if name == "output" {
					g.say(control, wire.ToHost{Started: true})
				}
				g.say(control, wire.ToHost{Exit: exit})
				time.AfterFunc(10*time.Millisecond, func() { cancel(late) })
				_, _ = in.ReadByte() // the end
			}()
			if r, err := s.Run(ctx); r != nil || !errors.Is(err, late) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// TestWhoKnows loses artifacts here and in the guest: the reason is told by who knows
// it.
func TestWhoKnows(t *testing.T) {
	dir := t.TempDir()
	c := Command{Args: []string{"x"}, Artifacts: []Transfer{{"/a", filepath.Join(dir, "new", "a")}, {"/b", filepath.Join(dir, "b")}, {"/c", filepath.Join(dir, "c")}}}
	_, _, r, err := run(t, c, "", func(g *fakeGuest) {
		if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); err != nil { // where a directory is to be
			t.Error(err)
		}
		control, _, _ := g.begin()
		for i, what := range []string{"agent.go", "/no/such/file", "agent.go"} {
			conn := g.dial(wire.Artifact, i)
			_ = archive.Pack(conn, what)
			_ = conn.CloseWrite()
			_, _ = conn.Read(make([]byte, 1)) // until the host has it
			if i < 2 {
				g.say(control, wire.ToHost{Problem: &wire.Problem{Kind: wire.ArtifactLost, Text: "the guest's reason", Index: i}})
			}
		}
		g.say(control, wire.ToHost{Exit: &wire.Exit{Artifacts: 3}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Lost) != 2 || !strings.Contains(r.Lost[0], "is no directory") || r.Lost[1] != "the guest's reason" || !errors.Is(r.Unwritten, errArtifact) {
		t.Errorf("%q, %v", r.Lost, r.Unwritten)
	}
	if _, err := os.Stat(filepath.Join(dir, "c")); err != nil {
		t.Error(err)
	}
}

// TestDeafGuest tells a guest that reads nothing what to run, and more. Whoever tells it
// goes on, and can end the run.
func TestDeafGuest(t *testing.T) {
	s := NewSession(Command{Args: []string{strings.Repeat("x", 3<<20)}, Terminal: &Size{Rows: 2, Cols: 3}}, Streams{Out: io.Discard, Err: io.Discard})
	if s.Signal(2) {
		t.Error("a signal is sent to nobody")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	ran := make(chan error)
	go func() {
		_, err := s.Run(ctx)
		ran <- err
	}()
	g := &fakeGuest{t: t, s: s}
	g.say(g.dial(wire.Control, 0), wire.ToHost{Hello: &wire.Hello{}})
	<-s.Up()
	told := make(chan int)
	go func() {
		n := 0
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && n <= maxMessages; n++ {
			s.Resize(Size{Rows: 4, Cols: 5})
			if !s.Signal(2) && n > 0 {
				break
			}
		}
		told <- n
	}()
	select {
	case n := <-told:
		if n > maxMessages {
			t.Errorf("%d messages wait for a guest that reads none", n)
		}
	case <-time.After(20 * time.Second):
		t.Error("a guest that reads nothing holds up who signals it")
	}
	cancel(errors.New("enough"))
	if err := <-ran; err == nil || err.Error() != "enough" {
		t.Error(err)
	}
}

// TestOddNames has a guest send files whose names are to do something to a terminal, and
// cannot be unpacked, and say nothing of another artifact.
func TestOddNames(t *testing.T) {
	dir := t.TempDir()
	c := Command{Args: []string{"x"}, Artifacts: []Transfer{{"/a", filepath.Join(dir, "a")}, {"/b", filepath.Join(dir, "b")}}}
	_, _, r, err := run(t, c, "", func(g *fakeGuest) {
		control, _, _ := g.begin()
		g.say(control, wire.ToHost{Started: true})
		for _, stream := range []string{wire.Stdout, wire.Stderr} {
			_ = g.dial(stream, 0).Close()
		}
		conn := g.dial(wire.Artifact, 0)
		w := tar.NewWriter(conn)
		for _, h := range []tar.Header{
			{Typeflag: tar.TypeDir, Name: ".", Mode: 0o755},
			{Typeflag: tar.TypeReg, Name: "\x1b]0;x\a/\u202e/x"},
		} {
			if err := w.WriteHeader(&h); err != nil {
				t.Error(err)
			}
		}
		_ = w.Close()
		_, _ = conn.Read(make([]byte, 1))
		g.say(control, wire.ToHost{Exit: &wire.Exit{}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Lost) != 2 || !strings.Contains(r.Lost[0], " ]0;x / ") || strings.ContainsAny(r.Lost[0], "\x1b\a\u202e") || !strings.Contains(r.Lost[1], "has not sent it") {
		t.Errorf("lost: %q", r.Lost)
	}
}

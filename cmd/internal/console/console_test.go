package console

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary play three parts besides its own: the guard, a
// process that dies with a raw terminal, and one that reads it for a command.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == GuardCommand {
		if err := Guard(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if how := os.Getenv("CALF_TEST_END"); how != "" {
		holdTerminal(how)
	}
	if os.Getenv(envCommand) != "" {
		readCommand()
		return
	}
	os.Exit(m.Run())
}

// holdTerminal opens a console on standard input, says so, and ends.
func holdTerminal(how string) {
	c, err := Open(Spec{Kind: Stdio}, Streams{In: os.Stdin, Out: os.Stdout, Messages: NewMessages(os.Stderr)}, func() {})
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("raw")
	switch how {
	case "close":
		err = c.Close()
	case "line": // close when told to
		_, err = c.In.Read(make([]byte, 1))
		err = errors.Join(err, c.Close())
	case "panic":
		go panic("a panic outside the main goroutine")
		time.Sleep(time.Hour)
	case "wait": // for a signal
		time.Sleep(time.Hour)
	}
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func streams(in, out *os.File) Streams {
	return Streams{In: in, Out: out, Messages: NewMessages(os.Stderr)}
}

func TestParseSpec(t *testing.T) {
	for text, want := range map[string]Spec{
		"stdio": {Kind: Stdio}, "pty": {Kind: PTY}, "none": {Kind: None}, "file:/a:b": {File, "/a:b"},
	} {
		if got, err := ParseSpec(text); err != nil || got != want {
			t.Errorf("ParseSpec(%q) = %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "file", "file:", "tty", "STDIO", "stdio:"} {
		if got, err := ParseSpec(text); err == nil {
			t.Errorf("ParseSpec(%q) = %v, want an error", text, got)
		}
	}
}

func TestEscapeFilter(t *testing.T) {
	for _, tt := range []struct {
		typed, want string
		left        bool
	}{
		{"", "", false},
		{"hello", "hello", false},
		{"a\x01xb", "a", true},
		{"\x01\x01x", "\x01x", false},
		{"\x01\x01\x01xrest", "\x01", true},
		{"\x01lx", "\x01lx", false},
		{"x\x01", "x", false}, // the key after it never comes
		{"\x01X\x03\x1a", "\x01X\x03\x1a", false},
	} {
		for name, split := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r },
			"bytes": iotest.OneByteReader,
			"eof":   iotest.DataErrReader,
		} {
			left := false
			r := &escapeReader{r: split(strings.NewReader(tt.typed)), leave: func() { left = true }}
			got, err := io.ReadAll(iotest.OneByteReader(r))
			if err != nil || string(got) != tt.want || left != tt.left {
				t.Errorf("%q (%s) gives %q, left %v, %v; want %q, %v", tt.typed, name, got, left, err, tt.want, tt.left)
			}
		}
	}
}

func TestFileConsole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("what an earlier run left there"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(Spec{File, path}, Streams{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); len(got) == 0 {
		t.Error("Open empties the file")
	}
	if err := c.Empty(); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("line\r\n"), 3000)
	if n, err := c.Out.Write(want); n != len(want) || err != nil {
		t.Errorf("Write = %d, %v", n, err)
	}
	if c.In != nil {
		t.Error("a file has input")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, want) {
		t.Errorf("file has %d bytes, want %d", len(got), len(want))
	}
	if _, err := Open(Spec{File, t.TempDir() + "/no/such/dir"}, Streams{}, nil); err == nil {
		t.Error("Open of an impossible path succeeds")
	}
}

func TestPipeConsolePassesBytesUntouched(t *testing.T) {
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), func() { t.Error("a pipe has an escape") })
	if err != nil {
		t.Fatal(err)
	}
	const typed = "a\x01x\x00\xff\n"
	if _, err := inW.WriteString(typed); err != nil {
		t.Fatal(err)
	}
	inW.Close()
	if got, err := io.ReadAll(c.In); err != nil || string(got) != typed {
		t.Errorf("input = %q, %v; want %q", got, err, typed)
	}
	want := bytes.Repeat([]byte("\x00\x01\r\n\xff"), 100_000) // far more than a pipe holds
	go func() {
		if n, err := c.Out.Write(want); n != len(want) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
	}()
	got := make([]byte, len(want))
	_, err = io.ReadFull(outR, got)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("output has %d bytes, %v; want %d", len(got), err, len(want))
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestOutputWhoseReaderIsGoneIsDropped(t *testing.T) {
	inR, _ := pipe(t)
	outR, outW := pipe(t)
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), nil)
	if err != nil {
		t.Fatal(err)
	}
	outR.Close()
	for range 2 {
		if n, err := c.Out.Write([]byte("hello")); n != 5 || err != nil {
			t.Errorf("Write = %d, %v; want 5, nil", n, err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestAbortEndsAWriteThatWaits(t *testing.T) {
	inR, _ := pipe(t)
	_, outW := pipe(t) // nobody reads
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.Out.Write(make([]byte, 1<<20))
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("Write to a full pipe returned %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if c.Abort(); !c.Lost() {
		t.Error("Abort cost output, and Lost denies it")
	}
	if err := <-done; err != nil {
		t.Errorf("Write = %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsAReadThatWaits(t *testing.T) {
	inR, _ := pipe(t)
	_, outW := pipe(t)
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.In.Read(make([]byte, 1))
		done <- err
	}()
	time.Sleep(10 * time.Millisecond) // most often, the read waits by now
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Errorf("Read = %v, want EOF", err)
	}
	if _, err := c.In.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("Read after Close = %v, want EOF", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
}

func TestPTYConsole(t *testing.T) {
	c, err := Open(Spec{Kind: PTY}, Streams{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	user, err := os.OpenFile(c.Name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	if _, err := user.WriteString("\x03hi"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(c.In, buf); err != nil || string(buf) != "\x03hi" {
		t.Errorf("input = %q, %v", buf, err)
	}
	if _, err := c.Out.Write([]byte("boot\r\n")); err != nil {
		t.Fatal(err)
	}
	buf = make([]byte, 6)
	if _, err := io.ReadFull(user, buf); err != nil || string(buf) != "boot\r\n" {
		t.Errorf("output = %q, %v", buf, err)
	}
}

func TestPTYWithoutAReaderDropsOutput(t *testing.T) {
	c, err := Open(Spec{Kind: PTY}, Streams{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if n, err := c.Out.Write(make([]byte, 64<<10)); n != 64<<10 || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	if !c.Out.(*writer).behind {
		t.Error("a pseudo-terminal took 1 MiB that nobody read")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestAbortEndsAWriteToAStoppedTerminal(t *testing.T) {
	_, slave := openPTY(t) // nobody reads the master
	inR, _ := pipe(t)
	c, err := Open(Spec{Kind: Stdio}, streams(inR, slave), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.Out.Write(make([]byte, 1<<20))
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	c.Abort()
	if err := <-done; err != nil {
		t.Errorf("Write = %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestMessagesReturnTheCarriageOnlyWhileRaw(t *testing.T) {
	master, slave := openPTY(t)
	if err := unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, &unix.Termios{}); err != nil {
		t.Fatal(err)
	}
	m := NewMessages(slave)
	m.setRaw(true)
	fmt.Fprintf(m, "a\nb\n")
	m.setRaw(false)
	fmt.Fprintf(m, "c\n")
	buf := make([]byte, 8)
	if _, err := io.ReadFull(master, buf); err != nil || string(buf) != "a\r\nb\r\nc\n" {
		t.Errorf("messages = %q, %v", buf, err)
	}
	r, w := pipe(t)
	m = NewMessages(w)
	m.setRaw(true)
	fmt.Fprintf(m, "a\n")
	if n, err := r.Read(buf); string(buf[:n]) != "a\n" {
		t.Errorf("what is no terminal got %q, %v", buf[:n], err)
	}
}

// within fails the test if f has not returned after a time that no wait of this
// package should take.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatalf("%s does not return", what)
	}
}

func TestMessagesHoldUpNobody(t *testing.T) {
	r, w := pipe(t)
	m := NewMessages(w)
	within(t, "a message that nobody reads", func() {
		for range 40 { // a patience for each would be 20 s
			fmt.Fprint(m, strings.Repeat("m", 8<<10))
		}
	})
	r.Close()
	if n, err := m.Write([]byte("m\n")); n != 2 || err != nil {
		t.Errorf("Write to a reader that is gone = %d, %v", n, err)
	}
}

// Another process at the same end of a pipe may take what poll announced.
func TestCompetitionForAPipe(t *testing.T) {
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), nil)
	if err != nil {
		t.Fatal(err)
	}
	// Without poll before them, both would wait if the descriptors did.
	in, out := c.In.(*reader), c.Out.(*writer)
	within(t, "a read of an empty pipe", func() {
		err = withFd(in.file, func(fd int) error { _, err := in.read(fd, make([]byte, 1)); return err })
	})
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a read of an empty pipe = %v", err)
	}
	within(t, "a write to a full pipe", func() {
		for err = nil; err == nil; {
			err = withFd(out.file, func(fd int) error { _, err := out.write(fd, make([]byte, 4096)); return err })
		}
	})
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a write to a full pipe = %v", err)
	}
	if flags, err := unix.FcntlInt(outW.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("the descriptor that others share has flags %#x, %v", flags, err)
	}
	within(t, "Close", func() { err = c.Close() })
	if err != nil {
		t.Error(err)
	}
	_, _ = inW, outR
}

func TestCompetitionForASocket(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fds[1]) }()
	e := endOf(os.NewFile(uintptr(fds[0]), "socket"), false)
	defer e.file.Close()
	within(t, "a read of an empty socket", func() { _, err = e.read(fds[0], make([]byte, 1)) })
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a read of an empty socket = %v", err)
	}
	within(t, "a write to a full socket", func() {
		for err = nil; err == nil; {
			_, err = e.write(fds[0], make([]byte, 4096))
		}
	})
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a write to a full socket = %v", err)
	}
}

// A file that cannot block gets everything in one system call, and one that can no more
// than it takes when it is ready.
func TestWritesAreWhole(t *testing.T) {
	const size = 256 << 10
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	null, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	_, blocking := pipe(t)
	_, shared := pipe(t)
	own := reopen(shared, unix.O_WRONLY)
	if own == shared {
		t.Fatal("a pipe cannot be opened anew")
	}
	defer own.Close()
	for name, tt := range map[string]struct {
		end  end
		want int
	}{
		"a regular file":          {endOf(file, false), size},
		"/dev/null":               {endOf(null, false), size},
		"a pipe opened anew":      {endOf(own, true), size},
		"a pipe of somebody else": {endOf(blocking, false), writeChunk},
	} {
		var n int
		err := withFd(tt.end.file, func(fd int) (err error) {
			_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, size) // of a pipe
			n, err = tt.end.write(fd, make([]byte, size))
			return err
		})
		if n != tt.want || err != nil {
			t.Errorf("%s takes %d bytes at once, %v; want %d", name, n, err, tt.want)
		}
	}
}

func TestInputWhoseWriterHasGoneIsReadToItsEnd(t *testing.T) {
	inR, inW := pipe(t)
	_, outW := pipe(t)
	if _, err := inW.WriteString("last words"); err != nil {
		t.Fatal(err)
	}
	inW.Close()
	c, err := Open(Spec{Kind: Stdio}, streams(inR, outW), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	within(t, "reading to the end", func() {
		if got, err := io.ReadAll(c.In); err != nil || string(got) != "last words" {
			t.Errorf("input = %q, %v", got, err)
		}
	})
}

func TestFileConsoleWaitsForNoReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	within(t, "Open", func() {
		if _, err := Open(Spec{File, path}, Streams{}, nil); !errors.Is(err, unix.ENXIO) {
			t.Errorf("Open of a pipe without a reader = %v", err)
		}
	})
}

func TestTerminalIsRestored(t *testing.T) {
	for _, tt := range []struct {
		end string
		sig os.Signal
	}{{end: "close"}, {end: "panic"}, {"wait", unix.SIGKILL}, {"wait", unix.SIGQUIT}, {"wait", unix.SIGTERM}} {
		t.Run(fmt.Sprint(tt.end, "-", tt.sig), func(t *testing.T) {
			master, slave := openPTY(t)
			before := termios(t, slave)
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "CALF_TEST_END="+tt.end)
			cmd.Stdin = slave
			cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			said := make([]byte, 4)
			if _, err := io.ReadFull(stdout, said); err != nil || string(said) != "raw\n" {
				t.Fatalf("process says %q, %v", said, err)
			}
			if tt.sig != nil {
				if raw := termios(t, slave); raw.Lflag&unix.ICANON != 0 {
					t.Error("the terminal is not raw while the console is open")
				}
				if err := cmd.Process.Signal(tt.sig); err != nil {
					t.Fatal(err)
				}
			}
			_ = cmd.Wait() // how it ended is not the question
			waitFor(t, func() bool { return cmp.Equal(termios(t, slave), before) })
			_ = master
		})
	}
}

// What somebody else has made of the terminal meanwhile is left alone.
func TestOnlyRawTerminalsAreRestored(t *testing.T) {
	for _, end := range []string{"line", "wait"} {
		t.Run(end, func(t *testing.T) {
			master, slave := openPTY(t)
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "CALF_TEST_END="+end)
			cmd.Stdin = slave
			cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(stdout, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			theirs := termios(t, slave)
			theirs.Lflag |= unix.ECHO
			if err := unix.IoctlSetTermios(int(slave.Fd()), unix.TCSETS, &theirs); err != nil {
				t.Fatal(err)
			}
			if end == "line" {
				_, err = master.WriteString("\n")
			} else {
				err = cmd.Process.Kill()
			}
			if err != nil {
				t.Fatal(err)
			}
			// The guard holds the pipe open until it has done its work.
			_, _ = io.Copy(io.Discard, stdout)
			_ = cmd.Wait() // how it ended is not the question
			time.Sleep(100 * time.Millisecond)
			if now := termios(t, slave); now != theirs {
				t.Errorf("the terminal is %+v; somebody made it %+v", now, theirs)
			}
		})
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not happen within 5 s")
		}
	}
}

func termios(t *testing.T, tty *os.File) unix.Termios {
	t.Helper()
	got, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *got
}

func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close(); _ = master.Close() })
	return master, slave
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r, w
}

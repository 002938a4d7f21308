package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// envCommand has the test binary open the streams of a command, and say what there is
// to read.
const envCommand = "CALF_TEST_COMMAND"

// readCommand is that part of the test binary.
func readCommand() {
	c, err := OpenCommand(Streams{In: os.Stdin, Out: os.Stdout}, false, nil)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	if c.In == nil {
		fmt.Println("nothing")
		return
	}
	b, err := io.ReadAll(c.In)
	fmt.Printf("%q, %v\n", b, err)
}

// TestCommandInBackground: a job in the background does not read the terminal, for
// which it would be stopped.
func TestCommandInBackground(t *testing.T) {
	for script, want := range map[string]string{
		`set -m; "$0" & wait "$!"`: "nothing\n",
		`"$0"`:                     `"typed\n", <nil>` + "\n",
	} {
		master, slave := openPTY(t)
		if _, err := master.WriteString("typed\n\x04"); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-c", script, os.Args[0])
		cmd.Env = append(os.Environ(), envCommand+"=1")
		cmd.Stdin = slave
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
		var out []byte
		var err error
		within(t, "the end of "+script, func() { out, err = cmd.Output() })
		if err != nil || string(out) != want {
			t.Errorf("%s: it reads %q, %v; want %q", script, out, err, want)
		}
	}
}

// TestCommandTerminal: the terminal keeps its keys until the command wants what is typed,
// and has them again at the end.
func TestCommandTerminal(t *testing.T) {
	for _, read := range []bool{false, true} {
		master, slave := openPTY(t)
		before := termios(t, slave)
		c, err := OpenCommand(Streams{In: slave, Out: slave, Messages: NewMessages(os.Stderr)}, true, func() {})
		if err != nil {
			t.Fatal(err)
		}
		if now := termios(t, slave); now != before {
			t.Error("the terminal is another before anything is read")
		}
		if read {
			done := make(chan string, 1)
			go func() {
				key := make([]byte, 1)
				n, _ := c.In.Read(key)
				done <- string(key[:n])
			}()
			waitFor(t, func() bool { return termios(t, slave).Lflag&(unix.ICANON|unix.ISIG) == 0 })
			if _, err := master.WriteString("\x03"); err != nil {
				t.Fatal(err)
			}
			within(t, "a key", func() {
				if got := <-done; got != "\x03" {
					t.Errorf("%q was typed", got)
				}
			})
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if _, err := c.In.Read(make([]byte, 1)); err == nil {
			t.Error("it reads on after its end")
		}
		if now := termios(t, slave); now != before {
			t.Error("the terminal is not put back")
		}
	}
}

// TestCommandOutput: a command is told that nobody reads its output; that it is lost
// for another reason is an error of another kind.
func TestCommandOutput(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	r, w := pipe(t)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	master, gone := openPTY(t)
	if err := master.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		out  *os.File
		want error
	}{{"full", full, unix.ENOSPC}, {"no reader", w, unix.EPIPE}, {"a terminal that is gone", gone, unix.EIO}} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := OpenCommand(Streams{In: os.Stdin, Out: tt.out, Err: tt.out}, false, nil)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				for _, to := range []io.Writer{c.Out, c.Err} {
					if _, err := to.Write([]byte("output")); !errors.Is(err, tt.want) {
						t.Errorf("got %v, want %v", err, tt.want)
					}
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	// One that does not read is waited for until the end of the run.
	_, w = pipe(t)
	c, err := OpenCommand(Streams{In: os.Stdin, Out: w}, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, c.Abort)
	within(t, "the end of a write", func() { _, err = c.Out.Write(make([]byte, 1<<20)) })
	if !errors.Is(err, unix.EPIPE) {
		t.Errorf("got %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

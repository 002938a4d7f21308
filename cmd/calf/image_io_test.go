package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// qemuExerciser runs qemu-io on input.
func qemuExerciser(t *testing.T, input string, args ...string) (code int, stdout string) {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.Output()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), withoutTime(string(out))
}

var elapsed = regexp.MustCompile(`(\d+ ops; |(?m:^)\d+,\d+,).*`)

// withoutTime is the output of an exerciser without what differs between two runs.
func withoutTime(out string) string { return elapsed.ReplaceAllString(out, "${1}TIME") }

// exerciser returns calf image io as a process to be.
func exerciser(args ...string) *exec.Cmd {
	cmd := command(append([]string{"image", "io"}, args...)...)
	cmd.Env = append(cmd.Env, "GORACE=atexit_sleep_ms=0") // or it waits for a second before its end
	return cmd
}

// TestImageIOFlags gives flags in all their forms to both programs.
func TestImageIOFlags(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "raw", "base.raw", "2M")
	for _, path := range []string{"a.qcow2", "theirs.qcow2"} {
		qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "2M")
	}
	for _, args := range [][]string{
		{"-c", "length", "a.qcow2"},
		{"a.qcow2", "-c", "length", "--cmd", "map", "--cmd=alloc 0"},
		{"-f", "qcow2", "a.qcow2", "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", "-c", "read -P 6 0 64k", "-c", "length"},
		{"--format=raw", "base.raw", "-c", "length", "-c", "map"},
		{"-r", "a.qcow2", "-c", "write 0 1", "-c", "read -P 5 0 1"},
		{"--read-only", "a.qcow2", "-c", "discard 0 64k"},
		{"-rU", "a.qcow2", "-c", "read 0 1"},
		{"-U", "a.qcow2", "-c", "read 0 1"},
		{"-s", "a.qcow2", "-c", "write -P 9 0 64k", "-c", "read -P 9 0 64k", "-c", "info"},
		{"--snapshot", "-r", "a.qcow2", "-c", "write 0 1"},
		{"-f", "raw", "-s", "base.raw", "-c", "write -P 9 0 64k", "-c", "map"},
		{"a.qcow2", "-c", "read -P 5 0 64k"},
		{"-n", "a.qcow2", "-c", "write 1 1"},
		{"-t", "none", "a.qcow2", "-c", "write 1 1"},
		{"--cache=writethrough", "--discard", "unmap", "a.qcow2", "-c", "discard 0 64k", "-c", "read -P 0 0 64k"},
		{"-t", "directsync", "-d", "off", "a.qcow2", "-c", "write -P 4 0 64k", "-c", "discard 0 64k", "-c", "read -P 4 0 64k"},
		{"--aio=threads", "-m", "a.qcow2", "-c", "write 3 1000", "-c", "aio_read -P 0xcd 3 1000"},
		{"-mn", "a.qcow2", "-c", "write 3 1000", "-c", "read -P 0xcd 3 1000"},
		{"-C", "a.qcow2", "-c", "read 1M 4k", "-c", "map"},
		{"-C", "-r", "a.qcow2", "-c", "read 1M 4k"},
		{"--image-opts", "driver=qcow2,file.filename=a.qcow2", "-c", "length", "-c", "open -o driver=raw a.qcow2"},
		{"--image-opts", "driver=qcow2,file.driver=file,file.filename=a.qcow2,discard=unmap", "-c", "close", "-c", "open driver=raw,file.filename=base.raw", "-c", "length"},
		{"--image-opts", "-f", "raw", "driver=qcow2,file.filename=a.qcow2", "-c", "length"},
		{"--image-opts", "a.qcow2", "-c", "length"},
		{"none.qcow2", "-c", "length"},
		{"", "-c", "length"},
		{"-f", "vdi", "a.qcow2", "-c", "length"},
		{"-t", "fast", "a.qcow2"},
		{"-d", "maybe", "a.qcow2"},
		{"-i", "fast", "a.qcow2"},
		{"-c", "length"},
		{"-c", "open a.qcow2", "-c", "length"},
		{"-c", "foo", "a.qcow2"},
		{"-c", "quit", "a.qcow2", "-c", "foo"},
		{"a.qcow2", "-c", "aio_write 3M 1", "-c", "aio_flush", "-c", "aio_read -P 9 0 1"},
	} {
		wantCode, want := qemuExerciser(t, "", strings.Split(strings.ReplaceAll(strings.Join(args, "\x00"), "a.qcow2", "theirs.qcow2"), "\x00")...)
		code, got, messages := calf(t, append([]string{"image", "io"}, args...)...)
		if got = withoutTime(got); code != wantCode || got != want {
			t.Errorf("%q: code %d, want %d; (-qemu-io +calf)\n%s%s", args, code, wantCode, cmp.Diff(want, got), messages)
		}
		if code != 0 && got == "" && messages == "" {
			t.Errorf("%q: it fails without a word", args)
		}
	}
	if code, out := qemuImg(t, "compare", "a.qcow2", "theirs.qcow2"); code != 0 {
		t.Error(out)
	}
	both(t, "check", "a.qcow2")
}

// TestImageIORefusals says by name what is not supported.
func TestImageIORefusals(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	for says, args := range map[string][]string{
		"--native-aio":    {"-k", "a.qcow2"},
		"--trace":         {"-T", "x", "a.qcow2"},
		"--object":        {"--object", "secret,id=x", "a.qcow2"},
		"--version":       {"-V"},
		"mode native":     {"-i", "native", "a.qcow2"},
		"mode io_uring":   {"--aio", "io_uring", "a.qcow2"},
		"overlap-check":   {"--image-opts", "driver=qcow2,file.filename=a.qcow2,overlap-check=all"},
		`"nbd" for file`:  {"--image-opts", "driver=qcow2,file.driver=nbd,file.filename=a.qcow2"},
		"lazy-refcounts":  {"a.qcow2", "-c", "reopen -o lazy-refcounts=on"},
		"-b is not supp":  {"a.qcow2", "-c", "read -b 0 512"},
		"aio mode native": {"-c", "open -k a.qcow2"},
		"accepts at most": {"a.qcow2", "b.qcow2"},
	} {
		if code, _, messages := calf(t, append([]string{"image", "io"}, args...)...); code != 1 || !strings.Contains(messages, says) {
			t.Errorf("%q: code %d, it says %q, want %q in it", args, code, messages, says)
		}
	}
}

// TestImageIOInput reads commands from standard input, where there is no prompt.
func TestImageIOInput(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	for _, input := range []string{
		"", "length", "length\n", "\n\nlength\n\n", "write -P 3 0 4k\nread -P 3 0 4k\nread -P 4 0 1\nlength\n", "# length\nlength\n", "quit\nlength\n",
		"aio_write 0 4k\naio_flush\nlength\n", "close\nopen a.qcow2\nlength", "foo\nquit\n",
	} {
		wantCode, want := qemuExerciser(t, input, "-f", "qcow2", "a.qcow2")
		cmd := exerciser("a.qcow2")
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.Output()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		if got := withoutTime(string(out)); cmd.ProcessState.ExitCode() != wantCode || got != strings.ReplaceAll(want, "qemu-io> ", "") {
			t.Errorf("%q: code %d, want %d\n%s", input, cmd.ProcessState.ExitCode(), wantCode, cmp.Diff(want, got))
		}
	}
	cmd := exerciser("a.qcow2")
	cmd.Stdin = strings.NewReader(strings.Repeat("x", 1<<20))
	if out, err := cmd.CombinedOutput(); err == nil || len(out) > 1000 || !strings.Contains(string(out), "too long") {
		t.Errorf("a line of a mebibyte: %v, %.200s", err, out)
	}
}

// TestImageIOSignals ends by the signal that a command raises, as qemu-io does, and
// closes the image when one comes from outside.
func TestImageIOSignals(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	for _, c := range []string{"abort", "sigraise 1", "sigraise 2", "sigraise 3", "sigraise 6", "sigraise 9", "sigraise 11", "sigraise 15", "sigraise 17", "sigraise 64"} {
		var status [2]syscall.WaitStatus
		var out [2]string
		for i, cmd := range []*exec.Cmd{
			exec.Command("qemu-io", "-f", "qcow2", "a.qcow2", "-c", "write 0 512", "-c", c, "-c", "length"),
			exerciser("a.qcow2", "-c", "write 0 512", "-c", c, "-c", "length"),
		} {
			var b bytes.Buffer
			cmd.Stdout = &b
			_ = cmd.Run() // its status tells
			status[i], out[i] = cmd.ProcessState.Sys().(syscall.WaitStatus), withoutTime(b.String())
		}
		if status[0]&^0x80 != status[1]&^0x80 { // a core may be dumped
			t.Errorf("%s: status %#x, want %#x", c, status[1], status[0])
		}
		if status[0].Exited() && out[0] != out[1] || !strings.HasPrefix(out[1], "wrote 512/512") {
			t.Errorf("%s: it prints %q, want %q", c, out[1], out[0])
		}
	}
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		cmd := exerciser("a.qcow2", "-c", "write -P 7 0 512", "-c", "length", "-c", "sleep 100000")
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, len("wrote 512/512"))); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%s: %v, want exit code 1", sig, err)
		}
		both(t, "check", "a.qcow2")
	}
}

// TestImageIOTerminal talks to the exerciser over a terminal: it prompts, completes
// and edits, and shows reports as they come.
func TestImageIOTerminal(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	cmd := exerciser("a.qcow2")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 200})
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }).Stop() // which ends the reads, too
	var seen bytes.Buffer
	await := func(what string) {
		t.Helper()
		seen.Reset()
		for b := make([]byte, 1); !strings.HasSuffix(seen.String(), what); {
			if _, err := tty.Read(b); err != nil {
				t.Fatalf("%v; it shows %q, not %q", err, &seen, what)
			}
			seen.Write(b)
		}
	}
	send := func(keys string) {
		t.Helper()
		if _, err := tty.WriteString(keys); err != nil {
			t.Fatal(err)
		}
	}
	await("qemu-io> ")
	for _, c := range []struct{ keys, answer string }{
		{"length\r", "1 MiB\r\n"},
		{"lenX\x7fgth\r", "1 MiB\r\n"},                  // Backspace
		{"le\t\r", "1 MiB\r\n"},                         // completion
		{"\x1b[A\r", "1 MiB\r\n"},                       // the line before
		{"foo\r", "command \"foo\" not found\r\n"},      // a message
		{"aio_write 0 512\r", "bytes at offset 0\r\n"},  // while it waits for a line
		{"read -P 9 0 1\r", "bytes at offset 0\r\n"},    // the reports of both are whole
		{"help quit\r", "quit -- exit the program\r\n"}, // in columns that begin at the left
		{"\r", "qemu-io> "},                             // nothing
		{"aio_\t\x15flush\r", "qemu-io> "},              // Ctrl-U
		{"close\r", "qemu-io> "},                        // no file
		{"length\r", "no file open, try 'help open'\r\n"},
	} {
		send(c.keys)
		await(c.answer)
		if !strings.HasSuffix(c.answer, "> ") {
			await("qemu-io> ")
		}
	}
	send("\x04")
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v, want exit code 1, because commands failed", err)
	}
}

// TestImageIOTerminalIsRestored is ended by a signal while it waits for a line.
func TestImageIOTerminalIsRestored(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer slave.Close()
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exerciser()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill(); _ = master.Close() }).Stop()
	var seen []byte
	for b := make([]byte, 64); !bytes.HasSuffix(seen, []byte("qemu-io> ")); {
		n, err := master.Read(b)
		if err != nil {
			t.Fatalf("%v after %q", err, seen)
		}
		seen = append(seen, b[:n]...)
	}
	if raw, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || *raw == *before {
		t.Errorf("the terminal is not raw, %v", err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v, want exit code 1", err)
	}
	if after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || *after != *before {
		t.Errorf("the terminal is %+v, %v; it was %+v", after, err, before)
	}
}

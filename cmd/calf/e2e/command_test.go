package e2e

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// commandImage makes an image with busybox alone, and returns the arguments that run
// a command in it with the oldest stock kernel, which unpacks itself in half the time
// that newer ones take. The root is for calf to find.
func commandImage(t *testing.T) (image string, args []string) {
	t.Helper()
	lab.Need(t)
	im := newImages(t)
	root := im.path("root.raw")
	if err := lab.GuestRoot(root, 128, map[string]string{"/etc/passwd": "root:x:0:0::/root:/bin/sh\nworker:x:1000:1000::/tmp:/bin/sh\n"}); err != nil {
		t.Fatal(err)
	}
	k := kernels(t)[0]
	return root, []string{
		"run", "--kernel", k.Image, "--initrd", k.Initrd, "--cmdline", "quiet",
		"--memory", "256MiB", "--disk", root + ",format=raw", "--log-level", "debug",
	}
}

// TestCommand runs commands in a guest, and looks at what a user sees of them.
func TestCommand(t *testing.T) {
	image, base := commandImage(t)
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	note := filepath.Join(t.TempDir(), "note")
	if err := os.WriteFile(note, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		flags   []string
		command []string
		in      string
		out     string
		code    int
	}{
		{"output and status", nil, []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, "", "out\n", 7},
		{"input", nil, []string{"sort"}, "c\na\nb\n", "a\nb\nc\n", 0},
		{"environment", []string{"-e", "X=a b", "--workdir", "/tmp", "--user", "worker", "--copy", note + ":/notes/"}, []string{"sh", "-c", `echo "$X|$PWD|$USER|$HOME|$(id -u)|$(id -g)|$(stat -c %U:%a /notes/note)" >/dev/stdout`}, "", "a b|/tmp|worker|/tmp|1000|1000|worker:640\n", 0},
		{"not found", nil, []string{"no-such-command"}, "", "", 127},
		{"not executable", nil, []string{"/etc/passwd"}, "", "", 126},
		{"killed", nil, []string{"sh", "-c", "kill -9 $$"}, "", "", 137},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append(append(append([]string{}, base...), tt.flags...), "--")
			cmd := exec.Command(lab.Calf(), append(args, tt.command...)...)
			cmd.Stdin = strings.NewReader(tt.in)
			vm := startCommand(t, cmd)
			vm.exits(tt.code)
			if got := vm.console(); got != tt.out {
				t.Errorf("output %q, want %q", got, tt.out)
			}
		})
	}
	after, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Errorf("the image %s has changed", filepath.Base(image))
	}
}

// TestCommandStreams moves 100 MB through the streams of a command, and files to
// the guest and back.
func TestCommandStreams(t *testing.T) {
	_, base := commandImage(t)
	dir := t.TempDir()
	src, out := filepath.Join(dir, "src dir"), filepath.Join(dir, "out")
	if err := os.MkdirAll(filepath.Join(src, "deep", "er"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"a": "1", "deep/ü \n x": "2", "deep/er/run.sh": "#!/bin/sh\necho ran >>/src/a\n"} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("deep/er", filepath.Join(src, "link")); err != nil {
		t.Fatal(err)
	}
	odd, back := filepath.Join(dir, "odd"), filepath.Join(dir, "back")
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	plantOddities(t, odd)
	in := noise(1, 100e6)
	file := filepath.Join(dir, "files.toml")
	const text = "copy = [{ from = './src dir/', to = '/src' }]\nartifact = [{ from = '/src', to = 'out' }, { from = '/src/a', to = 'file/' }]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(append([]string{}, base...), file,
		"--copy", file+":/src/deep/", "--artifact", "/etc/passwd="+dir+"/new/", "--artifact", "/no/such/file",
		"--copy", odd+":/odd", "--artifact", ":/odd="+back,
		"--", "sh", "-c", "/src/link/run.sh; cat; stat -c %a /odd/setuid /odd/sticky >&2; echo done >&2; exit 3")
	cmd := exec.Command(lab.Calf(), args...)
	cmd.Dir = dir
	stdout, err := os.Create(filepath.Join(dir, "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	cmd.Stdin, cmd.Stdout = bytes.NewReader(in), stdout
	vm := startCommand(t, cmd)
	vm.exits(3)
	if got, err := os.ReadFile(stdout.Name()); err != nil || !bytes.Equal(got, in) {
		t.Errorf("%d bytes came back, which are not the %d that were sent; %v", len(got), len(in), err)
	}
	if diff := cmp.Diff(describe(t, odd), describe(t, back)); diff != "" {
		t.Errorf("what came back is not what was sent (-sent +back)\n%s", diff)
	}
	if !strings.Contains(vm.stderr(), "\n755\n1777\ndone\n") || !strings.Contains(vm.stderr(), "/no/such/file") {
		t.Errorf("it said %q", vm.stderr())
	}
	if b, err := os.ReadFile(filepath.Join(out, "a")); err != nil || string(b) != "1ran\n" {
		t.Errorf("the artifact has %q, %v", b, err)
	}
	for _, name := range []string{"deep/ü \n x", "link/run.sh", "deep/files.toml", "../file/a"} {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "new", "passwd")); err != nil {
		t.Error(err)
	}
}

// TestCommandEnds ends commands by signals, timeouts and panics, and boots what has
// been kept.
func TestCommandEnds(t *testing.T) {
	image, base := commandImage(t)
	run := func(t *testing.T, flags []string, script string) *vm {
		t.Helper()
		args := append(append(append([]string{}, base...), flags...), "--", "sh", "-c", script)
		return startCalf(t, args...)
	}
	t.Run("signal", func(t *testing.T) {
		vm := run(t, nil, "trap 'echo trapped; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
		vm.waitFor("ready\n")
		vm.signal(syscall.SIGTERM)
		vm.exits(9)
		if !strings.HasSuffix(vm.console(), "trapped\n") {
			t.Errorf("output %q", vm.console())
		}
	})
	t.Run("second signal", func(t *testing.T) {
		vm := run(t, nil, "trap '' INT; echo ready; while :; do sleep 1; done")
		vm.waitFor("ready\n")
		vm.signal(syscall.SIGINT)
		vm.waitForMessage("a second signal ends the guest")
		vm.signal(syscall.SIGINT)
		vm.exits(130)
	})
	t.Run("timeout", func(t *testing.T) {
		vm := run(t, []string{"--timeout", "40s"}, "echo ready; while :; do sleep 1; done")
		vm.exits(124)
		if !strings.Contains(vm.stderr(), "the run had not ended after 40s") {
			t.Errorf("it said %q", vm.stderr())
		}
	})
	t.Run("boot timeout", func(t *testing.T) {
		vm := run(t, []string{"--boot-timeout", "1s"}, "true")
		vm.exits(124)
		if !strings.Contains(vm.stderr(), "boot timeout") {
			t.Errorf("it said %q", vm.stderr())
		}
	})
	t.Run("panic", func(t *testing.T) {
		vm := run(t, nil, "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 100")
		vm.exits(255)
		if s := vm.stderr(); !strings.Contains(s, "panicked") || !strings.Contains(s, "sysrq") {
			t.Errorf("it said %q", s)
		}
	})
	t.Run("keep", func(t *testing.T) {
		kept := filepath.Join(filepath.Dir(image), "kept.qcow2")
		vm := run(t, []string{"--keep", kept}, "echo kept >/file; exit 4")
		vm.exits(4)
		again := slices.Clone(base)
		again[slices.Index(again, image+",format=raw")] = kept
		vm = startCalf(t, append(again, "--", "cat", "/file")...)
		vm.exits(0)
		if vm.console() != "kept\n" {
			t.Errorf("output %q", vm.console())
		}
	})
}

// startOnTerminal starts calf on a terminal, which the caller closes.
func startOnTerminal(t *testing.T, args []string) (*os.File, *vm) {
	t.Helper()
	host, guest, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := pty.Setsize(host, &pty.Winsize{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(lab.Calf(), args...)
	cmd.Stdin, cmd.Stdout = guest, guest
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	vm := startCommand(t, cmd)
	if err := guest.Close(); err != nil {
		t.Fatal(err)
	}
	return host, vm
}

// TestCommandTerminal runs a shell on a terminal, whose size changes. Ctrl-C is for the
// run while the guest boots, and for the guest then.
func TestCommandTerminal(t *testing.T) {
	_, base := commandImage(t)
	args := append(base, "--user", "worker", "--", "sh")
	boots, early := startOnTerminal(t, args)
	defer boots.Close()
	early.waitForMessage("starting the vCPUs")
	if _, err := boots.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	early.exits(128 + int(syscall.SIGINT))

	host, vm := startOnTerminal(t, args)
	defer host.Close()
	seen := make(chan string, 1000)
	go func() {
		defer close(seen)
		for lines := bufio.NewScanner(host); lines.Scan(); {
			seen <- lines.Text()
		}
	}()
	say := func(line string) {
		t.Helper()
		if _, err := host.WriteString(line + "\n"); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want string) {
		t.Helper()
		for late := time.After(patience); ; {
			select {
			case line, ok := <-seen:
				if strings.TrimSpace(line) == want {
					return
				}
				if !ok {
					t.Fatalf("the terminal ended before %q", want)
				}
			case <-late:
				t.Fatalf("%q did not come", want)
			}
		}
	}
	say("[ -t 0 ] && [ -t 2 ] && echo opened >$(tty) && echo yes=$((40+2)); stty size")
	expect("yes=42")
	expect("30 100")
	if err := pty.Setsize(host, &pty.Winsize{Rows: 11, Cols: 77}); err != nil {
		t.Fatal(err)
	}
	say("while [ \"$(stty size)\" != '11 77' ]; do sleep 0.1; done; echo resized=$((1+1))")
	expect("resized=2")
	say("echo ready=$((2+1)); sleep 1000") // which Ctrl-C ends, and not calf
	expect("ready=3")
	if _, err := host.WriteString("\x03"); err != nil {
		t.Fatal(err)
	}
	say("echo alive=$((3+1)); exit 5")
	expect("alive=4")
	vm.exits(5)
}

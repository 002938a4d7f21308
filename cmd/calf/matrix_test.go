package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/qcow2"
)

// matrixReport is what --json writes for targets, and junitReport what --junit writes,
// as scripts read them.
type (
	matrixReport struct {
		Targets []struct {
			Name string `json:"name"`
			launch.Result
		} `json:"targets"`
		ExitCode int     `json:"exit_code"`
		Seconds  float64 `json:"duration_seconds"`
	}
	junitReport struct {
		Suite struct {
			Name   string `xml:"name,attr"`
			Tests  int    `xml:"tests,attr"`
			Errors int    `xml:"errors,attr"`
			Cases  []struct {
				Name    string    `xml:"name,attr"`
				Out     string    `xml:"system-out"`
				Error   *struct{} `xml:"error"`
				Skipped *struct{} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
)

// matrixFile writes a file with a target for each name and kernel, in turn.
func matrixFile(t *testing.T, namesAndKernels ...string) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	var text strings.Builder
	text.WriteString("vm.memory = \"64MiB\"\n")
	for pair := range slices.Chunk(namesAndKernels, 2) {
		fmt.Fprintf(&text, "[[target]]\nname = %q\nboot.kernel = %q\n", pair[0], pair[1])
	}
	path = filepath.Join(dir, "matrix.toml")
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, path
}

func readMatrix(t *testing.T, dir string) (m matrixReport, j junitReport) {
	t.Helper()
	for name, decode := range map[string]func([]byte) error{
		"r.json": func(b []byte) error { return json.Unmarshal(b, &m) },
		"r.xml":  func(b []byte) error { return xml.Unmarshal(b, &j) },
	} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = decode(b)
		}
		if err != nil {
			t.Fatalf("%v: %s", err, b)
		}
	}
	return m, j
}

// TestMatrix runs guests that end well, badly, and not at all, side by side.
func TestMatrix(t *testing.T) {
	good := guest(t, (*guesttest.Program).PowerOff)
	dir, file := matrixFile(t, "good", good,
		"endless", guest(t, (*guesttest.Program).Spin),
		"broken", guest(t, func(p *guesttest.Program) { p.Print("oops"); p.Out8(0x505, 1); p.Halt() }),
		"late", good)
	text, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, bytes.Replace(text, []byte(`"endless"`), []byte("\"endless\"\nvm.timeout = \"1s\""), 1), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"run", file, "-j", "2", "--json", dir + "/r.json", "--junit", dir + "/r.xml"}
	code, stdout, stderr := calf(t, args...)
	if code != launch.ExitTimeout {
		t.Errorf("exit code %d, want that of the first target that failed", code)
	}
	lines := strings.SplitAfter(strings.ReplaceAll(stdout, "\r", ""), "\n")
	slices.Sort(lines)
	if got, want := strings.Join(lines, ""), "broken | hello\nbroken | oops\nendless | hello\ngood | hello\nlate | hello\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	for _, want := range []string{
		"calf: good: passed in ", "calf: late: passed in ",
		"calf: endless: failed with 124 in ", "s: timeout: the run had not ended after 1s and was ended\n",
		"calf: broken: failed with 255 in ", "\ncalf: 4 targets: 2 passed, 2 failed\n",
	} {
		if strings.Count(stderr, want) != 1 {
			t.Errorf("it says %q, which lacks one %q", stderr, want)
		}
	}
	m, j := readMatrix(t, dir)
	var names []string
	for i, r := range m.Targets {
		names = append(names, fmt.Sprintf("%s %s %d", r.Name, r.Outcome, r.ExitCode))
		if r.Seconds <= 0 || j.Suite.Cases[i].Name != r.Name || (j.Suite.Cases[i].Error != nil) != (r.ExitCode != 0) {
			t.Errorf("target %s took %v s and is %+v for JUnit", r.Name, r.Seconds, j.Suite.Cases[i])
		}
	}
	if want := []string{"good poweroff 0", "endless timeout 124", "broken panic 255", "late poweroff 0"}; !slices.Equal(names, want) {
		t.Errorf("targets %q, want %q", names, want)
	}
	if m.ExitCode != code || m.Seconds <= 0 || j.Suite.Name != "matrix.toml" || j.Suite.Errors != 2 || j.Suite.Cases[2].Out != "hello\noops" {
		t.Errorf("reports %+v and %+v", m, j)
	}
}

// TestMatrixChoosesTargets runs some targets, each with a console of its own.
func TestMatrixChoosesTargets(t *testing.T) {
	good := guest(t, (*guesttest.Program).PowerOff)
	dir, file := matrixFile(t, "a", good, "b", "no-such-kernel", "c", good)
	code, stdout, stderr := calf(t, "run", file, "--target", "c", "--target", "a", "--console", "file:"+dir+"/{target}.log")
	if code != 0 || stdout != "" || !strings.HasSuffix(stderr, "calf: 2 targets: 2 passed, 0 failed\n") {
		t.Errorf("exit code %d, output %q, messages %q", code, stdout, stderr)
	}
	for _, name := range []string{"a", "c"} {
		if b, err := os.ReadFile(dir + "/" + name + ".log"); err != nil || string(b) != "hello\r\n" {
			t.Errorf("the console of %s has %q, %v", name, b, err)
		}
	}
	newQCOW2(t, dir+"/root.qcow2", qcow2.CreateOptions{})
	mustCalf(t, "run", file, "--dry-run", "--target", "a", "--target", "c", "--disk", dir+"/root.qcow2", "--keep", "{target}.qcow2", "--", "true")
	if _, out, _ := calf(t, "__complete", "run", file, "--target", ""); out != "a\nb\nc\n:4\n" {
		t.Errorf("completing a target offers %q", out)
	}
	// A target whose host is at fault lets the others run.
	code, _, stderr = calf(t, "run", file)
	if code != launch.ExitError || !strings.Contains(stderr, "calf: b: failed with 125 in ") || !strings.HasSuffix(stderr, "calf: 3 targets: 2 passed, 1 failed\n") {
		t.Errorf("exit code %d, messages %q", code, stderr)
	}
	if out := mustCalf(t, "run", file, "--dry-run", "--target", "a", "--cpus", "3"); !strings.Contains(out, `name = "a"`) || !strings.Contains(out, "cpus = 3") {
		t.Errorf("it prints %s", out)
	}
}

// TestBadMatrix checks what is refused before any target runs.
func TestBadMatrix(t *testing.T) {
	kernel := new(guesttest.Program).Kernel(t)
	for _, tt := range []struct {
		name  string
		args  []string
		lines int
		says  string
	}{
		{"no such target", []string{"--target", "6.13"}, 1, `--target 6.13: there is no such target: did you mean "6.12"? (there are: 6.12 and 6.1)`},
		{"no job", []string{"-j", "0"}, 1, "--jobs must be 1 or more, not 0"},
		{"one console", []string{"--console", "file:log"}, 1, "--console: more than one target would write log: put {target} in it"},
		{"one overlay", []string{"--disk", "a.qcow2", "--keep", "k.qcow2", "--", "true"}, 1, "--keep: more than one target would write k.qcow2"},
		{"one artifact", []string{"--artifact", "/a=b", "--", "true"}, 1, "--artifact /a: to is that of another target too"},
		{"one socket", []string{"--vsock", "s"}, 1, "--vsock is that of another target too"},
		{"bad flag, told once", []string{"--cpus", "0"}, 1, "--cpus must be"},
		{"dry run", []string{"--dry-run", "--initrd", "/no/such/file"}, 1, "target 6.12: initrd"},
		{"one file for both", []string{"--json", "/tmp/x/../same-report", "--junit", "/tmp/same-report"}, 1, "--json and --junit name the same file"},
		{"report nowhere", []string{"--junit", "/no/such/dir/r.xml"}, 1, "--junit: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, file := matrixFile(t, "6.12", kernel, "6.1", kernel)
			code, stdout, stderr := calf(t, append([]string{"run", file}, tt.args...)...)
			refused(t, tt.lines, code, stdout, stderr, tt.says)
		})
	}
	code, stdout, stderr := calf(t, "run", "--kernel", kernel, "--target", "a")
	refused(t, 1, code, stdout, stderr, "--target a: there are no targets to choose from")
}

// TestMatrixSignals ends a matrix of guests that listen, and of guests that are deaf.
func TestMatrixSignals(t *testing.T) {
	listening := guest(t, func(p *guesttest.Program) {
		p.Out16(0x602, 1<<8) // enable the power button
		p.Print("up")
		p.PollPort(0x600, 1<<8, 1<<8)
		p.PowerOff()
	})
	deaf := guest(t, func(p *guesttest.Program) { p.Print("up"); p.Spin() })
	for _, tt := range []struct {
		name   string
		kernel string
		send   []unix.Signal
		target string
	}{
		{"power button", listening, []unix.Signal{unix.SIGTERM}, "poweroff"},
		{"second signal", deaf, []unix.Signal{unix.SIGINT, unix.SIGTERM}, "killed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, file := matrixFile(t, "a", tt.kernel, "b", tt.kernel, "c", tt.kernel)
			logs := []string{dir + "/a.log", dir + "/b.log"}
			cmd := command("run", file, "-j2", "--console", "file:"+dir+"/{target}.log", "--json", dir+"/r.json", "--junit", dir+"/r.xml")
			var messages bytes.Buffer
			cmd.Stderr = &messages
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Process.Kill() }()
			for _, log := range logs {
				waitForFile(t, log, "up")
			}
			for _, sig := range tt.send {
				time.Sleep(50 * time.Millisecond) // signals of one moment may arrive in any order
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
			}
			_ = cmd.Wait() // the exit code says more
			last := tt.send[len(tt.send)-1]
			if got := cmd.ProcessState.ExitCode(); got != 128+int(last) {
				t.Errorf("exit code %d; calf says %q", got, &messages)
			}
			m, j := readMatrix(t, dir)
			if m.Targets[0].Outcome != tt.target || m.Targets[1].Outcome != tt.target || m.Targets[2].Outcome != "not-started" || j.Suite.Cases[2].Skipped == nil {
				t.Errorf("reports %+v and %+v", m, j)
			}
			for _, want := range []string{"calf: a: ", "a | calf: ", "b | calf: ", "calf: c: not started: ", " 1 not started\n"} {
				if !strings.Contains(messages.String(), want) {
					t.Errorf("calf says %q, which lacks %q", &messages, want)
				}
			}
			if n := strings.Count(messages.String(), "a second signal ends it"); n != 2 {
				t.Errorf("%d targets say how they answer the first signal, want 2: %q", n, &messages)
			}
		})
	}
}

// waitForFile waits until the file at path holds text.
func waitForFile(t *testing.T, path, text string) {
	t.Helper()
	for late := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(text)) {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("%s has %q, %v", path, b, err)
		}
	}
}

// TestMatrixOnATerminal shows a line for each target, and no other target's output than
// that of one that has failed.
func TestMatrixOnATerminal(t *testing.T) {
	_, file := matrixFile(t, "good", guest(t, (*guesttest.Program).PowerOff),
		"bad", guest(t, func(p *guesttest.Program) { p.Print("oops\n"); p.Out8(0x505, 1); p.Halt() }))
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	cmd := command("run", file, "-j2")
	cmd.Env = append(cmd.Env, "TERM=xterm")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	var seen bytes.Buffer
	_, _ = seen.ReadFrom(master) // until calf has gone, which is an error
	_ = cmd.Wait()               // the exit code says more
	got := seen.String()
	if cmd.ProcessState.ExitCode() != 255 || strings.Contains(got, "good | ") {
		t.Errorf("exit code %d, and the terminal got %q", cmd.ProcessState.ExitCode(), got)
	}
	for _, want := range []string{"good  PASS     ", "bad   FAIL     255 in ", "bad | oops\r\n", "calf: 2 targets: 1 passed, 1 failed\r\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("the terminal got %q, which lacks %q", got, want)
		}
	}
}

// TestJUnitOfARun writes the report of a run without targets, and of one that was
// refused.
func TestJUnitOfARun(t *testing.T) {
	dir := t.TempDir()
	kernel := guest(t, (*guesttest.Program).PowerOff)
	args := []string{"run", "--memory", "64M", "--kernel", kernel, "--json", dir + "/r.json", "--junit", dir + "/r.xml"}
	if out := mustCalf(t, args...); out != "hello\r\n" {
		t.Errorf("output %q", out)
	}
	if r := readResult(t, dir+"/r.json"); r.Outcome != "poweroff" {
		t.Errorf("result %+v", r)
	}
	_, j := readMatrix(t, dir)
	if j.Suite.Tests != 1 || j.Suite.Errors != 0 || j.Suite.Cases[0].Name != "calf run" {
		t.Errorf("report %+v", j)
	}
	for _, bad := range [][]string{{"--cpus", "0"}, {"--bogus"}, {"--cpus", "0", "--", "true"}} {
		calf(t, append(args, bad...)...)
		if _, j := readMatrix(t, dir); j.Suite.Tests != 1 || j.Suite.Errors != 1 || j.Suite.Cases[0].Name != "calf run" {
			t.Errorf("report %+v", j)
		}
	}
}

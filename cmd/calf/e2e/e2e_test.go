// Package e2e holds the tests that boot stock Linux guests with calf and look
// at what a user sees: exit codes, the console, the images afterwards.
//
// A test prepares images, writes the script that the guest runs as its first
// process on its root disk, starts calf, and checks:
//
//	g := guest{kernel: k, cpus: 2, disks: []string{root}, script: `
//		dd if=/dev/vda of=/dev/null count=1
//		poweroff -f`}
//	vm := g.start(t)
//	vm.exits(0)
//
// The tests run on hardware KVM or, where there is none, inside one nested
// machine that package lab boots for all of them.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

func TestMain(m *testing.M) {
	if os.Getenv(asVsockGuest) != "" {
		vsockGuest()
		return
	}
	if os.Getenv(asSpeedGuest) != "" {
		speedGuest()
		return
	}
	lab.Main(m, lab.Config{Files: repositoryFiles(), Prepare: buildGoExample})
}

// patience bounds every wait for a guest. A boot takes ten seconds on an
// emulated processor that others use too.
const patience = 3 * time.Minute

// eachKernel runs test once for each stock kernel.
func eachKernel(t *testing.T, test func(t *testing.T, k lab.Kernel)) {
	for _, k := range kernels(t) {
		t.Run("linux="+k.Series(), func(t *testing.T) { test(t, k) })
	}
}

func kernels(t *testing.T) []lab.Kernel {
	t.Helper()
	list, err := lab.Kernels()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// newestKernel is the kernel of tests for which one is enough.
func newestKernel(t *testing.T) lab.Kernel {
	t.Helper()
	list := kernels(t)
	return list[len(list)-1]
}

// guest is a guest to be: the fields become the flags of calf run.
type guest struct {
	kernel  lab.Kernel
	cpus    int
	memory  string   // default 256MiB
	disks   []string // values of --disk; the first is the root
	cmdline string
	flags   []string // further flags
	// script is run by a shell as the guest's first process, after prelude.
	// If it ends, or a command of it fails, the guest's kernel panics.
	script string
}

// prelude begins every script. A line of output is only a line of its own if
// the kernel's messages stay off the console.
const prelude = `
export PATH=/bin
dmesg -n 1
set -e
`

// args are the arguments of calf that run the guest.
func (g guest) args(t *testing.T) []string {
	t.Helper()
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := g.kernel.WithScript(initrd, prelude+g.script); err != nil {
		t.Fatal(err)
	}
	memory := g.memory
	if memory == "" {
		memory = "256MiB"
	}
	args := []string{
		"run", "--kernel", g.kernel.Image, "--initrd", initrd,
		"--cmdline", strings.TrimSpace("quiet " + g.cmdline),
		"--cpus", fmt.Sprint(max(1, g.cpus)), "--memory", memory,
	}
	for _, d := range g.disks {
		args = append(args, "--disk", d)
	}
	return append(args, g.flags...)
}

// start boots the guest. The test fails if calf is still running at its end.
func (g guest) start(t *testing.T) *vm {
	t.Helper()
	lab.Need(t)
	return startCalf(t, g.args(t)...)
}

// vm is a calf process and what it says.
type vm struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{} // closed when calf has exited and out, errs are whole

	mu   sync.Mutex
	out  bytes.Buffer  // guarded by mu; standard output: the guest's console
	errs bytes.Buffer  // guarded by mu; standard error: calf's own messages
	more chan struct{} // guarded by mu; closed and replaced when out or errs has grown
}

// startCalf runs calf with args, without a standard input.
func startCalf(t *testing.T, args ...string) *vm {
	t.Helper()
	return startCommand(t, exec.Command(lab.Calf(), args...))
}

// startCommand runs a command that is or becomes calf.
func startCommand(t *testing.T, cmd *exec.Cmd) *vm {
	t.Helper()
	v := &vm{t: t, cmd: cmd, done: make(chan struct{}), more: make(chan struct{})}
	if v.cmd.Stdout == nil {
		v.cmd.Stdout = stream{v, &v.out}
	}
	v.cmd.Stderr = stream{v, &v.errs}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = v.cmd.Wait() // the state says it all
		close(v.done)
	}()
	t.Cleanup(func() {
		select {
		case <-v.done:
		default:
			t.Error("calf still runs at the end of the test")
			_ = v.cmd.Process.Kill()
			<-v.done
		}
		if t.Failed() {
			t.Logf("%s\n--- stderr ---\n%s\n--- console ---\n%s", strings.Join(cmd.Args, " "), v.stderr(), v.console())
		}
	})
	return v
}

// stream appends to one of a vm's buffers and wakes who waits for more.
type stream struct {
	v   *vm
	buf *bytes.Buffer
}

func (s stream) Write(p []byte) (int, error) {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	close(s.v.more)
	s.v.more = make(chan struct{})
	return s.buf.Write(p)
}

// console is what the guest has written to its console so far.
func (v *vm) console() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return strings.ReplaceAll(v.out.String(), "\r\n", "\n")
}

func (v *vm) stderr() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.errs.String()
}

// waitFor waits until the guest has written text to its console.
func (v *vm) waitFor(text string) {
	v.t.Helper()
	v.wait(v.console, text)
}

// waitForMessage waits until calf itself has said text.
func (v *vm) waitForMessage(text string) {
	v.t.Helper()
	v.wait(v.stderr, text)
}

// wait waits until what said returns holds text.
func (v *vm) wait(said func() string, text string) {
	v.t.Helper()
	timeout := time.After(patience)
	for {
		v.mu.Lock()
		more := v.more
		v.mu.Unlock()
		if strings.Contains(said(), text) {
			return
		}
		select {
		case <-more:
		case <-v.done:
			if strings.Contains(said(), text) {
				return
			}
			v.t.Fatalf("calf exited with status %d before %q was said", v.status(), text)
		case <-timeout:
			v.kill()
			v.t.Fatalf("%q was not said within %v", text, patience)
		}
	}
}

// exits waits until calf has exited and checks that its status is one of those.
func (v *vm) exits(want ...int) {
	v.t.Helper()
	select {
	case <-v.done:
	case <-time.After(patience):
		v.kill()
		v.t.Fatalf("calf did not exit within %v", patience)
	}
	if got := v.status(); !slices.Contains(want, got) {
		v.t.Fatalf("calf exited with status %d, want %d", got, want)
	}
}

// status is the exit status of calf, which has exited; as a shell says it.
func (v *vm) status() int {
	state := v.cmd.ProcessState
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}

// kill ends calf as nothing can be prepared for, and waits until it is gone.
func (v *vm) kill() {
	v.t.Helper()
	v.signal(syscall.SIGKILL)
	<-v.done
}

func (v *vm) signal(s syscall.Signal) {
	v.t.Helper()
	if err := v.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		v.t.Fatal(err)
	}
}

// value returns what the guest printed on a line "name=value".
func (v *vm) value(name string) string {
	v.t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + `=(.*)$`).FindStringSubmatch(v.console())
	if m == nil {
		v.t.Fatalf("the guest printed no %s=", name)
	}
	return strings.TrimSpace(m[1])
}

// run runs a tool and returns its standard output; a failure is the test's.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, status := try(t, name, args...)
	if status != 0 {
		t.Fatalf("%s %s: exit status %d\n%s", name, strings.Join(args, " "), status, out)
	}
	return out
}

// try runs a tool and returns its standard output and exit status.
func try(t *testing.T, name string, args ...string) (stdout string, status int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	path := name
	if _, err := exec.LookPath(name); err != nil {
		path = filepath.Join("/usr/sbin", name)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if err != nil {
		out = slices.Concat(out, errs.Bytes())
	}
	return string(out), cmd.ProcessState.ExitCode()
}

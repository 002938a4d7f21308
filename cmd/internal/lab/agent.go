package lab

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What the outer machine looks like to those inside.
const (
	insideScratch   = "/lab"             // the scratch disk
	insideSpec      = "/lab/spec.json"   // what to run: a job
	insideTemp      = "/lab/tmp"         // TMPDIR
	insideArtifacts = "/lab/artifacts"   // ArtifactDir
	insideBin       = "/lab/bin"         // the agent, calf, the command
	insideAgent     = insideBin + "/lab" // the first process
	insideCalf      = insideBin + "/calf"
	insideLib       = "/lab/lib" // shared libraries of what is in insideBin
	insideCache     = "/cache"   // CALF_CACHE, on the root disk
)

// reportPort is the name of the virtio-console port between agent and host.
const reportPort = "calf.lab"

// job is what the host asks the agent to run.
type job struct {
	Args []string
	Env  []string
	Dir  string
}

// message is what the agent tells the host, as a gob stream over the port. The
// host writes one byte the other way to have the command end.
type message struct {
	// Ready: the command is about to start.
	Ready bool
	// Stdout and Stderr are output of the command.
	Stdout, Stderr []byte
	// File and Data are the next piece of an artifact, by its path relative
	// to ArtifactDir.
	File string
	Data []byte
	// Done: the command ended with Status, and all else has been said.
	Done   bool
	Status int
}

// quitGrace is how long a command that was sent SIGQUIT, on which a Go program
// prints where it stands, may take before it is killed.
const quitGrace = 10 * time.Second

// RunAgent does not return in the first process of an outer machine, where it
// runs what the host asked for and switches the machine off. In any other
// process it does nothing. It comes first in the main function of every
// executable that calls Main or Run.
func RunAgent() {
	if os.Getenv(envRole) != roleAgent {
		return
	}
	if err := agent(); err != nil {
		fmt.Fprintf(os.Stderr, "lab: agent: %v\n", err)
	}
	unix.Sync()
	// The host ends the machine as soon as it has the status. Where it got
	// none, the power-off tells it so.
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Fprintf(os.Stderr, "lab: agent: power-off: %v\n", err)
	select {}
}

func agent() error {
	var j job
	text, err := os.ReadFile(insideSpec)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	port, err := openPort(reportPort)
	if err != nil {
		return err
	}
	host := gob.NewEncoder(port)
	if err := host.Encode(message{Ready: true}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		// Either the byte or an error: both mean that it is time to end.
		_, _ = port.Read(make([]byte, 1))
		cancel()
	}()
	stdout := writerFunc(func(p []byte) error { return host.Encode(message{Stdout: p}) })
	stderr := writerFunc(func(p []byte) error { return host.Encode(message{Stderr: p}) })
	status := j.run(ctx, stdout, stderr)
	if err := sendTree(host, insideArtifacts); err != nil {
		fmt.Fprintf(stderr, "lab: some artifacts are lost: %v\n", err)
	}
	return host.Encode(message{Done: true, Status: status})
}

// writerFunc is an io.Writer that writes everything or fails.
type writerFunc func(p []byte) error

func (f writerFunc) Write(p []byte) (int, error) {
	if err := f(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// run runs the job until it ends or ctx does and returns its exit status as a
// shell would.
func (j job) run(ctx context.Context, stdout, stderr io.Writer) int {
	cmd := exec.CommandContext(ctx, j.Args[0], j.Args[1:]...)
	cmd.Env = j.Env
	cmd.Dir = j.Dir
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error {
		fmt.Fprintln(stderr, "lab: asking the command to quit")
		return cmd.Process.Signal(syscall.SIGQUIT)
	}
	// It also bounds the wait for processes that outlive the command and hold
	// its output open.
	cmd.WaitDelay = quitGrace
	err := cmd.Run()
	state := cmd.ProcessState
	switch {
	case state == nil:
		fmt.Fprintf(stderr, "lab: %v\n", err)
		return 127
	case errors.Is(err, exec.ErrWaitDelay):
		fmt.Fprintln(stderr, "lab: the command left processes behind that hold its output open")
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}

// openPort opens the virtio-console port of the given name.
func openPort(name string) (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, file := range names {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(text)) == name {
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(file))), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no console port %q among %q", name, names)
}

// sendTree sends the regular files below dir as artifacts.
func sendTree(host *gob.Encoder, dir string) error {
	return filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(writerFunc(func(p []byte) error {
			return host.Encode(message{File: name, Data: p})
		}), f)
		return err
	})
}

package lab

import (
	"cmp"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bootLimit is how long the outer machine may take until its agent is
	// ready; on an idle host it takes about four seconds.
	bootLimit = 2 * time.Minute
	// scratchMiB is the size of the scratch disk, which is sparse.
	scratchMiB = 16 << 10
)

// Files of a run in its directory on the host.
const (
	fileScratch = "scratch.ext4"
	fileConsole = "console.log"
	fileQEMU    = "qemu.log"
)

// Run runs each of the commands in an outer machine of its own, all at once,
// and returns the largest of their exit statuses. The output of the first
// appears on this process's standard output and error as it is printed, that of
// each other one when those before it have ended. Commands are looked up here
// and copied there. err means that there is no status of some: the machine
// failed, the timeout passed, or SIGINT or SIGTERM ended it.
func Run(cfg Config, commands ...[]string) (status int, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "calf-lab-")
	if err != nil {
		return 0, err
	}
	if cfg.Calf, err = calfBinary(cfg, dir); err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	if cfg.Prepare != nil {
		if err := cfg.Prepare(); err != nil {
			return 0, errors.Join(err, os.RemoveAll(dir))
		}
	}
	boot, err := prepareBoot()
	if err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	machines := make([]*machine, len(commands))
	for i, command := range commands {
		m := &machine{cfg: cfg, boot: boot, dir: filepath.Join(dir, strconv.Itoa(i)), done: make(chan struct{})}
		m.artifacts = cmp.Or(cfg.Artifacts, m.path("artifacts"))
		machines[i] = m
		go func() {
			defer close(m.done)
			m.status, m.err = m.run(ctx, command)
		}()
	}
	var errs []error
	for _, m := range machines {
		m.output.release()
		<-m.done
		status = max(status, m.status)
		errs = append(errs, m.err)
	}
	err = errors.Join(errs...)
	if err == nil && status == 0 || ctx.Err() != nil {
		return status, errors.Join(err, os.RemoveAll(dir))
	}
	fmt.Fprintf(os.Stderr, "lab: the console log and the artifacts of the outer machine are in %s\n", dir)
	return status, err
}

// machine is one outer machine.
type machine struct {
	cfg       Config
	boot      bootFiles
	dir       string // everything of this run
	artifacts string // where artifacts go
	output    relay

	done   chan struct{} // closed when the machine is gone
	status int           // of the command; valid after done, if err is nil
	err    error         // valid after done
}

// relay passes output on once it has been released, and holds it until then.
type relay struct {
	mu       sync.Mutex
	released bool    // guarded by mu
	held     []piece // guarded by mu
}

// piece is output for w.
type piece struct {
	w    io.Writer
	data []byte
}

// write writes data to w, now or later. It keeps data.
func (r *relay) write(w io.Writer, data []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.released {
		r.held = append(r.held, piece{w, data})
		return nil
	}
	_, err := w.Write(data)
	return err
}

// release lets output pass from now on, beginning with what was held.
func (r *relay) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.released = true
	for _, p := range r.held {
		_, _ = p.w.Write(p.data) // to our own output: nobody else to tell
	}
	r.held = nil
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) run(ctx context.Context, args []string) (status int, err error) {
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		return 0, err
	}
	if err := m.makeScratch(args); err != nil {
		return 0, err
	}
	defer os.Remove(m.path(fileScratch)) // gone already once QEMU was up
	port, qemuEnd, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer port.Close()
	defer qemuEnd.Close()
	log, err := os.Create(m.path(fileQEMU))
	if err != nil {
		return 0, err
	}
	defer log.Close()

	ctx, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", m.qemuArgs()...)
	qemu.Stdout, qemu.Stderr = log, log
	qemu.ExtraFiles = []*os.File{qemuEnd} // becomes portFD
	// Nothing outlives this process, however it ends. The signal is tied to
	// the thread that starts QEMU, which therefore stays until QEMU is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := qemu.Start(); err != nil {
		return 0, fmt.Errorf("%w: run .ci/setup", err)
	}
	// With only QEMU holding its end, the port ends when QEMU does.
	qemuEnd.Close()
	status, err = m.converse(port, kill)
	if err != nil {
		err = cmp.Or(context.Cause(ctx), err)
	}
	kill(nil)
	_ = qemu.Wait() // killed, unless it failed, which converse has told
	if err != nil {
		err = fmt.Errorf("%w%s", err, m.lastWords())
	}
	return status, err
}

// converse does what the agent at the other end of port says until it reports
// the status of the command. It calls kill with the reason when that takes too
// long.
func (m *machine) converse(port *os.File, kill func(error)) (status int, err error) {
	started := time.Now()
	limit := time.AfterFunc(bootLimit, func() {
		kill(fmt.Errorf("the outer machine did not come up within %v", bootLimit))
	})
	defer func() { limit.Stop() }()
	for agent := gob.NewDecoder(port); ; {
		var msg message
		if err := agent.Decode(&msg); err != nil {
			return 0, fmt.Errorf("the outer machine ended without a status: %w", err)
		}
		switch {
		case msg.Ready:
			limit.Stop()
			limit = m.limitCommand(port, kill)
			// QEMU has the disk open and nobody else needs its name.
			_ = os.Remove(m.path(fileScratch))
			if os.Getenv("CALF_LAB_VERBOSE") != "" {
				fmt.Fprintf(os.Stderr, "lab: the outer machine was up after %.1f s\n", time.Since(started).Seconds())
			}
		case msg.Done:
			return msg.Status, nil
		case msg.File != "":
			err = m.saveArtifact(msg.File, msg.Data)
		case msg.Stdout != nil:
			err = m.output.write(os.Stdout, msg.Stdout)
		case msg.Stderr != nil:
			err = m.output.write(os.Stderr, msg.Stderr)
		}
		if err != nil {
			return 0, err
		}
	}
}

// limitCommand starts the clock of the command. When the time is over, the
// agent is asked to end the command, and soon after the machine is killed.
func (m *machine) limitCommand(port *os.File, kill func(error)) *time.Timer {
	timeout := cmp.Or(m.cfg.Timeout, 30*time.Minute)
	return time.AfterFunc(timeout, func() {
		fmt.Fprintf(os.Stderr, "lab: the command did not end within %v\n", timeout)
		_, _ = port.Write([]byte{0}) // if it fails, the machine is dead anyway
		time.AfterFunc(3*quitGrace, func() {
			kill(fmt.Errorf("the command did not end within %v, nor when it was killed", timeout))
		})
	})
}

// saveArtifact appends data to the artifact of the given name.
func (m *machine) saveArtifact(name string, data []byte) error {
	if !filepath.IsLocal(name) {
		return fmt.Errorf("artifact with the name %q", name)
	}
	file := filepath.Join(m.artifacts, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return cmp.Or(err, f.Close())
}

// lastWords is the end of what QEMU and the machine said, or what the machine
// said from its kernel's panic on, for an error message.
func (m *machine) lastWords() string {
	const most = 15 // lines of each
	var words strings.Builder
	for _, name := range []string{fileQEMU, fileConsole} {
		text, err := os.ReadFile(m.path(name))
		if err != nil || len(text) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		from := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "Kernel panic") })
		if from < 0 {
			from = max(0, len(lines)-most)
		}
		lines = lines[from:min(len(lines), from+most)]
		fmt.Fprintf(&words, "\n--- %s ---\n%s", name, strings.Join(lines, "\n"))
	}
	return words.String()
}

// socketPair returns two ends of a stream, neither inherited by accident.
func socketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "port"), nil
}

// portFD is the descriptor in QEMU of its end of the port: the first of
// exec.Cmd.ExtraFiles.
const portFD = 3

// outerCmdline is the kernel command line of the outer machine. Its timer ticks
// periodically: QEMU 7.2 now and then loses an interrupt that arrives while the
// machine switches to a guest or back. One that comes again delivers the lost
// one with it, while with one-shot timers the machine would stand still.
const outerCmdline = "console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off"

func (m *machine) qemuArgs() []string {
	return []string{
		"-nodefaults", "-display", "none", "-no-reboot",
		"-accel", "tcg,thread=multi", "-cpu", "max,+svm",
		"-smp", strconv.Itoa(cmp.Or(m.cfg.CPUs, 1)),
		"-m", strconv.Itoa(cmp.Or(m.cfg.MemoryMiB, 4096)),
		"-kernel", m.boot.kernel.Image, "-initrd", m.boot.initrd,
		"-append", outerCmdline,
		"-serial", "file:" + m.path(fileConsole),
		// The root disk is shared by all runs: what is written to it goes to
		// a temporary file of QEMU.
		"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file=" + m.boot.root,
		"-drive", "if=virtio,format=raw,cache=unsafe,discard=unmap,file=" + m.path(fileScratch),
		"-device", "virtio-serial-pci",
		"-chardev", fmt.Sprintf("socket,id=port,fd=%d", portFD),
		"-device", "virtserialport,chardev=port,name=" + reportPort,
	}
}

// makeScratch makes the scratch disk: the agent, what it is to run, what the
// caller wants there, and free space.
func (m *machine) makeScratch(args []string) error {
	agent, err := os.Executable()
	if err != nil {
		return err
	}
	newest := filepath.Join(insideCache, "kernels", m.boot.kernel.Release)
	j := job{Args: args, Dir: insideScratch, Env: append(insideEnv(),
		envKernel+"="+newest+"/vmlinuz", envInitrd+"="+newest+"/initrd",
		envDisk+"="+filepath.Join(insideCache, "images", wholeDisk))}
	programs := map[string]string{insideAgent: agent, insideCalf: m.cfg.Calf}
	if strings.Contains(args[0], "/") {
		there := filepath.Join(insideBin, filepath.Base(args[0]))
		programs[there] = args[0]
		j.Args = append([]string{there}, args[1:]...)
	}
	for there, here := range m.cfg.Files {
		programs[filepath.Join(insideScratch, there)] = here
	}
	spec, err := json.Marshal(j)
	if err != nil {
		return err
	}
	disk := make(tree)
	disk.dir(onScratch(insideTemp))
	disk.dir(onScratch(insideArtifacts))
	disk.text(onScratch(insideSpec), string(spec), 0o644)
	for there, here := range programs {
		if err := disk.file(onScratch(there), here); err != nil {
			return err
		}
		libs, err := sharedLibraries(here)
		if err != nil {
			return err
		}
		for _, lib := range libs {
			if err := disk.file(onScratch(filepath.Join(insideLib, filepath.Base(lib))), lib); err != nil {
				return err
			}
		}
	}
	return disk.ext4(m.path(fileScratch), scratchMiB)
}

// onScratch is where a path below insideScratch lies on the scratch disk.
func onScratch(path string) string { return strings.TrimPrefix(path, insideScratch) }

// insideEnv is the environment of the command: a fixed one, and what of ours
// steers Go programs, tests and calf.
func insideEnv() []string {
	env := []string{
		"PATH=" + insideBin + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "TERM=dumb",
		"LD_LIBRARY_PATH=" + insideLib,
		"TMPDIR=" + insideTemp,
		envRole + "=" + roleInside,
		envCalf + "=" + insideCalf,
		envArtifacts + "=" + insideArtifacts,
		envCache + "=" + insideCache,
	}
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		switch name {
		case envRole, envCalf, envArtifacts, envCache:
			continue
		case "CI", "GODEBUG", "GOGC", "GOMAXPROCS", "GOTRACEBACK", "GORACE":
			env = append(env, v)
		}
		if strings.HasPrefix(name, "CALF_") {
			env = append(env, v)
		}
	}
	return env
}

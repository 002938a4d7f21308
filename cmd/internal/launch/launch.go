// Package launch runs the guest that a configuration describes: it opens the
// disks and the console, builds the machine, turns signals and timeouts into
// its end, and says how the run went.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/vmm"
)

// Options are what a run needs beside its configuration.
type Options struct {
	Console  console.Spec
	NoReboot bool
	Streams  console.Streams
	Logger   *slog.Logger
	// Started is when the process began, for the log of how long it took to the
	// guest's first instruction.
	Started time.Time
	// Keep is the path of a new image that takes what is written to the first
	// disk, empty if that is thrown away or written there.
	Keep string
	// Signals are what the run answers to in place of the process's own signals, nil
	// for those.
	Signals <-chan os.Signal
	// CommandRuns, if not nil, is called when the guest runs its command.
	CommandRuns func()
	// AllowEmulation accepts a KVM that only emulates, which is enough for the
	// guests of tests.
	AllowEmulation bool
}

// Exit codes of a run. They are part of the contract with scripts.
const (
	ExitPowerOff = 0
	ExitTimeout  = 124
	ExitError    = 125
	ExitGuest    = 255 // the guest panicked, triple-faulted, or ended without a status
	exitSignal   = 128 // plus the number of the signal
)

// ExitSignal is the exit code of what sig has ended.
func ExitSignal(sig unix.Signal) int { return exitSignal + int(sig) }

// Outcomes that the machine itself does not know.
const (
	outcomeExited  = "exited" // the command has
	outcomeNotRun  = "not-run"
	outcomeTimeout = "timeout"
	outcomeKilled  = "killed"
	outcomeError   = "error"
	outcomeSkipped = "not-started"
)

// Result says how a run went.
type Result struct {
	Outcome  string  `json:"outcome"`
	ExitCode int     `json:"exit_code"`
	Message  string  `json:"message"` // one sentence; empty if there is nothing to say
	Seconds  float64 `json:"duration_seconds"`
	// Command says how the command in the guest ended, if one has been started.
	Command *CommandResult `json:"command,omitempty"`
}

// CommandResult says how a command in the guest ended.
type CommandResult struct {
	Status int      `json:"status"`           // its own, or 128 and the number of the signal
	Signal int      `json:"signal,omitempty"` // that ended it
	Kernel string   `json:"kernel"`           // release of the guest's
	Lost   []string `json:"lost,omitempty"`   // artifacts that could not be had, and why
}

// Failed is the result of a run that was ended, or never begun, by err.
func Failed(err error) Result {
	return Result{Outcome: outcomeError, ExitCode: ExitError, Message: err.Error()}
}

// NotStarted is the result of a run that was not begun, because sig came before its
// turn.
func NotStarted(sig unix.Signal) Result {
	return Result{
		Outcome: outcomeSkipped, ExitCode: ExitSignal(sig),
		Message: fmt.Sprintf("signal %d (%v) came before its turn", int(sig), sig),
	}
}

// Skipped reports whether r is of a run that was not begun, through no fault of its own.
func (r Result) Skipped() bool { return r.Outcome == outcomeSkipped }

// Check opens everything that cfg names, for reading, and reports what is wrong
// that can be found without a guest.
func Check(cfg *config.Config) error {
	cfg = cfg.Effective()
	if cfg.Boot.Kernel != "" {
		if err := checkFile("kernel", cfg.Boot.Kernel, boot.Check); err != nil {
			return err
		}
	}
	if cfg.Boot.Initrd != "" {
		if err := checkFile("initrd", cfg.Boot.Initrd, func(boot.File) error { return nil }); err != nil {
			return err
		}
	}
	if err := commandOf(cfg).Check(); err != nil {
		return err
	}
	if err := checkOverlays(cfg); err != nil {
		return err
	}
	open, err := openDisks(cfg, true)
	if err != nil {
		return err
	}
	if cfg.Boot.Kernel == "" && len(open) > 0 {
		_, err = findKernel(cfg, open[0].Disk)
	}
	return errors.Join(err, open.close())
}

// checkFile opens a regular file and has check look into it. A pipe, which
// might keep calf waiting, is not opened.
func checkFile(what, path string, check func(boot.File) error) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w; set [boot] %s in the file, or --%s", what, err, what, what)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s %s is not a regular file", what, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	err = check(boot.File{ReaderAt: f, Size: info.Size()})
	if err != nil {
		err = fmt.Errorf("%s %s: %w", what, path, err)
	}
	return errors.Join(err, f.Close())
}

// checkConsole refuses a console file that is one of the guest's other files:
// it is emptied before the guest runs.
func checkConsole(spec console.Spec, cfg *config.Config) error {
	if spec.Kind != console.File {
		return nil
	}
	info, err := os.Stat(spec.Path)
	if err != nil {
		return nil // not there yet, or opening it will tell
	}
	others := []string{cfg.Boot.Kernel, cfg.Boot.Initrd}
	for _, d := range cfg.Disks {
		others = append(others, d.Path)
	}
	for _, path := range others {
		if other, err := os.Stat(path); err == nil && os.SameFile(info, other) {
			return fmt.Errorf("--console file:%s would overwrite %s, which the guest uses; name another file", spec.Path, path)
		}
	}
	return nil
}

// Run runs the guest of cfg, which has been validated, until it ends.
func Run(cfg *config.Config, opts Options) Result {
	began := time.Now()
	ctx, stop := watch(opts.Streams.Messages, cfg.VM.Timeout, opts.Signals)
	e := run(ctx, cfg.Effective(), opts)
	stop.release()
	r := result(cfg, e)
	if e.command.died(e) {
		e.command.tail.show(opts.Streams.Messages)
	}
	r.Seconds = time.Since(began).Seconds()
	return r
}

// drainTime is how long the console may take to pass on the last output of a
// guest that is being ended.
const drainTime = time.Second

// end is how a run ended.
type end struct {
	outcome vmm.Outcome
	ran     bool  // the guest was started
	err     error // why it was not, or why it did not end by itself
	closing error // what went wrong afterwards, when everything was closed
	lost    bool  // output was dropped, because nobody read it
	// unwritten is the first error that a disk has answered a write of the guest with.
	unwritten error
	command   *command
}

// run opens what cfg names, runs the guest and closes everything again.
func run(ctx *watched, cfg *config.Config, opts Options) (e end) {
	also := func(err error) { e.closing = errors.Join(e.closing, err) }
	if e.err = errors.Join(Check(cfg), checkConsole(opts.Console, cfg)); e.err != nil {
		return e
	}
	cons, err := console.Open(opts.Console, opts.Streams, func() { ctx.end(errEscape) })
	if err != nil {
		e.err = err
		return e
	}
	defer func() {
		also(cons.Close())
		e.lost = cons.Lost()
	}()
	// What the guest said last is still to be read, but a reader that has
	// stopped reading must not hold up the end.
	defer context.AfterFunc(ctx, func() { time.AfterFunc(drainTime, cons.Abort) })()
	cmd, err := openCommand(cfg, opts, func() { ctx.end(errEscape) })
	if err != nil {
		e.err = err
		return e
	}
	defer func() { also(cmd.close()) }()
	e.command = cmd
	init := newHandOver(cfg, opts.Logger, ctx.end)
	defer init.stop()
	serve := cmd.serve()
	if cmd == nil {
		serve = init.serve()
	}
	socket, err := openVsock(cfg.Vsock, serve)
	if err != nil {
		e.err = err
		return e
	}
	defer func() { also(socket.close()) }()
	machine, kernel, err := newMachine(cfg, opts, cons, socket, cmd, init)
	if err != nil {
		e.err = err
		return e
	}
	if opts.Keep != "" {
		if e.err = keepOverlay(cfg, opts.Keep); e.err != nil {
			return e
		}
		defer func() {
			if !e.ran {
				also(os.Remove(opts.Keep))
			}
		}()
	}
	// The disks are opened for writing, which may change them, last of all,
	// and closed after the machine that uses them.
	var open disks
	var failed failures
	defer func() {
		also(errors.Join(machine.Close(), open.close()))
		e.unwritten = failed.first()
	}()
	if open, e.err = openDisks(cfg, false); e.err != nil {
		return e
	}
	kernel.use(open)
	if e.err = open.attach(machine, cfg.Disks, opts.Streams.Messages, &failed); e.err != nil {
		return e
	}
	announce(opts.Streams.Messages, cons)
	ctx.control(machine, cmd)
	defer ctx.control(nil, nil)
	if e.err = cons.Empty(); e.err != nil {
		return e
	}
	e.ran = true
	cmd.begin(ctx, ctx.end, cfg.VM.BootTimeout)
	e.outcome, e.err = machine.Run(ctx)
	also(cmd.wait())
	if e.outcome != vmm.PowerOff && e.outcome != vmm.Reboot {
		time.AfterFunc(drainTime, cons.Abort)
	}
	return e
}

// newMachine builds the machine of cfg, without its disks. A kernel on the first one
// is read from it here, before any is opened for writing.
func newMachine(cfg *config.Config, opts Options, cons *console.Console, socket *vsockHost, cmd *command, init *handOver) (*vmm.Machine, *diskKernel, error) {
	kernel, err := newDiskKernel(cfg, opts.Logger, init)
	if err != nil {
		return nil, nil, err
	}
	mc := machineConfig(cfg, opts, cons, socket, kernel)
	if cmd != nil {
		root, err := rootOfGiven(cfg)
		if err != nil {
			return nil, nil, errors.Join(err, kernel.close())
		}
		mc.Cmdline, mc.Console.Out = cmd.cmdline(cfg, root), cmd.console(cons.Out)
		mc.BootTimeout = 0 // which command.begin knows better
	}
	var machine *vmm.Machine
	if mc.FirstInitrd, err = cmd.initrd(); err == nil {
		machine, err = vmm.New(mc)
	}
	if err = errors.Join(err, kernel.close()); err != nil && machine != nil {
		err = errors.Join(err, machine.Close())
	}
	return machine, kernel, err
}

func machineConfig(cfg *config.Config, opts Options, cons *console.Console, socket *vsockHost, kernel *diskKernel) vmm.Config {
	logger := opts.Logger
	if cfg.VM.Name != "" {
		logger = logger.With("vm", cfg.VM.Name)
	}
	return vmm.Config{
		CPUs:        cfg.VM.CPUs,
		Memory:      uint64(cfg.VM.Memory),
		Kernel:      cfg.Boot.Kernel,
		Initrd:      cfg.Boot.Initrd,
		Cmdline:     cfg.Boot.Cmdline,
		Boot:        kernel.boot(),
		Console:     vmm.Console{In: cons.In, Out: cons.Out},
		Vsock:       socket.device(),
		NoReboot:    opts.NoReboot,
		BootTimeout: cfg.VM.BootTimeout,
		Logger:      logger,
		Started:     opts.Started,

		AllowEmulation: opts.AllowEmulation,
	}
}

// announce says what the user has to know about the console. A message that
// cannot be written keeps no guest from running.
func announce(w io.Writer, c *console.Console) {
	switch {
	case c.Name != "":
		_, _ = fmt.Fprintf(w, "calf: the guest's console is %s\n", c.Name)
	case c.Escape:
		_, _ = fmt.Fprintf(w, "calf: Ctrl-A x ends the guest, Ctrl-A Ctrl-A sends Ctrl-A\n")
	}
}

// announceStop says that the guest waits for a disk, because of err, and what ends
// that.
func announceStop(w io.Writer, err error) {
	_, _ = fmt.Fprintf(w, "calf: %v; the guest waits for this disk: mend the cause, then let it go on with kill -CONT %d\n", err, os.Getpid())
}

// result puts the end of a run into words and numbers. How the guest ended
// decides; what went wrong besides is said with it, and makes a success none.
func result(cfg *config.Config, e end) Result {
	r := Result{Outcome: e.outcome.String()}
	var killed *killedError
	also := errors.Join(e.unwritten, e.closing)
	switch {
	case e.command.ended():
		e.command.report(&r)
		also = errors.Join(e.command.result.Unwritten, also)
		if also != nil && r.ExitCode == 0 {
			r.ExitCode, r.Message = ExitError, strings.TrimPrefix(r.Message+"; the command ended well, but not everything that the guest wrote may be in place", "; ")
		}
	case e.command.died(e) && (e.outcome == vmm.PowerOff || e.outcome == vmm.Reboot || errors.Is(e.err, errCommandDone)):
		r.ExitCode, r.Message = ExitGuest, "the guest ended without a status of the command"
		if why := e.command.tail.reason(); why != "" {
			r.Message = "the command could not be run: " + why
		}
		if !errors.Is(e.command.err, errGuestEnded) { // which is said already
			also = errors.Join(e.command.err, also)
		}
	case e.outcome == vmm.PowerOff, e.outcome == vmm.Reboot:
		r.ExitCode = ExitPowerOff
		if errors.Join(e.err, e.closing) != nil { // what a disk has failed for, the guest knows
			r.ExitCode, r.Message = ExitError, "the guest ended by itself, but not everything it wrote may be in place"
			also = errors.Join(e.err, also)
		}
	case e.outcome == vmm.Panic:
		r.ExitCode, r.Message = ExitGuest, "the guest's kernel panicked; its console says why"
		also = errors.Join(e.err, also)
	case e.outcome == vmm.TripleFault:
		r.ExitCode, r.Message = ExitGuest, "the guest's processor gave up (triple fault)"
		also = errors.Join(e.err, also)
	case e.outcome == vmm.BootTimeout, errors.Is(e.err, errBootTimeout):
		r.Outcome = vmm.BootTimeout.String()
		r.ExitCode = ExitTimeout
		r.Message = fmt.Sprintf("boot timeout: the guest had not come up after %v and was ended", cfg.VM.BootTimeout)
		if e.command == nil {
			also = errors.Join(e.err, also)
		}
	case errors.As(e.err, &killed):
		r.Outcome, r.ExitCode = outcomeKilled, ExitSignal(killed.signal)
		r.Message = killed.Error()
	case errors.Is(e.err, errTimeout):
		r.Outcome, r.ExitCode = outcomeTimeout, ExitTimeout
		r.Message = fmt.Sprintf("timeout: the run had not ended after %v and was ended", cfg.VM.Timeout)
	case e.ran:
		r.Outcome, r.ExitCode = outcomeError, ExitGuest
		r.Message = fmt.Sprintf("the guest was ended by an error: %v", e.err)
	default:
		r = Failed(e.err)
	}
	if r.ExitCode != ExitPowerOff && e.command.ranOut() {
		r.Message = strings.TrimPrefix(r.Message+"; the guest ran out of memory: give it more with --memory", "; ")
	}
	if also != nil {
		r.Message = strings.TrimPrefix(r.Message+"; "+strings.ReplaceAll(also.Error(), "\n", "; "), "; ")
	}
	if e.lost {
		r.Message = strings.TrimPrefix(r.Message+"; output of its console that nobody read was dropped", "; ")
	}
	return r
}

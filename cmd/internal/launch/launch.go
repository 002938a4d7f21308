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
	"time"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/vmm"
)

// Options are what a run needs beside its configuration.
type Options struct {
	Console  console.Spec
	NoReboot bool
	Streams  console.Streams
	Logger   *slog.Logger
	// AllowEmulation accepts a KVM that only emulates, which is enough for the
	// guests of tests.
	AllowEmulation bool
}

// Exit codes of a run. They are part of the contract with scripts.
const (
	ExitPowerOff = 0
	ExitTimeout  = 124
	ExitError    = 125
	ExitGuest    = 255 // the guest panicked or triple-faulted
	exitSignal   = 128 // plus the number of the signal
)

// Outcomes that the machine itself does not know.
const (
	outcomeTimeout = "timeout"
	outcomeKilled  = "killed"
	outcomeError   = "error"
)

// Result says how a run went.
type Result struct {
	Outcome  string  `json:"outcome"`
	ExitCode int     `json:"exit_code"`
	Message  string  `json:"message"` // one sentence; empty if there is nothing to say
	Seconds  float64 `json:"duration_seconds"`
}

// Failed is the result of a run that was ended, or never begun, by err.
func Failed(err error) Result {
	return Result{Outcome: outcomeError, ExitCode: ExitError, Message: err.Error()}
}

// Check opens everything that cfg names, for reading, and reports what is wrong
// that can be found without a guest.
func Check(cfg *config.Config) error {
	cfg = cfg.Effective()
	for _, f := range []struct{ what, path string }{{"kernel", cfg.Boot.Kernel}, {"initrd", cfg.Boot.Initrd}} {
		if f.path == "" {
			continue
		}
		if err := checkReadable(f.what, f.path); err != nil {
			return err
		}
	}
	open, err := openDisks(cfg, true)
	if err != nil {
		return err
	}
	return open.close()
}

// checkReadable reports whether a regular file can be opened.
func checkReadable(what, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s %s is not a regular file", what, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return f.Close()
}

// Run runs the guest of cfg, which has been validated, until it ends.
func Run(cfg *config.Config, opts Options) Result {
	began := time.Now()
	ctx, stop := watch(opts.Streams.Messages, cfg.VM.Timeout)
	outcome, err := run(ctx, cfg.Effective(), opts)
	stop.release()
	r := result(cfg, outcome, err)
	r.Seconds = time.Since(began).Seconds()
	return r
}

// drainTime is how long the console may take to pass on the last output of a
// guest that is being ended.
const drainTime = time.Second

// run opens what cfg names, runs the guest and closes everything again.
func run(ctx *watched, cfg *config.Config, opts Options) (outcome vmm.Outcome, err error) {
	also := func(closing error) { err = errors.Join(err, closing) }
	if err := Check(cfg); err != nil {
		return vmm.Unknown, err
	}
	cons, err := console.Open(opts.Console, opts.Streams, func() { ctx.end(errEscape) })
	if err != nil {
		return vmm.Unknown, err
	}
	defer func() { also(cons.Close()) }()
	// What the guest said last is still to be read, but a reader that has
	// stopped reading must not hold up the end.
	defer context.AfterFunc(ctx, func() { time.AfterFunc(drainTime, cons.Abort) })()
	machine, err := vmm.New(machineConfig(cfg, opts, cons))
	if err != nil {
		return vmm.Unknown, err
	}
	// The disks are opened for writing, which may change them, last of all,
	// and closed after the machine that uses them.
	var open disks
	defer func() { also(errors.Join(machine.Close(), open.close())) }()
	if open, err = openDisks(cfg, false); err != nil {
		return vmm.Unknown, err
	}
	for _, d := range open {
		if err := machine.AddDisk(d); err != nil {
			return vmm.Unknown, err
		}
	}
	announce(opts.Streams.Messages, cons)
	ctx.powerOffWith(machine.PowerButton)
	defer ctx.powerOffWith(nil)
	if err := cons.Empty(); err != nil {
		return vmm.Unknown, err
	}
	outcome, err = machine.Run(ctx)
	if outcome != vmm.PowerOff && outcome != vmm.Reboot {
		time.AfterFunc(drainTime, cons.Abort)
	}
	return outcome, err
}

func machineConfig(cfg *config.Config, opts Options, cons *console.Console) vmm.Config {
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
		Console:     vmm.Console{In: cons.In, Out: cons.Out},
		NoReboot:    opts.NoReboot,
		BootTimeout: cfg.VM.BootTimeout,
		Logger:      logger,

		AllowEmulation: opts.AllowEmulation,
	}
}

// announce says what the user has to know about the console.
func announce(w io.Writer, c *console.Console) {
	switch {
	case c.Name != "":
		fmt.Fprintf(w, "calf: the guest's console is %s\n", c.Name)
	case c.Escape:
		fmt.Fprintf(w, "calf: Ctrl-A x ends the guest, Ctrl-A Ctrl-A sends Ctrl-A\n")
	}
}

// result puts the end of a run into words and numbers.
func result(cfg *config.Config, outcome vmm.Outcome, err error) Result {
	r := Result{Outcome: outcome.String()}
	var killed *killedError
	switch {
	case errors.As(err, &killed):
		r.Outcome, r.ExitCode = outcomeKilled, exitSignal+int(killed.signal)
		r.Message = killed.Error()
	case errors.Is(err, errTimeout):
		r.Outcome, r.ExitCode = outcomeTimeout, ExitTimeout
		r.Message = fmt.Sprintf("timeout: the run had not ended after %v and was ended", cfg.VM.Timeout)
	case outcome == vmm.BootTimeout:
		r.ExitCode = ExitTimeout
		r.Message = fmt.Sprintf("boot timeout: the guest had not come up after %v and was ended", cfg.VM.BootTimeout)
	case err != nil:
		r = Failed(err)
	case outcome == vmm.PowerOff, outcome == vmm.Reboot:
		r.ExitCode = ExitPowerOff
	case outcome == vmm.Panic:
		r.ExitCode = ExitGuest
		r.Message = "the guest's kernel panicked; its console says why"
	case outcome == vmm.TripleFault:
		r.ExitCode = ExitGuest
		r.Message = "the guest's processor gave up (triple fault)"
	default:
		r = Failed(fmt.Errorf("the run ended in an unknown way (%v)", outcome))
	}
	return r
}

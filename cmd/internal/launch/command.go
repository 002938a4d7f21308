package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/guest/boot"
)

// errBootTimeout ends a guest that has not been ready for its command in time.
var errBootTimeout = errors.New("launch: boot timeout")

// errCommandDone ends a guest whose command has ended.
var errCommandDone = errors.New("launch: the command has ended")

// errGuestEnded ends the wait for a command whose guest has ended.
var errGuestEnded = errors.New("launch: the guest has ended")

const (
	// guestProgram is what becomes the agent: this program, even if its file has
	// been replaced.
	guestProgram = "/proc/self/exe"
	// powerOffTime is how long a guest whose root is kept may take to write it
	// back and power off.
	powerOffTime = time.Minute
	// tailBytes and tailLines are how much of the guest's console is shown when it
	// dies without a status.
	tailBytes, tailLines = 16 << 10, 25
	// panicMark begins what a kernel says of why it gives up.
	panicMark = "Kernel panic - not syncing"
)

// command is what a run has for a command in its guest. A nil one is of a run
// without.
type command struct {
	session *agent.Session
	log     *slog.Logger
	streams *console.Console
	tail    tail // of the guest's console
	keep    bool
	runs    func() // called when the command runs, may be nil
	resized chan os.Signal

	cancel context.CancelCauseFunc // of the session
	done   chan struct{}           // closed when what follows is set
	result *agent.Result
	err    error
}

// openCommand opens the streams of the command that cfg names, nil if it names none.
func openCommand(cfg *config.Config, opts Options, leave func()) (*command, error) {
	if len(cfg.Run.Command) == 0 {
		return nil, nil
	}
	size := terminalSize(opts.Streams)
	what := commandOf(cfg)
	what.Terminal, what.Keep = size, opts.Keep != "" || slices.ContainsFunc(cfg.Disks, isWritten)
	if size != nil && os.Getenv("TERM") != "" {
		what.Env = slices.Insert(what.Env, 0, "TERM="+os.Getenv("TERM")) // which the user may set
	}
	streams, err := console.OpenCommand(opts.Streams, size != nil, leave)
	if err != nil {
		return nil, err
	}
	c := &command{log: opts.Logger, streams: streams, keep: what.Keep, runs: opts.CommandRuns, done: make(chan struct{}), resized: make(chan os.Signal, 1)}
	c.session = agent.NewSession(what, agent.Streams{In: streams.In, Out: orDiscard(streams.Out), Err: orDiscard(streams.Err)})
	if size != nil {
		signal.Notify(c.resized, unix.SIGWINCH)
		go func() {
			for range c.resized {
				if size := terminalSize(opts.Streams); size != nil {
					c.session.Resize(*size)
				}
			}
		}()
	}
	return c, nil
}

// commandOf is the command of cfg, as the agent takes it.
func commandOf(cfg *config.Config) agent.Command {
	c := agent.Command{
		Args: cfg.Run.Command, Workdir: cfg.Run.Workdir, User: cfg.Run.User, Hostname: cfg.VM.Name,
		Copies: transfers(cfg.Copies), Artifacts: transfers(cfg.Artifacts),
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Run.Env)) {
		c.Env = append(c.Env, name+"="+cfg.Run.Env[name])
	}
	return c
}

// transfers are the copies or artifacts of a configuration as the agent takes them.
func transfers[T config.Copy | config.Artifact](files []T) []agent.Transfer {
	var transfers []agent.Transfer
	for _, f := range files {
		transfers = append(transfers, agent.Transfer(f))
	}
	return transfers
}

// isWritten reports whether what a guest writes to a disk is there when it has ended.
func isWritten(d config.Disk) bool { return !d.Snapshot && !d.ReadOnly }

func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// terminalSize is the size of the terminal that both standard input and output are,
// nil if they are none.
func terminalSize(s console.Streams) *agent.Size {
	if !term.IsTerminal(int(s.In.Fd())) || !term.IsTerminal(int(s.Out.Fd())) {
		return nil
	}
	cols, rows, err := term.GetSize(int(s.Out.Fd()))
	if err != nil {
		return nil
	}
	return &agent.Size{Rows: uint16(rows), Cols: uint16(cols)} //nolint:gosec // G115: the kernel has 16 bits for each
}

// initrd is what the kernel is to unpack for the agent, and cmdline what it is to be
// told; root is what is known of its root.
func (c *command) initrd() (*boot.File, error) {
	if c == nil {
		return nil, nil
	}
	f, err := agent.Initramfs(guestProgram)
	return &f, err
}

func (c *command) cmdline(cfg *config.Config, root string) string {
	readOnly := len(cfg.Disks) > 0 && cfg.Disks[0].ReadOnly
	return strings.TrimSpace(strings.TrimSpace(agent.Cmdline(readOnly)+" "+root) + " " + cfg.Boot.Cmdline)
}

// console is where the guest's console goes that is to go to out, which may be nil.
func (c *command) console(out io.Writer) io.Writer {
	if out == nil {
		return &c.tail
	}
	return io.MultiWriter(&c.tail, out)
}

// serve takes the connections of the agent.
func (c *command) serve() func(agent.Conn) {
	if c == nil {
		return nil
	}
	return c.session.Serve
}

// begin waits for the command in a goroutine of its own. When it has ended, end is
// called, which ends the guest, unless that does so itself; likewise if the guest is
// not ready for it within bootTimeout, which is no limit if it is 0.
func (c *command) begin(ctx context.Context, end func(error), bootTimeout time.Duration) {
	if c == nil {
		return
	}
	if bootTimeout > 0 {
		late := time.AfterFunc(bootTimeout, func() { end(errBootTimeout) })
		go func() {
			select {
			case <-c.session.Up():
				late.Stop()
			case <-c.done:
			}
		}()
	}
	if c.runs != nil {
		go func() {
			select {
			case <-c.session.Started():
				c.runs()
			case <-c.done:
			}
		}()
	}
	ctx, c.cancel = context.WithCancelCause(ctx)
	go func() {
		defer close(c.done)
		c.result, c.err = c.session.Run(ctx)
		if r := c.result; r != nil {
			c.log.Debug("the agent was ready for the command", "kernel", r.Began, "agent", r.Ready-r.Began)
		}
		if c.keep && c.err == nil {
			time.AfterFunc(powerOffTime, func() { end(errCommandDone) })
			return
		}
		end(errCommandDone)
	}()
}

// wait returns when the guest has ended and nothing more is to come from it. The
// command's input has ended then, for which the connections of the guest wait.
func (c *command) wait() error {
	if c == nil {
		return nil
	}
	// What came before the end of the guest may still be under way.
	select {
	case <-c.done:
	case <-time.After(drainTime):
	}
	c.cancel(errGuestEnded)
	<-c.done
	return c.streams.Close()
}

// ended reports whether the command has ended, or could not be run, and said so.
func (c *command) ended() bool { return c != nil && c.result != nil }

// died reports whether the guest of a command that ended like e did so without a
// status, and not at the bidding of calf.
func (c *command) died(e end) bool {
	return c != nil && e.ran && c.result == nil && !errors.Is(e.err, errBootTimeout) &&
		!errors.Is(e.err, errTimeout) && !errors.As(e.err, new(*killedError))
}

// report says how the command ended.
func (c *command) report(r *Result) {
	r.Outcome, r.ExitCode, r.Message = outcomeExited, c.result.Code, c.result.Problem
	switch {
	case c.result.Uncopied != "":
		r.Outcome, r.ExitCode, r.Message = outcomeError, ExitError, c.result.Uncopied
		return
	case !c.result.Ran:
		r.Outcome = outcomeNotRun
	}
	r.Command = &CommandResult{Status: c.result.Code, Signal: c.result.Signal, Kernel: c.result.Kernel, Lost: c.result.Lost}
	if len(c.result.Lost) > 0 {
		r.Message = strings.TrimPrefix(r.Message+"; "+strings.Join(c.result.Lost, "; "), "; ")
	}
}

// close puts the terminal back.
func (c *command) close() error {
	if c == nil {
		return nil
	}
	signal.Stop(c.resized)
	close(c.resized)
	c.session.Close() // which has not run if the guest has not
	return c.streams.Close()
}

// signal passes a signal on to the command. It reports false if there is none to
// pass it to.
func (c *command) signal(sig unix.Signal) bool {
	if c == nil {
		return false
	}
	select {
	case <-c.session.Started():
		return c.session.Signal(int(sig))
	default:
		return false
	}
}

// tail keeps the last bytes written to it.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > 2*tailBytes {
		t.b = append(t.b[:0], t.b[len(t.b)-tailBytes:]...)
	}
	return len(p), nil
}

// lines returns the last whole lines, or the first of a panic if there is one, without
// what moves a cursor or rings a bell.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.b[max(0, len(t.b)-tailBytes):]
	var lines []string
	for line := range bytes.Lines(b) {
		if clean := progress.Plain(string(bytes.TrimRight(line, "\r\n"))); clean != "" {
			lines = append(lines, clean)
		}
	}
	if i := slices.IndexFunc(lines, func(line string) bool { return strings.Contains(line, panicMark) }); i >= 0 {
		return lines[i:min(len(lines), i+tailLines)]
	}
	return lines[max(0, len(lines)-tailLines):]
}

// reason returns why the agent has given up, or empty.
func (t *tail) reason() string {
	const maxReason = 1000
	for _, line := range slices.Backward(t.lines()) {
		if _, why, ok := strings.Cut(line, agent.GivesUp); ok {
			return why[:min(len(why), maxReason)]
		}
	}
	return ""
}

// outOfMemory are what a kernel says when it has no memory left: what it kills, or that
// there is nothing to be killed.
var outOfMemory = []string{"Out of memory: Killed process", "System is deadlocked on memory"}

// ranOut reports whether the guest of a command has said lately that it has no memory
// left. A command that was killed for that need not be the one that calf has run.
func (c *command) ranOut() bool {
	return c != nil && slices.ContainsFunc(c.tail.lines(), func(line string) bool {
		return slices.ContainsFunc(outOfMemory, func(mark string) bool { return strings.Contains(line, mark) })
	})
}

// show writes the last lines of the console for a person.
func (t *tail) show(w io.Writer) {
	lines := t.lines()
	if len(lines) == 0 {
		return
	}
	var s strings.Builder
	s.WriteString("calf: the last lines of the guest's console:\n")
	for _, line := range lines {
		fmt.Fprintf(&s, "    %s\n", line)
	}
	_, _ = io.WriteString(w, s.String()) // who cannot be told is not told
}

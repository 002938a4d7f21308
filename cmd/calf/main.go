// Command calf boots Linux guests from QCOW2 images on KVM.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/confine"
	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/doctor"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/guest/agent/pid1"
)

func main() {
	if pid1.IsAgent() {
		pid1.Main()
		return
	}
	if confine.IsRole() {
		confine.Main()
		os.Exit(launch.ExitError)
	}
	if len(os.Args) == 2 && os.Args[1] == console.GuardCommand {
		if console.Guard() != nil {
			os.Exit(launch.ExitError)
		}
		return
	}
	// A reader of the messages that goes away must not take the guest with it, and a
	// file that may not grow is an error like a full disk.
	signal.Ignore(unix.SIGPIPE, unix.SIGXFSZ)
	p := program{started: time.Now(), streams: console.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Messages: console.NewMessages(os.Stderr)}}
	os.Exit(p.run(os.Args[1:]))
}

// program is one execution of calf.
type program struct {
	streams        console.Streams
	started        time.Time
	allowEmulation bool // see launch.Options; for tests
}

// run runs calf with the given arguments and returns its exit code.
func (p program) run(args []string) int {
	root := p.root()
	root.SetArgs(signedSize(args))
	cmd, err := root.ExecuteC()
	var exit exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		complain(p.streams.Messages, exit.message)
		return exit.code
	}
	complain(p.streams.Messages, err.Error())
	if cmd.Name() == runCommand {
		if err := reportMisuse(cmd.Flags(), args, err); err != nil {
			complain(p.streams.Messages, err.Error())
		}
	}
	return launch.ExitError
}

// exitError ends calf with a code that is not the usual one for errors.
type exitError struct {
	code    int
	message string // empty if there is nothing to say
}

func (e exitError) Error() string { return e.message }

// complain writes each line of a message under calf's name.
func complain(w io.Writer, message string) {
	for line := range strings.Lines(message) {
		_, _ = fmt.Fprintf(w, "calf: %s\n", strings.TrimSuffix(line, "\n")) // There is nowhere else to complain.
	}
}

// root returns the command tree.
func (p program) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "calf",
		Short: "Boot Linux guests from QCOW2 images",
		Long: `calf is a microVM monitor: it boots Linux guests from QCOW2 images on KVM,
described by a TOML file, by flags, or by both.`,
		Example:       "  calf run --kernel vmlinuz debian-12.qcow2\n  calf run ci.toml",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(p.streams.In)
	root.SetOut(p.streams.Out)
	root.SetErr(p.streams.Messages)
	root.AddCommand(newRun(p), newImage(), newConfig(), newDoctor(doctor.ThisHost()), newGitLab(p), newVersion())
	return root
}

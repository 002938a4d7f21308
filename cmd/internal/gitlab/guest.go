package gitlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/config"
)

// Outcomes of a run that are the job's.
const (
	outcomeExited  = "exited"
	outcomeTimeout = "timeout"
	outcomeKilled  = "killed"
)

// inGuest runs a script of the job in its guest. The first one makes the guest, with a
// copy of what the host has fetched; those after it find there what was left: what is
// written goes to an overlay of the job's.
func (e *Executor) inGuest(j *job, script *os.File) error {
	cfg, err := e.guest(j)
	if err != nil {
		return err
	}
	project, err := e.project(j)
	if err != nil {
		return err
	}
	again, err := exists(j.overlay())
	if err != nil {
		return err
	}
	if err := removeTree(j.incoming()); err != nil {
		return err
	}
	opts := launch.Options{Console: console.Spec{Kind: console.None}, Streams: e.Streams}
	opts.Streams.In = script
	cfg.Artifacts = []config.Artifact{{From: filepath.Join(j.builds(), project), To: j.incoming()}}
	if again {
		image := cfg.Disks[0].Path
		cfg.Disks[0] = config.Disk{Path: j.overlay(), Format: config.FormatQCOW2, BackingDirs: []string{filepath.Dir(image)}}
		cfg.SetSnapshot("the job", false)
	} else {
		opts.Keep = j.overlay()
		cfg.Copies = []config.Copy{{From: j.builds(), To: j.builds()}}
	}
	signals, stop := insist(e.grace())
	opts.Signals = signals
	r := e.Machine.Run(cfg, opts)
	stop()
	if r.Outcome != outcomeExited || r.Command == nil {
		return noStatus(j, r)
	}
	return e.takeBack(j, project, r)
}

// insist passes on the signals that end a run, and says the first one again if it has
// not been enough after a while.
func insist(patience time.Duration) (signals <-chan os.Signal, stop func()) {
	in, out, quit, done := make(chan os.Signal, 8), make(chan os.Signal), make(chan struct{}), make(chan struct{})
	launch.Notify(in)
	go func() {
		defer close(done)
		var sig os.Signal
		var again <-chan time.Time
		for {
			select {
			case sig = <-in:
				if sig != unix.SIGCONT && again == nil {
					again = time.After(patience)
				}
			case <-again:
				sig = unix.SIGTERM
			case <-quit:
				return
			}
			select {
			case out <- sig:
			case <-quit:
				return
			}
		}
	}()
	return out, func() {
		signal.Stop(in)
		close(quit)
		<-done
	}
}

// noStatus says how a guest has ended that has not said how its script did. Nobody knows
// what it has left, so that the next stage has a new one.
func noStatus(j *job, r launch.Result) error {
	err := errors.Join(errors.New(r.Message), removeTree(j.overlay()))
	if r.Outcome == outcomeTimeout || r.Outcome == outcomeKilled {
		return &BuildError{Err: err}
	}
	return err
}

// takeBack takes the project's directory back from a guest whose script has ended.
func (e *Executor) takeBack(j *job, project string, r launch.Result) error {
	err := e.accept(j, project, r)
	switch {
	case r.Command.Status != 0 && err != nil:
		return &BuildError{Code: r.Command.Status, Err: errors.Join(scriptFailed(r.Command.Status), err)}
	case r.Command.Status != 0:
		return scriptFailed(r.Command.Status)
	}
	return err
}

// accept accepts what has come in, unless something went wrong on the way.
func (e *Executor) accept(j *job, project string, r launch.Result) error {
	if r.ExitCode != r.Command.Status || len(r.Command.Lost) > 0 {
		return fmt.Errorf("the project's directory stays as it was before this stage: %s", r.Message)
	}
	root, err := os.OpenRoot(j.dir)
	if err != nil {
		return err
	}
	dropped, err := accept(root, "incoming", filepath.Join("builds", project))
	if err = errors.Join(err, root.Close()); err != nil {
		return fmt.Errorf("what the guest has sent cannot be taken: %w", err)
	}
	const few, maxShown = 5, 1000
	if n := len(dropped); n > 0 {
		_, _ = fmt.Fprintf(e.Streams.Messages, "calf: %d links that lead out of the project are not taken to the host: %s\n",
			n, progress.Cut(strings.Join(dropped[:min(n, few)], ", "), maxShown)) // names that the guest has chosen
	}
	return nil
}

// exists reports whether there is a file.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

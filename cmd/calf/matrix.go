package main

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/matrix"
	"github.com/calfvm/calf/config"
)

// completeTarget lets the shell offer the targets of the file as values of --target.
func completeTarget(cmd *cobra.Command) {
	complete := func(_ *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		if cfg, _, err := begin(args); err == nil {
			for _, c := range cfg.Expand() {
				names = append(names, c.Target)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	if err := cmd.RegisterFlagCompletionFunc("target", complete); err != nil {
		panic("BUG: " + err.Error())
	}
}

// ofTarget is err, which is about the target of cfg if it has one.
func ofTarget(cfg *config.Config, err error) error {
	if cfg.Target == "" {
		return err
	}
	return fmt.Errorf("target %s: %w", cfg.Target, err)
}

// checkShared refuses flags by which several guests would write the same file. What
// their configurations say has been checked.
func checkShared(guests []guestRun) error {
	taken := map[string]bool{}
	for _, g := range guests {
		files := []struct{ flag, path string }{{"--keep", g.opts.Keep}, {"--console", g.opts.Console.Path}}
		for _, f := range files {
			if f.path != "" && taken[f.path] {
				return fmt.Errorf("%s: more than one target would write %s: put {target} in it, which stands for the name", f.flag, f.path)
			}
		}
		for _, f := range files {
			taken[f.path] = true
		}
	}
	return nil
}

// runMatrix runs the guests of targets.
func (f *runFlags) runMatrix(name string, guests []guestRun, files resultFiles, p program) error {
	var targets []matrix.Target
	for _, g := range guests {
		targets = append(targets, matrix.Target{Name: g.cfg.Target, Run: func(s matrix.Slot) launch.Result {
			if len(g.cfg.Run.Command) == 0 {
				s.Running()
			}
			opts := g.opts
			opts.Streams, opts.Signals, opts.CommandRuns = s.Streams, s.Signals, s.Running
			opts.Logger = f.logger(s.Streams.Messages)
			return launch.Run(g.cfg, opts)
		}})
	}
	report, err := matrix.Run(targets, f.jobs, p.streams)
	if err != nil {
		err = fmt.Errorf("the output of the targets: %w", err)
		report.ExitCode = cmp.Or(report.ExitCode, launch.ExitError)
	}
	if err := errors.Join(err, files.write(report, report, name)); err != nil {
		return exitError{cmp.Or(report.ExitCode, launch.ExitError), err.Error()}
	}
	if report.ExitCode == 0 {
		return nil
	}
	return exitError{code: report.ExitCode}
}

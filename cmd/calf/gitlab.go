package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/doctor"
	"github.com/calfvm/calf/cmd/internal/gitlab"
	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
)

// newGitLab returns the command gitlab-executor, whose verbs are the stages that GitLab
// Runner has a custom executor for.
func newGitLab(p program) *cobra.Command {
	e := &gitlab.Executor{Machine: jobMachine{p}, Version: buildVersion().Version, Getenv: os.Getenv, Streams: p.streams}
	var memory string
	cmd := &cobra.Command{
		Use:   "gitlab-executor",
		Short: "Run jobs of GitLab CI in guests of their own",
		Long: `Run jobs of GitLab CI in guests of their own: a custom executor for GitLab Runner,
which calls the verbs config, prepare, run and cleanup. The commands of a job run in a
fresh guest of the image that it names; what fetches and delivers files runs on this
host, confined to the job's directory. docs/gitlab.md says how to set it up, and what a
job can and cannot do.`,
		Example: `  # config.toml of the runner
  [runners.custom]
    config_exec = "calf"
    config_args = ["gitlab-executor", "--state=/var/lib/calf", "--images=/srv/images", "config"]`,
	}
	flags := cmd.PersistentFlags()
	flags.SortFlags = false
	flags.StringVar(&e.State, "state", "/var/lib/calf/gitlab", "keep what is of jobs in this `DIRECTORY`")
	flags.StringVar(&e.Images, "images", "", "the `DIRECTORY` of the images that jobs can name, each as NAME.qcow2")
	flags.StringVar(&e.Image, "image", "", "the `NAME` of the image for jobs that name none")
	flags.StringVar(&e.Guest, "config", "", "a TOML `FILE` with the [vm], [boot] and [run] env of guests")
	flags.IntVar(&e.MaxCPUs, "max-cpus", 0, "let jobs choose up to `NUMBER` processors with their variable CALF_CPUS")
	flags.StringVar(&memory, "max-memory", "", "let jobs choose memory up to `SIZE` with their variable CALF_MEMORY")
	flags.BoolVar(&e.Unconfined, "unconfined", false, "let what runs on this host for a job do what the runner may do")
	add := func(use, short string, args cobra.PositionalArgs, verb func(args []string) error) {
		cmd.AddCommand(&cobra.Command{
			Use: use, Short: short, Args: args,
			Example: "  calf gitlab-executor --state /var/lib/calf --images /srv/images " + use,
			RunE: func(_ *cobra.Command, args []string) error {
				err := parseMemory(e, memory)
				if err == nil {
					err = verb(args)
				}
				return endStage(e, err)
			},
		})
	}
	add("config", "Tell the runner where the job is at home", cobra.NoArgs, func([]string) error { return e.Config() })
	add("prepare", "Make the job's directories, and see whether its guest can run", cobra.NoArgs, func([]string) error { return e.Prepare() })
	add("run SCRIPT STAGE", "Run the script of a stage", cobra.ExactArgs(2), func(args []string) error { return e.Run(args[0], args[1]) })
	add("cleanup", "Remove what belongs to the job", cobra.NoArgs, func([]string) error { return e.Cleanup() })
	return cmd
}

func parseMemory(e *gitlab.Executor, size string) (err error) {
	if size == "" {
		return nil
	}
	if e.MaxMemory, err = config.ParseSize(size); err != nil {
		return fmt.Errorf("--max-memory: %w", err)
	}
	return nil
}

// endStage ends calf with the code that the runner expects.
func endStage(e *gitlab.Executor, err error) error {
	code, failed := e.ExitCode(err)
	if err = errors.Join(err, failed); err == nil {
		return nil
	}
	return exitError{code, err.Error()}
}

// jobMachine runs guests as calf run does.
type jobMachine struct{ p program }

// Check implements gitlab.Machine.
func (m jobMachine) Check(cfg *config.Config) (kernel string, err error) {
	if err := fit(doctor.ThisHost()); err != nil {
		return "", err
	}
	if err := launch.Check(cfg); err != nil || cfg.Boot.Kernel != "" {
		return cfg.Boot.Kernel, err
	}
	info, err := image.InspectBoot(cfg.Disks[0].Path, image.OpenOptions{Format: cfg.Disks[0].Format})
	if err != nil {
		return "", err
	}
	return info.Kernel.Path, nil
}

// fit reports what is missing on a host for guests to run.
func fit(host doctor.Host) error {
	report, err := doctor.Examine(host, doctor.Options{})
	if err != nil || report.OK {
		return err
	}
	var missing []error
	for _, c := range report.Checks {
		if c.State == doctor.Missing {
			missing = append(missing, errors.New(c.Name+": "+c.Found+"; "+c.Mend))
		}
	}
	return errors.Join(missing...)
}

// Run implements gitlab.Machine.
func (m jobMachine) Run(cfg *config.Config, opts launch.Options) launch.Result {
	opts.Started, opts.AllowEmulation = m.p.started, m.p.allowEmulation
	opts.Logger = slog.New(slog.NewTextHandler(opts.Streams.Messages, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return launch.Run(cfg, opts)
}

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/matrix"
	"github.com/calfvm/calf/config"
)

// overrides are the flags that hold the value of a key of the file.
var overrides = []struct{ flag, key, usage string }{
	{"kernel", "boot.kernel", "Linux kernel, a bzImage or an ELF vmlinux: `FILE` (default: the one on the first disk)"},
	{"initrd", "boot.initrd", "initial RAM disk: `FILE`"},
	{"cmdline", "boot.cmdline", "kernel `PARAMETERS`, appended to calf's own"},
	{"cpus", "vm.cpus", "`NUMBER` of virtual CPUs (default 1)"},
	{"memory", "vm.memory", "guest memory, a `SIZE` such as 2G (default 512MiB)"},
	{"vsock", "vsock.path", "Unix socket for connections with the guest, at `PATH`"},
	{"workdir", "run.workdir", "run the command in this `DIRECTORY` of the guest (default /)"},
	{"user", "run.user", "run the command as this `USER[:GROUP]` of the guest (default root)"},
	{"timeout", "vm.timeout", "end the run after this `DURATION`, such as 10m; 0 for never"},
	{"boot-timeout", "vm.boot_timeout", "end the run if the guest is not up after this `DURATION`"},
}

const (
	runCommand = "run"
	// namelessRun is what a run without a file is called in reports.
	namelessRun = "calf run"
)

// runFlags are the flags of calf run that are not keys of the file.
type runFlags struct {
	disks      []string
	snapshot   bool
	noSnapshot bool
	console    string
	logLevel   string
	level      slog.Level // that logLevel stands for
	dryRun     bool
	json       string
	junit      string
	noReboot   bool

	// What follows is for the targets of a file.
	jobs    int
	targets []string

	// What follows is for a command in the guest.
	env       []string
	copies    []string
	artifacts []string
	keep      string
}

func newRun(p program) *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   runCommand + " [CONFIG.toml | IMAGE.qcow2] [flags] [-- COMMAND [ARG…]]",
		Short: "Run a command in a fresh guest, or boot one and wait for its end",
		Long: `Run a command in a fresh guest, or boot one and wait for its end.

The guest is described by a TOML file, by a QCOW2 image that becomes its first
disk, or by flags alone. A flag overrides the file; --disk adds a disk, or
changes the keys of the disk of the file that has the same path.

Without a kernel, the guest boots the one that a boot loader would start from its
first disk, with the initial RAM disk and the root that go with it; calf image info
--boot shows which. The disk has ext4, ext3 or ext2 where its kernel lies.

With an IMAGE, writes go to a throw-away overlay and the image stays as it is;
the disks of a file, and those of --disk without an IMAGE, are written unless
they say snapshot. --snapshot and --no-snapshot decide for all disks. Overlays lie
in $TMPDIR, or /tmp, as files without a name: they need room there for what the
guest writes, and are gone with calf, however it ends.

With a COMMAND, the guest runs that and nothing else, in the root of its first disk.
Its streams, its terminal and its exit code are those of calf, and SIGINT, SIGTERM
and SIGHUP go to it; a second one ends the guest. Writes to the disks are thrown away
unless the file says otherwise, or --keep. --copy takes files to the guest before it,
and --artifact takes files from it after it, however it has ended.

Without one, the guest's console is that of calf: on a terminal, every key goes to
the guest; Ctrl-A x ends the guest and Ctrl-A Ctrl-A sends Ctrl-A. SIGINT, SIGTERM
and SIGHUP ask the guest to power off; a second one ends it. SIGCONT lets disks go on
that have stopped because of an error (on_error = "stop").

A file with [[target]] tables is a matrix: each target is a run of its own, -j of
them at once. Flags and -- COMMAND are for every one; {target} in a path of the
host stands for the name. A target has no terminal and no standard input. What it
says appears line by line after its name; on a terminal there is a line of status
for each, and at the end the output of those that failed. A signal reaches all
that run, and no further target is started.

Exit codes:
  0-125  the command's own; without one, 0: the guest powered off (with
         --no-reboot, or restarted)
  124    a timeout fired
  125    the configuration or the host is at fault; the message says how
  126    the command could not be executed
  127    there is no such command in the guest
  128+N  the command died of signal N, or the run was ended by it (130 by Ctrl-A x)
  255    the guest panicked, triple-faulted, or ended without a status

A matrix ends with 0 if all targets do; with 128+N if signal N came before its end;
else with the code of the first one of the file that failed. --json has them all.`,
		Example: `  calf run debian-12.qcow2 -- uname -a
  calf run debian-12.qcow2 --copy .:/src --workdir /src --artifact /src/report.xml=out/ -- ./test.sh
  calf run debian-12.qcow2
  calf run ci.toml
  calf run --kernel vmlinuz --memory 1G --cpus 2 debian-12.qcow2
  calf run matrix.toml -j 4 --junit report.xml
  calf run ci.toml --disk scratch.img,format=raw,serial=scratch --timeout 10m --json result.json`,
		ValidArgsFunction: filesNamed("toml", "qcow2"),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := f.run(cmd, args, p)
			if _, ok := errors.AsType[exitError](err); err != nil && !ok {
				return exitError{launch.ExitError, err.Error()} // unlike an error before this
			}
			return err
		},
	}
	f.define(cmd)
	return cmd
}

func (f *runFlags) define(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	for _, o := range overrides {
		flags.String(o.flag, "", o.usage)
	}
	flags.StringArrayVar(&f.disks, "disk", nil, "a disk: `PATH[,key=value…]` with the keys of [[disk]]; may be repeated")
	flags.BoolVar(&f.snapshot, "snapshot", false, "send the writes of all disks to throw-away overlays")
	flags.BoolVar(&f.noSnapshot, "no-snapshot", false, "write all disks themselves")
	flags.StringVar(&f.console, "console", "stdio", "the guest's console: stdio, file:PATH, pty or none, as `WHERE`")
	flags.StringVar(&f.logLevel, "log-level", "warn", "which messages to print: debug, info, warn or error, as `LEVEL`")
	flags.BoolVar(&f.dryRun, "dry-run", false, "check everything that needs no KVM and print the effective configuration")
	flags.StringVar(&f.json, "json", "", "write the result of the run to `FILE`")
	flags.StringVar(&f.junit, "junit", "", "write the result of the run to `FILE` as JUnit's XML")
	flags.BoolVar(&f.noReboot, "no-reboot", false, "end the run where the guest would restart")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "set a variable for the command, `NAME=VALUE`, or take NAME from here; may be repeated")
	flags.StringArrayVar(&f.copies, "copy", nil, "copy a file or directory to the guest before the command runs, `FROM:TO`; may be repeated")
	flags.StringArrayVar(&f.artifacts, "artifact", nil, "copy a file or directory from the guest after the command, `FROM=TO`; may be repeated")
	flags.StringVar(&f.keep, "keep", "", "keep what is written to the first disk in a new overlay, `FILE.qcow2`, which can be booted")
	flags.IntVarP(&f.jobs, "jobs", "j", 1, "run this `NUMBER` of targets at once")
	flags.StringArrayVar(&f.targets, "target", nil, "run only the target `NAME`; may be repeated")
	cmd.MarkFlagsMutuallyExclusive("snapshot", "no-snapshot")
	cmd.MarkFlagsMutuallyExclusive("keep", "no-snapshot")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "json")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "junit")
	complete := map[string][]string{
		"console":   {"stdio", "file:", "pty", "none"},
		"log-level": {"debug", "info", "warn", "error"},
	}
	for name, words := range complete {
		completeFlag(cmd, name, words...)
	}
	completeTarget(cmd)
}

// completeFlag lets the shell offer words as the values of a flag.
func completeFlag(cmd *cobra.Command, name string, words ...string) {
	if err := cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic("BUG: " + err.Error())
	}
}

// run does what the command line asks for.
func (f *runFlags) run(cmd *cobra.Command, args []string, p program) error {
	files, err := openResults(f.json, f.junit)
	if err != nil {
		return err
	}
	name := runName(cmd, args)
	guests, err := f.prepare(cmd, args, p)
	switch {
	case err == nil && f.dryRun:
		return dryRun(cmd, guests)
	case err == nil && guests[0].cfg.Target != "":
		return f.runMatrix(name, guests, files, p)
	}
	var result launch.Result
	if err != nil {
		result = launch.Failed(err)
	} else {
		result = launch.Run(guests[0].cfg, guests[0].opts)
	}
	if err := files.write(result, matrix.Single(name, result), name); err != nil {
		complain(p.streams.Messages, result.Message)
		return err
	}
	if result.ExitCode == 0 && result.Message == "" {
		return nil
	}
	return exitError{result.ExitCode, result.Message}
}

// runName is what the run with the given arguments is called in reports.
func runName(cmd *cobra.Command, args []string) string {
	if dash := cmd.ArgsLenAtDash(); dash >= 0 {
		args = args[:dash] // the rest is the guest's
	}
	if len(args) == 0 || strings.HasPrefix(args[0], ":") {
		return namelessRun
	}
	return filepath.Base(args[0])
}

// guestRun is a guest to be run.
type guestRun struct {
	cfg  *config.Config
	opts launch.Options
}

// dryRun reports what is wrong with guests that can be found without KVM, or prints
// what they are.
func dryRun(cmd *cobra.Command, guests []guestRun) error {
	for _, g := range guests {
		if err := launch.Check(g.cfg); err != nil {
			return ofTarget(g.cfg, err)
		}
	}
	for _, g := range guests {
		if err := printTOML(cmd, g.cfg); err != nil {
			return err
		}
	}
	return nil
}

// prepare turns the command line into guests with valid configurations and options: one
// for each target of the file, or one.
func (f *runFlags) prepare(cmd *cobra.Command, args []string, p program) ([]guestRun, error) {
	var command []string
	if dash := cmd.ArgsLenAtDash(); dash >= 0 {
		args, command = args[:dash], args[dash:]
	}
	switch f.logLevel {
	case "debug", "info", "warn", "error":
		if err := f.level.UnmarshalText([]byte(f.logLevel)); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("--log-level must be debug, info, warn or error, not %q", f.logLevel)
	}
	if f.jobs < 1 {
		return nil, fmt.Errorf("--jobs must be 1 or more, not %d", f.jobs)
	}
	spec, err := console.ParseSpec(f.console)
	if err != nil {
		return nil, fmt.Errorf("--console: %w", err)
	}
	cfg, err := f.configure(cmd.Flags(), args, command)
	if err != nil {
		return nil, err
	}
	var guests []guestRun
	for _, c := range cfg.Expand() {
		opts := launch.Options{
			Console: spec, NoReboot: f.noReboot, Keep: c.Own(f.keep), Streams: p.streams, Started: p.started, AllowEmulation: p.allowEmulation,
			Logger: f.logger(p.streams.Messages),
		}
		opts.Console.Path = c.Own(opts.Console.Path)
		if err := f.settle(cmd.Flags(), c, &opts); err != nil {
			return nil, ofTarget(c, err)
		}
		guests = append(guests, guestRun{c, opts})
	}
	return guests, checkShared(guests)
}

// logger returns what logs to w.
func (f *runFlags) logger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: f.level}))
}

// configure reads the file, if there is one, and applies the flags.
func (f *runFlags) configure(flags *pflag.FlagSet, args, command []string) (*config.Config, error) {
	args, copies, err := copiesOf(f.copies, args)
	if err != nil {
		return nil, err
	}
	artifacts, err := artifactsOf(f.artifacts)
	if err != nil {
		return nil, err
	}
	cfg, base, err := begin(args)
	if err != nil {
		return nil, err
	}
	if len(f.targets) > 0 {
		if err := cfg.Select("--target", f.targets...); err != nil {
			return nil, err
		}
	}
	for _, c := range cfg.Expand() {
		if len(command) > 0 {
			c.Run.Command = slices.Clone(command)
		}
		if err := setEnv(c, f.env); err != nil {
			return nil, err
		}
		for _, t := range copies {
			c.AddCopy("--copy", t.From, t.To)
		}
		for _, t := range artifacts {
			c.AddArtifact("--artifact", t.From, t.To)
		}
		if err := f.override(flags, c, base); err != nil {
			return nil, err
		}
	}
	return cfg, cfg.Validate()
}

// override applies the flags that change what the file says.
func (f *runFlags) override(flags *pflag.FlagSet, cfg *config.Config, base config.Disk) error {
	var errs config.Errors
	collect := func(err error) {
		if more, ok := errors.AsType[config.Errors](err); ok {
			errs = append(errs, more...)
		}
	}
	for _, o := range overrides {
		if flag := flags.Lookup(o.flag); flag.Changed {
			collect(cfg.Set("--"+o.flag, o.key, flag.Value.String()))
		}
	}
	for _, spec := range f.disks {
		collect(cfg.AddDisk("--disk", spec, base))
	}
	switch {
	case f.snapshot:
		cfg.SetSnapshot("--snapshot", true)
	case f.noSnapshot:
		cfg.SetSnapshot("--no-snapshot", false)
	}
	if len(errs) > 0 {
		return errs
	}
	return nil
}

// begin returns what the argument stands for, and what a disk of a flag starts
// from.
func begin(args []string) (*config.Config, config.Disk, error) {
	var base config.Disk
	switch {
	case len(args) == 0:
		return &config.Config{}, base, nil
	case len(args) > 1:
		return nil, base, fmt.Errorf("one CONFIG.toml or IMAGE.qcow2 at most, not %q: give more disks with --disk", args)
	}
	switch path := args[0]; strings.ToLower(filepath.Ext(path)) {
	case ".toml":
		cfg, err := config.Load(path)
		return cfg, base, err
	case ".qcow2":
		base.Snapshot = true
		cfg := &config.Config{}
		return cfg, base, cfg.AddDisk("image", strings.ReplaceAll(path, ",", ",,"), base)
	default:
		return nil, base, fmt.Errorf("%q is neither a CONFIG.toml nor an IMAGE.qcow2 by its name: for another image use --disk %s,format=raw", path, path)
	}
}

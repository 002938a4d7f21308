package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/spf13/pflag"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
)

// setEnv adds the variables of --env to those of the file.
func setEnv(cfg *config.Config, env []string) error {
	for _, v := range env {
		name, value, given := strings.Cut(v, "=")
		if !given {
			value, given = os.LookupEnv(name)
		}
		switch {
		case name == "":
			return fmt.Errorf("--env %q: the name of the variable is missing", v)
		case !given:
			return fmt.Errorf("--env %s: there is no such variable here, and no value is given: write %s=VALUE", name, name)
		}
		cfg.SetEnv("--env", name, value)
	}
	return nil
}

// copiesOf reads the values of --copy. One of FROM alone is followed by an argument
// ":TO", which is taken out of args.
func copiesOf(specs, args []string) (rest []string, copies []config.Copy, err error) {
	var targets []string
	for _, arg := range args {
		if strings.HasPrefix(arg, ":") {
			targets = append(targets, arg[1:])
		} else {
			rest = append(rest, arg)
		}
	}
	for _, spec := range specs {
		t := config.Copy{From: spec}
		if i := strings.LastIndex(spec, ":"); i > 0 {
			t.From, t.To = spec[:i], spec[i+1:]
		} else if len(targets) > 0 {
			t.To, targets = targets[0], targets[1:]
		}
		if !path.IsAbs(t.To) {
			return nil, nil, fmt.Errorf("--copy %s: the path in the guest is missing, or does not begin with a slash: write FROM:/TO", spec)
		}
		copies = append(copies, t)
	}
	if len(targets) > 0 {
		return nil, nil, fmt.Errorf("the argument :%s belongs to no --copy", targets[0])
	}
	return rest, copies, nil
}

// artifactsOf reads the values of --artifact.
func artifactsOf(specs []string) ([]config.Artifact, error) {
	var artifacts []config.Artifact
	for _, spec := range specs {
		from, to, given := strings.Cut(strings.TrimPrefix(spec, ":"), "=")
		if !path.IsAbs(from) || given && to == "" {
			return nil, fmt.Errorf("--artifact %s: write /FROM=TO, where FROM is a path in the guest", spec)
		}
		artifacts = append(artifacts, config.Artifact{From: from, To: to})
	}
	return artifacts, nil
}

// settle makes the options go with each other.
func (f *runFlags) settle(flags *pflag.FlagSet, cfg *config.Config, opts *launch.Options) error {
	if f.keep != "" && len(cfg.Disks) == 0 {
		return errors.New("--keep: the guest has no disk")
	}
	if len(cfg.Run.Command) == 0 {
		if flags.ArgsLenAtDash() >= 0 {
			return errors.New("no command follows the --; leave it out to boot the guest without one")
		}
		return nil
	}
	switch {
	case opts.Console.Kind == console.Stdio && flags.Changed("console"):
		return errors.New("--console stdio: standard output is that of the command; send the console to a file with --console file:PATH")
	case opts.Console.Kind == console.Stdio:
		opts.Console = console.Spec{Kind: console.None}
	}
	return nil
}

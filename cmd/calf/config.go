package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
)

func newConfig() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "config",
		Short:   "Check, show and describe configuration files",
		Example: "  calf config check ci.toml",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newConfigCheck(), newConfigShow(), newConfigSchema())
	return cmd
}

// loadValid reads a file that a run would accept without further flags.
func loadValid(path string) (*config.Config, error) {
	cfg, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	return cfg, cfg.Validate()
}

func newConfigCheck() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Report everything that is wrong with a file",
		Long: `Report everything that is wrong with a file, with line and column. Only the file
itself is read; 'calf run --dry-run' also looks at the kernel and the images.

The exit code is 0 if nothing is wrong and 125 otherwise.`,
		Example:           "  calf config check ci.toml\n  calf config check --json ci.toml",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: filesNamed("toml"),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := loadValid(args[0])
			var errs config.Errors
			if !asJSON || err != nil && !errors.As(err, &errs) {
				return err
			}
			report := struct {
				Valid  bool          `json:"valid"`
				Errors config.Errors `json:"errors"`
			}{err == nil, append(config.Errors{}, errs...)}
			if err := printJSON(cmd.OutOrStdout(), report); err != nil {
				return err
			}
			if !report.Valid {
				return exitError{code: launch.ExitError}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the errors as JSON")
	return cmd
}

func newConfigShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Print the effective configuration",
		Long: `Print the configuration of a file with every default filled in and every path made
absolute, as a file that means the same. A target is printed with all that it
has from the rest of the file.`,
		Example:           "  calf config show ci.toml > effective.toml",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: filesNamed("toml"),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := loadValid(args[0])
			if err != nil {
				return err
			}
			return printTOML(cmd, cfg)
		},
	}
}

func newConfigSchema() *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		Short:   "Print the JSON schema of configuration files",
		Example: "  calf config schema > calf.schema.json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := config.Schema()
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
}

// printTOML prints the effective form of cfg.
func printTOML(cmd *cobra.Command, cfg *config.Config) error {
	text, err := cfg.TOML()
	if err != nil {
		return err
	}
	_, err = cmd.OutOrStdout().Write(text)
	return err
}

// filesNamed completes the names of files with one of the given extensions.
func filesNamed(extensions ...string) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return extensions, cobra.ShellCompDirectiveFilterFileExt
	}
}

package main

import (
	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/doctor"
)

// exitUnfit is the exit code of doctor if calf run does not work.
const exitUnfit = 1

func newDoctor(host doctor.Host) *cobra.Command {
	var (
		opts   doctor.Options
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this host can do, and how to mend what it cannot",
		Long: `Say what this host can do for calf, and how to mend what it cannot. Nothing is
changed. With --kernel, say whether guests can use that kernel; its configuration
is looked for in it and beside it.

The exit code is 0 if calf run works here and 1 if something that it needs is
missing; warnings do not count.`,
		Example: "  calf doctor\n  calf doctor --json\n  calf doctor --kernel /boot/vmlinuz-6.12.0",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := doctor.Examine(host, opts)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), report)
			} else {
				err = report.Text(cmd.OutOrStdout())
			}
			if err == nil && !report.OK {
				return exitError{code: exitUnfit}
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.Kernel, "kernel", "", "a kernel for guests: a bzImage, or an ELF vmlinux")
	flags.StringVar(&opts.KernelConfig, "kernel-config", "", "the configuration of the kernel")
	flags.BoolVar(&asJSON, "json", false, "print as JSON")
	return cmd
}

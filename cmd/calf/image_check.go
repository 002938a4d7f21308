package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

func newImageCheck() *cobra.Command {
	var (
		format, output, repair string
		quiet                  bool
		opts                   image.CheckOptions
	)
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check an image, and repair it",
		Long: `Count all references in an image and compare them with its reference counts. -r
mends leaks, or all that can be mended.

The exit code is 0 if the image is sound then, 1 if it could not be checked, 2 if it
is corrupt, 3 if it has leaks only, and 63 if its format cannot be checked.`,
		Example: "  calf image check disk.qcow2\n  calf image check -r leaks disk.qcow2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := inJSON(output)
			if err != nil {
				return err
			}
			f, err := image.FormatOf(args[0], format)
			if err != nil {
				return err
			}
			if opts.Repair, err = repairMode(repair); err != nil {
				return err
			}
			report, code, failed := image.Check(cmd.Context(), args[0], f, opts)
			if err := report.Findings(cmd.ErrOrStderr()); err != nil {
				return err
			}
			switch {
			case quiet:
			case asJSON:
				err = printJSON(cmd.OutOrStdout(), report)
			case failed == nil:
				err = report.Text(cmd.OutOrStdout())
			}
			if failed != nil {
				return exitError{code: code, message: errors.Join(failed, err).Error()}
			}
			if err == nil && code != image.CheckClean {
				err = exitError{code: code}
			}
			return err
		},
	}
	formatFlag(cmd, &format)
	outputFlag(cmd, &output)
	forceShareFlag(cmd, &opts.ForceShare)
	flags := cmd.Flags()
	flags.StringVarP(&repair, "repair", "r", "", "what to mend: leaks or all")
	flags.StringVarP(&opts.Cache, "cache", "T", image.CacheWriteback, "cache mode: none and directsync read past the host's page cache")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// repairMode reads the value of -r.
func repairMode(repair string) (*qcow2.RepairMode, error) {
	switch repair {
	case "":
		return nil, nil
	case "leaks":
		return new(qcow2.RepairLeaks), nil
	case "all":
		return new(qcow2.RepairAll), nil
	}
	return nil, fmt.Errorf("-r is leaks or all, not %q", repair)
}

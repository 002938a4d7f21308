package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

func newImageCheck() *cobra.Command {
	var (
		format, output, repair string
		quiet                  bool
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
			var mode *qcow2.RepairMode
			switch repair {
			case "":
			case "leaks":
				mode = new(qcow2.RepairLeaks)
			case "all":
				mode = new(qcow2.RepairAll)
			default:
				return fmt.Errorf("-r is leaks or all, not %q", repair)
			}
			report, code, err := image.Check(cmd.Context(), args[0], f, mode)
			if err != nil {
				return exitError{code: code, message: err.Error()}
			}
			switch {
			case asJSON:
				err = printJSON(cmd.OutOrStdout(), report)
			case !quiet:
				err = report.Text(cmd.OutOrStdout())
			}
			if err == nil && code != image.CheckClean {
				err = exitError{code: code}
			}
			return err
		},
	}
	formatFlag(cmd, &format)
	outputFlag(cmd, &output)
	cmd.Flags().StringVarP(&repair, "repair", "r", "", "what to mend: leaks or all")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

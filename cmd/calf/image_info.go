package main

import (
	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageInfo() *cobra.Command {
	var (
		format, output string
		chain, share   bool
	)
	cmd := &cobra.Command{
		Use:     "info FILE",
		Short:   "Print what an image says of itself",
		Long:    "Print what an image says of itself. Nothing but the image is opened, unless the chain is asked for.",
		Example: "  calf image info disk.qcow2\n  calf image info --output=json --backing-chain overlay.qcow2",
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
			if chain {
				infos, err := image.Chain(args[0], image.OpenOptions{Format: f, ForceShare: share})
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), infos)
				}
				return image.Tree(cmd.OutOrStdout(), infos)
			}
			i, err := inspectImage(args[0], f, share)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), i)
			}
			return i.Text(cmd.OutOrStdout())
		},
	}
	formatFlag(cmd, &format)
	forceShareFlag(cmd, &share)
	outputFlag(cmd, &output)
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "follow the backing files, too")
	return cmd
}

// inspectImage looks at the image at path, shared with a writer if it is to be.
func inspectImage(path, format string, share bool) (*image.Info, error) {
	if share {
		return image.InspectShared(path, format)
	}
	return image.Inspect(path, format)
}

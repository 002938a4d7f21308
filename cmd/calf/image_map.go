package main

import (
	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageMap() *cobra.Command {
	var (
		format, output, start, most string
		opens                       openFlags
	)
	cmd := &cobra.Command{
		Use:   "map FILE",
		Short: "Print where the data of an image is",
		Long: `Print what the parts of the disk in an image are: in which layer of its chain and
where in that file, or zero. As text, what has data; as JSON, everything.`,
		Example: "  calf image map disk.qcow2\n  calf image map --output=json -s 1G -l 64M overlay.qcow2",
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
			var r image.MapRange
			if r.Start, err = sizeFlag(start, 0); err != nil {
				return err
			}
			if r.Most, err = sizeFlag(most, -1); err != nil {
				return err
			}
			o := opens.options(f)
			o.ReadOnly = true
			return image.Map(cmd.Context(), cmd.OutOrStdout(), args[0], o, r, asJSON)
		},
	}
	formatFlag(cmd, &format)
	outputFlag(cmd, &output)
	opens.define(cmd, true)
	flags := cmd.Flags()
	flags.StringVarP(&start, "start-offset", "s", "", "byte of the disk to begin with")
	flags.StringVarP(&most, "max-length", "l", "", "length of the part to print")
	return cmd
}

// sizeFlag reads the value of a flag that is a size, missing if it is not given.
func sizeFlag(v string, missing int64) (int64, error) {
	if v == "" {
		return missing, nil
	}
	return image.ParseSize(v)
}

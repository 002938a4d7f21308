package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

// measureFlags are the flags of measure.
type measureFlags struct {
	openFlags
	format, target, size, snapshot string
	options                        []string
}

func newImageMeasure() *cobra.Command {
	var (
		o      measureFlags
		output string
	)
	cmd := &cobra.Command{
		Use:   "measure [--size SIZE | FILE]",
		Short: "Tell how large the file of a new image has to be",
		Long: `Tell how large the file of a new image has to be at most: at first, and once its
disk is full of data. The image is an empty one of SIZE, or a copy of FILE.`,
		Example: `  calf image measure -O qcow2 --size 100G
  calf image measure -O qcow2 -o cluster_size=2M --output=json disk.raw`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asJSON, err := inJSON(output)
			if err != nil {
				return err
			}
			r, err := o.measure(cmd, args)
			switch {
			case err != nil || r == nil:
				return err
			case asJSON:
				return printJSON(cmd.OutOrStdout(), r)
			}
			return r.Text(cmd.OutOrStdout())
		},
	}
	formatFlag(cmd, &o.format)
	outputFlag(cmd, &output)
	o.define(cmd, true)
	flags := cmd.Flags()
	flags.StringVarP(&o.target, "target-format", "O", "", "format of the new image: raw, which it is without the flag, or qcow2")
	flags.StringArrayVarP(&o.options, "options", "o", nil, "options of the new image: KEY=VALUE,…; help lists them")
	flags.StringVar(&o.size, "size", "", "size of the disk of the new image")
	flags.StringVarP(&o.snapshot, "snapshot", "l", "", "internal snapshot of FILE to copy, by its ID or name")
	return cmd
}

// measure returns nil if all that was asked for is help with the options.
func (o *measureFlags) measure(cmd *cobra.Command, args []string) (*image.Measurement, error) {
	to, err := image.FormatOf("", o.target)
	if err != nil {
		return nil, err
	}
	var create image.CreateOptions
	if done, err := setOptions(cmd, &create, to, o.options); done || err != nil {
		return nil, err
	}
	if len(args) == 1 && o.size == "" {
		f, err := image.FormatOf(args[0], o.format)
		if err != nil {
			return nil, err
		}
		source := o.openFlags.options(f)
		source.Snapshot = snapshotName(o.snapshot)
		return image.MeasureCopy(cmd.Context(), args[0], source, to, create)
	}
	switch {
	case len(args) == 1 || o.size == "":
		return nil, errors.New("one of --size and FILE has to be given, and not both")
	case o.format != "" || o.snapshot != "":
		return nil, errors.New("-f and -l go with FILE")
	}
	if create.Size, err = image.ParseSize(o.size); err != nil {
		return nil, err
	}
	return image.MeasureNew(to, create)
}

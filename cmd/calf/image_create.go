package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageCreate() *cobra.Command {
	var (
		format, preset string
		o              image.CreateOptions
		options        []string
		quiet          bool
	)
	cmd := &cobra.Command{
		Use:   "create FILE [SIZE]",
		Short: "Make an empty image",
		Long: `Make an empty image where no file is yet: qemu-img overwrites one that is there.
SIZE takes the units k, M, G, T, P and E; an image over a backing file may leave it
out.`,
		Example: `  calf image create disk.qcow2 10G
  calf image create -o extended_l2=on,cluster_size=128k disk.qcow2 10G
  calf image create -b base.qcow2 -F qcow2 overlay.qcow2`,
		Args: func(cmd *cobra.Command, args []string) error {
			if slices.ContainsFunc(options, asksForHelp) {
				return nil
			}
			return cobra.RangeArgs(1, 2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := image.FormatOf(strings.Join(args[:min(1, len(args))], ""), format)
			if err != nil {
				return err
			}
			if done, err := setOptions(cmd, &o, f, options); done || err != nil {
				return err
			}
			sized := o.Size > 0
			if preset != "" {
				o.BackingFile = preset
			}
			if len(args) == 2 {
				if o.Size, err = image.ParseSize(args[1]); err != nil {
					return err
				}
				sized = true
			}
			line, err := image.Create(args[0], f, o, sized)
			if err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), line)
			return err
		},
	}
	flags := cmd.Flags()
	formatFlag(cmd, &format)
	flags.StringArrayVarP(&options, "options", "o", nil, "options of the format: KEY=VALUE,…; help lists them")
	flags.StringVarP(&preset, "backing", "b", "", "image to lie over; a relative name counts from the new image's directory")
	flags.StringVarP(&o.BackingFormat, "backing-format", "F", "", "format of the backing file, which -b takes")
	flags.BoolVarP(&o.Unsafe, "unsafe", "u", false, "do not look at the backing file")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing")
	return cmd
}

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

func newImageResize() *cobra.Command {
	var (
		format, preallocation string
		opts                  qcow2.ResizeOptions
		quiet                 bool
	)
	cmd := &cobra.Command{
		Use:   "resize FILE [+]SIZE",
		Short: "Change the size of the disk in an image",
		Long: `Change the size of the disk in an image: to SIZE, or with a sign by SIZE. What it
gains reads as zero. To shrink takes --shrink, and loses what lies beyond the new
end.`,
		Example: "  calf image resize disk.qcow2 +10G\n  calf image resize --shrink disk.qcow2 -5G",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := image.FormatOf(args[0], format)
			if err != nil {
				return err
			}
			if opts.Preallocation, err = image.ParsePreallocation(preallocation); err != nil {
				return err
			}
			if err := image.Resize(cmd.Context(), args[0], f, args[1], opts); err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "Image resized.")
			return err
		},
	}
	formatFlag(cmd, &format)
	flags := cmd.Flags()
	flags.BoolVar(&opts.Shrink, "shrink", false, "allow the disk to become smaller")
	flags.StringVar(&preallocation, "preallocation", "off", "room for what the disk gains: off, metadata, falloc or full")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing")
	return cmd
}

// signedSize returns the arguments of calf with a mark before a negative size at the
// end of those of resize, which is no flag there, as it is none of qemu-img's.
func signedSize(args []string) []string {
	last := len(args) - 1
	if last < 2 || args[0] != "image" || args[1] != "resize" || slices.Contains(args, "--") {
		return args
	}
	if digits, ok := strings.CutPrefix(args[last], "-"); !ok || strings.IndexAny(digits, "0123456789") != 0 {
		return args
	}
	return slices.Insert(slices.Clone(args), last, "--")
}

package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
)

const compareVerb = "compare"

func newImageCompare() *cobra.Command {
	var (
		formats             [2]string
		strict, show, quiet bool
		opens               openFlags
	)
	cmd := &cobra.Command{
		Use:   compareVerb + " FILE FILE",
		Short: "Compare the disks in two images",
		Long: `Compare the disks in two images, whatever their formats and options are, and print
where the first difference is. What one lacks at its end must be zero in the other.

The exit code is 0 if they are the same, 1 if they differ, 2 if one cannot be
opened, 3 if what a range is cannot be found out, and 4 if one cannot be read.`,
		Example: "  calf image compare disk.raw disk.qcow2\n  calf image compare -s before.qcow2 after.qcow2",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var o [2]image.OpenOptions
			for i := range o {
				f, err := image.FormatOf(args[i], formats[i])
				if err != nil {
					return exitError{code: image.CompareNotOpened, message: err.Error()}
				}
				o[i] = opens.options(f)
			}
			out := cmd.OutOrStdout()
			if quiet {
				out = io.Discard
			}
			code := 0
			err := working(cmd, quiet, func(m *progress.Meter) (err error) {
				code, err = image.Compare(cmd.Context(), out, [2]string(args), o, strict, m)
				return err
			})
			switch {
			case err != nil:
				return exitError{code: code, message: err.Error()}
			case code != image.CompareSame:
				return exitError{code: code}
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&formats[0], "a-format", "f", "", "format of the first FILE: qcow2 or raw")
	flags.StringVarP(&formats[1], "b-format", "F", "", "format of the second")
	flags.BoolVarP(&strict, "strict", "s", false, "the sizes have to be the same, too, and what is allocated")
	flags.StringVarP(&opens.cache, "cache", "T", image.CacheWriteback, "cache mode of both: writeback, writethrough, none, directsync or unsafe")
	flags.StringArrayVar(&opens.backingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	forceShareFlag(cmd, &opens.forceShare)
	flags.BoolVarP(&show, "progress", "p", false, "show progress, which it does anyway")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

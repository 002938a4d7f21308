package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
)

func newImageRebase() *cobra.Command {
	var (
		open          openFlags
		o             image.RebaseOptions
		format        string
		quiet, unsafe bool
	)
	cmd := &cobra.Command{
		Use:   "rebase -b BACKING FILE",
		Short: "Put an overlay over another backing file",
		Long: `Put the overlay FILE over the backing file BACKING instead of the one it has, and
let it show what it did: where the two differ, what the old one has is copied into
FILE first. If that is cut short, FILE lies over the old one. An empty BACKING makes
FILE an image of its own.

-u changes only the name that FILE has for its backing file, and opens nothing else:
for one that has moved.`,
		Example: `  calf image rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  calf image rebase -b "" overlay.qcow2
  calf image rebase -u -b moved/base.img -F raw overlay.qcow2`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !unsafe && !cmd.Flags().Changed("backing") {
				return errors.New(`give the new backing file with -b, or -b "" for none`)
			}
			if unsafe && o.Compress {
				return errors.New("-u copies nothing that -c could compress: leave one of them out")
			}
			o.Open = open.options(format)
			if unsafe {
				return image.RebaseUnsafe(args[0], o)
			}
			return working(cmd, quiet, func(m *progress.Meter) error {
				return image.Rebase(cmd.Context(), args[0], o, m)
			})
		},
	}
	formatFlag(cmd, &format)
	open.define(cmd, false)
	progressFlags(cmd, &quiet)
	flags := cmd.Flags()
	flags.StringVarP(&o.Backing, "backing", "b", "", "new backing file; a relative name counts from the directory of FILE")
	flags.StringVarP(&o.BackingFormat, "backing-format", "F", "", "format of the new backing file, which -b takes")
	flags.StringVarP(&o.BackingCache, "source-cache", "T", image.CacheWriteback, "cache mode of the new backing file")
	flags.BoolVarP(&o.Compress, "compress", "c", false, "compress what is copied")
	flags.BoolVarP(&unsafe, "unsafe", "u", false, "change the name only, whatever the files have")
	return cmd
}

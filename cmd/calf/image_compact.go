package main

import (
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
)

func newImageCompact() *cobra.Command {
	var (
		o       image.CompactOptions
		options []string
		quiet   bool
	)
	cmd := &cobra.Command{
		Use:   "compact FILE",
		Short: "Give back the room that an image does not need",
		Long: `Give back to the host the room that an image takes for zeros and for what nothing
refers to. A qcow2 image is written anew beside itself, with the options it has, and
takes its name again when it is whole; in a raw image holes are made. Have the guest
fill its free space with zeros, or discard it, before.`,
		Example: "  calf image compact disk.qcow2\n  calf image compact -c -o compression_type=zstd disk.qcow2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, list := range options {
				kind, ok := strings.CutPrefix(list, "compression_type=")
				if !ok {
					return fmt.Errorf("-o %s: compact changes the compression_type only; calf image convert -o changes all", list)
				}
				o.CompressionType = kind
			}
			var done image.Compaction
			err := working(cmd, quiet, func(m *progress.Meter) (err error) {
				done, err = image.Compact(cmd.Context(), args[0], o, m)
				return err
			})
			if err != nil || quiet {
				return err
			}
			size := func(n int64) string { return units.BytesSize(float64(n)) }
			if done.After >= done.Before {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s takes %s, and needs it.\n", args[0], size(done.Before))
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s took %s and takes %s now: %s won.\n",
				args[0], size(done.Before), size(done.After), size(done.Before-done.After))
			return err
		},
	}
	formatFlag(cmd, &o.Format)
	flags := cmd.Flags()
	flags.BoolVarP(&o.Compress, "compress", "c", false, "compress all of it; without it, what is compressed stays so")
	flags.StringArrayVarP(&options, "options", "o", nil, "compression_type=zlib or compression_type=zstd")
	flags.StringArrayVar(&o.BackingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	progressFlags(cmd, &quiet)
	return cmd
}

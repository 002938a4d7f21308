package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
)

func newImageCommit() *cobra.Command {
	var (
		open         openFlags
		o            image.CommitOptions
		format, rate string
		quiet        bool
	)
	cmd := &cobra.Command{
		Use:   "commit FILE",
		Short: "Merge an overlay into the image it lies over",
		Long: `Write what the overlay FILE has into the image that it lies over, which becomes
larger if it is too small, and empty FILE. If that is cut short, FILE shows what it
did before, and the same command goes on.

-b names an image further down. Those between then make no sense any more, as does
any other overlay of an image that is written to. FILE is not emptied then, because
it shows them.`,
		Example: "  calf image commit overlay.qcow2\n  calf image commit -b base.qcow2 overlay.qcow2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Rate, err = parseRate(rate); err != nil {
				return err
			}
			o.Open = open.options(format)
			o.Keep = o.Keep || o.Base != ""
			if err := working(cmd, quiet, func(m *progress.Meter) error {
				return image.Commit(cmd.Context(), args[0], o, m)
			}); err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "Image committed.")
			return err
		},
	}
	formatFlag(cmd, &format)
	open.define(cmd, false)
	rateFlag(cmd, &rate)
	progressFlags(cmd, &quiet)
	flags := cmd.Flags()
	flags.StringVarP(&o.Base, "base", "b", "", "image to write to, if not the one right under FILE; implies -d")
	flags.BoolVarP(&o.Keep, "keep", "d", false, "do not empty FILE")
	return cmd
}

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageSnapshot() *cobra.Command {
	var (
		format string
		list   bool
		share  bool
		quiet  bool
		names  [3]string
	)
	verbs := [3]image.SnapshotVerb{image.CreateSnapshot, image.ApplySnapshot, image.DeleteSnapshot}
	cmd := &cobra.Command{
		Use:   "snapshot [-l | -c NAME | -a NAME | -d NAME] FILE",
		Short: "List, make, apply and delete internal snapshots",
		Long: `List the internal snapshots of an image, keep the present state of its disk as one,
make the disk what it was when one was made, or delete one. NAME is its name or ID.`,
		Example: "  calf image snapshot -c before-upgrade disk.qcow2\n  calf image snapshot disk.qcow2",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := image.FormatOf(args[0], format)
			if err != nil {
				return err
			}
			if f == image.Raw {
				return fmt.Errorf("%s: a raw image has no snapshots", args[0])
			}
			what := -1
			for i, flag := range [3]string{"create", "apply", "delete"} {
				if !cmd.Flags().Changed(flag) {
					continue
				}
				if what >= 0 || list {
					return errors.New("of -l, -c, -a and -d only one can be done at a time")
				}
				what = i
			}
			switch {
			case what < 0:
				i, err := image.Examine(args[0], image.OpenOptions{Format: f, ForceShare: share})
				if err != nil {
					return err
				}
				if err := i.Fault(); err != nil {
					return err
				}
				return image.ListSnapshots(cmd.OutOrStdout(), i)
			case share:
				return errors.New("-U is for a list: an image that others use cannot be changed")
			}
			return image.ChangeSnapshot(cmd.Context(), args[0], verbs[what], names[what])
		},
	}
	formatFlag(cmd, &format)
	forceShareFlag(cmd, &share)
	flags := cmd.Flags()
	flags.BoolVarP(&list, "list", "l", false, "list the snapshots, which is what it does without a flag")
	flags.StringVarP(&names[0], "create", "c", "", "make a snapshot with this name")
	flags.StringVarP(&names[1], "apply", "a", "", "make the disk what it was when this one was made")
	flags.StringVarP(&names[2], "delete", "d", "", "delete this one")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing, which is what changes do anyway")
	return cmd
}

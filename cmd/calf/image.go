package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/qcow2"
)

// exitImage is the exit code of a verb of calf image that failed, as of qemu-img.
const exitImage = 1

func newImage() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Make, inspect, check and change disk images",
		Long: `Make, inspect, check and change disk images, QCOW2 and raw.

The verbs take the flags of qemu-img, end with its exit codes and print its JSON.
The format of an image is what -f says, else qcow2 if the name ends in .qcow2, else
raw: it is never guessed from what the file holds.`,
		Example: "  calf image create disk.qcow2 10G\n  calf image check disk.qcow2",
		Args:    func(cmd *cobra.Command, args []string) error { return imageError(cobra.NoArgs(cmd, args)) },
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return imageError(err) })
	for _, verb := range []*cobra.Command{newImageCreate(), newImageInfo(), newImageCheck(), newImageResize(), newImageSnapshot()} {
		run := verb.RunE
		verb.RunE = func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			cmd.SetContext(ctx)
			return imageError(run(cmd, args))
		}
		args := verb.Args
		verb.Args = func(cmd *cobra.Command, a []string) error { return imageError(args(cmd, a)) }
		cmd.AddCommand(verb)
	}
	return cmd
}

// imageError gives err the exit code of a verb, if it has none.
func imageError(err error) error {
	if _, ok := err.(exitError); ok || err == nil { //nolint:errorlint // only the outermost counts
		return err
	}
	return exitError{code: exitImage, message: err.Error()}
}

// formatFlag defines -f.
func formatFlag(cmd *cobra.Command, format *string) {
	cmd.Flags().StringVarP(format, "format", "f", "", "format of the image: qcow2 or raw")
}

// outputFlag defines --output.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVar(output, "output", "human", "form of the result: human or json")
}

// inJSON reads the value of --output.
func inJSON(output string) (bool, error) {
	switch output {
	case "human":
		return false, nil
	case "json":
		return true, nil
	}
	return false, fmt.Errorf("--output is human or json, not %q", output)
}

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
		Long: `Make an empty image where no file is yet. SIZE takes the units k, M, G, T and P;
an image over a backing file may leave it out.`,
		Example: `  calf image create disk.qcow2 10G
  calf image create -o extended_l2=on,cluster_size=128k disk.qcow2 10G
  calf image create -b base.qcow2 -F qcow2 overlay.qcow2`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := image.FormatOf(args[0], format)
			if err != nil {
				return err
			}
			sized := false
			for _, list := range options {
				if list == "help" || list == "?" {
					_, err := fmt.Fprint(cmd.OutOrStdout(), image.HelpOptions(f))
					return err
				}
				if err := o.Set(f, list); err != nil {
					return err
				}
				sized = sized || o.Size > 0
			}
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

func newImageInfo() *cobra.Command {
	var (
		format, output string
		chain          bool
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
				infos, err := image.Chain(args[0], f)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), infos)
				}
				return image.Tree(cmd.OutOrStdout(), infos)
			}
			i, err := image.Inspect(args[0], f)
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
	outputFlag(cmd, &output)
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "follow the backing files, too")
	return cmd
}

func newImageCheck() *cobra.Command {
	var (
		format, output, repair string
		quiet                  bool
	)
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check an image, and repair it",
		Long: `Count all references in an image and compare them with its reference counts. -r
mends leaks, or all that can be mended.

The exit code is 0 if the image is sound then, 1 if it could not be checked, 2 if it
is corrupt, 3 if it has leaks only, and 63 if its format cannot be checked.`,
		Example: "  calf image check disk.qcow2\n  calf image check -r leaks disk.qcow2",
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
			var mode *qcow2.RepairMode
			switch repair {
			case "":
			case "leaks":
				mode = new(qcow2.RepairLeaks)
			case "all":
				mode = new(qcow2.RepairAll)
			default:
				return fmt.Errorf("-r is leaks or all, not %q", repair)
			}
			report, code, err := image.Check(cmd.Context(), args[0], f, mode)
			if err != nil {
				return exitError{code: code, message: err.Error()}
			}
			switch {
			case asJSON:
				err = printJSON(cmd.OutOrStdout(), report)
			case !quiet:
				err = report.Text(cmd.OutOrStdout())
			}
			if err == nil && code != image.CheckClean {
				err = exitError{code: code}
			}
			return err
		},
	}
	formatFlag(cmd, &format)
	outputFlag(cmd, &output)
	cmd.Flags().StringVarP(&repair, "repair", "r", "", "what to mend: leaks or all")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

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
end; write -- before a SIZE that begins with a minus sign.`,
		Example: "  calf image resize disk.qcow2 +10G\n  calf image resize --shrink disk.qcow2 5G",
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

func newImageSnapshot() *cobra.Command {
	var (
		format string
		list   bool
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
			for i, name := range names {
				if name != "" && (what >= 0 || list) {
					return errors.New("of -l, -c, -a and -d only one can be done at a time")
				}
				if name != "" {
					what = i
				}
			}
			if what < 0 {
				return image.ListSnapshots(cmd.OutOrStdout(), args[0])
			}
			return image.ChangeSnapshot(cmd.Context(), args[0], verbs[what], names[what])
		},
	}
	formatFlag(cmd, &format)
	flags := cmd.Flags()
	flags.BoolVarP(&list, "list", "l", false, "list the snapshots, which is what it does without a flag")
	flags.StringVarP(&names[0], "create", "c", "", "make a snapshot with this name")
	flags.StringVarP(&names[1], "apply", "a", "", "make the disk what it was when this one was made")
	flags.StringVarP(&names[2], "delete", "d", "", "delete this one")
	flags.BoolVarP(&quiet, "quiet", "q", false, "print nothing, which is what changes do anyway")
	return cmd
}

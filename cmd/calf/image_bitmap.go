package main

import (
	"errors"
	"slices"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageBitmap() *cobra.Command {
	var (
		open                openFlags
		format, granularity string
		actions             bitmapActions
		o                   image.BitmapOptions
	)
	cmd := &cobra.Command{
		Use:   "bitmap (--add | --remove | --clear | --enable | --disable | --merge SOURCE)... FILE BITMAP",
		Short: "Add, remove, clear, enable, disable and merge persistent bitmaps",
		Long: `Change a persistent bitmap of an image: which parts of its disk have changed since
some time, as backup programs want to know it. Several actions are done in the order
in which they are given, and those before one that fails stay done. A bitmap that is in
use, because the disk has changed without it, can only be removed.`,
		Example: `  calf image bitmap --add disk.qcow2 monday
  calf image bitmap --add --disable -g 1M disk.qcow2 archive
  calf image bitmap --merge monday -b overlay.qcow2 -F qcow2 disk.qcow2 week`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			does := func(what string) bool {
				return slices.ContainsFunc(actions, func(a image.BitmapAction) bool { return a.What == what })
			}
			var err error
			switch changed := cmd.Flags().Changed; {
			case len(actions) == 0:
				return errors.New("say what to do: one of --add, --remove, --clear, --enable, --disable and --merge at least")
			case changed("granularity") && !does(image.AddBitmap):
				return errors.New("-g goes with --add")
			case changed("source-file") && !does(image.MergeBitmap):
				return errors.New("-b goes with --merge")
			case changed("source-format") && !changed("source-file"):
				return errors.New("-F goes with -b")
			case changed("granularity"):
				if o.Granularity, err = image.ParseSize(granularity); err != nil {
					return err
				}
			}
			o.OpenOptions = open.options(format)
			return image.ChangeBitmap(cmd.Context(), args[0], args[1], actions, o)
		},
	}
	flags := cmd.Flags()
	formatFlag(cmd, &format)
	flags.StringArrayVar(&open.backingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	for _, a := range []struct{ what, usage string }{
		{image.AddBitmap, "add the bitmap, enabled and with nothing marked"},
		{image.RemoveBitmap, "remove it"},
		{image.ClearBitmap, "unmark all parts of the disk"},
		{image.EnableBitmap, "have it follow the disk"},
		{image.DisableBitmap, "have it stay as it is"},
	} {
		flags.VarPF(&bitmapFlag{&actions, a.what}, a.what, "", a.usage).NoOptDefVal = "true"
	}
	flags.Var(&bitmapFlag{&actions, image.MergeBitmap}, image.MergeBitmap, "mark in addition what the bitmap SOURCE marks")
	flags.StringVarP(&o.SourceFile, "source-file", "b", "", "image that has the bitmap SOURCE; default: FILE")
	flags.StringVarP(&o.SourceFormat, "source-format", "F", "", "format of that image")
	flags.StringVarP(&granularity, "granularity", "g", "", "bytes of the disk for each bit of a new bitmap; default: the cluster size, 4k to 64k")
	return cmd
}

// bitmapActions are actions in the order of the command line.
type bitmapActions []image.BitmapAction

// bitmapFlag is the flag of an action.
type bitmapFlag struct {
	actions *bitmapActions
	what    string
}

// Set implements pflag.Value.
func (f *bitmapFlag) Set(value string) error {
	a := image.BitmapAction{What: f.what}
	switch {
	case f.what == image.MergeBitmap:
		a.Source = value
	case value != "true":
		return errors.New("it takes no value")
	}
	*f.actions = append(*f.actions, a)
	return nil
}

func (*bitmapFlag) String() string { return "" }

// Type implements pflag.Value.
func (f *bitmapFlag) Type() string {
	if f.what == image.MergeBitmap {
		return "SOURCE"
	}
	return "bool"
}

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
)

// convertFlags are the flags of convert that are not those of image.ConvertOptions.
type convertFlags struct {
	image.ConvertOptions
	options             []string
	sparse, rate        string
	workers             int
	salvage, skipBroken bool
	quiet               bool
}

func newImageConvert() *cobra.Command {
	var o convertFlags
	cmd := &cobra.Command{
		Use:   "convert FILE... TARGET",
		Short: "Copy disks into a new image, of any format",
		Long: `Copy the disk in FILE, or those in several one after the other, into the new image
TARGET, which takes the place of an older one when it is whole. - is standard input
as the only FILE, and standard output as TARGET, both raw.

-B keeps a backing file: what the target shows of it already is not copied.`,
		Example: `  calf image convert disk.img disk.qcow2
  calf image convert -c -o compression_type=zstd disk.qcow2 small.qcow2
  calf image convert -l before-upgrade disk.qcow2 old.img
  zstdcat disk.img.zst | calf image convert - disk.qcow2`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 && len(o.options) == 0 {
				return errors.New("convert takes an image to read and one to make")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args) },
	}
	flags := cmd.Flags()
	flags.StringVarP(&o.Source.Format, "format", "f", "", "format of each FILE: qcow2 or raw")
	flags.StringVarP(&o.Format, "target-format", "O", "", "format of TARGET: qcow2 or raw")
	flags.StringArrayVarP(&o.options, "options", "o", nil, "options of the target's format: KEY=VALUE,…; help lists them")
	flags.BoolVarP(&o.Compress, "compress", "c", false, "compress the target")
	flags.StringVarP(&o.Create.BackingFile, "backing", "B", "", "backing file of the target; a relative name counts from its directory")
	flags.StringVarP(&o.Create.BackingFormat, "backing-format", "F", "", "format of the backing file, which -B takes")
	flags.StringVarP(&o.Source.Snapshot, "snapshot", "l", "", "read this internal snapshot of FILE, by its ID or name")
	flags.StringVarP(&o.sparse, "sparse", "S", "4k", "least length of zeros that are left out of the target; 0 writes all of them")
	flags.IntVarP(&o.workers, "workers", "m", 0, "how many parts are copied at once, 1 to 16")
	flags.BoolVarP(&o.Unordered, "out-of-order", "W", false, "write them in any order")
	flags.BoolVarP(&o.Existing, "no-create", "n", false, "write into an image that exists")
	flags.BoolVar(&o.TargetIsZero, "target-is-zero", false, "the image of -n reads as zero")
	flags.BoolVar(&o.salvage, "salvage", false, "go on where FILE cannot be read, with zeros, and say where that is")
	flags.BoolVar(&o.Bitmaps, "bitmaps", false, "copy the persistent bitmaps of FILE, too")
	flags.BoolVar(&o.skipBroken, "skip-broken-bitmaps", false, "but not those that cannot be trusted")
	flags.BoolVarP(&o.Offload, "copy-offload", "C", false, "have the host copy the data of raw images, without looking for zeros in it")
	rateFlag(cmd, &o.rate)
	flags.StringVarP(&o.Cache, "cache", "t", image.CacheUnsafe, "cache mode of the target: writeback, writethrough, none, directsync or unsafe")
	flags.StringVarP(&o.Source.Cache, "source-cache", "T", image.CacheWriteback, "cache mode of each FILE")
	flags.StringArrayVar(&o.Source.BackingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	forceShareFlag(cmd, &o.Source.ForceShare)
	progressFlags(cmd, &o.quiet)
	return cmd
}

func (o *convertFlags) run(cmd *cobra.Command, args []string) error {
	target := args[len(args)-1]
	for _, list := range o.options {
		format, err := image.FormatOf(target, o.Format)
		if err != nil {
			return err
		}
		if list == "help" || list == "?" {
			_, err := fmt.Fprint(cmd.OutOrStdout(), image.HelpOptions(format))
			return err
		}
		if err := o.Create.Set(format, list); err != nil {
			return err
		}
	}
	if len(args) < 2 {
		return errors.New("convert takes an image to read and one to make")
	}
	if err := o.parse(cmd); err != nil {
		return err
	}
	o.Input, o.Output = cmd.InOrStdin(), cmd.OutOrStdout()
	err := working(cmd, o.quiet, func(m *progress.Meter) error {
		if o.quiet {
			m = nil
		}
		return image.Convert(cmd.Context(), args[:len(args)-1], target, o.ConvertOptions, m)
	})
	if err == nil && o.salvage && !o.quiet {
		err = o.Lost.Text(cmd.ErrOrStderr())
	}
	return err
}

// parse checks the values of flags that have a form or bounds of their own.
func (o *convertFlags) parse(cmd *cobra.Command) (err error) {
	const maxSparse = 16 << 20
	if o.Sparse, err = image.ParseSize(o.sparse); err != nil || o.Sparse%512 != 0 || o.Sparse > maxSparse {
		return fmt.Errorf("-S %s: it is a multiple of 512 up to 16M, or 0 to write all zeros", o.sparse)
	}
	if o.Rate, err = parseRate(o.rate); err != nil {
		return err
	}
	if o.workers < 0 || o.workers > 16 {
		return fmt.Errorf("-m %d: it is a number from 1 to 16", o.workers)
	}
	o.Workers = o.workers
	if o.Existing && len(o.options) > 0 {
		return errors.New("-o has no effect on an image that exists: leave it out with -n")
	}
	if o.Offload && cmd.Flags().Changed("sparse") {
		return errors.New("the host does not look for zeros: leave out -C or -S")
	}
	if o.skipBroken {
		o.SkipBroken = func(name string) {
			if !o.quiet {
				cmd.PrintErrf("left out: the bitmap %q is in use and cannot be trusted\n", name)
			}
		}
	}
	o.Source.Snapshot = snapshotName(o.Source.Snapshot)
	if o.salvage {
		o.Lost = new(image.Lost)
	}
	return nil
}

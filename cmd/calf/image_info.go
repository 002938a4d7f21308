package main

import (
	"errors"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

// exitUntrusted is the exit code of info if there is a reason not to use the image.
const exitUntrusted = 2

// infoFlags are the flags of info.
type infoFlags struct {
	format, output, maxSize string
	chain, untrusted, share bool
	boot                    bool
	backingDirs             []string
}

func newImageInfo() *cobra.Command {
	var o infoFlags
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Print what an image says of itself",
		Long: `Print what an image says of itself. Nothing but the image is opened, unless the
chain of its backing files is asked for, or with --boot what calf run would boot
from it: the kernel, its initial RAM disks and its arguments, by the configuration
of GRUB or another boot loader.

Of an image that is broken what can be read is printed, and what is wrong; the exit
code is 1. With --untrusted all reasons not to use an image from a stranger are
listed; the exit code is 2 if there is one.`,
		Example: `  calf image info disk.qcow2
  calf image info --output=json --backing-chain overlay.qcow2
  calf image info --boot debian-12.qcow2
  calf image info --untrusted -f qcow2 upload.qcow2`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args[0]) },
	}
	formatFlag(cmd, &o.format)
	outputFlag(cmd, &o.output)
	forceShareFlag(cmd, &o.share)
	flags := cmd.Flags()
	flags.BoolVar(&o.chain, "backing-chain", false, "follow the backing files, too")
	flags.StringArrayVar(&o.backingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	flags.BoolVar(&o.boot, "boot", false, "print what calf run would boot from the image instead")
	flags.BoolVar(&o.untrusted, "untrusted", false, "list the reasons not to use the image")
	flags.StringVar(&o.maxSize, "max-size", "1T", "with --untrusted, the largest disk to accept")
	return cmd
}

func (o *infoFlags) run(cmd *cobra.Command, path string) error {
	asJSON, err := inJSON(o.output)
	if err != nil {
		return err
	}
	format, err := image.FormatOf(path, o.format)
	if err != nil {
		return err
	}
	opts := image.OpenOptions{Format: format, ForceShare: o.share, BackingDirs: o.backingDirs}
	out := cmd.OutOrStdout()
	if o.boot {
		return o.runBoot(out, path, opts, asJSON)
	}
	if o.chain {
		if o.untrusted {
			return errors.New("--untrusted opens nothing but the image: leave out --backing-chain")
		}
		chain, failed := image.Chain(path, opts)
		switch {
		case !asJSON:
			err = image.Tree(out, chain)
		case failed == nil:
			err = printJSON(out, chain)
		}
		return errors.Join(failed, err, faults(chain...))
	}
	i, err := o.look(path, opts)
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(out, i)
	} else {
		err = i.Text(out)
	}
	switch {
	case i.Trust == nil:
		return errors.Join(err, faults(i))
	case err == nil && len(i.Trust.Reasons) > 0:
		return exitError{code: exitUntrusted}
	}
	return err
}

// runBoot prints what would be booted.
func (o *infoFlags) runBoot(out io.Writer, path string, opts image.OpenOptions, asJSON bool) error {
	if o.chain || o.untrusted {
		return errors.New("--boot prints nothing else: leave out --backing-chain and --untrusted")
	}
	i, err := image.InspectBoot(path, opts)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(out, i)
	}
	return i.Text(out)
}

// look examines the image at path.
func (o *infoFlags) look(path string, opts image.OpenOptions) (*image.Info, error) {
	if !o.untrusted {
		return image.Examine(path, opts)
	}
	size, err := image.ParseSize(o.maxSize)
	if err != nil {
		return nil, err
	}
	return image.ExamineUntrusted(path, opts, image.DoubtOptions{MaxSize: size, Named: o.format == ""})
}

// faults is an error that has all faults of the images, nil if there are none.
func faults(all ...*image.Info) error {
	var said []string
	for _, i := range all {
		said = append(said, i.Faults...)
	}
	if len(said) == 0 {
		return nil
	}
	return errors.New(strings.Join(said, "\n"))
}

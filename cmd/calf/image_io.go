package main

import (
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/calfvm/calf/cmd/internal/exercise"
	"github.com/calfvm/calf/cmd/internal/image"
)

func newImageIO() *cobra.Command {
	var (
		o                   exercise.Options
		config              = exercise.Config{Name: "calf", Open: exercise.OpenImage}
		commands            []string
		imageOpts, misalign bool
	)
	cmd := &cobra.Command{
		Use:   "io [FILE]",
		Short: "Read, write and inspect an image by commands",
		Long: `Run commands on an image: those of -c, or the lines of standard input. The language
is that of qemu-io; the command help lists it. The image is used through the engine
that serves guests.

The exit code is 0 if the image could be opened and every command succeeded.`,
		Example: `  calf image io -c 'write -P 0x41 1M 64k' -c 'read -v -P 0x41 1M 512' disk.qcow2
  calf image io -r disk.qcow2 < commands`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			config.ImageOpts, config.Misalign, config.BackingDirs = imageOpts, misalign, o.BackingDirs
			if len(args) == 1 && imageOpts {
				if o.Format != "" {
					return errors.New("--image-opts and -f are mutually exclusive")
				}
				if err := o.SetList(args[0]); err != nil {
					return err
				}
			} else if len(args) == 1 {
				o.Path = args[0]
			}
			return runExerciser(cmd, config, len(args) == 1, o, commands)
		},
	}
	flags := cmd.Flags()
	formatFlag(cmd, &o.Format)
	flags.StringArrayVarP(&commands, "cmd", "c", nil, "run this command; may be given more than once")
	flags.BoolVarP(&o.ReadOnly, "read-only", "r", false, "open the image for reading only")
	flags.BoolVarP(&o.Scratch, "snapshot", "s", false, "let a throw-away overlay take the writes")
	flags.BoolVarP(&o.CopyOnRead, "copy-on-read", "C", false, "keep in the image what is read of its backing file")
	flags.BoolVarP(&o.ForceShare, "force-share", "U", false, "read the image even if a program writes to it; takes -r")
	flags.StringArrayVar(&o.BackingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	flags.BoolVar(&imageOpts, "image-opts", false, "FILE is a list of options: driver=…,file.filename=…")
	flags.BoolVarP(&misalign, "misalign", "m", false, "use memory that is not aligned")
	flags.BoolFuncP("nocache", "n", "the same as -t none", func(string) error { return o.SetCache(image.CacheNone) })
	flags.FuncP("cache", "t", "cache `mode`: writeback, writethrough, none, directsync or unsafe", o.SetCache)
	flags.FuncP("discard", "d", "`mode` of discards: unmap or ignore", o.SetDiscard)
	flags.FuncP("aio", "i", "`mode` in which data is moved: threads", o.SetAIO)
	return cmd
}

// runExerciser runs commands, or the lines of standard input if there are none, on
// the image that o describes, if there is one.
func runExerciser(cmd *cobra.Command, config exercise.Config, open bool, o exercise.Options, commands []string) (err error) {
	config.Out, config.Messages = cmd.OutOrStdout(), cmd.ErrOrStderr()
	next := exercise.Lines(cmd.InOrStdin())
	if terminal := terminalOf(cmd.InOrStdin(), config.Out); terminal != nil && len(commands) == 0 {
		defer func() { err = errors.Join(err, terminal.Restore()) }()
		config.Out, next = terminal, terminal.ReadLine
		if watched, ok := config.Messages.(interface{ IsTerminal() bool }); ok && watched.IsTerminal() {
			config.Messages = terminal
		}
	}
	s := exercise.New(config)
	defer func() {
		if !s.Close() && err == nil {
			err = exitError{code: exitImage}
		}
	}()
	if open {
		if err := s.OpenFile(o); err != nil {
			return err
		}
	}
	for _, c := range commands {
		if !s.Do(cmd.Context(), c) {
			return nil
		}
	}
	if len(commands) > 0 {
		return nil
	}
	return s.Run(cmd.Context(), next)
}

// terminalOf returns the terminal at both ends, or nil if there is none.
func terminalOf(in io.Reader, out io.Writer) *exercise.Terminal {
	i, ok := in.(*os.File)
	o, okOut := out.(*os.File)
	if !ok || !okOut || !term.IsTerminal(int(i.Fd())) || !term.IsTerminal(int(o.Fd())) {
		return nil
	}
	return exercise.NewTerminal(i, o)
}

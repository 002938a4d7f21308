package main

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/calfvm/calf/blk/nbd"
	"github.com/calfvm/calf/cmd/internal/image"
)

// serveFlags are the flags of calf image serve.
type serveFlags struct {
	all     image.ServedImage // what holds for every image
	exports []string
	name    string
	discard string
	noCache bool
	shared  int
	quiet   bool
	verbose bool
}

func newImageServe() *cobra.Command {
	var (
		f serveFlags
		o image.ServeOptions
	)
	cmd := &cobra.Command{
		Use:   "serve [FLAGS] IMAGE…",
		Short: "Serve images over NBD",
		Long: `Serve images over NBD, on a Unix socket or a TCP port of a loopback address, until
SIGINT or SIGTERM, or until the last client has gone unless -t is given. What is
printed, once clients can connect, is the address of each image.

One image has the name of -x, or none; of several images each has its file name, or
what --export says. Nothing else can use an image as a disk meanwhile. Clients can
share it: what one has flushed, or been told is written through, is durable for all.`,
		Example: `  calf image serve -k /run/disk.sock disk.qcow2
  calf image serve -t -r -p 10809 a.qcow2 b.qcow2
  calf image serve -k s --export root=disk.qcow2 --export data=big.img,format=raw,readonly=on`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.Socket != "" && (cmd.Flags().Changed("port") || cmd.Flags().Changed("bind")) {
				return errors.New("-k is for a Unix socket, -p and -b are for TCP: give one of them")
			}
			var err error
			if o.Exports, err = f.images(args); err != nil {
				return err
			}
			o.MaxConnections = f.shared
			if f.shared == 0 {
				o.MaxConnections = nbd.MaxConnections
			}
			level := slog.LevelWarn
			if f.verbose {
				level = slog.LevelDebug
			}
			o.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			o.Ready = func(uris []string) error {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), strings.Join(uris, "\n"))
				return err
			}
			stats, err := image.Serve(cmd.Context(), o)
			if err == nil && !f.quiet {
				complain(cmd.ErrOrStderr(), servedLine(stats))
			}
			return err
		},
	}
	f.define(cmd)
	flags := cmd.Flags()
	flags.StringVarP(&o.Socket, "socket", "k", "", "path of the Unix socket to listen on")
	flags.Uint16VarP(&o.Port, "port", "p", image.DefaultPort, "TCP port to listen on; 0 is any that is free")
	flags.StringVarP(&o.Bind, "bind", "b", "127.0.0.1", "loopback address to listen on")
	flags.BoolVarP(&o.Persistent, "persistent", "t", false, "go on when the last client has gone")
	flags.StringVar(&o.PIDFile, "pid-file", "", "file to write the process ID to while clients can connect")
	return cmd
}

// define defines the flags that say what is served.
func (f *serveFlags) define(cmd *cobra.Command) {
	formatFlag(cmd, &f.all.Open.Format)
	flags := cmd.Flags()
	flags.StringArrayVar(&f.exports, "export", nil, "image to serve, as NAME=PATH[,format=FORMAT][,readonly=on][,description=TEXT]; a comma in it is written twice")
	flags.StringVarP(&f.name, "export-name", "x", "", "name of the export")
	flags.StringVarP(&f.all.Description, "description", "D", "", "description of the export, for people")
	flags.IntVarP(&f.shared, "shared", "e", nbd.DefaultConnections, "how many clients may be connected at a time; 0 is as many as can be, 256")
	flags.BoolVarP(&f.all.Open.ReadOnly, "read-only", "r", false, "refuse all writes")
	flags.BoolVarP(&f.all.Open.Scratch, "snapshot", "s", false, "take writes to a throw-away overlay, and leave the image as it is")
	flags.StringVarP(&f.all.Open.Snapshot, "load-snapshot", "l", "", "serve this internal snapshot, by its name or ID, read-only unless -s is given")
	flags.StringVar(&f.all.Open.Cache, "cache", image.CacheWriteback, "cache mode: writeback, writethrough, none, directsync or unsafe")
	flags.BoolVarP(&f.noCache, "nocache", "n", false, "the same as --cache=none")
	flags.StringVar(&f.discard, "discard", "unmap", "whether the host gets back the room of what clients discard: unmap or ignore")
	flags.StringArrayVarP(&f.all.Bitmaps, "bitmap", "B", nil, "persistent bitmap that clients may read, with -r, as the metadata context qemu:dirty-bitmap:NAME")
	flags.StringArrayVar(&f.all.Open.BackingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "print which clients come and go")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "do not print what was served")
}

// images are the images that the flags and arguments name.
func (f *serveFlags) images(args []string) ([]image.ServedImage, error) {
	if err := f.complete(); err != nil {
		return nil, err
	}
	var images []image.ServedImage
	for _, path := range args {
		s := f.all
		s.Path, s.Name = path, f.name
		if len(args)+len(f.exports) > 1 {
			s.Name = filepath.Base(path)
		}
		images = append(images, s)
	}
	for _, e := range f.exports {
		s, err := f.export(e)
		if err != nil {
			return nil, fmt.Errorf("--export %s: %w", e, err)
		}
		images = append(images, s)
	}
	switch {
	case len(images) == 0:
		return nil, errors.New("there is nothing to serve: name an image")
	case f.name != "" && (len(images) > 1 || len(f.exports) > 0):
		return nil, errors.New("-x names one image: give several their names with --export NAME=PATH")
	}
	return images, nil
}

// complete checks the flags that hold for every image.
func (f *serveFlags) complete() error {
	if f.noCache {
		f.all.Open.Cache = image.CacheNone
	}
	switch f.discard {
	case "unmap", "on":
	case "ignore", "off":
		f.all.NoDiscard = true
	default:
		return fmt.Errorf("--discard is unmap or ignore, not %q", f.discard)
	}
	f.all.Open.Snapshot = snapshotName(f.all.Open.Snapshot)
	return nil
}

// export reads the value of --export.
func (f *serveFlags) export(value string) (image.ServedImage, error) {
	const comma = "\x00" // stands for a comma that is written twice; no path has it
	s := f.all
	parts := strings.Split(strings.ReplaceAll(value, ",,", comma), ",")
	for i, part := range parts {
		key, v, ok := strings.Cut(strings.ReplaceAll(part, comma, ","), "=")
		switch {
		case !ok:
			return s, fmt.Errorf("%q is not of the form KEY=VALUE", part)
		case i == 0:
			s.Name, s.Path = key, v
		case key == "format":
			s.Open.Format = v
		case key == "description":
			s.Description = v
		case key == "readonly" && (v == "on" || v == "off"):
			s.Open.ReadOnly = v == "on"
		case key == "readonly":
			return s, fmt.Errorf("readonly is on or off, not %q", v)
		default:
			return s, fmt.Errorf("%q is not one of format, readonly and description", key)
		}
	}
	if s.Path == "" {
		return s, errors.New("the path is missing")
	}
	return s, nil
}

// servedLine says what a server has done.
func servedLine(s nbd.Stats) string {
	return fmt.Sprintf("served %d connections: %d requests, %d of them failed; %s read, %s written, %d flushes",
		s.Connections, s.Requests, s.Errors, units.BytesSize(float64(s.BytesRead)), units.BytesSize(float64(s.BytesWritten)), s.Flushes)
}

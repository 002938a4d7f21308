package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/image"
)

// benchFlags are the flags of bench that have a form of their own.
type benchFlags struct {
	image.BenchOptions
	open                openFlags
	format, engine, aio string
	size, step, offset  string
	patterns            []string
	asJSON, quietly     bool
}

func newImageBench() *cobra.Command {
	o := benchFlags{open: openFlags{cache: image.CacheWriteback}}
	cmd := &cobra.Command{
		Use:   "bench FILE",
		Short: "Measure how fast requests to an image are",
		Long: `Make requests to an image as the queues of a guest do, and print how many are done
in a second and how long they take. The same requests to a raw image of the same size
on the same file system are the limit to compare with.

-w writes: it destroys what the disk in FILE has.`,
		Example: `  calf image bench disk.qcow2
  calf image bench -w --queues 4 -d 16 --pattern rand disk.qcow2
  calf image bench -f raw -s 1M -c 5000 disk.img`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.parse(); err != nil {
				return err
			}
			o.Open = o.open.options(o.format)
			if err := o.Check(); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if o.asJSON || o.quietly {
				out = io.Discard
			}
			if _, err := io.WriteString(out, o.Heading()); err != nil {
				return err
			}
			report, err := image.Bench(cmd.Context(), args[0], o.BenchOptions)
			if err != nil {
				return err
			}
			if o.asJSON {
				return printJSON(cmd.OutOrStdout(), report)
			}
			return report.Text(out)
		},
	}
	o.define(cmd)
	return cmd
}

func (o *benchFlags) define(cmd *cobra.Command) {
	formatFlag(cmd, &o.format)
	o.open.define(cmd, true)
	flags := cmd.Flags()
	flags.Int64VarP(&o.Count, "count", "c", 75000, "number of requests")
	flags.Int64VarP(&o.Depth, "depth", "d", 64, "requests under way in each queue")
	flags.Int64Var(&o.Queues, "queues", 1, "number of queues")
	flags.StringVarP(&o.size, "buffer-size", "s", "4k", "length of a request")
	flags.StringVarP(&o.step, "step-size", "S", "", "from each request to the next; the length of a request unless given")
	flags.StringVarP(&o.offset, "offset", "o", "0", "where the first request begins")
	flags.BoolVarP(&o.Write, "write", "w", false, "write, which destroys what the disk has")
	flags.StringArrayVar(&o.patterns, "pattern", nil, "order of the requests, seq or rand; a number from 0 to 255 is the byte that is written")
	flags.Int64Var(&o.FlushInterval, "flush-interval", 0, "flush after so many requests of a queue")
	flags.BoolVar(&o.Undrained, "no-drain", false, "flush while other requests are under way")
	flags.StringVar(&o.engine, "engine", "auto", "how requests reach the host: auto or sync")
	flags.StringVarP(&o.aio, "aio", "i", "threads", "threads, which is --engine sync")
	flags.BoolVar(&o.asJSON, "json", false, "print the result as JSON")
	flags.BoolVarP(&o.quietly, "quiet", "q", false, "print nothing but errors")
}

// parse checks the values that have a form of their own.
func (o *benchFlags) parse() (err error) {
	switch {
	case o.engine == "io_uring" || o.aio == "io_uring" || o.aio == "native":
		return errors.New("requests go to the host by preadv and pwritev alone: leave out --engine and -i")
	case o.engine != "auto" && o.engine != "sync":
		return fmt.Errorf("--engine is auto or sync, not %q", o.engine)
	case o.aio != "threads":
		return fmt.Errorf("-i is threads, not %q", o.aio)
	}
	if o.Size, err = image.ParseSize(o.size); err != nil {
		return fmt.Errorf("-s: %w", err)
	}
	o.Step = o.Size
	if o.step != "" && o.step != "0" {
		if o.Step, err = image.ParseSize(o.step); err != nil {
			return fmt.Errorf("-S: %w", err)
		}
	}
	if o.Offset, err = image.ParseSize(o.offset); err != nil {
		return fmt.Errorf("-o: %w", err)
	}
	for _, p := range o.patterns {
		fill, err := strconv.ParseUint(p, 0, 8)
		switch {
		case p == "seq" || p == "rand":
			o.Random = p == "rand"
		case err != nil:
			return fmt.Errorf("--pattern is seq, rand or a byte from 0 to 255, not %q", p)
		default:
			o.Fill = byte(fill)
		}
	}
	return nil
}

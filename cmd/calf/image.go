package main

import (
	"context"
	"fmt"
	"os/signal"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/image"
	"github.com/calfvm/calf/cmd/internal/progress"
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
		Args:    func(cmd *cobra.Command, args []string) error { return imageError(cmd, cobra.NoArgs(cmd, args)) },
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.SetFlagErrorFunc(flagError)
	for _, group := range imageVerbs() {
		if len(group.verbs) > 0 {
			cmd.AddGroup(&cobra.Group{ID: group.title, Title: group.title})
		}
		for _, verb := range group.verbs {
			verb.GroupID = group.title
			addVerb(cmd, verb)
		}
	}
	for name, instead := range otherVerbs {
		cmd.AddCommand(newOtherVerb(name, instead))
	}
	return cmd
}

// verbGroup are verbs that belong together in the help.
type verbGroup struct {
	title string
	verbs []*cobra.Command
}

func imageVerbs() []verbGroup {
	return []verbGroup{
		{"To make and change images:", []*cobra.Command{
			newImageCreate(),
			newImageResize(),
			newImageSnapshot(),
			newImageBitmap(),
		}},
		{"To look into them:", []*cobra.Command{
			newImageInfo(),
			newImageMap(),
			newImageMeasure(),
			newImageCheck(),
			newImageCompare(),
		}},
		{"To copy and merge them:", []*cobra.Command{
			newImageConvert(),
			newImageCompact(),
			newImageCommit(),
			newImageRebase(),
		}},
		{"To use and measure them:", []*cobra.Command{
			newImageBench(),
			newImageServe(),
			newImageIO(),
		}},
	}
}

// verbMemory is how much of calf's own memory a verb makes do with, if it can: beyond
// it garbage is collected more often than once memory in use has grown by verbGarbage
// percent.
const (
	verbMemory  = 150 << 20
	verbGarbage = 400
)

// addVerb adds a verb to cmd. It is done until a signal ends it, and what goes
// wrong with it ends calf as qemu-img ends.
func addVerb(cmd, verb *cobra.Command) {
	refuseFlags(verb)
	run, args := verb.RunE, verb.Args
	verb.RunE = func(cmd *cobra.Command, args []string) error {
		if err := refuseEmpty(cmd); err != nil {
			return imageError(verb, err)
		}
		debug.SetMemoryLimit(verbMemory)
		debug.SetGCPercent(verbGarbage)
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		defer stop()
		context.AfterFunc(ctx, stop) // a second signal ends calf at once
		cmd.SetContext(ctx)
		return imageError(verb, run(cmd, args))
	}
	verb.Args = func(cmd *cobra.Command, a []string) error { return imageError(verb, args(cmd, a)) }
	cmd.AddCommand(verb)
}

// imageError gives err, which is of a verb, the exit code that errors of it have, if it
// has none.
func imageError(verb *cobra.Command, err error) error {
	if _, ok := err.(exitError); ok || err == nil { //nolint:errorlint // only the outermost counts
		return err
	}
	code := exitImage
	if verb.Name() == compareVerb {
		code = image.CompareNotOpened // for 1 says that the disks differ
	}
	return exitError{code: code, message: err.Error()}
}

// formatFlag defines -f.
func formatFlag(cmd *cobra.Command, format *string) {
	cmd.Flags().StringVarP(format, "format", "f", "", "format of the image: qcow2 or raw")
	completeFlag(cmd, "format", image.QCOW2, image.Raw)
}

// outputFlag defines --output.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVar(output, "output", "human", "form of the result: human or json")
	completeFlag(cmd, "output", "human", "json")
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

// forceShareFlag defines -U.
func forceShareFlag(cmd *cobra.Command, share *bool) {
	cmd.Flags().BoolVarP(share, "force-share", "U", false, "read the image even if a program writes to it")
}

// asksForHelp reports whether a value of -o asks which options there are.
func asksForHelp(list string) bool { return list == "help" || list == "?" }

// setOptions sets the values of -o for a new image of a format. done is true if they
// asked for help, which is printed.
func setOptions(cmd *cobra.Command, o *image.CreateOptions, format string, lists []string) (done bool, err error) {
	for _, list := range lists {
		if asksForHelp(list) {
			_, err := fmt.Fprint(cmd.OutOrStdout(), image.HelpOptions(format))
			return true, err
		}
		if err := o.Set(format, list); err != nil {
			return false, err
		}
	}
	return false, nil
}

// snapshotName reads a snapshot in one of qemu-img's forms: ID_OR_NAME,
// snapshot.id=ID or snapshot.name=NAME.
func snapshotName(v string) string {
	for _, key := range []string{"snapshot.id=", "snapshot.name="} {
		if name, ok := strings.CutPrefix(v, key); ok {
			return name
		}
	}
	return v
}

// openFlags are the flags of verbs that open images with the files they lie over.
type openFlags struct {
	cache       string
	forceShare  bool
	backingDirs []string
}

// define defines -t, with which the image is opened that the verb works on, -U
// for verbs that only read, and --backing-dir.
func (o *openFlags) define(cmd *cobra.Command, reads bool) {
	flags := cmd.Flags()
	flags.StringVarP(&o.cache, "cache", "t", image.CacheWriteback, "cache mode: writeback, writethrough, none, directsync or unsafe")
	flags.StringArrayVar(&o.backingDirs, "backing-dir", nil, "directory in which a backing file may lie, beside that of the image")
	if reads {
		forceShareFlag(cmd, &o.forceShare)
	}
}

// options are how to open the image of a format.
func (o *openFlags) options(format string) image.OpenOptions {
	return image.OpenOptions{Format: format, Cache: o.cache, ForceShare: o.forceShare, BackingDirs: o.backingDirs}
}

// rateFlag defines -r.
func rateFlag(cmd *cobra.Command, rate *string) {
	cmd.Flags().StringVarP(rate, "rate", "r", "", "most bytes to copy in a second")
}

// parseRate reads the value of -r: bytes in a second, 0 if there is no limit.
func parseRate(rate string) (int64, error) {
	if rate == "" {
		return 0, nil
	}
	n, err := image.ParseSize(rate)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("-r %s: it is a number of bytes in a second, like 50M", rate)
	}
	return n, nil
}

// progressFlags defines -p and -q. Nothing depends on the first.
func progressFlags(cmd *cobra.Command, quiet *bool) {
	cmd.Flags().BoolP("progress", "p", false, "show progress, which it does anyway")
	cmd.Flags().BoolVarP(quiet, "quiet", "q", false, "print nothing but errors")
}

// working does work that may take long, and shows on standard error how far it is,
// unless quiet.
func working(cmd *cobra.Command, quiet bool, work func(*progress.Meter) error) error {
	var m progress.Meter
	if !quiet {
		messages := cmd.ErrOrStderr()
		watched, ok := messages.(interface{ IsTerminal() bool })
		defer progress.Show(messages, ok && watched.IsTerminal(), &m)()
	}
	return work(&m)
}

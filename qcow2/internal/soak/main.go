// Command soak lets many goroutines write, read, discard and flush one QCOW2 image
// over a backing file, for as long as it is told. Every read is compared with what
// was written. Every few seconds it prints how much was moved and what the image
// takes; now and then it closes the image, checks it and reads all of it.
//
// It fails if a sector shows anything but what was written to it last, if the check
// finds anything, or if the file takes a tenth more than it has to.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"time"
)

// config is what the flags say.
type config struct {
	length       time.Duration // 0: until interrupted
	image        string        // a new file; empty: in a directory that is removed
	goroutines   int
	seed         uint64
	size         int64 // of the disk, in bytes
	every, check time.Duration
}

func main() {
	var c config
	flag.DurationVar(&c.length, "for", time.Minute, "how long; 0 is until interrupted")
	flag.StringVar(&c.image, "image", "", "the image to make, where no file may be; by default in a directory that is removed")
	flag.IntVar(&c.goroutines, "goroutines", 8, "how many work at once, 1 to 32")
	flag.Uint64Var(&c.seed, "seed", 0, "of what is random; 0 is a new one")
	flag.Int64Var(&c.size, "size", 256<<20, "of the disk in bytes, a multiple of 64 MiB")
	flag.DurationVar(&c.every, "every", 5*time.Second, "how often to report")
	flag.DurationVar(&c.check, "check", 30*time.Second, "how often to check the image and read all of it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := c.run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// run does what the flags say and reports to w.
func (c config) run(ctx context.Context, w io.Writer) (err error) {
	if c.goroutines < 1 || c.goroutines > 32 || c.size <= 0 || c.size%(64<<20) != 0 || c.every <= 0 || c.check <= 0 {
		return errors.New("a flag is out of its range; see -help")
	}
	if c.seed == 0 {
		c.seed = rand.Uint64()
	}
	if c.image == "" {
		dir, err := os.MkdirTemp("", "soak")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		c.image = dir + "/disk.qcow2"
	}
	if c.length > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.length)
		defer cancel()
	}
	if _, err := fmt.Fprintf(w, "seed %d, %d goroutines, image %s\n", c.seed, c.goroutines, c.image); err != nil {
		return err
	}
	s, err := newSoak(c)
	if err != nil {
		return err
	}
	return s.run(ctx, w)
}

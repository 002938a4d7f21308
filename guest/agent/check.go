package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/archive"
	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// Check reports what can be found wrong with a command before a guest runs.
func (c Command) Check() error {
	if len(c.Args) > 0 && c.Args[0] == "" {
		return errors.New("the command to run is an empty string")
	}
	const each = 8 // what a string takes besides its bytes, or more
	size := 0
	texts := slices.Concat(c.Args, c.Env, []string{c.Workdir, c.User})
	for _, t := range slices.Concat(c.Copies, c.Artifacts) {
		texts = append(texts, t.From, t.To)
	}
	for _, s := range texts {
		if strings.Contains(s, "\x00") {
			return fmt.Errorf("%q has a NUL byte, which no argument, variable or path can have", s)
		}
		size += len(s) + each
	}
	if size > wire.MaxStart/2 { // base64 makes more of it
		return fmt.Errorf("the command has %d MiB of arguments and variables, more than any Linux takes", size>>20)
	}
	for _, v := range c.Env {
		if name, _, given := strings.Cut(v, "="); name == "" || !given {
			return fmt.Errorf("the variable %q of the command has no name", v)
		}
	}
	for _, t := range c.Copies {
		if err := t.check(); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
	}
	for _, t := range c.Artifacts {
		place, err := archive.Find(t.To)
		if err == nil {
			err = place.Close()
		}
		if err != nil {
			return errors.New(t.lost(err))
		}
	}
	return nil
}

// check reports why what t names on the host cannot be copied to the guest.
func (t Transfer) check() error {
	info, err := os.Stat(t.From)
	if err != nil {
		return err
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is neither a file nor a directory", t.From)
	}
	f, err := os.OpenFile(t.From, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a FIFO by now
	if err != nil {
		return err
	}
	return f.Close()
}

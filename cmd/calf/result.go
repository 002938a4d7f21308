package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"

	"github.com/calfvm/calf/cmd/internal/launch"
)

// resultFile is where the result of a run goes.
type resultFile struct {
	path string // with symbolic links followed: a link is not to be replaced
	// place is a device or a pipe, which no other file may take the place of.
	place bool
}

// openResult finds out, before a guest has run for hours, whether its result
// can be written, and removes an older one, so that what is found there after
// this run is of this run.
func openResult(path string) (resultFile, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return resultFile{path: path}, tryDir(filepath.Dir(path))
	case err != nil:
		return resultFile{}, err
	case info.IsDir():
		return resultFile{}, fmt.Errorf("%s is a directory", path)
	case !info.Mode().IsRegular() || strings.HasPrefix(filepath.Clean(path), "/dev/"):
		return resultFile{path: path, place: true}, nil
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return resultFile{}, err
	}
	if err := tryDir(filepath.Dir(real)); err != nil {
		return resultFile{}, err
	}
	return resultFile{path: real}, os.Remove(real)
}

// tryDir reports whether a file can be made in dir.
func tryDir(dir string) error {
	f, err := os.CreateTemp(dir, ".calf-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// write writes r. A reader finds all of it or none.
func (rf resultFile) write(r launch.Result) (err error) {
	if rf.place {
		f, err := os.OpenFile(rf.path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(printJSON(f, r), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(rf.path), "."+filepath.Base(rf.path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := errors.Join(printJSON(f, r), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), rf.path)
}

// reportMisuse writes the result of a run that was not begun, because cause is
// wrong with its flags, to where args say.
func reportMisuse(flags *pflag.FlagSet, args []string, cause error) error {
	lenient := pflag.NewFlagSet("", pflag.ContinueOnError)
	lenient.ParseErrorsAllowlist.UnknownFlags = true
	lenient.AddFlagSet(flags)
	path := ""
	// What is wrong is known already.
	_ = lenient.ParseAll(args, func(f *pflag.Flag, value string) error {
		if f.Name == "json" {
			path = value
		}
		return nil
	})
	if path == "" {
		return nil
	}
	file, err := openResult(path)
	if err == nil {
		err = file.write(launch.Failed(cause))
	}
	if err != nil {
		return fmt.Errorf("--json: %w", err)
	}
	return nil
}

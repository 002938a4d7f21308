package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/cmd/internal/matrix"
	"github.com/calfvm/calf/cmd/internal/standin"
)

// resultFile is where the result of a run goes.
type resultFile struct {
	path string // with symbolic links followed: a link is not to be replaced
	// place is a device or a pipe, which no other file may take the place of.
	place bool
}

// resultFiles are where a run is reported, as far as flags say so.
type resultFiles struct{ json, junit *resultFile }

// openResults opens the files of --json and --junit. An empty path is none.
func openResults(json, junit string) (files resultFiles, err error) {
	open := func(flag, path string) *resultFile {
		if path == "" || err != nil {
			return nil
		}
		file, failed := openResult(path)
		if failed != nil {
			err = fmt.Errorf("%s: %w", flag, failed)
		}
		return &file
	}
	files = resultFiles{open("--json", json), open("--junit", junit)}
	if err == nil && json != "" && junit != "" && filepath.Clean(files.json.path) == filepath.Clean(files.junit.path) && !files.json.place {
		err = fmt.Errorf("--json and --junit name the same file, %s", junit)
	}
	return files, err
}

// write writes result, and report under the given name.
func (files resultFiles) write(result any, report matrix.Report, name string) error {
	var errs []error
	if files.json != nil {
		errs = append(errs, files.json.write(func(w io.Writer) error { return printJSON(w, result) }))
	}
	if files.junit != nil {
		errs = append(errs, files.junit.write(func(w io.Writer) error { return report.JUnit(w, name) }))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	return nil
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
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("no file can be made in %s: %w", dir, err)
	}
	return nil
}

// write has encode write the result. A reader finds all of it or none.
func (rf resultFile) write(encode func(io.Writer) error) (err error) {
	if rf.place {
		f, err := os.OpenFile(rf.path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(encode(f), f.Close())
	}
	temp, done := standin.Name(rf.path)
	defer func() { err = errors.Join(err, done()) }()
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(encode(f), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(temp, rf.path)
}

// reportMisuse writes the result of a run that was not begun, because cause is
// wrong with its flags, to where args say.
func reportMisuse(flags *pflag.FlagSet, args []string, cause error) error {
	lenient := pflag.NewFlagSet("", pflag.ContinueOnError)
	lenient.ParseErrorsAllowlist.UnknownFlags = true
	lenient.AddFlagSet(flags)
	given := map[string]string{}
	// What is wrong is known already.
	_ = lenient.ParseAll(args, func(f *pflag.Flag, value string) error {
		given[f.Name] = value
		return nil
	})
	files, err := openResults(given["json"], given["junit"])
	if err != nil {
		return err
	}
	result := launch.Failed(cause)
	return files.write(result, matrix.Single(namelessRun, result), namelessRun)
}

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/calfvm/calf/cmd/internal/launch"
)

// checkResultFile reports, before a guest has run for hours, that its result
// could not be written.
func checkResultFile(path string) error {
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return err
	}
	if !dir.IsDir() {
		return fmt.Errorf("%s is not a directory", filepath.Dir(path))
	}
	if file, err := os.Stat(path); err == nil && file.IsDir() {
		return fmt.Errorf("%s is a directory", path)
	}
	return nil
}

// writeResult writes r to path. A reader finds all of it or none.
func writeResult(path string, r launch.Result) (err error) {
	if info, statErr := os.Stat(path); statErr == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // a pipe or a device takes no other's place
		if err != nil {
			return err
		}
		return errors.Join(printJSON(f, r), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
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
	return os.Rename(f.Name(), path)
}

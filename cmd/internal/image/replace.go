package image

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
)

// replace makes the file at path, which may exist, all at once: write makes a new
// file at temp, in the same directory, which takes the name path once write has
// succeeded and the file is stable. On any error path is what it was, and no other
// file is left. A file that is replaced keeps its permissions, and a symbolic link
// stays one, to the new file. A file that another program uses as an image is not
// replaced.
func replace(path string, write func(temp string) error) (err error) {
	target, old, err := replaced(path)
	if err != nil {
		return err
	}
	if old != nil {
		// Its lock is held until the name is another file's.
		inUse, err := blk.OpenRaw(target, blk.RawOptions{})
		if err != nil {
			return err
		}
		defer closing(inUse, &err)
	}
	temp := filepath.Join(filepath.Dir(target), "."+filepath.Base(target)+".calf-"+rand.Text()[:8])
	defer func() {
		if gone := os.Remove(temp); err != nil && !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}()
	if err := write(temp); err != nil {
		return err
	}
	if old != nil {
		if err := os.Chmod(temp, old.Mode().Perm()); err != nil {
			return err
		}
	}
	if err := syncFile(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, target); err != nil {
		return err
	}
	return syncFile(filepath.Dir(target))
}

// replaced returns the file that path leads to, through symbolic links, and what it
// is, nil if it is to be made.
func replaced(path string) (target string, old fs.FileInfo, err error) {
	target, err = filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(path); err == nil {
			return "", nil, fmt.Errorf("%s is a symbolic link to nothing: remove it, or name its target", path)
		}
		return path, nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	if old, err = os.Stat(target); err != nil {
		return "", nil, err
	}
	if !old.Mode().IsRegular() {
		return "", nil, fmt.Errorf("%s is not a regular file, and cannot be replaced by one", path)
	}
	return target, old, nil
}

// syncFile makes the file or directory at path durable.
func syncFile(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer closing(f, &err)
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // some file systems sync no directory
		return err
	}
	return nil
}

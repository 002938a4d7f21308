package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/cmd/internal/standin"
)

// replace makes the file at path, which may exist, all at once: write makes a new
// file at temp, in the same directory, which takes the name path once write has
// succeeded and the file is stable. On any error path is what it was, and no other
// file is left. A file that is replaced keeps its owner, permissions and extended
// attributes, and a symbolic link stays one, to the new file. A file that another program uses as an image is not
// replaced.
func replace(path string, write func(temp string) error) error { return replaceFile(path, true, write) }

// replaceFile is replace. Unless it is durable, a file where none was is left to the
// host to make stable, as cp does: it has its name before.
func replaceFile(path string, durable bool, write func(temp string) error) (err error) {
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
	temp, done := standin.Name(target)
	defer func() { err = errors.Join(err, done()) }()
	if err := write(temp); err != nil {
		if errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("there is no room for %s: make some, or name another place for it: %w", path, err)
		}
		return err
	}
	if old != nil {
		if err := keepAttributes(target, temp, old); err != nil {
			return err
		}
	}
	durable = durable || old != nil
	if durable {
		if err := syncFile(temp); err != nil {
			return err
		}
	}
	if err := os.Rename(temp, target); err != nil || !durable {
		return err
	}
	return syncFile(filepath.Dir(target))
}

// keepAttributes gives the new file at temp what the old one at target has.
func keepAttributes(target, temp string, old fs.FileInfo) error {
	st := old.Sys().(*syscall.Stat_t)
	if err := os.Chown(temp, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("the owner of %s cannot be kept: %w", target, withoutPath(err))
	}
	names, err := xattr(func(b []byte) (int, error) { return unix.Listxattr(target, b) })
	if err != nil {
		return fmt.Errorf("the extended attributes of %s cannot be read: %w", target, err)
	}
	for name := range strings.SplitSeq(strings.Trim(string(names), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value, err := xattr(func(b []byte) (int, error) { return unix.Getxattr(target, name, b) })
		if err == nil {
			err = unix.Setxattr(temp, name, value, 0)
		}
		// The host gives labels of its own where it does not allow us to.
		own := strings.HasPrefix(name, "security.") || strings.HasPrefix(name, "trusted.")
		if err != nil && (!own || !errors.Is(err, unix.EPERM)) {
			return fmt.Errorf("the extended attribute %s of %s cannot be kept: %w", name, target, err)
		}
	}
	return os.Chmod(temp, old.Mode().Perm()) // at last: a new owner may take bits away
}

// xattr returns what get has, whose length it tells where it is given no room.
func xattr(get func([]byte) (int, error)) ([]byte, error) {
	n, err := get(nil)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // the file system has none
	}
	if err != nil || n == 0 {
		return nil, err
	}
	b := make([]byte, n)
	n, err = get(b)
	return b[:max(n, 0)], err
}

func withoutPath(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	return err
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

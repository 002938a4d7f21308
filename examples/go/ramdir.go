// Package ramdir makes directories in memory that hold so much and no more, for
// scratch files that must neither reach a disk nor fill the memory.
package ramdir

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Dir is a directory in memory.
type Dir struct{ Path string }

// New makes a directory that holds at most size bytes. It takes a caller who may
// mount file systems.
func New(size int64) (*Dir, error) {
	if size <= 0 {
		return nil, fmt.Errorf("ramdir: a directory of %d bytes holds nothing", size)
	}
	path, err := os.MkdirTemp("", "ramdir-")
	if err != nil {
		return nil, err
	}
	options := fmt.Sprintf("mode=0700,size=%d", size)
	if err := syscall.Mount("ramdir", path, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		return nil, errors.Join(fmt.Errorf("ramdir: mounting %s: %w", path, err), os.Remove(path))
	}
	return &Dir{path}, nil
}

// Remove removes the directory with all that is in it.
func (d *Dir) Remove() error {
	if err := syscall.Unmount(d.Path, syscall.MNT_DETACH); err != nil {
		return fmt.Errorf("ramdir: unmounting %s: %w", d.Path, err)
	}
	return os.Remove(d.Path)
}

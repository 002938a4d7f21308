package blk

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// CopyRange has the host copy the n bytes at off to the same place on the disk to,
// which may share the room of both. The error wraps errors.ErrUnsupported where the
// host cannot copy between the two, or not so.
func (r *Raw) CopyRange(to *Raw, off, n int64) error {
	if err := to.checkRange("copy to", off, n); err != nil {
		return err
	}
	if off > r.Size()-n {
		return ErrBounds
	}
	// The end of the last sector of a file that lacks it is zero on both.
	for end := min(off+n, r.length.Load()); off < end; {
		from, at := off, off
		done, err := unix.CopyFileRange(r.fd, &from, to.fd, &at, int(end-off), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS):
			return fmt.Errorf("copy from %s to %s: %w: %w", r.path, to.path, errors.ErrUnsupported, err)
		case err != nil:
			return fmt.Errorf("copy from %s to %s at %d: %w", r.path, to.path, off, err)
		case done == 0:
			return fmt.Errorf("copy from %s to %s: %w: it ends at %d", r.path, to.path, errors.ErrUnsupported, off)
		}
		off += int64(done)
	}
	return nil
}

package blk

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// QEMU says what it does with an image, and what it suffers others to do, by
// locks on single bytes of the file: a shared lock on lockUsed+n means "I use
// permission n", one on lockDenied+n "nobody else may". Every lock is shared;
// a conflict is found by asking for the opposite byte after one's own locks are
// in place, so that of two that open at once at least one sees the other.
const (
	lockUsed   = 100
	lockDenied = 200

	permRead   = 0 // BLK_PERM_CONSISTENT_READ
	permWrite  = 1 // BLK_PERM_WRITE
	permResize = 3 // BLK_PERM_RESIZE
)

// ErrLocked is wrapped by the error for an image that another process uses in a
// way that excludes ours.
var ErrLocked = errors.New("image is in use by another process")

// lockImage takes the open-file-description locks that opts ask for on the image
// fd. Closing fd gives them up.
func lockImage(fd int, opts RawOptions) error {
	used, denied := []int64{permRead, permWrite, permResize}, []int64{permWrite, permResize}
	switch {
	case opts.ForceShare:
		used, denied = used[:1], nil
	case opts.ReadOnly:
		used = used[:1]
	}
	for _, n := range used {
		if err := lockByte(fd, lockUsed+n); err != nil {
			return err
		}
	}
	for _, n := range denied {
		if err := lockByte(fd, lockDenied+n); err != nil {
			return err
		}
	}
	for _, n := range used {
		if err := refuse(fd, lockDenied+n, "it does not share it"); err != nil {
			return err
		}
	}
	for _, n := range denied {
		if err := refuse(fd, lockUsed+n, "it writes to it"); err != nil {
			return err
		}
	}
	return nil
}

func lockByte(fd int, at int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w, which has locked it whole", ErrLocked)
	case err != nil:
		return fmt.Errorf("lock the image: %w", err)
	default:
		return nil
	}
}

// refuse fails if anyone else holds a lock on the byte at.
func refuse(fd int, at int64, why string) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	err := retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk) })
	if err != nil {
		return fmt.Errorf("query the image lock: %w", err)
	}
	if lk.Type != unix.F_UNLCK {
		return fmt.Errorf("%w: %s", ErrLocked, why)
	}
	return nil
}

package qcow2

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// QEMU's protocol for sharing an image between processes (its file-posix
// driver): a holder puts a shared lock on byte permBase+n for each permission n
// that it uses and on byte sharedBase+n for each permission that it does not let
// others use, and then looks whether somebody else's locks contradict its own.
// The locks belong to the open file description, so they end with it, even when
// the process is killed, and they outlive the file's name.
const (
	permBase   = 100
	sharedBase = 200
)

// QEMU's permissions, as bit numbers.
const (
	permConsistentRead = 0
	permWrite          = 1
	permResize         = 3
)

// access says what an open image is for.
type access uint8

const (
	// accessRead shares the image with readers only.
	accessRead access = iota
	// accessWrite shares it with nobody who reads or writes.
	accessWrite
	// accessForced reads it beside a writer, whose changes may show in part.
	accessForced
)

// accessOf is the access of an image that is opened with opts.
func accessOf(opts Options) access {
	switch {
	case opts.ForceShare:
		return accessForced
	case opts.ReadOnly:
		return accessRead
	}
	return accessWrite
}

// readAccess is accessRead, or accessForced if forced.
func readAccess(forced bool) access {
	return accessOf(Options{ReadOnly: true, ForceShare: forced})
}

// lockImage locks f, which is opened for writing iff that is its access. A writer
// uses and denies to others writing and resizing; a reader denies them the same,
// so that readers share with readers only; a forced one denies nothing. It returns
// an error of kind ErrLocked if another process has f open in a way that
// contradicts this.
func lockImage(f *os.File, path string, a access) error {
	used, denied := []int64{permConsistentRead}, []int64{permWrite, permResize}
	switch a {
	case accessWrite:
		used = append(used, permWrite, permResize)
	case accessForced:
		denied = nil
	}
	for _, n := range used {
		if err := shareByte(f, permBase+n); err != nil {
			return lockError(path, err)
		}
	}
	for _, n := range denied {
		if err := shareByte(f, sharedBase+n); err != nil {
			return lockError(path, err)
		}
	}
	for _, n := range used {
		if err := othersHold(f, path, sharedBase+n); err != nil {
			return err
		}
	}
	for _, n := range denied {
		if err := othersHold(f, path, permBase+n); err != nil {
			return err
		}
	}
	return nil
}

func shareByte(f *os.File, off int64) error {
	return fcntlLock(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: off, Len: 1})
}

// othersHold fails with ErrLocked iff another open file description holds a
// lock on the byte.
func othersHold(f *os.File, path string, off int64) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: 1}
	if err := fcntlLock(f, unix.F_OFD_GETLK, &l); err != nil {
		return lockError(path, err)
	}
	if l.Type == unix.F_UNLCK {
		return nil
	}
	return lockError(path, unix.EAGAIN)
}

func fcntlLock(f *os.File, cmd int, l *unix.Flock_t) error {
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, l)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func lockError(path string, err error) error {
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return &Error{
			Path: path, Kind: ErrLocked, What: "the image is in use by another process",
			Mend: fmt.Sprintf("close the program that uses it (fuser %s shows which)", shellWord(path)),
		}
	}
	return &Error{Path: path, What: "locking the image failed", Err: err}
}

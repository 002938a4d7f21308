package qcow2

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// OpenScratch opens the image at base, of the given format, "qcow2" or "raw",
// under a throw-away overlay that takes all writes. The overlay is a file without
// a name in dir, or in the system's directory for temporary files if dir is empty;
// its room is given back at Close, or when the process ends. Nothing of it
// survives a crash, so Flush does not wait for stable storage. base is locked as
// by a reader and never written. opts hold for base and its backing files;
// ReadOnly is ignored, and with Snapshot the disk begins as what it was then.
func OpenScratch(dir, base, format string, opts Options) (*Image, error) {
	c := &chain{}
	under, err := openBase(base, format, opts, c)
	if err != nil {
		return nil, err
	}
	m, err := openUnnamed(dir, under.Size(), opts, c)
	if err != nil {
		return nil, errors.Join(err, under.Close())
	}
	m.backing = under
	return m, nil
}

// openBase opens a file that the user, not an image, names as the base.
func openBase(base, format string, opts Options, c *chain) (backing, error) {
	opts.ReadOnly = true
	switch format {
	case "qcow2":
		return asBacking(openChain(base, opts, c))
	case "raw":
		if opts.Snapshot != "" {
			return nil, &Error{Path: base, Kind: ErrNoSnapshot, What: "a raw image has no internal snapshots"}
		}
		f, err := openRegular(base, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		return c.openRaw(f, base, opts)
	}
	return nil, &Error{Path: base, Kind: ErrInvalidOption, What: fmt.Sprintf("the format %q is not one of qcow2 and raw", format)}
}

// openUnnamed makes an empty image in a file without a name in dir and opens it,
// to be put over c.
func openUnnamed(dir string, size int64, opts Options, c *chain) (*Image, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	p, err := CreateOptions{Size: size}.plan()
	if err != nil {
		return nil, inFile(dir, err)
	}
	f, err := unnamedFile(dir)
	if err != nil {
		return nil, &Error{Path: dir, What: "cannot create a throw-away overlay", Err: withoutPath(err)}
	}
	v := volatileFile{newOSFile(f)}
	if err := p.write(v); err != nil {
		return nil, inFile(f.Name(), errors.Join(err, f.Close()))
	}
	opts.ReadOnly, opts.Snapshot = false, ""
	return openFile(v, f.Name(), opts, c)
}

// unnamedFile opens a new file in dir that never has a name. What its Name
// returns is for messages.
func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		// Not every file system can. What keeps this one from it otherwise
		// keeps it from making a file with a name, too.
		return removedFile(dir)
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, "calf-scratch.qcow2")), nil
}

// removedFile is unnamedFile with a file that has a name for a moment.
func removedFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "calf-scratch-*.qcow2")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// volatileFile is a file that nobody needs after a crash of the host, so nothing in
// it has to be on stable storage.
type volatileFile struct{ file }

// Fdatasync implements file.
func (volatileFile) Fdatasync() error { return nil }

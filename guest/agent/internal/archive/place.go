package archive

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Place is where an archive is to be unpacked. What is there of the path is found out
// once, with the symbolic links that a user has there; below that, none is followed
// that comes later, by which archives could reach for each other's places.
type Place struct {
	dest string
	root *os.Root // the innermost directory of dest that is there
	rest string   // of dest, below root
	into bool     // dest ends in a slash: a file goes into it
}

// Find finds the place of dest, and reports why nothing can be unpacked there. The
// caller closes it.
func Find(dest string) (*Place, error) {
	dir, err := filepath.Abs(dest)
	if err != nil {
		return nil, err
	}
	rest := "."
	for {
		info, err := os.Stat(dir)
		if err == nil && info.IsDir() {
			break
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return nil, err
		}
		if _, gone := os.Lstat(dir); gone == nil && rest != "." {
			return nil, fmt.Errorf("%s is there, and is no directory", dir)
		}
		dir, rest = filepath.Dir(dir), path.Join(filepath.Base(dir), rest)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return nil, fmt.Errorf("nothing can be written to the directory %s: %w", dir, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Place{dest: dest, root: root, rest: rest, into: strings.HasSuffix(dest, "/")}, nil
}

// Close closes the place.
func (p *Place) Close() error { return p.root.Close() }

// open opens the directory at name below the place's root, which is made if need be.
// The caller closes it.
func (p *Place) open(name string) (*os.Root, error) {
	dir, err := p.root.OpenRoot(".")
	if err != nil || name == "." {
		return dir, err
	}
	for part := range strings.SplitSeq(name, "/") {
		if err = dir.Mkdir(part, 0o755); errors.Is(err, fs.ErrExist) {
			err = nil
		}
		var next *os.Root
		if err == nil {
			next, err = openDir(dir, part)
		}
		if err = errors.Join(err, dir.Close()); err != nil {
			return nil, err
		}
		dir = next
	}
	return dir, nil
}

// openDir opens the directory name of dir, if it is one and no link to one.
func openDir(dir *os.Root, name string) (*os.Root, error) {
	there, err := dir.Lstat(name)
	if err != nil {
		return nil, err
	}
	var next *os.Root
	var opened fs.FileInfo
	if there.IsDir() {
		if next, err = dir.OpenRoot(name); err != nil {
			return nil, err
		}
		if opened, err = next.Stat("."); err == nil && os.SameFile(opened, there) {
			return next, nil
		}
		err = errors.Join(err, next.Close())
	}
	return nil, errors.Join(fmt.Errorf("%s is there, and is no directory", filepath.Join(dir.Name(), name)), err)
}

// newFile is a file that takes its name in a directory when it is whole.
type newFile struct {
	*os.File
	dir  *os.File
	name string
	// temp is what a whole file is called before it replaces another one, so that
	// what is found there may as well be put into its place.
	temp string
	// part is its name until it is whole, where a file cannot be without one, and
	// empty elsewhere. What a process that was killed has left there makes way.
	part string
}

// create begins the file name, which has no slash, of dir.
func create(dir *os.File, name string) (*newFile, error) {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(name)) // it never fails
	f := &newFile{dir: dir, name: name, temp: ".calf-" + strconv.FormatUint(sum.Sum64(), 16)}
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		// Not every file system can. What keeps this one from it otherwise keeps it
		// from what follows, too.
		f.part = f.temp + "-part"
		if fd, err = createNamed(int(dir.Fd()), f.part); err != nil {
			return nil, f.failed("openat", err)
		}
	}
	f.File = os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name))
	return f, nil
}

func createNamed(dir int, name string) (fd int, err error) {
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return -1, err
	}
	return unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
}

func (f *newFile) failed(op string, err error) error {
	return &fs.PathError{Op: op, Path: filepath.Join(f.dir.Name(), f.name), Err: err}
}

// finish gives the file its name, which another one may have now.
func (f *newFile) finish() error {
	if f.part != "" {
		err := f.rename(f.part)
		if err == nil {
			f.part = ""
		}
		return err
	}
	err := f.link(f.name)
	for tries := 100; errors.Is(err, fs.ErrExist) && tries > 0; tries-- {
		// Whose file temp is, a dead process or one that is about to do the same,
		// does not matter: it is put into place, and then, with temp free, ours.
		if err = f.link(f.temp); err == nil || errors.Is(err, fs.ErrExist) {
			err = errors.Join(err, f.rename(f.temp))
		}
	}
	return err
}

// rename puts the file that is called name into place, unless another process has
// done so.
func (f *newFile) rename(name string) error {
	at := int(f.dir.Fd())
	err := unix.Renameat(at, name, at, f.name)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	case name == f.temp:
		_ = unix.Unlinkat(at, name, 0) // nobody can put it there
	}
	return f.failed("rename", err)
}

// link gives the file, which has no name, one that is free.
func (f *newFile) link(name string) error {
	if err := unix.Linkat(unix.AT_FDCWD, f.path(), int(f.dir.Fd()), name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return f.failed("link", err)
	}
	return nil
}

// path leads to the file whatever its name.
func (f *newFile) path() string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

// setModified sets when the file was changed last.
func (f *newFile) setModified(t time.Time) error {
	modified, err := unix.TimeToTimespec(t)
	if err != nil {
		return f.failed("set the time of", err)
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, modified}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, f.path(), times, 0); err != nil {
		return f.failed("set the time of", err)
	}
	return nil
}

// Close closes the file, which is gone if it has not been finished.
func (f *newFile) Close() error {
	err := f.File.Close()
	if f.part != "" {
		err = errors.Join(err, unix.Unlinkat(int(f.dir.Fd()), f.part, 0))
	}
	return err
}

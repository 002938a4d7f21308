// Package archive packs files and trees into tar archives and unpacks them, on
// either side of a guest. What is unpacked stays inside its destination, whatever
// the archive says. A line follows the archive, by which one that has been cut off
// between two files is told from a whole one.
package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// end follows an archive.
const end = "calf: end of archive\n"

// errCut is why an archive is not taken for a whole one.
var errCut = errors.New("the archive was cut off")

// Pack writes what is at name, a file or a tree, to w. Sockets, FIFOs and devices in
// a tree are left out. A tree is called "." in its archive, a file by its last name.
func Pack(w io.Writer, name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	if info.IsDir() {
		err = packTree(t, name)
	} else {
		err = packFile(t, name, filepath.Base(name), info)
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return err
	}
	_, err = io.WriteString(w, end)
	return err
}

// readEnd reads what follows an archive.
func readEnd(r io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(r, int64(len(end))+1))
	if err == nil && string(b) != end {
		err = errCut
	}
	return err
}

func packTree(t *tar.Writer, name string) error {
	root, err := os.OpenRoot(name)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // it was read only
	return fs.WalkDir(root.FS(), ".", func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := root.Lstat(at)
		if err != nil {
			return err
		}
		switch info.Mode().Type() {
		case fs.ModeDir:
			return packHeader(t, at, "", info)
		case fs.ModeSymlink:
			link, err := root.Readlink(at)
			if err != nil {
				return err
			}
			return packHeader(t, at, link, info)
		case 0:
			f, err := root.Open(at)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			return packOpen(t, f, at)
		}
		return nil
	})
}

// packFile packs a single file, which may be reached by links.
func packFile(t *tar.Writer, name, as string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is neither a file nor a directory", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return packOpen(t, f, as)
}

func packHeader(t *tar.Writer, as, link string, info fs.FileInfo) error {
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Format = as, tar.FormatPAX // for names and times of any kind
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	return t.WriteHeader(h)
}

// packOpen packs f, of which as much is taken as it has now.
func packOpen(t *tar.Writer, f *os.File, as string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := packHeader(t, as, "", info); err != nil {
		return err
	}
	n, err := io.Copy(t, io.LimitReader(f, info.Size()))
	if err == nil && n < info.Size() {
		err = fmt.Errorf("%s became shorter while it was read", f.Name())
	}
	return err
}

// Options say how to unpack.
type Options struct {
	// Owners gives files the owners that the archive says, and the bits by which
	// they act for them. Without it they are the caller's.
	Owners bool
}

// Unpack unpacks the archive that r has at dest. A tree becomes the directory dest,
// which is made or added to; a file becomes the file dest, or goes by its name into
// dest if that is a directory or ends in a slash. Directories above are made.
func Unpack(r io.Reader, dest string, o Options) error {
	t := tar.NewReader(r)
	first, err := t.Next()
	if err != nil {
		return fmt.Errorf("the archive is empty or broken: %w", err)
	}
	if first.Typeflag == tar.TypeReg {
		return unpackFile(r, t, first, dest, o)
	}
	if err := os.MkdirAll(dest, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dest)
	if err != nil {
		return err
	}
	u := &unpacking{root: root, Options: o}
	for h := first; err == nil; h, err = t.Next() {
		if err = u.entry(t, h); err != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = errors.Join(readEnd(r), u.finish())
	}
	return errors.Join(err, root.Close())
}

// unpackFile unpacks the only file of an archive.
func unpackFile(r io.Reader, t *tar.Reader, h *tar.Header, dest string, o Options) (err error) {
	if info, err := os.Stat(dest); strings.HasSuffix(dest, "/") || err == nil && info.IsDir() {
		dest = filepath.Join(dest, path.Base(h.Name))
	}
	dir := filepath.Dir(dest)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	h.Name = filepath.Base(dest)
	u := &unpacking{root: root, Options: o}
	if err := u.entry(t, h); err != nil {
		return err
	}
	if _, err := t.Next(); !errors.Is(err, io.EOF) {
		return errors.Join(errors.New("the archive of a file has more than that, or was cut off"), err)
	}
	return readEnd(r)
}

// unpacking is an Unpack of a tree.
type unpacking struct {
	Options
	root *os.Root
	dirs []*tar.Header // which get their modes and times when all is in them
}

// entry unpacks the entry h.
func (u *unpacking) entry(t *tar.Reader, h *tar.Header) error {
	name := path.Clean(h.Name)
	if !fs.ValidPath(name) {
		return fmt.Errorf("the archive has a file %q, which does not lie in it", h.Name)
	}
	h.Name = name
	if name != "." && h.Typeflag != tar.TypeDir {
		// What has the name now makes way, and is not written through.
		if err := u.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs = append(u.dirs, h)
		if name == "." {
			return nil
		}
		if err := u.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if info, err := u.root.Lstat(name); err != nil || !info.IsDir() {
			return errors.Join(err, fmt.Errorf("%s is there, and is no directory", name))
		}
		return nil
	case tar.TypeReg:
		return u.file(t, h)
	case tar.TypeSymlink:
		if err := u.root.Symlink(h.Linkname, name); err != nil || !u.Owners {
			return err
		}
		return u.root.Lchown(name, h.Uid, h.Gid)
	}
	return nil // nothing else is packed
}

func (u *unpacking) file(t *tar.Reader, h *tar.Header) error {
	f, err := u.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, t)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return u.attributes(h)
}

// finish gives directories what is theirs, the innermost first.
func (u *unpacking) finish() error {
	for _, h := range slices.Backward(u.dirs) {
		if err := u.attributes(h); err != nil {
			return err
		}
	}
	return nil
}

// attributes gives a file or directory its owner, mode and time.
func (u *unpacking) attributes(h *tar.Header) error {
	mode := h.FileInfo().Mode()
	if u.Owners {
		if err := u.root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
			return err
		}
	} else {
		mode = mode.Perm()
	}
	if err := u.root.Chmod(h.Name, mode&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return u.root.Chtimes(h.Name, time.Time{}, h.ModTime)
}

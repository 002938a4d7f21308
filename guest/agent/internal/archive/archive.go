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
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// end follows an archive.
const end = "calf: end of archive\n"

// errCut is why an archive is not taken for a whole one.
var errCut = errors.New("the archive was cut off")

// Pack writes what is at name, a file or a tree, to w. Sockets, FIFOs and devices in
// a tree are left out; several names of one file stay that. A tree is called "." in
// its archive, a file by its last name.
func Pack(w io.Writer, name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	if info.IsDir() {
		err = packTree(t, name)
	} else {
		err = packFile(t, name, filepath.Base(name))
	}
	if err == nil { // else it stays without its end
		err = t.Close()
	}
	if err == nil {
		_, err = io.WriteString(w, end)
	}
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

// packing is a Pack of a tree.
type packing struct {
	*tar.Writer
	root  *os.Root
	links map[inode]string // files with more names than one, by the first that was packed
}

// inode is a file whatever its name.
type inode struct{ device, number uint64 }

func packTree(t *tar.Writer, name string) error {
	root, err := os.OpenRoot(name)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // it was read only
	p := &packing{Writer: t, root: root, links: make(map[inode]string)}
	return p.dir(".")
}

// dir packs a directory of the tree and all that is in it. Names on Linux need not be
// text, as the ones that package io/fs walks by have to.
func (p *packing) dir(at string) error {
	dir, err := p.root.OpenFile(at, readFile|unix.O_DIRECTORY, 0)
	if err != nil {
		return p.failed(err, at)
	}
	entries, err := dir.ReadDir(-1)
	if err = errors.Join(p.entry(at), err, dir.Close()); err != nil {
		return p.failed(err, at)
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		name := path.Join(at, e.Name())
		if e.IsDir() {
			err = p.dir(name)
		} else {
			err = p.failed(p.entry(name), name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// failed gives an error the whole path of the file that it is about.
func (p *packing) failed(err error, at string) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok && !filepath.IsAbs(e.Path) {
		err = &fs.PathError{Op: e.Op, Path: filepath.Join(p.root.Name(), at), Err: e.Err}
	}
	return err
}

// entry packs what is at a path of the tree, which may be something else by now than
// a moment ago.
func (p *packing) entry(at string) error {
	info, err := p.root.Lstat(at)
	if err != nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return packHeader(p.Writer, at, "", info)
	case fs.ModeSymlink:
		link, err := p.root.Readlink(at)
		if err != nil {
			return err
		}
		return packHeader(p.Writer, at, link, info)
	case 0:
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			file := inode{st.Dev, st.Ino}
			if first, ok := p.links[file]; ok {
				return p.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: at, Linkname: first, Format: tar.FormatPAX})
			}
			p.links[file] = at
		}
		f, err := p.root.OpenFile(at, readFile, 0)
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }() // it was read only
		return packOpen(p.Writer, f, at)
	}
	return nil
}

// readFile opens a file for reading. Something else, a FIFO above all, keeps nobody
// waiting.
const readFile = os.O_RDONLY | unix.O_NONBLOCK

// packFile packs a single file, which may be reached by links.
func packFile(t *tar.Writer, name, as string) error {
	f, err := os.OpenFile(name, readFile, 0)
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
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is neither a file nor a directory", f.Name())
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Blocks == 0 && st.Size <= maxClaim {
		return packUnsized(t, f, as, info)
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

const (
	// maxClaim is how long a file claims to be, at most, that the kernel makes up as it
	// is read, as in /proc or /sys: it has no block, and nothing or a page.
	maxClaim = 4096
	// maxUnsized bounds what such a file may have.
	maxUnsized = 16 << 20
)

// packUnsized packs f, whose length is known only when it has been read.
func packUnsized(t *tar.Writer, f *os.File, as string, info fs.FileInfo) error {
	b, err := io.ReadAll(io.LimitReader(f, maxUnsized+1))
	if err != nil {
		return err
	}
	if len(b) > maxUnsized {
		return fmt.Errorf("%s does not say how long it is, and has more than %d MiB", f.Name(), maxUnsized>>20)
	}
	if err := packHeader(t, as, "", sized{info, int64(len(b))}); err != nil {
		return err
	}
	_, err = t.Write(b)
	return err
}

// sized is a file of another length.
type sized struct {
	fs.FileInfo
	size int64
}

// Size implements fs.FileInfo.
func (s sized) Size() int64 { return s.size }

// Owner is whom what is unpacked belongs to, by numbers.
type Owner struct{ UID, GID int }

// Unpack unpacks the archive that r has at dest: see Find, and Place.Unpack.
func Unpack(r io.Reader, dest string, o *Owner) error {
	p, err := Find(dest)
	if err != nil {
		return err
	}
	return errors.Join(p.Unpack(r, o), p.Close())
}

// Unpack unpacks the archive that r has. A tree becomes the directory at the place,
// which is made or added to; a file becomes the file there, or goes by its name into
// what is a directory, or ends in a slash. Directories above are made. A file has its
// name only when it is whole, and replaces another one then. What is made belongs to
// o, or to the caller if that is nil; a directory that was there keeps its owner. The
// bits by which a file acts for its owner are left out.
func (p *Place) Unpack(r io.Reader, o *Owner) error {
	t := tar.NewReader(r)
	first, err := t.Next()
	if err != nil {
		return fmt.Errorf("the archive is empty or broken: %w", err)
	}
	if first.Typeflag == tar.TypeReg {
		return p.unpackFile(r, t, first, o)
	}
	_, absent := p.root.Lstat(p.rest)
	root, err := p.open(p.rest)
	if err != nil {
		return err
	}
	u := &unpacking{root: root, owner: o, isNew: absent != nil}
	for h := first; err == nil; h, err = t.Next() {
		if err = u.entry(t, h); err != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = readEnd(r)
	}
	if err = errors.Join(err, u.leave("")); err != nil {
		err = fmt.Errorf("%w; only a part of it is in %s", err, p.dest)
	}
	return errors.Join(err, root.Close())
}

// unpackFile unpacks the only file of an archive.
func (p *Place) unpackFile(r io.Reader, t *tar.Reader, h *tar.Header, o *Owner) (err error) {
	dir, name := path.Split(p.rest)
	if there, err := p.root.Lstat(p.rest); p.into || err == nil && there.IsDir() {
		dir, name = p.rest, path.Base(h.Name)
	}
	root, err := p.open(path.Clean(dir))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	h.Name = name
	u := &unpacking{root: root, owner: o}
	return u.put(t, h, func() error {
		if _, err := t.Next(); !errors.Is(err, io.EOF) {
			return errors.Join(errors.New("the archive of a file has more than that, or was cut off"), err)
		}
		return readEnd(r)
	})
}

// unpacking is an Unpack.
type unpacking struct {
	root  *os.Root
	owner *Owner
	isNew bool        // the root has been made for it
	dirs  []directory // that entries may still lie in, each in the one before it
}

// directory is one that gets what is its own when all is in it.
type directory struct {
	name     string
	mode     fs.FileMode
	modified time.Time
	isNew    bool
}

// maxName bounds the name of an entry, as Linux bounds paths.
const maxName = 4096

// entry unpacks the entry h.
func (u *unpacking) entry(t *tar.Reader, h *tar.Header) error {
	name := path.Clean(h.Name)
	if !filepath.IsLocal(name) || len(name) > maxName {
		return fmt.Errorf("the archive has a file %.200q, which does not lie in it", h.Name)
	}
	h.Name = name
	if err := u.leave(name); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.enter(h)
	case tar.TypeReg:
		return u.put(t, h, func() error { return nil })
	case tar.TypeSymlink:
		if err := u.makeWay(name); err != nil {
			return err
		}
		if err := u.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return u.own(name)
	case tar.TypeLink:
		if path.Clean(h.Linkname) == name {
			return fmt.Errorf("the archive has a file %.200q that is another name of itself", h.Name)
		}
		if err := u.makeWay(name); err != nil {
			return err
		}
		return u.root.Link(h.Linkname, name) // which has to lie in it, too
	}
	return nil // nothing else is packed
}

// makeWay removes what has a name that an entry gets, if anything.
func (u *unpacking) makeWay(name string) error {
	if err := u.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// enter makes a directory, or adds to one that is there.
func (u *unpacking) enter(h *tar.Header) error {
	isNew := u.isNew
	if h.Name != "." {
		err := u.root.Mkdir(h.Name, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		isNew = err == nil
	}
	if info, err := u.root.Lstat(h.Name); err != nil || !info.IsDir() {
		return errors.Join(err, fmt.Errorf("%s is there, and is no directory", filepath.Join(u.root.Name(), h.Name)))
	}
	u.dirs = append(u.dirs, directory{h.Name, mode(h), h.ModTime, isNew})
	return nil
}

// leave gives those directories what is theirs that name, the next one, does not lie
// in; an empty name lies in none.
func (u *unpacking) leave(name string) error {
	for len(u.dirs) > 0 {
		last := u.dirs[len(u.dirs)-1]
		if name != "" && name != last.name && (last.name == "." || strings.HasPrefix(name, last.name+"/")) {
			break
		}
		u.dirs = u.dirs[:len(u.dirs)-1]
		if last.isNew {
			if err := u.own(last.name); err != nil {
				return err
			}
		}
		err := errors.Join(u.root.Chmod(last.name, last.mode), u.root.Chtimes(last.name, time.Time{}, last.modified))
		if err != nil {
			return err
		}
	}
	return nil
}

// own gives what has been made under name to its owner.
func (u *unpacking) own(name string) error {
	if u.owner == nil {
		return nil
	}
	return u.root.Lchown(name, u.owner.UID, u.owner.GID)
}

// mode is the mode that the file or directory h gets.
func mode(h *tar.Header) fs.FileMode {
	return h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSticky)
}

// put makes the file h, of what t has, if check agrees at the end.
func (u *unpacking) put(t *tar.Reader, h *tar.Header, check func() error) (err error) {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") { // which may have no end, and needs no data
			return fmt.Errorf("%.200q is sparse, which no file is that is packed", h.Name)
		}
	}
	if there, err := u.root.Lstat(h.Name); err == nil && there.IsDir() {
		if err := u.root.Remove(h.Name); err != nil {
			return err
		}
	}
	dir, err := u.root.Open(path.Dir(h.Name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	f, err := create(dir, path.Base(h.Name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, t); err != nil {
		return err
	}
	if u.owner != nil {
		if err := f.Chown(u.owner.UID, u.owner.GID); err != nil {
			return err
		}
	}
	if err := errors.Join(f.Chmod(mode(h)), f.setModified(h.ModTime), check()); err != nil {
		return err
	}
	return f.finish()
}

package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"path"
	"slices"
	"strings"
	"time"
)

const (
	// maxDir is the length of the largest directory that is read, in bytes.
	maxDir = 16 << 20
	// maxLinks is how many symbolic links a path may lead through, as in Linux.
	maxLinks = 40
	// maxSteps is how many names a path may have, those of its links included.
	maxSteps = 1024
	// maxTarget is the length of the longest symbolic link, in bytes.
	maxTarget = 4096
)

// data reads what an inode holds.
type data struct {
	fs     *FS
	inode  inode
	inline []byte // instead of blocks, if the inode says so
}

func (f *FS) data(n inode) (*data, error) {
	if n.has(flagEncrypt) {
		return nil, errors.New("it is encrypted")
	}
	d := &data{fs: f, inode: n}
	if n.has(flagInlineData) {
		if d.inline = n.inlineData(); n.size() > int64(len(d.inline)) {
			return nil, corrupt("inode %d does not have the data that it should", n.number)
		}
	}
	return d, nil
}

// ReadAt implements io.ReaderAt.
func (d *data) ReadAt(p []byte, off int64) (int, error) {
	size := d.inode.size()
	if off < 0 {
		return 0, fs.ErrInvalid
	}
	if off >= size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > size-off {
		p, end = p[:size-off], io.EOF
	}
	if d.inline != nil {
		return copy(p, d.inline[off:]), end
	}
	m := mapper{fs: d.fs, file: d.inode}
	for n := 0; n < len(p); {
		got, err := m.read(p[n:], off+int64(n))
		if err != nil {
			return n, err
		}
		n += got
	}
	return len(p), end
}

// read fills the part of p that lies in one piece of the file.
func (m *mapper) read(p []byte, off int64) (int, error) {
	within := off % m.fs.blockSize
	piece, err := m.find(uint64(off / m.fs.blockSize)) //nolint:gosec // G115: not negative
	if err != nil {
		return 0, err
	}
	if blocks := uint64(len(p))/uint64(m.fs.blockSize) + 2; piece.n > blocks { //nolint:gosec // G115: positive
		piece.n = blocks // what is left of a large hole may not fit an int64
	}
	n := min(int64(len(p)), int64(piece.n)*m.fs.blockSize-within) //nolint:gosec // G115: bounded above
	if piece.zero {
		clear(p[:n])
		return int(n), nil
	}
	return int(n), m.fs.read(p[:n], piece.disk, within)
}

// dirEntry is an entry of a directory.
type dirEntry struct {
	fs     *FS
	name   string
	number uint32
	kind   byte // EXT4_FT_*; 0: the inode knows
}

func (e dirEntry) Name() string   { return e.name }
func (e dirEntry) IsDir() bool    { return e.Type().IsDir() }
func (e dirEntry) String() string { return fs.FormatDirEntry(e) }
func (e dirEntry) Type() fs.FileMode {
	if types := [...]uint16{1: 0x8, 2: 0x4, 3: 0x2, 4: 0x6, 5: 0x1, 6: 0xC, 7: 0xA}; e.kind > 0 && int(e.kind) < len(types) {
		return typeOf(types[e.kind])
	}
	info, err := e.Info()
	if err != nil {
		return fs.ModeIrregular
	}
	return info.Mode().Type()
}

func (e dirEntry) Info() (fs.FileInfo, error) {
	n, err := e.fs.inode(e.number)
	return info{n, e.name}, err
}

// entries are those of a directory but for itself and its parent, in no order.
func (f *FS) entries(dir inode) iter.Seq2[dirEntry, error] {
	return func(yield func(dirEntry, error) bool) {
		for b, err := range f.dirBlocks(dir) {
			for len(b) > 0 && err == nil {
				var e dirEntry
				e, b, err = f.entry(b)
				if err == nil && e.number != 0 && e.name != "." && e.name != ".." && !yield(e, nil) {
					return
				}
			}
			if err != nil {
				yield(dirEntry{}, err)
				return
			}
		}
	}
}

// dirBlocks are the pieces of a directory that are lists of entries.
func (f *FS) dirBlocks(dir inode) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		size := dir.size()
		d, err := f.data(dir)
		switch {
		case err != nil:
			yield(nil, err)
		case size > maxDir:
			yield(nil, fmt.Errorf("ext4: a directory of %d bytes is too large to be read", size))
		case d.inline == nil:
			d.blocks(yield)
		case size < 60:
			yield(nil, corrupt("inode %d is a directory of %d bytes", dir.number, size))
		default:
			// Four bytes say what the parent is; entries that did not fit follow.
			_ = yield(d.inline[4:60], nil) && yield(d.inline[60:size], nil)
		}
	}
}

// blocks yields what d holds by blocks.
func (d *data) blocks(yield func([]byte, error) bool) {
	b := make([]byte, d.fs.blockSize)
	for off := int64(0); off < d.inode.size(); off += int64(len(b)) {
		n, err := d.ReadAt(b, off)
		if err == io.EOF { //nolint:errorlint // as io.ReaderAt says it
			err = nil
		}
		if !yield(b[:n], err) || err != nil {
			return
		}
	}
}

var errBrokenEntry = corrupt("a directory has a broken entry")

// entry takes the first entry from b.
func (f *FS) entry(b []byte) (dirEntry, []byte, error) {
	const header = 8
	if len(b) < header {
		return dirEntry{}, nil, errBrokenEntry
	}
	length := int(binary.LittleEndian.Uint16(b[4:]))
	if f.blockSize == 1<<16 && (length == 0 || length == 1<<16-1) {
		length = 1 << 16 // which 16 bits cannot say
	}
	name := int(b[6])
	if length < header+name || length < 12 || length > len(b) {
		return dirEntry{}, nil, errBrokenEntry
	}
	e := dirEntry{fs: f, name: string(b[header : header+name]), number: binary.LittleEndian.Uint32(b)}
	if f.features&featureFiletype != 0 {
		e.kind = b[7]
	}
	if e.number != 0 && (name == 0 || strings.ContainsAny(e.name, "/\x00")) {
		return dirEntry{}, nil, errBrokenEntry
	}
	return e, b[length:], nil
}

// lookup returns the inode of a name in a directory.
func (f *FS) lookup(dir inode, name string) (inode, error) {
	if !dir.mode().IsDir() {
		return inode{}, fs.ErrNotExist
	}
	for e, err := range f.entries(dir) {
		if err != nil {
			return inode{}, err
		}
		if e.name == name {
			return f.inode(e.number)
		}
	}
	return inode{}, fs.ErrNotExist
}

// resolve returns the inode that a path leads to. Symbolic links are followed
// inside the file system only, the last name's if follow says so.
func (f *FS) resolve(name string, follow bool) (inode, error) {
	root, err := f.inode(rootInode)
	if err != nil {
		return inode{}, err
	}
	way := []inode{root} // from the root to where we are
	left := strings.Split(name, "/")
	links := 0
	for steps := 0; len(left) > 0; steps++ {
		next := left[0]
		left = left[1:]
		switch {
		case steps == maxSteps:
			return inode{}, errors.New("the path is too long")
		case next == "" || next == ".":
			continue
		case next == "..":
			way = way[:max(1, len(way)-1)]
			continue
		}
		n, err := f.lookup(way[len(way)-1], next)
		if err != nil {
			return inode{}, err
		}
		if n.mode().Type() != fs.ModeSymlink || len(left) == 0 && !follow {
			way = append(way, n)
			continue
		}
		if links++; links > maxLinks {
			return inode{}, errors.New("too many symbolic links")
		}
		target, err := f.target(n)
		if err != nil {
			return inode{}, err
		}
		if path.IsAbs(target) {
			way = way[:1]
		}
		left = append(strings.Split(target, "/"), left...)
	}
	return way[len(way)-1], nil
}

// target is what a symbolic link says. A short one lies where the map would.
func (f *FS) target(n inode) (string, error) {
	size := n.size()
	if size > maxTarget {
		return "", corrupt("a symbolic link of %d bytes", size)
	}
	if size < 60 && !n.has(flagInlineData) && !n.has(flagEncrypt) {
		return string(n.raw[inodeBlock : inodeBlock+size]), nil
	}
	d, err := f.data(n)
	if err != nil {
		return "", err
	}
	b := make([]byte, size)
	if _, err := d.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return string(b), nil
}

// find resolves the name of an operation of package fs.
func (f *FS) find(op, name string, follow bool) (inode, error) {
	err := fs.ErrInvalid
	if fs.ValidPath(name) {
		var n inode
		if n, err = f.resolve(name, follow); err == nil {
			return n, nil
		}
	}
	return inode{}, &fs.PathError{Op: op, Path: name, Err: err}
}

// Open implements fs.FS. What it returns for a regular file is an io.ReaderAt.
func (f *FS) Open(name string) (fs.File, error) {
	n, err := f.find("open", name, true)
	if err != nil {
		return nil, err
	}
	i := info{n, path.Base(name)}
	switch i.Mode().Type() {
	case fs.ModeDir:
		return &dir{info: i, fs: f}, nil
	case 0:
		d, err := f.data(n)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return &file{SectionReader: io.NewSectionReader(d, 0, i.Size()), info: i}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("neither a regular file nor a directory")}
}

// ReadDir implements fs.ReadDirFS.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := f.find("readdir", name, true)
	if err == nil && !n.mode().IsDir() {
		err = &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a directory")}
	}
	if err != nil {
		return nil, err
	}
	return f.list(n)
}

// list returns the entries of a directory by name.
func (f *FS) list(n inode) ([]fs.DirEntry, error) {
	var list []fs.DirEntry
	for e, err := range f.entries(n) {
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return list, nil
}

// ReadLink implements fs.ReadLinkFS.
func (f *FS) ReadLink(name string) (string, error) {
	n, err := f.find("readlink", name, false)
	if err != nil {
		return "", err
	}
	if n.mode().Type() != fs.ModeSymlink {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return f.target(n)
}

// Lstat implements fs.ReadLinkFS.
func (f *FS) Lstat(name string) (fs.FileInfo, error) {
	n, err := f.find("lstat", name, false)
	if err != nil {
		return nil, err
	}
	return info{n, path.Base(name)}, nil
}

// file is an open regular file.
type file struct {
	*io.SectionReader
	info info
}

func (f *file) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *file) Close() error               { return nil }

// dir is an open directory.
type dir struct {
	info info
	fs   *FS
	left []fs.DirEntry // what ReadDir has not returned yet
	read bool          // left has been filled
}

func (d *dir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *dir) Close() error               { return nil }

func (d *dir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.name, Err: errors.New("is a directory")}
}

// ReadDir implements fs.ReadDirFile.
func (d *dir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.read {
		list, err := d.fs.list(d.info.inode)
		if err != nil {
			return nil, err
		}
		d.left, d.read = list, true
	}
	if n <= 0 || n > len(d.left) {
		if n > 0 && len(d.left) == 0 {
			return nil, io.EOF
		}
		n = len(d.left)
	}
	list := d.left[:n]
	d.left = d.left[n:]
	return list, nil
}

// info is what an inode says of a file.
type info struct {
	inode inode
	name  string
}

func (i info) Name() string      { return i.name }
func (i info) Size() int64       { return i.inode.size() }
func (i info) Mode() fs.FileMode { return i.inode.mode() }
func (i info) IsDir() bool       { return i.Mode().IsDir() }
func (i info) Sys() any          { return nil }
func (i info) String() string    { return fs.FormatFileInfo(i) }

func (i info) ModTime() time.Time {
	seconds := int64(int32(i.inode.field(inodeMtime))) //nolint:gosec // G115: two's complement
	var nanoseconds int64
	if len(i.inode.raw) >= inodeMtimeX+4 {
		extra := i.inode.field(inodeMtimeX)
		seconds, nanoseconds = seconds+int64(extra&3)<<32, int64(extra>>2)
	}
	return time.Unix(seconds, nanoseconds)
}

package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLayers is the greatest number of files in a chain of backing files.
const maxLayers = 64

// backing is what lies under an overlay: where the overlay has no data, its
// reader sees the backing's, and zeros beyond the backing's end.
type backing interface {
	// ReadvAt fills iov from [off, off+length), which lies inside Size.
	ReadvAt(iov [][]byte, off int64) error
	// mapAt maps the beginning of [off, off+n), which lies inside Size. The
	// layer it returns counts from this one.
	mapAt(off, n int64) (Mapping, error)
	Size() int64
	Close() error
}

// chain is what is known of the layers above the one being opened.
type chain struct {
	files []fs.FileInfo
	// dirs are the directories that the caller allows, resolved once.
	dirs []string
	// dir is the directory of the last layer, as its open file had it; empty
	// if that is not known. It is never resolved again, so that nobody who
	// may rename what lies in it can make it mean another one.
	dir string
	// budget is what the images of the chain share, set by the first.
	budget *cacheBudget
	// base is the layer that is open for writing beside the first, nil if there
	// is none, and baseLayer its number.
	base      Base
	baseLayer int
}

// enter adds the open file f to the chain, unless it is in it already.
func (c *chain) enter(f *os.File, path string) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	for _, above := range c.files {
		if os.SameFile(fi, above) {
			return &Error{Path: path, Kind: ErrCorrupt, What: "the image is its own backing file, through one or more others", Mend: rebaseHint(path)}
		}
	}
	if len(c.files) == maxLayers {
		return &Error{Path: path, Kind: ErrUnsupported, What: fmt.Sprintf("the chain of backing files is longer than %d", maxLayers), Mend: "merge some of its images with calf image commit"}
	}
	c.files = append(c.files, fi)
	c.dir = ""
	if own, err := openPath(f); err == nil {
		c.dir = filepath.Dir(own)
	}
	return nil
}

// rebaseHint tells how to name another backing file.
func rebaseHint(path string) string {
	return fmt.Sprintf("name another one with: calf image rebase -f qcow2 -u -F FORMAT -b FILE %s (FORMAT is qcow2 or raw)", shellWord(path))
}

// openBacking opens name, the backing file that the image at path names, with
// the given format, by the trust rule.
func (c *chain) openBacking(path, name, format string, opts Options) (backing, error) {
	if err := checkBacking(path, name, format, opts); err != nil {
		return nil, err
	}
	return c.openLayer(path, name, format, opts)
}

// checkBacking refuses a backing file for what the image at path says of it.
func checkBacking(path, name, format string, opts Options) error {
	refused := &Error{Path: path, Kind: ErrBackingRefused}
	switch {
	case opts.NoBacking:
		refused.What = fmt.Sprintf("the image has the backing file %q, and backing files are not allowed here", name)
		refused.Mend = fmt.Sprintf("make an image without one: calf image convert -f qcow2 -O qcow2 %s NEW", shellWord(path))
	case hasProtocol(name):
		refused.What = fmt.Sprintf("the backing file %q is not the plain name of a file", name)
		refused.Mend = rebaseHint(path)
	case format == "":
		refused.What = fmt.Sprintf("the image does not say which format its backing file %q has", name)
		refused.Mend = fmt.Sprintf("say it with: calf image rebase -f qcow2 -u -F FORMAT -b %s %s (FORMAT is qcow2 or raw)", shellWord(name), shellWord(path))
	case format != "qcow2" && format != "raw":
		return &Error{
			Path: path, Kind: ErrUnsupported,
			What: fmt.Sprintf("the format %q of the backing file %q is not supported (qcow2 and raw are)", format, name),
			Mend: rebaseHint(path),
		}
	default:
		return nil
	}
	return refused
}

// openLayer opens name, which the image at path lies over, for writing if it is the
// base that opts name.
func (c *chain) openLayer(path, name, format string, opts Options) (under backing, err error) {
	target := besideImage(path, name)
	opts.ReadOnly, opts.Snapshot, opts.BackingSize = !opts.isBase(path, target), "", 0
	f, err := c.openTrusted("backing file", path, target, openFlags(opts))
	if err != nil {
		return nil, err
	}
	layer := len(c.files)
	if format == "raw" {
		under, err = c.openRaw(f, target, opts)
	} else {
		under, err = asBacking(openLocked(f, target, opts, c))
	}
	if err == nil && !opts.ReadOnly {
		c.base, c.baseLayer = under.(Base), layer
	}
	return under, err
}

// besideImage is the path of the file that the image at path names: a relative
// name counts from the directory of the image.
func besideImage(path, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(path), name)
}

// asBacking keeps a nil *Image from becoming a backing that is not nil.
func asBacking(m *Image, err error) (backing, error) {
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (c *chain) openRaw(f *os.File, path string, opts Options) (backing, error) {
	err := c.enter(f, path)
	if err == nil {
		err = lockImage(f, path, accessOf(opts))
	}
	r := &rawBacking{file: newOSFile(f), path: path, readOnly: opts.ReadOnly}
	if err == nil {
		err = r.measure()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

// hasProtocol reports whether QEMU would take name for more than a file name:
// "json:…", "nbd://…", "file:…".
func hasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// openPath is the path of the open file f, without symbolic links.
func openPath(f *os.File) (string, error) {
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}

// resolveDirs resolves the symbolic links in dirs. What cannot be resolved
// allows nothing and is left out.
func resolveDirs(dirs []string) []string {
	var resolved []string
	for _, dir := range dirs {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue
		}
		if real, err = filepath.Abs(real); err == nil {
			resolved = append(resolved, real)
		}
	}
	return resolved
}

// openTrusted opens target, which the image names as its what, iff it lies, all
// symbolic links resolved, in the directory of the last layer or in one that the
// caller allows.
func (c *chain) openTrusted(what, image, target string, flags int) (*os.File, error) {
	allowed := append([]string{c.dir}, c.dirs...)
	resolved, err := filepath.EvalSymlinks(target)
	if err == nil {
		resolved, err = filepath.Abs(resolved)
	}
	cannot := &Error{Path: image, What: fmt.Sprintf("its %s %s cannot be opened", what, shown(target))}
	if err != nil {
		cannot.Err = withoutPath(err)
		return nil, cannot
	}
	if !insideAny(resolved, allowed) {
		return nil, outside(what, image, target, resolved)
	}
	f, err := openRegular(resolved, flags|unix.O_NOFOLLOW)
	if err != nil {
		cannot.Err = err
		return nil, cannot
	}
	// The path may have changed since it was resolved. What was opened cannot
	// have, so its own name decides.
	opened, err := openPath(f)
	if err != nil {
		refused := &Error{Path: image, Kind: ErrBackingRefused, What: "where its " + what + " lies cannot be checked", Err: err}
		return nil, errors.Join(refused, f.Close())
	}
	if !insideAny(opened, allowed) {
		return nil, errors.Join(outside(what, image, target, opened), f.Close())
	}
	return f, nil
}

func outside(what, image, target, resolved string) error {
	e := &Error{
		Path: image, Kind: ErrBackingRefused,
		What: fmt.Sprintf("its %s %s lies outside the directory of the image", what, shown(target)),
		Mend: fmt.Sprintf("list %s in backing_dirs, or in --backing-dir of calf image, to allow it", shown(filepath.Dir(resolved))),
	}
	if resolved != target {
		e.What = fmt.Sprintf("its %s %s, which is %s, lies outside the directory of the image", what, shown(target), shown(resolved))
	}
	return e
}

// insideAny reports whether the resolved path lies inside one of dirs, which are
// resolved too.
func insideAny(path string, dirs []string) bool {
	for _, dir := range dirs {
		if rel, err := filepath.Rel(dir, path); dir != "" && err == nil && filepath.IsLocal(rel) {
			return true
		}
	}
	return false
}

// openRegular opens a regular file or a block device. Anything else is refused,
// and cannot block the open or be changed by it.
func openRegular(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &Error{Path: path, What: "cannot open the image", Err: withoutPath(err)}
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() && fi.Mode().Type() != fs.ModeDevice {
		err = &Error{Path: path, Kind: ErrNotQCOW2, What: "not a regular file or a block device"}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// withoutPath is err without the raw path that it may have.
func withoutPath(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

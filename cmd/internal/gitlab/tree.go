package gitlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// accept puts what a guest has sent in the place of the project's directory; both are
// paths below the job's directory, root. Programs of the host read it next, so that
// nothing comes in by which they could be misled:
//
//   - what is called .git, in any case and anywhere, is not taken, as its configuration
//     names programs that git runs. The host's own stay where they are, if their
//     directory is still one;
//   - links that lead out of the project, or by a .git, are not taken, as a program that
//     follows one would read or write a file of the host. dropped has their names.
//
// The job's stages on the host have written to its directory, too. So every path is
// resolved below root, whatever links there are.
func accept(root *os.Root, incoming, project string) (dropped []string, err error) {
	if err := root.MkdirAll(project, 0o700); err != nil {
		return nil, err
	}
	if dropped, err = clean(root, incoming, project); err != nil {
		return nil, err
	}
	const old = "old"
	if err := errors.Join(removeFrom(root, old), root.Rename(project, old)); err != nil {
		return nil, err
	}
	if err := root.Rename(incoming, project); err != nil {
		return nil, errors.Join(err, root.Rename(old, project))
	}
	return dropped, removeFrom(root, old)
}

// clean makes what has come in fit to be the project.
func clean(root *os.Root, incoming, project string) ([]string, error) {
	in, err := root.OpenRoot(incoming)
	if err != nil {
		return nil, err
	}
	defer func() { _ = in.Close() }() // it is a directory
	links, dropped, err := strip(in)
	if err != nil {
		return nil, err
	}
	if err := keepGit(root, in, incoming, project); err != nil {
		return nil, err
	}
	// All are looked at before any goes: none that stays leads over one that does not.
	out := slices.DeleteFunc(links, func(link string) bool { return !leadsOut(in, link) })
	for _, link := range out {
		if err := in.Remove(link); err != nil {
			return nil, err
		}
	}
	return append(dropped, out...), nil
}

func isGit(name string) bool { return strings.EqualFold(name, ".git") }

// strip removes what is called .git and links that lead by one, which are dropped, and
// lets the owner into every directory. It returns the other links.
func strip(in *os.Root) (links, dropped []string, err error) {
	err = fs.WalkDir(in.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name != "." && isGit(d.Name()):
			if err := removeFrom(in, name); err != nil || !d.IsDir() {
				return err
			}
			return fs.SkipDir
		case d.IsDir():
			return open(in, name, d)
		case d.Type() != fs.ModeSymlink:
			return nil
		}
		to, err := in.Readlink(name)
		if err == nil && slices.ContainsFunc(strings.Split(to, "/"), isGit) {
			dropped = append(dropped, name)
			return in.Remove(name)
		}
		links = append(links, name)
		return err
	})
	return links, dropped, err
}

// open lets the owner of a directory into it.
func open(in *os.Root, name string, d fs.DirEntry) error {
	const all = 0o700
	info, err := d.Info()
	if err != nil || info.Mode()&all == all {
		return err
	}
	return in.Chmod(name, info.Mode().Perm()|all)
}

// keepGit moves the host's .git from the project to the same places of what has come in.
func keepGit(root, in *os.Root, incoming, project string) error {
	from, err := root.OpenRoot(project)
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }() // it was read only
	return fs.WalkDir(from.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." || !isGit(d.Name()) {
			return err
		}
		if isTree(in, path.Dir(name)) {
			err = root.Rename(path.Join(project, name), path.Join(incoming, name))
		}
		if err == nil && d.IsDir() {
			err = fs.SkipDir
		}
		return err
	})
}

// isTree reports whether name is a directory, and no part of it a link.
func isTree(in *os.Root, name string) bool {
	for ; name != "."; name = path.Dir(name) {
		if info, err := in.Lstat(name); err != nil || !info.IsDir() {
			return false
		}
	}
	return true
}

// leadsOut reports whether a link leads out of in, or may do so when what it leads to
// is made.
func leadsOut(in *os.Root, link string) bool {
	_, err := in.Stat(link)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err != nil
	}
	to, err := in.Readlink(link)
	return err != nil || path.IsAbs(to) || slices.Contains(strings.Split(to, "/"), "..")
}

// removeTree removes a directory with everything in it, also what its owner may not
// change. What is not there is no error.
func removeTree(dir string) error {
	root, err := os.OpenRoot(filepath.Dir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(removeFrom(root, filepath.Base(dir)), root.Close())
}

func removeFrom(root *os.Root, name string) error {
	if err := root.RemoveAll(name); err == nil {
		return nil
	}
	err := fs.WalkDir(root.FS(), name, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = open(root, name, d)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := root.RemoveAll(name); err != nil {
		return fmt.Errorf("removing %s: %w", filepath.Join(root.Name(), name), err)
	}
	return nil
}

// Package modules reads the modules of a kernel from the directory that has them, such
// as /lib/modules/6.1.0 of an image: which there are, what they need, and their
// contents, compressed as distributions do it.
//
// Files are not trusted: sizes and counts are bounded.
package modules

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const (
	maxModules = 1 << 16
	maxSize    = 64 << 20 // of a module
	maxList    = 8 << 20  // of the list of them, of which reading makes several times as much
)

// ErrNoModule is wrapped by the error for a module that is not there; it may be part of
// the kernel.
var ErrNoModule = errors.New("there is no such module")

// Set are the modules in a directory.
type Set struct {
	files fs.FS
	paths map[string]string   // by name
	needs map[string][]string // names by name; nil if only the modules know
}

// Open returns the modules of a directory: those that its modules.dep lists, or all in
// the tree if it has none, as in the initial RAM disks of some distributions.
func Open(files fs.FS) (*Set, error) {
	s := &Set{files: files, paths: make(map[string]string)}
	list, err := files.Open("modules.dep")
	if errors.Is(err, fs.ErrNotExist) {
		return s, s.walk()
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = list.Close() }() // it was read only
	return s, s.readList(list)
}

// walk adds all modules of the tree.
func (s *Set) walk() error {
	return fs.WalkDir(s.files, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || len(s.paths) >= maxModules {
			return err
		}
		if name, ok := nameOf(file); ok {
			s.paths[name] = file
		}
		return nil
	})
}

// readList adds the modules of a modules.dep: lines of a path, a colon, and the paths of
// what that needs.
func (s *Set) readList(r io.Reader) error {
	s.needs = make(map[string][]string)
	lines := bufio.NewScanner(io.LimitReader(r, maxList))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() && len(s.paths) < maxModules {
		file, needs, ok := strings.Cut(lines.Text(), ":")
		name, isModule := nameOf(file)
		if !ok || !isModule || !fs.ValidPath(file) {
			continue
		}
		s.paths[name] = file
		for need := range strings.FieldsSeq(needs) {
			if n, ok := nameOf(need); ok {
				s.needs[name] = append(s.needs[name], n)
			}
		}
	}
	return lines.Err()
}

// nameOf is the name of the module in a file, which has underscores, whatever its file
// has.
func nameOf(file string) (name string, ok bool) {
	name, suffix, ok := strings.Cut(path.Base(file), ".ko")
	return normal(name), ok && (suffix == "" || suffix == ".gz" || suffix == ".xz" || suffix == ".zst")
}

func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

// Files returns the paths of the modules with the names, and of all that they need, as
// far as they are there.
func (s *Set) Files(names ...string) []string {
	var files []string
	done := make(map[string]bool)
	for len(names) > 0 {
		name := normal(names[0])
		names = names[1:]
		if file, ok := s.paths[name]; ok && !done[name] {
			done[name] = true
			files = append(files, file)
			names = append(names, s.needs[name]...)
		}
	}
	return files
}

// Read returns a module, and the names of those that it needs.
func (s *Set) Read(name string) (image []byte, needs []string, err error) {
	file, ok := s.paths[normal(name)]
	if !ok {
		return nil, nil, fmt.Errorf("%s: %w", name, ErrNoModule)
	}
	f, err := s.files.Open(file)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = f.Close() }() // it was read only
	r, err := unpack(f, path.Ext(file))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	image, err = io.ReadAll(io.LimitReader(r, maxSize+1))
	if err == nil && len(image) > maxSize {
		err = fmt.Errorf("it is larger than %d MiB", maxSize>>20)
	}
	if err == nil {
		needs, err = needsOf(image)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	return image, needs, nil
}

// unpack returns a reader of what the file holds.
func unpack(r io.Reader, suffix string) (io.Reader, error) {
	switch suffix {
	case ".gz":
		return gzip.NewReader(r)
	case ".xz":
		return xz.NewReader(bufio.NewReader(r))
	case ".zst":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxSize))
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	return r, nil
}

// needsOf returns the names of the modules that one says it needs.
func needsOf(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it is no kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok {
			return strings.FieldsFunc(list, func(r rune) bool { return r == ',' }), nil
		}
	}
	return nil, nil
}

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const mebibyte = 1 << 20

// makeDisk makes a raw image of so many MiB at path, as a disk in use might be: of
// eight MiB two are source text, three are programs, one is noise and two are holes.
// The text and the programs are those of the Go toolchain.
func makeDisk(path string, mib int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("looking for the Go toolchain: %w", err)
	}
	goroot := strings.TrimSpace(string(root))
	text, err := newFiles(filepath.Join(goroot, "src"), ".go")
	if err != nil {
		return err
	}
	programs, err := newFiles(filepath.Join(goroot, "bin"), "")
	if err != nil {
		return err
	}
	noise := rand.NewChaCha8([32]byte{1})
	contents := [8]io.Reader{text, programs, nil, programs, noise, text, nil, programs}
	w := bufio.NewWriterSize(f, mebibyte)
	for i := range mib {
		r := contents[i%int64(len(contents))]
		if r == nil {
			if err := w.Flush(); err != nil {
				return err
			}
			if _, err := f.Seek(mebibyte, io.SeekCurrent); err != nil {
				return err
			}
			continue
		}
		if _, err := io.CopyN(w, r, mebibyte); err != nil {
			return err
		}
	}
	return errors.Join(w.Flush(), f.Truncate(mib*mebibyte))
}

// files reads files one after the other, and begins again after the last.
type files struct {
	names []string
	next  int
	open  *os.File
}

// newFiles returns the files below dir whose names have the suffix.
func newFiles(dir, suffix string) (*files, error) {
	r := &files{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, suffix) {
			r.names = append(r.names, path)
		}
		return err
	})
	if err == nil && len(r.names) == 0 {
		err = fmt.Errorf("no files in %s", dir)
	}
	return r, err
}

// Read implements io.Reader.
func (r *files) Read(p []byte) (int, error) {
	for {
		if r.open == nil {
			f, err := os.Open(r.names[r.next%len(r.names)])
			if err != nil {
				return 0, err
			}
			r.open = f
			r.next++
		}
		n, err := r.open.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if err := r.open.Close(); err != nil {
			return 0, err
		}
		r.open = nil
	}
}

// Package standin names files that are made beside others whose places they take when
// they are whole, and removes those that processes have left which were killed.
package standin

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// mark is between the name of a file and what makes that of the one beside it unique.
const mark = ".calf-"

// random is what Name adds to mark: eight characters of rand.Text.
var random = regexp.MustCompile(`^[A-Z2-7]{8}$`)

// Name returns a path beside target for a file that is to take its place, and a
// function that is to be called when that has been done or given up, which removes
// what is at the path then. What others have left beside target is removed first.
//
// Whoever has such a path holds a shared lock of the directory. So who gets a lock of
// it alone, which is tried here, finds only what nobody needs.
func Name(target string) (path string, done func() error) {
	dir, base := filepath.Dir(target), "."+filepath.Base(target)+mark
	path = filepath.Join(dir, base+rand.Text()[:8])
	lock, err := os.Open(dir)
	if err == nil {
		sweep(lock, base)
		share(lock)
	}
	return path, func() error {
		gone := os.Remove(path)
		if errors.Is(gone, fs.ErrNotExist) {
			gone = nil
		}
		if lock != nil {
			_ = lock.Close() // it was read only
		}
		return gone
	}
}

// sweep removes the files of dir whose names are base and something random, unless
// anybody may be using one. What cannot be removed stays.
func sweep(dir *os.File, base string) {
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return
	}
	for _, name := range names {
		if len(name) > len(base) && name[:len(base)] == base && random.MatchString(name[len(base):]) {
			_ = os.Remove(filepath.Join(dir.Name(), name))
		}
	}
}

// share takes a shared lock of dir. Who is sweeping it is soon done; a program that
// holds it alone for other reasons does not sweep, and is not waited for.
func share(dir *os.File) {
	for range 100 {
		if err := unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			return // and a directory that cannot be locked is not swept
		}
		time.Sleep(10 * time.Millisecond)
	}
}

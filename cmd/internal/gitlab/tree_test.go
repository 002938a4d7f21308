package gitlab

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// names are what random trees are made of: few, so that links lead to each other.
var names = []string{"a", "b", "c", ".git", ".Git"}

// plant fills dir with directories, files and links of any kind.
func plant(t *testing.T, random *rand.Rand, dir, outside string, depth int) {
	t.Helper()
	for _, name := range names {
		path := filepath.Join(dir, name)
		switch random.IntN(6) {
		case 0:
			must(t, os.WriteFile(path, []byte("guest"), os.FileMode(random.IntN(0o1000))))
		case 1, 2:
			parts := []string{outside}
			if random.IntN(4) > 0 {
				parts = []string{"."}
			}
			for range random.IntN(6) {
				parts = append(parts, append(names, "..", "..", "..", "new")[random.IntN(len(names)+4)])
			}
			must(t, os.Symlink(strings.Join(parts, "/"), path))
		case 3:
			if depth > 0 {
				must(t, os.Mkdir(path, 0o700))
				plant(t, random, path, outside, depth-1)
				must(t, os.Chmod(path, os.FileMode(random.IntN(0o1000))))
			}
		}
	}
}

// everything lists what is in dir, but for one of its directories.
func everything(t *testing.T, dir, but string) (all []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path == but {
			return fs.SkipDir
		}
		info, errInfo := os.Lstat(path)
		if errInfo == nil && !d.IsDir() {
			path += info.ModTime().String()
		}
		all = append(all, path)
		return errors.Join(err, errInfo)
	}))
	return all
}

// TestAccept accepts random trees. Whatever is read or written by any name in them
// afterwards lies in the project, and no .git is the guest's.
func TestAccept(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	rounds := 100
	if testing.Short() {
		rounds = 30
	}
	kept, taken := 0, 0
	for range rounds {
		top := t.TempDir()
		job, project := filepath.Join(top, "job"), filepath.Join(top, "job", "builds", "project")
		for _, dir := range []string{"", "a", "b", "a/b"} {
			write(t, filepath.Join(project, dir, ".git"), "host")
		}
		for _, name := range names {
			write(t, filepath.Join(top, name), "secret")
		}
		must(t, os.Mkdir(filepath.Join(job, "incoming"), 0o700))
		plant(t, random, filepath.Join(job, "incoming"), top, 3)
		root, err := os.OpenRoot(job)
		must(t, err)
		_, err = accept(root, "incoming", "builds/project")
		must(t, errors.Join(err, root.Close()))

		before := everything(t, top, project)
		must(t, filepath.WalkDir(project, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			if isGit(d.Name()) {
				kept++
				if got := read(t, path); got != "host" {
					t.Errorf("%s is %q", path, got)
				}
			}
			if d.Type() == fs.ModeSymlink {
				taken++
				if b, err := os.ReadFile(path); err == nil && string(b) == "secret" {
					t.Errorf("%s leads out", path)
				}
				if f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600); err == nil { // what a program that follows it does
					must(t, f.Close())
				}
			}
			return nil
		}))
		if after := everything(t, top, project); !slices.Equal(before, after) {
			t.Fatalf("outside of the project there were\n%q, and now\n%q", before, after)
		}
	}
	if kept < rounds || taken < rounds/5 {
		t.Errorf("%d rounds have kept %d .git and taken %d links", rounds, kept, taken)
	}
}

package e2e

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// plantOddities fills dir with what a tree of files may have and few have.
func plantOddities(t *testing.T, dir string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]fs.FileMode{
		"a b": 0o644, "new\nline": 0o600, "-rf": 0o640, "*?[a-z]\\'\"$HOME": 0o444, "\xff\xfe no text \x80": 0o755,
		"ünïcödé": 0o666, strings.Repeat("long", 63) + "est": 0o644, "setuid": 0o755 | fs.ModeSetuid, "nobody": 0,
	} {
		must(os.WriteFile(at(name), []byte("this is "+name), 0o600))
		must(os.Chmod(at(name), mode))
		must(os.Chtimes(at(name), time.Time{}, time.Unix(1e9+int64(len(name)), 123456789)))
	}
	must(os.Link(at("a b"), at("another name of a b")))
	for name, target := range map[string]string{"dangling": "no/such/file", "absolute": "/etc/passwd", "up": "..", "to \xff": "\xff\xfe no text \x80"} {
		must(os.Symlink(target, at(name)))
	}
	sparse, err := os.Create(at("sparse"))
	must(err)
	_, err = sparse.WriteAt([]byte("the end"), 8<<20)
	must(err)
	must(sparse.Close())
	for name, mode := range map[string]fs.FileMode{
		"empty": 0o700, "sticky": 0o777 | fs.ModeSticky, "not to write": 0o555, "\xe9t\xe9": 0o755,
	} {
		must(os.Mkdir(at(name), 0o700))
		must(os.WriteFile(filepath.Join(at(name), "in it"), nil, 0o600))
		must(os.Chmod(at(name), mode))
		must(os.Chtimes(at(name), time.Time{}, time.Unix(1, 1)))
	}
	must(os.Remove(filepath.Join(at("empty"), "in it")))
}

// describe says of all that is in dir what copies of it have to keep.
func describe(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		// Who gets a copy need not be whom the original acts for.
		mode := info.Mode() &^ (fs.ModeSetuid | fs.ModeSetgid)
		what := fmt.Sprint(mode, " ", info.ModTime().UnixNano())
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			what, err = os.Readlink(path) // permissions and times are the file's
		case 0:
			what += fmt.Sprintf(" %d bytes, %d names, checksum %x", info.Size(), info.Sys().(*syscall.Stat_t).Nlink, checksum(t, path))
		}
		all[strings.TrimPrefix(path, dir)] = what
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// leftBy lists what runs whose home is dir have made and not removed: files, and
// processes, which are told by their environment.
func leftBy(t *testing.T, dir string) []string {
	t.Helper()
	places := []string{dir}
	if lab.Inside() { // a machine of our own
		places = append(places, "/dev/shm", "/tmp", "/run")
	}
	var left []string
	for _, place := range places {
		err := filepath.WalkDir(place, func(path string, _ fs.DirEntry, err error) error {
			left = append(left, path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if env, err := os.ReadFile(p); err == nil && strings.Contains(string(env), "HOME="+dir+"\x00") {
			left = append(left, p)
		}
	}
	return left
}

// Twenty runs in a row leave nothing behind, every other one ended by force at any
// moment.
func TestCommandTwenty(t *testing.T) {
	_, base := commandImage(t)
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	home := t.TempDir()
	work := filepath.Join(home, "work")
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home}
	for _, name := range []string{"TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME"} {
		env = append(env, name+"="+filepath.Join(home, name))
		if err := os.Mkdir(filepath.Join(home, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	before := leftBy(t, home)
	for i := range 20 {
		cmd := exec.Command(lab.Calf(), append(base, "--", "sh", "-c", fmt.Sprint("exit ", i))...)
		cmd.Dir, cmd.Env = work, env
		vm := startCommand(t, cmd)
		if i%2 == 0 {
			vm.exits(i)
			continue
		}
		time.Sleep(time.Duration(random.Int64N(int64(5 * time.Second))))
		for range 2 { // the second one is not asked twice
			vm.signal(syscall.SIGTERM)
			time.Sleep(100 * time.Millisecond)
		}
		vm.exits(i, 128+int(syscall.SIGTERM))
	}
	if diff := cmp.Diff(before, leftBy(t, home)); diff != "" {
		t.Errorf("(-before +after)\n%s", diff)
	}
}

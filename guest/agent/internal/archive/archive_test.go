package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// tree describes everything under dir: type, permissions, time, and contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		what := info.Mode().String()
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what = "-> " + link
		case 0:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %v %d names, %x", info.ModTime().UTC(), info.Sys().(*syscall.Stat_t).Nlink, b)
		case fs.ModeDir:
			what += fmt.Sprint(" ", info.ModTime().UTC())
		}
		all[rel] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// grow fills dir with files of any name, contents, permissions and time.
func grow(t *testing.T, random *rand.Rand, dir string, depth int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	stamp := func(path string) {
		must(os.Chtimes(path, time.Time{}, time.Unix(random.Int64N(2e9), random.Int64N(1e9))))
	}
	for range random.IntN(8) {
		name := make([]byte, 1+random.IntN(200))
		for i := range name {
			name[i] = byte(1 + random.IntN(255))
			if name[i] == '/' {
				name[i] = ' '
			}
		}
		path := filepath.Join(dir, "n"+string(name))
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		switch random.IntN(4) {
		case 0:
			must(os.Symlink([]string{"/etc/passwd", "..", "nowhere", strings.Repeat("x/", 200)}[random.IntN(4)], path))
		case 1:
			if depth > 0 {
				must(os.Mkdir(path, 0o700))
				grow(t, random, path, depth-1)
				must(os.Chmod(path, fs.FileMode(0o500|random.IntN(0o1000))|[]fs.FileMode{0, fs.ModeSticky}[random.IntN(2)]))
				stamp(path)
			}
		default:
			b := make([]byte, random.IntN(100_000))
			for i := range b {
				b[i] = byte(random.Uint32())
			}
			must(os.WriteFile(path, b, 0o600))
			must(os.Chmod(path, fs.FileMode(0o400|random.IntN(0o1000))))
			stamp(path)
			if random.IntN(4) == 0 {
				must(os.Link(path, filepath.Join(dir, fmt.Sprint("link", random.Uint64()))))
			}
		}
	}
}

// TestTree packs and unpacks random trees, into nothing and over other trees.
func TestTree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	for range rounds {
		from, to := filepath.Join(t.TempDir(), "from"), filepath.Join(t.TempDir(), "a", "b")
		if err := os.Mkdir(from, 0o700); err != nil {
			t.Fatal(err)
		}
		grow(t, random, from, 3)
		if err := unix.Mkfifo(filepath.Join(from, "fifo"), 0o600); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := Pack(&b, from); err != nil {
			t.Fatal(err)
		}
		want := tree(t, from)
		delete(want, "fifo") // no archive has it
		for range 2 {        // the second time over what is there
			if err := Unpack(bytes.NewReader(b.Bytes()), to, nil); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, tree(t, to)); diff != "" {
				t.Fatalf("(-packed +unpacked)\n%s", diff)
			}
		}
		for range 5 { // anywhere, and between two files
			cut := random.IntN(b.Len())
			for _, n := range []int{cut, cut &^ 511} {
				if err := Unpack(bytes.NewReader(b.Bytes()[:n]), to, nil); err == nil {
					t.Errorf("%d bytes of %d are taken for a whole", n, b.Len())
				}
			}
		}
	}
}

// TestFile packs a single file and unpacks it to where a name, a directory and a
// slash say.
// What is made belongs to the owner that is asked for, and what was there does not.
func TestOwner(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root gives files away")
	}
	from, to := t.TempDir(), t.TempDir()
	for _, dir := range []string{from + "/old", from + "/new", to + "/old"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(from+"/new/file", nil, 0o600), os.Symlink("file", from+"/new/link")); err != nil {
		t.Fatal(err)
	}
	own := func(path string) int {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return int(info.Sys().(*syscall.Stat_t).Uid)
	}
	for _, dest := range []string{to, to + "/made"} {
		var b bytes.Buffer
		if err := errors.Join(Pack(&b, from), Unpack(&b, dest, &Owner{UID: 1000, GID: 1000})); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]int{
		"": 0, "old": 0, "new": 1000, "new/file": 1000, "new/link": 1000, "made": 1000, "made/old": 1000,
	} {
		if got := own(filepath.Join(to, path)); got != want {
			t.Errorf("%q belongs to user %d, want %d", path, got, want)
		}
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "report.xml")
	if err := os.WriteFile(from, []byte("all is well"), 0o640); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("report.xml", link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, want string }{
		{from, dir + "/out/new/r.xml", dir + "/out/new/r.xml"},
		{from, dir + "/out/", dir + "/out/report.xml"},
		{from, dir + "/out/new", dir + "/out/new/report.xml"},
		{link, dir + "/out/", dir + "/out/link"},
		{from, dir + "/out/link", dir + "/out/link"}, // over what is there
	} {
		var b bytes.Buffer
		if err := errors.Join(Pack(&b, c.from), Unpack(&b, c.to, nil)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(c.want)
		if err != nil || info.Mode() != 0o640 {
			t.Errorf("%s to %s: %v, %v", c.from, c.to, info, err)
		}
	}
	for _, bad := range []string{dir + "/none", "/dev/null"} {
		if err := Pack(new(bytes.Buffer), bad); err == nil {
			t.Errorf("%s is packed", bad)
		}
	}
}

// TestUnsized packs files that do not say how long they are, or something else than they
// are.
func TestUnsized(t *testing.T) {
	for _, from := range []string{"/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"} {
		want, err := os.ReadFile(from)
		if err != nil || len(want) == 0 {
			t.Logf("%s is left out: %d bytes, %v", from, len(want), err)
			continue
		}
		to := filepath.Join(t.TempDir(), "copy")
		var b bytes.Buffer
		if err := errors.Join(Pack(&b, from), Unpack(&b, to, nil)); err != nil {
			t.Fatalf("%s: %v", from, err)
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: got %q, %v, want %q", from, got, err, want)
		}
	}
	long, err := os.Create(filepath.Join(t.TempDir(), "long"))
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	if err := long.Truncate(maxUnsized + 1); err != nil {
		t.Fatal(err)
	}
	info, err := long.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := packUnsized(tar.NewWriter(new(bytes.Buffer)), long, "long", info); err == nil {
		t.Error("a file without an end is packed")
	}
}

// TestHostile unpacks archives that want to reach outside.
func TestHostile(t *testing.T) {
	dir := func(name string) *tar.Header { return &tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755} }
	file := func(name string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o6777, Size: 4}
	}
	link := func(name, to string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
	}
	for _, c := range []struct {
		name    string
		entries []*tar.Header
		fails   bool
	}{
		{"parent", []*tar.Header{dir("."), file("../evil")}, true},
		{"absolute", []*tar.Header{dir("."), file("/evil")}, true},
		{"through a link", []*tar.Header{dir("."), link("a", ".."), file("a/evil")}, true},
		{"through an absolute link", []*tar.Header{dir("."), link("a", "/tmp"), file("a/evil")}, true},
		{"onto a link", []*tar.Header{dir("."), link("evil", "../evil"), file("evil")}, false},
		{"a directory onto a link", []*tar.Header{dir("."), link("a", ".."), dir("a"), file("a/evil")}, true},
		{"a hard link", []*tar.Header{dir("."), {Name: "evil", Typeflag: tar.TypeLink, Linkname: "../victim"}}, true},
		{"an absolute hard link", []*tar.Header{dir("."), {Name: "evil", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}}, true},
		{"a hard link through a link", []*tar.Header{dir("."), link("a", ".."), {Name: "evil", Typeflag: tar.TypeLink, Linkname: "a/victim"}}, true},
		{"a hard link to itself", []*tar.Header{dir("."), file("x"), {Name: "x", Typeflag: tar.TypeLink, Linkname: "./x"}}, true},
		{"a device", []*tar.Header{dir("."), {Name: "evil", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}}, false},
		{"a link as a file", []*tar.Header{link("x", "../victim")}, false},
		{"two files", []*tar.Header{file("x"), file("../evil")}, true},
		{"nothing", nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range c.entries {
				if err := w.WriteHeader(h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					if _, err := w.Write(make([]byte, h.Size)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			b.WriteString(end)
			home := t.TempDir()
			if err := os.WriteFile(filepath.Join(home, "victim"), []byte("safe"), 0o600); err != nil {
				t.Fatal(err)
			}
			err := Unpack(&b, filepath.Join(home, "in"), nil)
			if (err != nil) != c.fails {
				t.Errorf("got error %v", err)
			}
			for name := range tree(t, home) {
				if name != "." && name != "victim" && name != "in" && !strings.HasPrefix(name, "in/") {
					t.Errorf("%s lies outside", name)
				}
			}
			if _, err := os.Lstat(filepath.Join(home, "in")); err != nil {
				return
			}
			for name, what := range tree(t, filepath.Join(home, "in")) {
				if strings.HasPrefix(what, "u") || strings.HasPrefix(what, "g") || strings.HasPrefix(what, "D") || strings.HasPrefix(what, "c") {
					t.Errorf("%s is %s", name, what)
				}
			}
			if b, err := os.ReadFile(filepath.Join(home, "victim")); err != nil || string(b) != "safe" {
				t.Errorf("the victim has %q, %v", b, err)
			}
		})
	}
}

// FuzzUnpack unpacks anything, and looks outside.
func FuzzUnpack(f *testing.F) {
	var b bytes.Buffer
	home := f.TempDir()
	if err := os.WriteFile(filepath.Join(home, "file"), []byte("contents"), 0o600); err != nil {
		f.Fatal(err)
	}
	if err := Pack(&b, home); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		home := t.TempDir()
		_ = Unpack(bytes.NewReader(b), filepath.Join(home, "in"), nil)
		entries, err := os.ReadDir(home)
		if err != nil || len(entries) > 1 || len(entries) == 1 && entries[0].Name() != "in" {
			t.Errorf("%v, %v", entries, err)
		}
	})
}

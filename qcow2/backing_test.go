package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTrust names backing files in and outside of where they may be.
func TestTrust(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"images/sub", "other/deep", "images2"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"images/base.raw", "images/sub/base.raw", "other/base.raw", "other/deep/base.raw", "images2/base.raw"} {
		writeFile(t, filepath.Join(root, f), []byte(f))
	}
	for link, to := range map[string]string{
		"images/in":   "sub/base.raw",
		"images/out":  "../other/base.raw",
		"images/dir":  "../other",
		"other/back":  "../images/base.raw",
		"images/loop": "loop",
	} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		dirs []string
		want string // contents of the backing file, or part of the error
		kind error
	}{
		{"base.raw", nil, "images/base.raw", nil},
		{"sub/base.raw", nil, "images/sub/base.raw", nil},
		{root + "/images/base.raw", nil, "images/base.raw", nil},
		{"in", nil, "images/sub/base.raw", nil},
		{"../images/base.raw", nil, "images/base.raw", nil},
		{"../other/back", nil, "images/base.raw", nil},
		{"../other/base.raw", nil, "outside", ErrBackingRefused},
		{"out", nil, "outside", ErrBackingRefused},
		{"dir/base.raw", nil, "outside", ErrBackingRefused},
		{"../images2/base.raw", nil, "outside", ErrBackingRefused},
		{"/etc/passwd", nil, "outside", ErrBackingRefused},
		{"/dev/zero", []string{"/dev"}, "regular", ErrNotQCOW2},
		{"../other/base.raw", []string{root + "/other"}, "other/base.raw", nil},
		{"out", []string{root + "/other"}, "other/base.raw", nil},
		{"dir/deep/base.raw", []string{root + "/images/dir"}, "other/deep/base.raw", nil},
		{"../other/base.raw", []string{root + "/images2", root + "/nowhere"}, "outside", ErrBackingRefused},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}`, nil, "plain name", ErrBackingRefused},
		{"nbd://localhost/x", nil, "plain name", ErrBackingRefused},
		{"file:base.raw", nil, "plain name", ErrBackingRefused},
		{"missing.raw", nil, "no such file", os.ErrNotExist},
		{"loop", nil, "too many links", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(root, "images", "overlay.qcow2")
			_ = os.Remove(path)
			if err := Create(path, CreateOptions{Size: 4096, BackingFile: c.name, BackingFormat: "raw"}); err != nil {
				t.Fatal(err)
			}
			m, err := Open(path, Options{BackingDirs: c.dirs})
			if err != nil {
				if c.kind != nil && !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "overlay.qcow2") {
					t.Errorf("got %v, want %q", err, c.want)
				}
				return
			}
			got := make([]byte, len(c.want))
			if _, err := m.ReadAt(got, 0); err != nil || string(got) != c.want {
				t.Errorf("read %q, %v", got, err)
			}
			closeImage(t, m)
			if _, err := Open(path, Options{BackingDirs: c.dirs, NoBacking: true}); !errors.Is(err, ErrBackingRefused) {
				t.Errorf("with NoBacking: %v", err)
			}
		})
	}
}

// TestBackingFormat refuses to guess.
func TestBackingFormat(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := Create(base, CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "overlay.qcow2")
	if err := Create(path, CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for format, says := range map[string]string{"": "calf image rebase -f qcow2 -u -F FORMAT -b base", "vmdk!": `"vmdk!"`} {
		b := append([]byte(nil), good...)
		ext := appendExtension(nil, extBackingFormat, []byte("qcow2"))
		changed := appendExtension(nil, extBackingFormat, []byte("vmdk!"))
		if format == "" {
			changed = appendExtension(nil, 0x11111111, []byte("qcow2"))
		}
		writeFile(t, path, bytes.Replace(b, ext, changed, 1))
		if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("format %q: %v", format, err)
		}
	}
	// A raw base is raw, whatever it begins with.
	writeFile(t, path, bytes.Replace(good, appendExtension(nil, extBackingFormat, []byte("qcow2")), appendExtension(nil, extBackingFormat, []byte("raw")), 1))
	m := open(t, path, Options{})
	got := make([]byte, 4)
	if _, err := m.ReadAt(got, 0); err != nil || string(got) != "QFI\xfb" {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestChain builds chains of the greatest length, one longer, and a cycle.
func TestChain(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return fmt.Sprintf("%d.qcow2", i) }
	const size = 1 << 20
	for i := range maxLayers + 1 {
		opts := CreateOptions{Size: size, ClusterSize: 4096}
		if i > 0 {
			opts.BackingFile, opts.BackingFormat = name(i-1), "qcow2"
		}
		path := filepath.Join(dir, name(i))
		if err := Create(path, opts); err != nil {
			t.Fatal(err)
		}
		if i == maxLayers {
			break
		}
		m := open(t, path, Options{})
		if _, err := m.WriteAt([]byte{byte(i + 1)}, int64(i)*5000); err != nil {
			t.Fatal(err)
		}
		closeImage(t, m)
	}
	m := open(t, filepath.Join(dir, name(maxLayers-1)), Options{})
	got := make([]byte, size)
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i := range maxLayers {
		if got[i*5000] != byte(i+1) {
			t.Errorf("layer %d does not show", i)
		}
	}
	closeImage(t, m)
	if _, err := Open(filepath.Join(dir, name(maxLayers)), Options{}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a chain of %d: %v", maxLayers+1, err)
	}
	bottom := filepath.Join(dir, name(0))
	if err := os.Remove(bottom); err != nil {
		t.Fatal(err)
	}
	if err := Create(bottom, CreateOptions{Size: size, BackingFile: name(2), BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, name(3)), Options{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "its own backing file") {
		t.Errorf("a cycle: %v", err)
	}
}

// TestScratch shows that a throw-away overlay takes the writes, leaves the base
// as it is, and leaves nothing behind.
func TestScratch(t *testing.T) {
	r := newSeed(t)
	for _, format := range []string{"raw", "qcow2"} {
		dir := t.TempDir()
		want := makeBase(t, r, dir, format, 3<<20)
		base := filepath.Join(dir, "base."+format)
		before, err := os.ReadFile(base)
		if err != nil {
			t.Fatal(err)
		}
		tmp := t.TempDir()
		m, err := OpenScratch(tmp, base, format, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
			t.Errorf("%v is left while the overlay is open (%v)", left, err)
		}
		for range 50 {
			off, n := randomRange(r, m.Size(), 100000)
			fillRandom(r, want[off:off+n])
			if _, err := m.WriteAt(want[off:off+n], off); err != nil {
				t.Fatal(err)
			}
		}
		got := make([]byte, m.Size())
		if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: wrong contents (%v)", format, err)
		}
		closeImage(t, m)
		if after, err := os.ReadFile(base); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s: the base was changed (%v)", format, err)
		}
	}
}

// TestUnnamedFile shows that a throw-away overlay never has a name where the
// file system can do that, and that the other way leaves none either.
func TestUnnamedFile(t *testing.T) {
	dir := t.TempDir()
	for name, make := range map[string]func(string) (*os.File, error){"unnamed": unnamedFile, "removed": removedFile} {
		f, err := make(dir)
		must(t, err)
		if _, err := f.WriteAt([]byte("x"), 100); err != nil {
			t.Error(err)
		}
		was, err := openPath(f)
		must(t, err)
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		if err == nil {
			must(t, unix.Close(fd))
		}
		if had := strings.Contains(was, "calf-scratch-"); had != (name == "removed" || err != nil) {
			t.Errorf("%s: the file was %s (%v)", name, was, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left %v (%v)", name, left, err)
		}
		must(t, f.Close())
	}
}

// TestCorruptBacking shows that a broken backing file fails the reads that need
// it, by its own name, and leaves the overlay writable.
func TestCorruptBacking(t *testing.T) {
	dir := t.TempDir()
	b, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(b, l2, 8, 0x8000000000052a00)
	writeFile(t, dir+"/base.qcow2", b)
	path := dir + "/overlay.qcow2"
	if err := Create(path, CreateOptions{Size: 1 << 20, BackingFile: "base.qcow2", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	m := open(t, path, Options{})
	if _, err := m.ReadAt(make([]byte, 10), 0); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "base.qcow2: ") {
		t.Errorf("read: %v", err)
	}
	if _, err := m.WriteAt([]byte("x"), 10); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a write that has to copy what cannot be read: %v", err)
	}
	if _, err := m.WriteAt(make([]byte, 1<<16), 0); err != nil {
		t.Errorf("a write of the whole cluster: %v", err)
	}
	closeImage(t, m)
	closeImage(t, open(t, path, Options{}))
	if after, err := os.ReadFile(dir + "/base.qcow2"); err != nil || !bytes.Equal(after, b) {
		t.Errorf("the backing file was changed (%v)", err)
	}
}

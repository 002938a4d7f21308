package image

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/qcow2"
)

// kinds is a map of the disk as text: one letter for each 64 KiB.
func kinds(t *testing.T, d Disk) string {
	t.Helper()
	var s []byte
	for m, err := range d.Map(0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, bytes.Repeat([]byte{m.Kind.String()[0]}, int(m.Length>>16))...)
	}
	return string(s)
}

// TestOpenMap maps holes of raw images, alone and under an overlay.
func TestOpenMap(t *testing.T) {
	dir := t.TempDir()
	base, over := filepath.Join(dir, "base.img"), filepath.Join(dir, "over.qcow2")
	if _, err := Create(base, Raw, CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 8 << 16}}, true); err != nil {
		t.Fatal(err)
	}
	o := CreateOptions{CreateOptions: qcow2.CreateOptions{BackingFile: "base.img", BackingFormat: Raw}}
	if _, err := Create(over, QCOW2, o, false); err != nil {
		t.Fatal(err)
	}
	write := func(path string, at int64) {
		t.Helper()
		d, err := Open(path, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.WritevAt([][]byte{bytes.Repeat([]byte{1}, 1<<16)}, at), d.Flush(), d.Close()); err != nil {
			t.Fatal(err)
		}
	}
	write(base, 2<<16)
	write(base, 7<<16)
	write(over, 4<<16)
	for path, want := range map[string]string{base: "zzdzzzzd", over: "zzdzdzzd"} {
		d, err := Open(path, OpenOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := kinds(t, d); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestForceShare reads beside a writer only when told to.
func TestForceShare(t *testing.T) {
	for _, name := range []string{"a.img", "a.qcow2"} {
		path := filepath.Join(t.TempDir(), name)
		format, err := FormatOf(path, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Create(path, format, CreateOptions{CreateOptions: qcow2.CreateOptions{Size: 1 << 20}}, true); err != nil {
			t.Fatal(err)
		}
		writer, err := Open(path, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path, OpenOptions{ReadOnly: true}); !errors.Is(err, qcow2.ErrLocked) && !errors.Is(err, blk.ErrLocked) {
			t.Errorf("%s beside a writer: %v", name, err)
		}
		d, err := Open(path, OpenOptions{ForceShare: true})
		if err != nil {
			t.Fatal(err)
		}
		if !d.ReadOnly() {
			t.Errorf("%s is open for writing twice", name)
		}
		if err := errors.Join(d.Close(), writer.Close()); err != nil {
			t.Error(err)
		}
	}
}

// countingDisk counts flushes.
type countingDisk struct {
	Disk
	flushes int
}

func (d *countingDisk) Flush() error {
	d.flushes++
	return d.Disk.Flush()
}

// TestCacheModes makes sure which changes of a disk are stable when they return.
func TestCacheModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.img")
	if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, OpenOptions{Cache: "sometimes"}); err == nil {
		t.Error("a cache mode that does not exist is accepted")
	}
	for mode, flushes := range map[string]int{ // after four changes and a flush
		CacheWriteback: 1, CacheNone: 1, CacheWritethrough: 5, CacheDirectsync: 5, CacheUnsafe: 0,
	} {
		m, err := Open(path, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		counted := &countingDisk{Disk: m.Disk}
		d := cacheModes[mode].over(counted)
		err = errors.Join(d.WritevAt([][]byte{{1}}, 0), d.WriteZeroes(0, 1), d.PunchHole(0, 1), d.Discard(0, 4096), d.Flush(), d.Close())
		if err != nil || counted.flushes != flushes {
			t.Errorf("%s: %d flushes, want %d; %v", mode, counted.flushes, flushes, err)
		}
	}
}

// TestReplace replaces a file, and leaves everything as it was where it cannot.
func TestReplace(t *testing.T) {
	failed := errors.New("it went wrong")
	writing := func(err error) func(string) error {
		return func(temp string) error { return errors.Join(os.WriteFile(temp, []byte("new"), 0o600), err) }
	}
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		write   error
		fails   bool
		want    string // in the file a, empty if there is none
	}{
		{"nothing there", func(*testing.T, string) {}, nil, false, "new"},
		{"a file", func(t *testing.T, dir string) { old(t, dir+"/a") }, nil, false, "new"},
		{"a link", func(t *testing.T, dir string) {
			old(t, dir+"/b")
			symlink(t, "b", dir+"/a")
		}, nil, false, "new"},
		{"a link to nothing", func(t *testing.T, dir string) { symlink(t, "b", dir+"/a") }, nil, true, ""},
		{"an error", func(t *testing.T, dir string) { old(t, dir+"/a") }, failed, true, "old"},
		{"an error, nothing there", func(*testing.T, string) {}, failed, true, ""},
		{"an image in use", func(t *testing.T, dir string) {
			old(t, dir+"/a")
			d, err := blk.OpenRaw(dir+"/a", blk.RawOptions{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = d.Close() })
		}, nil, true, "old"},
		{"a directory", func(t *testing.T, dir string) {
			if err := os.Mkdir(dir+"/a", 0o700); err != nil {
				t.Fatal(err)
			}
		}, nil, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			c.prepare(t, dir)
			before := names(t, dir)
			err := replace(filepath.Join(dir, "a"), writing(c.write))
			if (err != nil) != c.fails || c.write != nil && !errors.Is(err, c.write) {
				t.Errorf("got error %v", err)
			}
			if b, err := os.ReadFile(dir + "/a"); string(b) != c.want && (c.want != "" || err == nil) {
				t.Errorf("the file has %q, want %q", b, c.want)
			}
			if fi, err := os.Stat(dir + "/a"); err == nil && len(before) > 0 && !fi.IsDir() && fi.Mode().Perm() != 0o640 {
				t.Errorf("its permissions are %v", fi.Mode())
			}
			if after := names(t, dir); c.fails && len(after) != len(before) {
				t.Errorf("an error left %v, where there were %v", after, before)
			}
			if fi, err := os.Lstat(dir + "/b"); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
				t.Error("the file that the link led to is a link")
			}
		})
	}
}

func old(t *testing.T, path string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, []byte("old"), 0o600), os.Chmod(path, 0o640)); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// onWrite calls do when it is written to for the nth time.
type onWrite struct {
	bytes.Buffer
	n  int
	do func()
}

func (w *onWrite) Write(p []byte) (int, error) {
	if w.n--; w.n == 0 {
		w.do()
	}
	return w.Buffer.Write(p)
}

// TestChanging packs a tree that somebody changes at any moment: either it is packed,
// or the error names what has changed. Nothing waits.
func TestChanging(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"removed":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 10) },
		"grown":     func(path string) error { return os.Truncate(path, 1<<22) },
		"a directory": func(path string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		},
		"a FIFO": func(path string) error {
			return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600))
		},
		"a link out": func(path string) error {
			return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path))
		},
		"its directory is gone": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
	} {
		t.Run(name, func(t *testing.T) {
			packed := false
			for n := 1; !packed; n++ {
				dir := filepath.Join(t.TempDir(), "tree")
				victim := filepath.Join(dir, "b", "file")
				if err := errors.Join(os.MkdirAll(filepath.Dir(victim), 0o700), os.WriteFile(victim, make([]byte, 100<<10), 0o600),
					os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o600)); err != nil {
					t.Fatal(err)
				}
				changed := false
				done := make(chan error, 1)
				w := &onWrite{n: n, do: func() {
					changed = true
					if err := change(victim); err != nil {
						t.Error(err)
					}
				}}
				go func() { done <- Pack(w, dir) }()
				select {
				case err := <-done:
					packed = !changed // later than the last write
					if err != nil && !strings.Contains(err.Error(), filepath.Join(dir, "b")) || err != nil && strings.Contains(err.Error(), "\n") {
						t.Errorf("at write %d: %v", n, err)
					}
					to := t.TempDir()
					if unpacked := Unpack(w, to, nil); (unpacked == nil) != (err == nil) {
						t.Errorf("at write %d: %v, and unpacked: %v", n, err, unpacked)
					}
					// It is what it was once, or is now.
					if info, err := os.Lstat(filepath.Join(to, "b", "file")); err == nil && info.Mode().IsRegular() &&
						info.Size() != 100<<10 && info.Size() != 10 && info.Size() != 1<<22 {
						t.Errorf("at write %d: a file has %d bytes", n, info.Size())
					}
				case <-time.After(10 * time.Second):
					t.Fatalf("at write %d: it waits", n)
				}
			}
		})
	}
}

// TestLink: no archive is unpacked through a link that another one has made.
func TestLink(t *testing.T) {
	home := t.TempDir()
	for _, dir := range []string{"real", "safe"} {
		if err := os.Mkdir(filepath.Join(home, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("real", filepath.Join(home, "user")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Pack(&b, file); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dest, makes string // a link that another archive makes meanwhile
		want        string // empty: it fails
	}{
		{"user/f", "", "real/f"}, // a link of the user
		{"new/sub/f", "new", ""},
		{"new2/sub/", "new2/sub", ""},
		{"new3/", "new3", ""},
		{"new4", "new4", "new4"}, // it is replaced
	} {
		place, err := Find(filepath.Join(home, c.dest) + strings.Repeat("/", strings.Count(c.dest[len(c.dest)-1:], "/")))
		if err != nil {
			t.Fatal(err)
		}
		if c.makes != "" {
			link := filepath.Join(home, c.makes)
			to := strings.Repeat("../", strings.Count(c.makes, "/")) + "safe" // which does not leave home
			if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o700), os.Symlink(to, link)); err != nil {
				t.Fatal(err)
			}
		}
		err = errors.Join(place.Unpack(bytes.NewReader(b.Bytes()), nil), place.Close())
		if (err == nil) != (c.want != "") {
			t.Errorf("%s: %v", c.dest, err)
		}
		if c.want != "" {
			if info, err := os.Lstat(filepath.Join(home, c.want)); err != nil || !info.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", c.dest, info, err)
			}
		}
	}
	if entries, err := os.ReadDir(filepath.Join(home, "safe")); err != nil || len(entries) > 0 {
		t.Errorf("%v is written, %v", entries, err)
	}
}

// TestFind refuses places before anything is made there.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), nil, 0o600), os.Symlink("nowhere", filepath.Join(dir, "link")), os.Mkdir(filepath.Join(dir, "locked"), 0o500)); err != nil {
		t.Fatal(err)
	}
	for dest, want := range map[string]string{
		"file/x": "file is there, and is no directory", "link/x": "link is there, and is no directory",
		"file": "", "link": "", "new/x/y/": "", ".": "", "": "",
	} {
		place, err := Find(dir + "/" + dest)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", dest, err)
		}
		if err == nil {
			err = place.Close()
		}
		if want == "" && err != nil {
			t.Error(err)
		}
	}
	if os.Getuid() != 0 {
		if place, err := Find(dir + "/locked/x"); err == nil {
			t.Errorf("a place in a directory that cannot be written: %v", place.Close())
		}
	}
}

// TestWholeOrNot cuts archives anywhere: what was there before stays whole, and there
// is nothing else, until the new file is whole.
func TestWholeOrNot(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	fresh, old := bytes.Repeat([]byte("new"), 10_000), []byte("old")
	if err := os.WriteFile(filepath.Join(from, "file"), fresh, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{from, filepath.Join(from, "file")} {
		var b bytes.Buffer
		if err := Pack(&b, path); err != nil {
			t.Fatal(err)
		}
		for cut := 0; cut <= b.Len(); cut += max(1, min(b.Len()-cut, 997)) {
			if err := os.WriteFile(filepath.Join(to, "file"), old, 0o600); err != nil {
				t.Fatal(err)
			}
			err := Unpack(bytes.NewReader(b.Bytes()[:cut]), to, nil)
			if (err == nil) != (cut == b.Len()) {
				t.Fatalf("%d bytes of %d: %v", cut, b.Len(), err)
			}
			got, err := os.ReadFile(filepath.Join(to, "file"))
			isOld, isNew := bytes.Equal(got, old), bytes.Equal(got, fresh)
			alone := path != from // and not one of a tree, where those before the cut are new
			if err != nil || !isOld && !isNew || !isNew && cut == b.Len() || !isOld && cut < b.Len() && alone {
				t.Fatalf("after %d bytes of %d there are %d bytes, %v", cut, b.Len(), len(got), err)
			}
			if entries, err := os.ReadDir(to); err != nil || len(entries) != 1 {
				t.Fatalf("after %d bytes of %d there are %v, %v", cut, b.Len(), entries, err)
			}
		}
	}
}

// TestLeftOver: what a process that was killed has left makes way, with and without
// files that have no name.
func TestLeftOver(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, unnamed := range []bool{true, false} {
		f, err := create(dir, "file")
		if err != nil {
			t.Fatal(err)
		}
		if !unnamed { // as where there is no O_TMPFILE
			f.part = f.temp + "-part"
			if err := os.WriteFile(filepath.Join(dir.Name(), f.part), []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
			fd, err := createNamed(int(dir.Fd()), f.part)
			if err = errors.Join(err, f.File.Close()); err != nil {
				t.Fatal(err)
			}
			f.File = os.NewFile(uintptr(fd), "part")
		}
		for _, left := range []string{"file", f.temp} {
			if err := os.WriteFile(filepath.Join(dir.Name(), left), []byte("old"), 0o600); err != nil && unnamed {
				t.Fatal(err)
			}
		}
		_, err = f.WriteString("whole")
		if err := errors.Join(err, f.finish(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir.Name(), "file")); err != nil || string(b) != "whole" {
			t.Errorf("%q, %v", b, err)
		}
		if !unnamed {
			_ = os.Remove(filepath.Join(dir.Name(), f.temp)) // which such a file system never has
		}
		if entries, err := os.ReadDir(dir.Name()); err != nil || len(entries) != 1 {
			t.Errorf("there are %v, %v", entries, err)
		}
	}
}

// TestTogether unpacks many files to one place at once: it is always one of them, and
// nobody fails.
func TestTogether(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "file")
	const many = 8
	var wg sync.WaitGroup
	for i := range many {
		name := filepath.Join(from, strings.Repeat("x", i+1))
		if err := os.WriteFile(name, bytes.Repeat([]byte{byte('a' + i)}, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := Pack(&b, name); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range 50 {
				if err := Unpack(bytes.NewReader(b.Bytes()), to, nil); err != nil {
					t.Error(err)
				}
				if got, err := os.ReadFile(to); err != nil || len(got) != 1000 || bytes.Count(got, got[:1]) != 1000 {
					t.Errorf("there are %d bytes of several kinds, %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
	if entries, err := os.ReadDir(filepath.Dir(to)); err != nil || len(entries) != 1 {
		t.Errorf("there are %v, %v", entries, err)
	}
}

// endless is an archive of directories with long names, which it makes up as it is
// read.
type endless struct {
	bytes.Buffer
	w    *tar.Writer
	left int
	most uint64 // bytes in use when it was read, without garbage
}

func (e *endless) Read(p []byte) (int, error) {
	for e.Len() < len(p) && e.left > 0 {
		e.left--
		if e.left%10 == 0 {
			e.most = max(e.most, inUse())
		}
		h := &tar.Header{Name: ".", Typeflag: tar.TypeDir, Mode: 0o755, Format: tar.FormatPAX, PAXRecords: map[string]string{"CALF.x": strings.Repeat("x", 900<<10)}}
		if err := e.w.WriteHeader(h); err != nil {
			return 0, err
		}
	}
	if e.Len() == 0 {
		return 0, io.EOF
	}
	return e.Buffer.Read(p)
}

// inUse is the memory in use, without garbage.
func inUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestBombs unpacks archives that are meant to take all memory, or all room and time.
func TestBombs(t *testing.T) {
	e := &endless{left: 100}
	e.w = tar.NewWriter(&e.Buffer)
	before := inUse()
	if err := Unpack(e, t.TempDir(), nil); err == nil {
		t.Error("an archive without an end is whole")
	}
	if grown := int64(e.most) - int64(before); grown > 16<<20 {
		t.Errorf("%d MiB are held of an archive of directories", grown>>20)
	}

	for name, records := range map[string]map[string]string{
		"0.1": {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": fmt.Sprint(int64(1) << 60)},
	} {
		t.Run("sparse "+name, func(t *testing.T) {
			var text strings.Builder
			for k, v := range records {
				for n := 0; ; n++ { // the length counts itself
					if line := fmt.Sprintf("%d %s=%s\n", n, k, v); len(line) == n {
						text.WriteString(line)
						break
					}
				}
			}
			var b bytes.Buffer
			pax := block("PaxHeaders/x", 'x', text.Len())
			b.Write(pax)
			b.WriteString(text.String())
			b.Write(make([]byte, (512-text.Len()%512)%512))
			b.Write(block("x", '0', 1))
			b.Write(append([]byte("x"), make([]byte, 511+1024)...))
			dir := t.TempDir()
			if err := Unpack(&b, filepath.Join(dir, "x"), nil); err == nil || !strings.Contains(err.Error(), "is sparse") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// block is the header of an entry, made by hand.
func block(name string, kind byte, size int) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00%011o\x00", size, 0))
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestFIFO refuses what somebody would have to write to.
func TestFIFO(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Pack(io.Discard, fifo) }()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), fifo+" is neither") {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits")
	}
}

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// tool runs one of the tools of e2fsprogs, which are on the PATH of root only.
func tool(t testing.TB, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && name == "e2fsck" && exit.ExitCode() == 1 {
		return // changed as it was asked to
	}
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// makeImage makes a file system of a directory.
func makeImage(t testing.TB, dir string, size string, options ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	args := append([]string{"-q", "-F", "-d", dir}, options...)
	tool(t, "mke2fs", append(args, image, size)...)
	return image
}

// open opens the file system in a file.
func open(t testing.TB, image string) *FS {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	fsys, err := New(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

// tree makes a directory with what is hard to read: many names, long files, files
// with holes, links of every kind.
func tree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	random := rand.NewChaCha8([32]byte{1})
	add := func(name string, content []byte) {
		host := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(host), 0o755), os.WriteFile(host, content, 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	filled := func(n int) []byte {
		b := make([]byte, n)
		_, _ = random.Read(b) // never fails
		return b
	}
	add("empty", nil)
	add("a/b/c/deep", filled(59))
	add("inline", filled(130))
	add("large", filled(1<<20+123))
	holes := filled(1 << 20) // mke2fs writes no block of zeros
	for _, block := range []int{0, 1, 17, 100, 254} {
		clear(holes[block*4096:][:4096])
	}
	add("holes", holes)
	sparse := make([]byte, 3<<20) // a piece for every second block: extents of two levels
	for off := 4096; off < len(sparse); off += 8192 {
		copy(sparse[off:], filled(4096))
	}
	add("sparse", sparse)
	for i := range 200 {
		add(fmt.Sprintf("many/%s-%03d", strings.Repeat("x", 200), i), fmt.Append(nil, i))
	}
	for name, target := range map[string]string{
		"short": "a/b/c/deep", "absolute": "/a/b/../b/c/deep", "long": "a/" + strings.Repeat("./", 50) + "b/c/deep", "a/b/up": "../../large", "a/b/absolute": "/a/b/c/deep",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestFeatures reads everything back from file systems of every kind that mke2fs
// makes.
func TestFeatures(t *testing.T) {
	dir := tree(t)
	for i, tt := range []struct {
		name, options string
		sorted        bool // with hashed directories
		kind          string
	}{
		{"default", "-t ext4", true, "ext4"},
		{"linear", "-t ext4 -O ^dir_index", false, "ext4"},
		{"no checksums", "-t ext4 -O ^metadata_csum", true, "ext4"},
		{"descriptor checksums", "-t ext4 -O ^metadata_csum,uninit_bg", false, "ext4"},
		{"32 bits", "-t ext4 -O ^64bit", false, "ext4"},
		{"checksum seed, orphan file", "-t ext4 -O metadata_csum_seed,orphan_file", false, "ext4"},
		{"inline data", "-t ext4 -O inline_data", false, "ext4"},
		{"large inodes", "-t ext4 -O inline_data -I 1024", false, "ext4"},
		{"small inodes", "-t ext4 -I 128", false, "ext4"},
		{"blocks of 1 KiB", "-t ext4 -b 1024", true, "ext4"},
		{"blocks of 2 KiB, no extents", "-t ext4 -b 2048 -O ^extents,^64bit", false, "ext4"},
		{"blocks of 64 KiB", "-t ext4 -b 65536", false, "ext4"},
		{"clusters", "-t ext4 -O bigalloc -C 65536", false, "ext4"},
		{"meta groups", "-t ext4 -b 1024 -g 256 -N 768 -O meta_bg,^resize_inode,^flex_bg", false, "ext4"},
		{"meta groups, all with superblocks", "-t ext4 -b 1024 -g 256 -N 768 -O meta_bg,^resize_inode,^sparse_super,^flex_bg", false, "ext4"},
		{"meta groups, two superblocks", "-t ext4 -b 1024 -g 256 -N 768 -O meta_bg,^resize_inode,sparse_super2,^flex_bg", false, "ext4"},
		{"other features", "-t ext4 -O casefold,encrypt,large_dir,mmp,ea_inode,quota,project,verity", false, "ext4"},
		{"ext3", "-t ext3", true, "ext3"},
		{"ext2", "-t ext2", false, "ext2"},
		{"ext2, blocks of 1 KiB", "-t ext2 -b 1024", true, "ext2"},
		{"revision 0", "-t ext2 -r 0", false, "ext2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if testing.Short() && i%3 > 0 {
				t.Skip("one of three is enough for -short")
			}
			image := makeImage(t, dir, "24M", append(strings.Fields(tt.options), "-L", "label", "-U", "6F1c3f8a-0000-4000-8000-00000000000a")...)
			if tt.sorted {
				tool(t, "e2fsck", "-fyD", image)
			}
			f := open(t, image)
			if f.Kind() != tt.kind || f.Label() != "label" || f.UUID() != "6f1c3f8a-0000-4000-8000-00000000000a" || f.Unclean() {
				t.Errorf("%s, %q, %s, unclean %v", f.Kind(), f.Label(), f.UUID(), f.Unclean())
			}
			compare(t, f, dir)
		})
	}
}

// compare compares all of f with the directory that it was made of.
func compare(t *testing.T, f *FS, dir string) {
	t.Helper()
	want := os.DirFS(dir).(fs.ReadLinkFS)
	seen := 0
	err := fs.WalkDir(want, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		seen++
		w, err := want.Lstat(name)
		if err != nil {
			return err
		}
		g, err := f.Lstat(name)
		if err != nil {
			return err
		}
		if g.Mode().Type() != w.Mode().Type() || w.Mode().IsRegular() && (g.Size() != w.Size() || g.Mode() != w.Mode() || g.ModTime().Unix() != w.ModTime().Unix()) {
			t.Errorf("%s: %v; want %v", name, g, w)
		}
		switch {
		case d.IsDir():
			return compareDir(f, want, name)
		case d.Type() == fs.ModeSymlink:
			g, err := f.ReadLink(name)
			if w, _ := want.ReadLink(name); err != nil || g != w {
				t.Errorf("%s leads to %q, %v; want %q", name, g, err, w)
			}
			if w, _ := want.ReadLink(name); filepath.IsAbs(w) {
				name, _ = filepath.Rel("/", filepath.Clean(w)) // the host's root is another
			}
		}
		got, err := fs.ReadFile(f, name)
		if err != nil {
			return err
		}
		if w, _ := fs.ReadFile(want, name); !bytes.Equal(got, w) {
			t.Errorf("%s: the contents differ", name)
		}
		return nil
	})
	if err != nil || seen < 100 {
		t.Errorf("after %d names: %v", seen, err)
	}
}

func compareDir(f *FS, want fs.FS, name string) error {
	list := func(fsys fs.FS) ([]string, error) {
		entries, err := fs.ReadDir(fsys, name)
		var names []string
		for _, e := range entries {
			if e.Name() != "lost+found" {
				names = append(names, e.Name()+e.Type().String())
			}
		}
		return names, err
	}
	g, err1 := list(f)
	w, err2 := list(want)
	if !slices.Equal(g, w) {
		return fmt.Errorf("%s: %d entries, want %d", name, len(g), len(w))
	}
	return errors.Join(err1, err2)
}

// TestFS holds FS to what package fs promises.
func TestFS(t *testing.T) {
	dir := t.TempDir()
	names := []string{"a/b/file", "a/empty", "a/b/c/large"}
	for i, name := range names {
		host := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(host), 0o755), os.WriteFile(host, bytes.Repeat([]byte("x"), 5000*i*i), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": "a/b/file", "a/long": strings.Repeat("./", 50) + "empty"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	for _, kind := range []string{"ext2", "ext4"} {
		if err := fstest.TestFS(open(t, makeImage(t, dir, "8M", "-t", kind)), names...); err != nil {
			t.Error(err)
		}
	}
}

// TestReadAt reads pieces at every kind of place, concurrently.
func TestReadAt(t *testing.T) {
	dir := tree(t)
	f := open(t, makeImage(t, dir, "24M", "-t", "ext4"))
	for _, name := range []string{"sparse", "holes", "inline"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			opened, err := f.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			random := rand.New(rand.NewPCG(1, 2))
			for range 500 {
				off, n := random.IntN(len(want)+10), random.IntN(20000)
				got := make([]byte, n)
				read, err := opened.(io.ReaderAt).ReadAt(got, int64(off))
				w := want[min(off, len(want)):min(off+n, len(want))]
				if !bytes.Equal(got[:read], w) || (err == io.EOF) != (read < n) || err != nil && err != io.EOF {
					t.Fatalf("%d bytes at %d: %d, %v", n, off, read, err)
				}
			}
		})
	}
}

// TestUnwritten: what has been allocated and not written reads as zero, whatever
// lies there.
func TestUnwritten(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), bytes.Repeat([]byte("x"), 4096*3), 0o600); err != nil {
		t.Fatal(err)
	}
	image := makeImage(t, dir, "16M", "-t", "ext4", "-b", "4096", "-O", "^has_journal")
	// The blocks that fallocate takes are filled before it does.
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for off := len(content) / 2; off < len(content); off += 4096 {
		copy(content[off:], "stale")
	}
	if err := os.WriteFile(image, content, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "debugfs", "-w", "-R", "fallocate file 3 3000", image)
	tool(t, "debugfs", "-w", "-R", "sif file size 12298000", image) // and a hole at the end
	got, err := fs.ReadFile(open(t, image), "file")
	if err != nil || len(got) != 12298000 {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if !bytes.Equal(got[:12288], bytes.Repeat([]byte("x"), 12288)) || len(bytes.Trim(got[12288:], "\x00")) > 0 {
		t.Error("the contents are wrong")
	}
}

// TestLinks: links stay inside, and lead to an error where they lead nowhere.
func TestLinks(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("found"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"out": "../../../file", "loop": "loop", "one": "two", "two": "/one", "none": "nothing", "through": "file/x", "self": "./././self/.", "host": "/etc/passwd",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 41 {
		if err := os.Symlink(fmt.Sprintf("chain%d", i-1), filepath.Join(dir, fmt.Sprintf("chain%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("file", filepath.Join(dir, "chain-1")); err != nil {
		t.Fatal(err)
	}
	f := open(t, makeImage(t, dir, "8M"))
	for name, want := range map[string]string{
		"file": "found", "out": "found", "chain38": "found", "chain39": "too many symbolic links", "loop": "too many", "one": "too many", "self": "too many",
		"none": "not exist", "through": "not exist", "host": "not exist", "../file": "invalid", "/file": "invalid", "lost+found/x": "not exist",
	} {
		got, err := fs.ReadFile(f, name)
		if err == nil && string(got) != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

// TestRefusals names what is not read.
func TestRefusals(t *testing.T) {
	image := makeImage(t, t.TempDir(), "8M", "-t", "ext4", "-b", "4096")
	good, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		at   int
		put  []byte
		want string
	}{
		{"no magic", 0x38, []byte{0, 0}, "no ext2"},
		{"journal device", 0x60, []byte{0x8}, "journal"},
		{"compressed", 0x60, []byte{0x1}, "compressed"},
		{"unknown", 0x62, []byte{0x8}, "incompat 0x80000"},
		{"huge blocks", 0x18, []byte{7}, "damaged"},
		{"blocks without end", 0x1B, []byte{0xFF}, "damaged"},
		{"no blocks in a group", 0x20, make([]byte, 4), "damaged"},
		{"no inodes in a group", 0x28, make([]byte, 4), "damaged"},
		{"inodes of nothing", 0x58, make([]byte, 2), "damaged"},
		{"inodes of 8 KiB", 0x58, []byte{0, 0x20}, "damaged"},
		{"descriptors of nothing", 0xFE, make([]byte, 2), "damaged"},
	} {
		b := bytes.Clone(good)
		copy(b[superOffset+tt.at:], tt.put)
		if _, err := New(bytes.NewReader(b), int64(len(b))); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := New(bytes.NewReader(nil), 0); !errors.Is(err, ErrNotExt) {
		t.Errorf("nothing: %v", err)
	}
	if _, err := New(bytes.NewReader(good[:3000]), 3000); err != nil {
		t.Errorf("cut off: %v", err)
	}
	if f, err := New(bytes.NewReader(good[:3000]), 3000); err != nil {
		t.Error(err)
	} else if _, err := fs.ReadDir(f, "."); !errors.Is(err, errCorrupt) {
		t.Errorf("the root of what is cut off: %v", err)
	}
}

// FuzzFS reads everything from a file system with bytes of its metadata changed:
// no panic, an end, and no more than files say they hold.
func FuzzFS(f *testing.F) {
	dir := f.TempDir()
	for i := range 30 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i)), bytes.Repeat([]byte("x"), i*700), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("file3", filepath.Join(dir, "link")), os.Truncate(filepath.Join(dir, "file9"), 1<<20)); err != nil {
		f.Fatal(err)
	}
	var images [][]byte
	for _, options := range []string{"-t ext4 -O ^has_journal", "-t ext2", "-t ext4 -O inline_data,^has_journal", "-t ext4 -O meta_bg,^resize_inode,^has_journal"} {
		b, err := os.ReadFile(makeImage(f, dir, "512K", append(strings.Fields(options), "-b", "1024", "-N", "48")...))
		if err != nil {
			f.Fatal(err)
		}
		images = append(images, b)
	}
	f.Add(uint8(0), []byte{})
	for i := range images {
		f.Add(uint8(i), []byte{0, 1, 4, 0xFF, 5, 40, 0x28, 0x80, 0, 0x30, 0x7F, 1})
	}
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		b := bytes.Clone(images[int(which)%len(images)])
		for ; len(changes) >= 4; changes = changes[4:] { // block, offset, value
			at := int(changes[0])<<10 | int(changes[1])<<2&0x3FC | int(changes[2])&3
			b[at%len(b)] = changes[3]
		}
		fsys, err := New(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		left := 1000 // names: a directory may be its own child
		_ = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
			if left--; left < 0 {
				return fs.SkipAll
			}
			if err != nil || d.IsDir() {
				return nil
			}
			opened, err := fsys.Open(name)
			if err != nil {
				return nil
			}
			n, _ := io.Copy(io.Discard, io.LimitReader(opened, 1<<20))
			if st, err := opened.Stat(); err != nil || n > st.Size() {
				t.Errorf("%s: %d bytes read, %v", name, n, err)
			}
			return nil
		})
	})
}

package qcow2

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEmpty empties overlays that both programs have written to, twice over: they
// show their backing file, have little left in them, and can be written to again.
func TestEmpty(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		options   string
		snapshots bool
	}{
		{"cluster_size=512", true},
		{"cluster_size=4k,compat=0.10", true},
		{"cluster_size=64k", false},
		{"cluster_size=16k,extended_l2=on", true},
		{"cluster_size=4k,refcount_bits=64", false},
		{"cluster_size=4k,data_file=data", false},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			t.Chdir(t.TempDir())
			s := saved{makeBase(t, r, ".", "qcow2", size/2), map[string][]byte{}}
			under := resized(s.disk, size)
			s.disk = resized(s.disk, size)
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "-o", c.options, "disk.qcow2", "1M")
			for range 2 {
				qemuWrite(t, r, "disk.qcow2", s.disk, 6)
				if c.snapshots && len(s.snapshots) == 0 {
					qemu(t, "qemu-img", "snapshot", "-c", "s", "disk.qcow2")
					s.change("-c", "s")
				}
				m := open(t, "disk.qcow2", Options{DataFile: true})
				fillRandom(r, s.disk[1000:size/4])
				_, err := m.WriteAt(s.disk[1000:size/4], 1000)
				must(t, err)
				must(t, m.Empty(t.Context()))
				copy(s.disk, under)
				got := make([]byte, size)
				if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, s.disk) {
					t.Errorf("the emptied disk does not show its backing file, %v", err)
				}
				for e, err := range m.Map(0, size) {
					if err != nil || e.Layer == 0 && e.Kind != MapUnallocated {
						t.Errorf("there is still %+v, %v", e, err)
					}
				}
				closeImage(t, m)
				checkClean(t, "disk.qcow2")
				if n := fileSize(t, "disk.qcow2"); !c.snapshots && n > 8*defaultClusterSize {
					t.Errorf("the empty image has %d bytes", n)
				}
				if n := roomOf(t, "data"); n > 0 {
					t.Errorf("the data file takes %d bytes", n)
				}
			}
			if c.snapshots {
				verifySaved(t, "disk.qcow2", s)
			}
			qemuWrite(t, r, "disk.qcow2", s.disk, 6)
			checkClean(t, "disk.qcow2")
			compare(t, ".", "disk.qcow2", s.disk)
		})
	}
}

// roomOf is how many bytes the file at path takes of the host; 0 if there is none.
func roomOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestEmptyRefused does not empty what lies over nothing, or may not be changed.
func TestEmptyRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: 1 << 20, DataFile: "raw", DataFileRaw: true}))
	for opts, kind := range map[*Options]error{{DataFile: true}: ErrUnsupported, {ReadOnly: true}: ErrReadOnly} {
		opened := path
		if opts.ReadOnly {
			opened = create(t, CreateOptions{Size: 1 << 20})
		}
		m := open(t, opened, *opts)
		if err := m.Empty(t.Context()); !errors.Is(err, kind) {
			t.Errorf("%+v: %v", *opts, err)
		}
		closeImage(t, m)
	}
}

// TestBase writes to a backing file through the image above it, which shows it at
// once, and which nobody else may use meanwhile. The layers that are not written
// are shared with readers.
func TestBase(t *testing.T) {
	for _, c := range []struct {
		base, format string
		layer        int
	}{
		{"base.raw", "raw", 2},
		{"base.qcow2", "qcow2", 2},
		{"mid.qcow2", "qcow2", 1},
		{"dir/mid.qcow2", "qcow2", 1},
	} {
		t.Run(c.base, func(t *testing.T) {
			dir := t.TempDir()
			t.Chdir(dir)
			format := c.format
			if c.layer == 1 {
				format = "qcow2"
			}
			const size = 1 << 20
			if format == "raw" {
				writeFile(t, "base.raw", make([]byte, size/2))
			} else {
				must(t, Create("base.qcow2", CreateOptions{Size: size / 2}))
			}
			must(t, Create("mid.qcow2", CreateOptions{Size: size, BackingFile: "base." + format, BackingFormat: format}))
			must(t, Create("top.qcow2", CreateOptions{Size: size, BackingFile: "mid.qcow2", BackingFormat: "qcow2"}))
			name := c.base
			if filepath.Dir(name) == "dir" {
				name = filepath.Join(dir, "mid.qcow2")
			}
			m := open(t, filepath.Join(dir, "top.qcow2"), Options{Base: name})
			b, layer := m.Base()
			if b == nil || layer != c.layer {
				t.Fatalf("the base is %v, layer %d", b, layer)
			}
			must(t, b.Resize(t.Context(), size, ResizeOptions{}))
			want := make([]byte, size)
			for _, off := range []int{0, size/2 - 700, size - 1000} {
				copy(want[off:], bytes.Repeat([]byte{7}, 1000))
				must(t, b.WritevAt([][]byte{want[off : off+1000]}, int64(off)))
			}
			clear(want[size/2-100 : size/2+100])
			must(t, b.PunchHole(size/2-100, 200))
			must(t, b.Flush())
			got := make([]byte, size)
			if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the image does not show what its base has, %v", err)
			}
			if err := b.WritevAt([][]byte{want[:10]}, size-9); !errors.Is(err, ErrRange) {
				t.Errorf("a write beyond the end: %v", err)
			}
			for layer, path := range []string{"top.qcow2", "mid.qcow2", "base." + format} {
				if err := readable(path); (layer == 0 || layer == c.layer) != errors.Is(err, ErrLocked) {
					t.Errorf("reading %s: %v", path, err)
				}
			}
			closeImage(t, m)
			if got := content(t, "top.qcow2", ""); !bytes.Equal(got, want) {
				t.Error("what was written is lost")
			}
		})
	}
}

// readable returns the error of opening the one file for reading.
func readable(path string) error {
	if filepath.Ext(path) == ".qcow2" {
		_, err := Inspect(path)
		return err
	}
	b, err := openBase(path, "raw", Options{}, &chain{})
	if err != nil {
		return err
	}
	return b.Close()
}

// TestBaseRefused names bases that are none, or cannot be written.
func TestBaseRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	writeFile(t, "base.raw", make([]byte, 4096))
	writeFile(t, "other.raw", make([]byte, 4096))
	must(t, Create("top.qcow2", CreateOptions{Size: 4096, BackingFile: "base.raw", BackingFormat: "raw"}))
	for _, c := range []struct {
		opts Options
		kind error
	}{
		{Options{Base: "other.raw"}, ErrInvalidOption},
		{Options{Base: "none.raw"}, ErrInvalidOption},
		{Options{Base: "top.qcow2"}, ErrInvalidOption},
		{Options{Base: "base.raw", ReadOnly: true}, ErrInvalidOption},
		{Options{Base: "base.raw", NoBacking: true}, ErrBackingRefused},
	} {
		if m, err := Open("top.qcow2", c.opts); m != nil || !errors.Is(err, c.kind) {
			t.Errorf("%+v: %v", c.opts, err)
		}
	}
	m := open(t, "top.qcow2", Options{ReadOnly: true})
	defer closeImage(t, m)
	if b, _ := m.Base(); b != nil {
		t.Error("there is a base without the option")
	}
	if _, err := Open("top.qcow2", Options{Base: "base.raw"}); !errors.Is(err, ErrLocked) {
		t.Errorf("beside a reader: %v", err)
	}
}

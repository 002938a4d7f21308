package qcow2

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestRawDataFileGrows grows a disk whose data file is raw: all that it gains is
// preallocated, and the file has the length of the disk and its contents, even if
// it was longer before and had something else there.
func TestRawDataFileGrows(t *testing.T) {
	const old, size = 1 << 20, 1<<20 + 65536 + 512
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: old, DataFile: "data.raw", DataFileRaw: true}))
	raw := filepath.Join(filepath.Dir(path), "data.raw")
	writeFile(t, raw, append(make([]byte, old), bytes.Repeat([]byte{9}, old)...))
	m := open(t, path, Options{DataFile: true})
	must(t, m.Resize(t.Context(), size, ResizeOptions{}))
	for r, err := range m.Map(0, size) {
		if err != nil || r.Kind != MapData {
			t.Errorf("%+v, %v", r, err)
		}
	}
	want := make([]byte, size)
	want[size-512] = 'x'
	_, err := m.WriteAt([]byte("x"), size-512)
	must(t, err)
	closeImage(t, m)
	if got := readFile(t, raw); !bytes.Equal(got, want) {
		t.Errorf("the raw file has %d bytes, or others than the disk", len(got))
	}
}

// TestRawDataFileZeroes makes a disk zero whose tables say that it is already, but
// whose raw data file has something else; and writes to its last cluster, which
// does not make the file longer.
func TestRawDataFileZeroes(t *testing.T) {
	const size = 1<<20 + 512
	for how := range 3 {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+path+".raw,data_file_raw=on", path, fmt.Sprint(size))
		b := readFile(t, path)
		clear(b[0x30000:0x40000]) // the L1 table
		writeFile(t, path, b)
		writeFile(t, path+".raw", bytes.Repeat([]byte{9}, size))
		m := open(t, path, Options{DataFile: true})
		must(t, eraser(m, how)(0, size))
		if how != eraseDiscard {
			must(t, eraser(m, how)(100, 1000))
		}
		want := make([]byte, size)
		want[size-1] = 'x'
		_, err := m.WriteAt([]byte("x"), size-1)
		must(t, err)
		closeImage(t, m)
		if got := readFile(t, path+".raw"); !bytes.Equal(got, want) {
			t.Errorf("%d: the raw file has %d bytes, or is not zero", how, len(got))
		}
	}
}

// TestForeignDataFile refuses what is not to be trusted, and opens nothing of it.
func TestForeignDataFile(t *testing.T) {
	dir := t.TempDir()
	path, data := filepath.Join(dir, "a", "disk.qcow2"), filepath.Join(dir, "data")
	must(t, os.Mkdir(filepath.Dir(path), 0o700))
	must(t, Create(path, CreateOptions{Size: 1 << 20, DataFile: data}))
	for _, opts := range []Options{{}, {DataFile: true}, {DataFile: true, ReadOnly: true}} {
		if m, err := Open(path, opts); err == nil {
			closeImage(t, m)
			t.Errorf("%+v: opened", opts)
		}
	}
	opts := Options{DataFile: true, BackingDirs: []string{dir}}
	m := open(t, path, opts)
	if _, err := Open(path, opts); err == nil {
		t.Error("two writers")
	}
	closeImage(t, m)
	must(t, os.Remove(data))
	if _, err := Open(path, opts); err == nil {
		t.Error("opened without its data")
	}
}

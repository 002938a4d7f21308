package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"testing"
)

// tornFile fails one write at or beyond at, of which all but the last sector is
// done.
type tornFile struct {
	file
	at int64
}

func (f *tornFile) WritevAt(iov [][]byte, off int64) error {
	if f.at == 0 || off < f.at {
		return f.file.WritevAt(iov, off)
	}
	f.at = 0
	b := bytes.Join(iov, nil)
	return errors.Join(f.file.WritevAt([][]byte{b[:len(b)-sector]}, off), syscall.ENOSPC)
}

// TestTornTable fails the write of a new refcount table. What it left is not taken
// for zeros when its clusters are used for data.
func TestTornTable(t *testing.T) {
	const size = 16 << 20
	path := create(t, CreateOptions{Size: size, ClusterSize: 512})
	of, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	f := &tornFile{file: newOSFile(of)}
	m, err := openFile(f, path, Options{}, &chain{})
	must(t, err)
	defer m.Close()
	f.at = m.offset(m.refs.covered())
	if err := m.Resize(t.Context(), 1<<30, ResizeOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	want := make([]byte, size)
	for off := int64(100); off < size; off += 512 {
		want[off] = 1
		_, err := m.WriteAt([]byte{1}, off)
		must(t, err)
	}
	got := make([]byte, size)
	if must(t, m.ReadvAt([][]byte{got}, 0)); !bytes.Equal(got, want) {
		t.Error("bytes show that were never written")
	}
}

// TestGrowOverTable grows an image of which the counts do not cover an L2 table:
// the new L1 table does not go there.
func TestGrowOverTable(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	m := open(t, path, Options{})
	_, err := m.WriteAt([]byte("data"), 0)
	must(t, err)
	to, l1 := m.offset(m.refs.covered()+100), m.l1Offset
	closeImage(t, m)
	b := readFile(t, path)
	l2 := int64(binary.BigEndian.Uint64(b[l1:]) & entryOffset)
	b = apply(b, bytes.Clone(b[l2:l2+512]), to)
	put(b, l1, 8, uint64(to)|entryCopied)
	writeFile(t, path, b)
	m = open(t, path, Options{})
	if err := m.Resize(t.Context(), 1<<30, ResizeOptions{}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("resize: %v", err)
	}
	_ = m.Close()
	m = open(t, path, Options{ReadOnly: true})
	got := make([]byte, 4)
	if _, err := m.ReadAt(got, 0); err != nil || string(got) != "data" {
		t.Errorf("after it: %q, %v", got, err)
	}
}

// TestFreedRoomComesBack allocates and frees the same cluster without a flush. The
// file does not grow with each.
func TestFreedRoomComesBack(t *testing.T) {
	const cluster, rounds = 2 << 20, 300
	path := create(t, CreateOptions{Size: cluster, ClusterSize: cluster, Version: 2})
	m := open(t, path, Options{})
	for range rounds {
		_, err := m.WriteAt([]byte("data"), 0)
		must(t, err)
		must(t, m.Discard(0, cluster))
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() > rounds*cluster/2 {
		t.Errorf("no data takes %d bytes, %v", fi.Size(), err)
	}
}

// TestSnapshotOfCorrupt makes a snapshot of an image whose data lies in its L1
// table. That ends all writing and is marked.
func TestSnapshotOfCorrupt(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	m := open(t, path, Options{})
	_, err := m.WriteAt([]byte("data"), 0)
	must(t, err)
	l1 := m.l1Offset
	closeImage(t, m)
	b := readFile(t, path)
	put(b, int64(binary.BigEndian.Uint64(b[l1:])&entryOffset), 8, uint64(l1)|entryCopied)
	writeFile(t, path, b)
	m = open(t, path, Options{})
	if _, err := m.CreateSnapshot(t.Context(), "s"); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	if _, err := m.WriteAt([]byte("x"), 8192); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a write after it: %v", err)
	}
	_ = m.Close()
	if b := readFile(t, path); b[offIncompatible+7]>>incompatCorrupt&1 == 0 {
		t.Error("the image is not marked corrupt")
	}
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
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

// smallHost is a file on a host with little room, where no zeros take any at first.
type smallHost struct {
	file
	mu    sync.Mutex
	taken map[int64]bool // the blocks that have room
	left  int            // blocks
}

const hostBlock = 4096

func newSmallHost(t *testing.T, f file, left int) *smallHost {
	t.Helper()
	h := &smallHost{file: f, taken: make(map[int64]bool), left: left}
	size, err := f.Size()
	must(t, err)
	for b := make([]byte, hostBlock); size > 0; {
		size = (size - 1) / hostBlock * hostBlock
		must(t, readFull(f, b, size))
		h.taken[size/hostBlock] = !isZero(b)
	}
	return h
}

// take takes room for [off, off+n).
func (h *smallHost) take(off, n int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for b := off / hostBlock; b <= (off+n-1)/hostBlock; b++ {
		if h.taken[b] {
			continue
		}
		if h.left == 0 {
			return syscall.ENOSPC
		}
		h.taken[b] = true
		h.left--
	}
	return nil
}

func (h *smallHost) WritevAt(iov [][]byte, off int64) error {
	if err := h.take(off, length(iov)); err != nil {
		return err
	}
	return h.file.WritevAt(iov, off)
}

func (h *smallHost) Allocate(off, n int64) error {
	if err := h.take(off, n); err != nil {
		return err
	}
	return h.file.Allocate(off, n)
}

// TestFullHost writes to images, whose tables are holes in their files where they
// are empty, until the host has no more room. What was written before can be made
// durable then, without any.
func TestFullHost(t *testing.T) {
	for _, cluster := range []int64{512, 4096, 64 << 10} {
		for _, clusters := range []int64{1 << 11, 1 << 21} {
			for left := 3; left < 1200; left = 2*left + 1 {
				fillHost(t, CreateOptions{Size: clusters * cluster, ClusterSize: cluster, RefcountBits: 64}, left)
			}
		}
	}
}

// fillHost writes to an image of some clusters on a host with room for left blocks
// more.
func fillHost(t *testing.T, o CreateOptions, left int) {
	path := create(t, o)
	random := rand.New(rand.NewPCG(1, uint64(left))) //nolint:gosec // G404, G115: a test
	want := make(map[int64]byte)
	write := func(m *Image, b byte) error {
		off := random.Int64N(o.Size/o.ClusterSize) * o.ClusterSize
		_, err := m.WriteAt([]byte{b}, off)
		if err == nil {
			want[off] = b
		}
		return err
	}
	m := open(t, path, Options{})
	for range 20 {
		must(t, write(m, 1))
	}
	closeImage(t, m)

	of, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	m, err = openFile(newSmallHost(t, newOSFile(of), left), path, Options{}, &chain{})
	must(t, err)
	for n := 0; err == nil && n < 3*left; n++ {
		err = write(m, 2)
	}
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatalf("%+v, %d blocks: %d writes are lost: %v", o, left, len(want), err)
	}
	m = open(t, path, Options{ReadOnly: true})
	for off, b := range want {
		got := make([]byte, 1)
		if _, err := m.ReadAt(got, off); err != nil || got[0] != b {
			t.Errorf("%+v, %d blocks: at %d is %d, not %d; %v", o, left, off, got[0], b, err)
		}
	}
	closeImage(t, m)
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

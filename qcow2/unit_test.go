package qcow2

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCount(t *testing.T) {
	r := newSeed(t)
	for order := range uint(7) {
		const n = 64
		b := make([]byte, n<<order/8)
		want := make([]uint64, n)
		for range 500 {
			i := r.IntN(n)
			want[i] = r.Uint64() >> (64 - 1<<order)
			setCount(b, order, uint64(i), want[i])
		}
		got := make([]uint64, n)
		for i := range got {
			got[i] = count(b, order, uint64(i))
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("order %d: %s", order, d)
		}
	}
	// The format's own order: the first of the narrow counts is the lowest bit.
	if b := []byte{0b10_01_00_11}; count(b, 1, 0) != 3 || count(b, 1, 2) != 1 || count(b, 1, 3) != 2 || count(b, 0, 7) != 1 {
		t.Error("narrow counts are in the wrong order")
	}
}

func TestCreateOptions(t *testing.T) {
	for _, c := range []struct {
		opts CreateOptions
		says string
	}{
		{CreateOptions{Size: -1}, "impossible"},
		{CreateOptions{ClusterSize: 1000}, "cluster size of 1000"},
		{CreateOptions{ClusterSize: 256}, "cluster size of 256"},
		{CreateOptions{ClusterSize: 4 << 20}, "cluster size"},
		{CreateOptions{Version: 4}, "version 4"},
		{CreateOptions{RefcountBits: 3}, "3 bits"},
		{CreateOptions{RefcountBits: 128}, "128 bits"},
		{CreateOptions{Version: 2, RefcountBits: 8}, "16 bits only"},
		{CreateOptions{BackingFile: "x"}, "go together"},
		{CreateOptions{BackingFile: "x", BackingFormat: "vmdk"}, `"vmdk"`},
		{CreateOptions{BackingFile: strings.Repeat("x", 1024), BackingFormat: "raw"}, "longer than 1023"},
		{CreateOptions{BackingFile: strings.Repeat("x", 500), BackingFormat: "raw", ClusterSize: 512}, "too long"},
		{CreateOptions{Size: 1<<37 + 1, ClusterSize: 512}, "too large"},
		{CreateOptions{Size: 1<<63 - 1}, "too large"},
		{CreateOptions{Size: 1 << 60, ClusterSize: 2 << 20, Preallocation: PreallocateMetadata, RefcountBits: 64}, "more reference counts"},
		{CreateOptions{CompressionType: "lz4"}, `"lz4"`},
		{CreateOptions{Preallocation: 4}, "preallocation 4"},
		{CreateOptions{ExtendedL2: true, Version: 2}, "no extended L2"},
		{CreateOptions{LazyRefcounts: true, Version: 2}, "no lazy"},
		{CreateOptions{CompressionType: "zstd", Version: 2}, "but zlib"},
		{CreateOptions{DataFile: "data", Version: 2}, "no external data"},
		{CreateOptions{DataFile: "nbd://host/data"}, "plain name"},
		{CreateOptions{DataFile: strings.Repeat("x", 500), ClusterSize: 512}, "too long"},
		{CreateOptions{DataFileRaw: true}, "name of a data file"},
		{CreateOptions{DataFile: "data", DataFileRaw: true, BackingFile: "x", BackingFormat: "raw"}, "cannot have a backing file"},
		{CreateOptions{Preallocation: PreallocateFull, BackingFile: "x", BackingFormat: "raw"}, "takes extended L2"},
		{CreateOptions{ExtendedL2: true, ClusterSize: 8 << 10}, "at least 16384"},
	} {
		dir := t.TempDir()
		err := Create(dir+"/disk.qcow2", c.opts)
		if !errors.Is(err, ErrInvalidOption) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: got %v", c.opts, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%+v: left %v (%v)", c.opts, left, err)
		}
	}
	path := create(t, CreateOptions{})
	before, _ := os.ReadFile(path)
	if err := Create(path, CreateOptions{Size: 1 << 30}); !errors.Is(err, os.ErrExist) {
		t.Errorf("over an existing image: %v", err)
	}
	if after, _ := os.ReadFile(path); string(after) != string(before) {
		t.Error("an existing image was changed")
	}
}

// TestCreateCheck lets QEMU check what Create makes, to the limits of size.
func TestCreateCheck(t *testing.T) {
	for _, opts := range []CreateOptions{
		{},
		{Size: 1 << 50},
		{Size: 1 << 37, ClusterSize: 512},
		{Size: 1 << 37, ClusterSize: 512, RefcountBits: 64},
		{Size: 1<<30 + 1, ClusterSize: 2 << 20, RefcountBits: 1},
		{Size: 1 << 30, Version: 2},
	} {
		path := create(t, opts)
		qemu(t, "qemu-img", "check", "-q", path)
		m := open(t, path, Options{})
		if m.Size() != opts.Size {
			t.Errorf("size %d, want %d", m.Size(), opts.Size)
		}
		if n := min(m.Size(), 10); n > 0 {
			if _, err := m.WriteAt(make([]byte, n), m.Size()-n); err != nil {
				t.Error(err)
			}
		}
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", path)
	}
}

func TestRanges(t *testing.T) {
	const size = 1<<20 + 100
	m := open(t, create(t, CreateOptions{Size: size}), Options{})
	b := make([]byte, 200)
	for _, off := range []int64{-1, size - 199, size, size + 1, 1<<63 - 1} {
		if err := m.ReadvAt([][]byte{b}, off); !errors.Is(err, ErrRange) {
			t.Errorf("read at %d: %v", off, err)
		}
		if err := m.WritevAt([][]byte{b}, off); !errors.Is(err, ErrRange) {
			t.Errorf("write at %d: %v", off, err)
		}
	}
	if err := errors.Join(m.ReadvAt(nil, size), m.WritevAt([][]byte{{}}, size)); err != nil {
		t.Errorf("nothing at the end: %v", err)
	}
	if n, err := m.ReadAt(b, size-150); n != 150 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt across the end: %d, %v", n, err)
	}
	closeImage(t, m)
	m = open(t, m.path, Options{ReadOnly: true})
	if _, err := m.WriteAt(b, 0); !errors.Is(err, ErrReadOnly) || !m.ReadOnly() {
		t.Errorf("write to a read-only image: %v", err)
	}
	if err := m.Flush(); err != nil {
		t.Errorf("flush of a read-only image: %v", err)
	}
}

// TestOpenErrors shows the sentences for files that are no images.
func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/text", []byte("hello"))
	writeFile(t, dir+"/empty", nil)
	writeFile(t, dir+"/short", []byte("QFI\xfb\x00\x00\x00\x03"))
	for name, want := range map[string]error{
		"missing": os.ErrNotExist, "text": ErrNotQCOW2, "empty": ErrNotQCOW2, "short": ErrNotQCOW2, ".": nil,
	} {
		path := dir + "/" + name
		_, err := Open(path, Options{})
		if err == nil || want != nil && !errors.Is(err, want) || !strings.HasPrefix(err.Error(), path+": ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		t.Log(err)
	}
}

// TestAlike shows that a lookup of many clusters finds what lookups of one each do, in
// tables whose entries continue one another, nearly do, or not at all.
func TestAlike(t *testing.T) {
	for _, opts := range []CreateOptions{
		{Size: 1300 << 12, ClusterSize: 1 << 12}, // of three slices, the last has no table
		{Size: 700 << 14, ClusterSize: 1 << 14, ExtendedL2: true},
	} {
		r := newSeed(t)
		m := open(t, create(t, opts), Options{})
		for id := range int64(2) {
			if _, err := m.WriteAt([]byte{1}, id<<m.sliceBits*m.clusterSize); err != nil {
				t.Fatal(err)
			}
		}
		for range 100 {
			for id := range uint64(2) {
				fillAlike(r, m, m.cache.find(id).entries)
			}
			compareAlike(t, r, m)
		}
		for id := range uint64(2) {
			clear(m.cache.find(id).entries) // for the end of the test
		}
	}
}

// compareAlike looks the disk of m up in both ways.
func compareAlike(t *testing.T, r *rand.Rand, m *Image) {
	t.Helper()
	for _, use := range []purpose{forReading, forMapping} {
		for off := int64(0); off < m.Size(); {
			n := 1 + r.Int64N(m.Size()-off)
			got, gotErr := unpinned(m.lookupFor(off, n, 0, use))
			want, wantErr := lookupEach(m, off, n, use)
			if got != want || (gotErr == nil) != (wantErr == nil) {
				t.Fatalf("purpose %d, %d bytes at %#x: %+v, %v, want %+v, %v", use, n, off, got, gotErr, want, wantErr)
			}
			off += max(got.length, m.clusterSize-m.inCluster(off))
		}
	}
}

// fillAlike fills a slice of m with runs of entries, each of which has its place behind
// that of the one before, with other flags, subclusters or reserved bits where a run
// ends.
func fillAlike(r *rand.Rand, m *Image, entries []uint64) {
	step := uint64(1) << m.clusterBits
	next, bitmap := uint64(0), uint64(0)
	for i := 0; i < len(entries); i += 1 << m.wordBits {
		next += step
		switch r.IntN(12) {
		case 0:
			next = entryCopied | step*(1+r.Uint64N(1<<20))
		case 1:
			next ^= []uint64{entryCopied, entryZero, entryCompressed, 1 << 56, 2}[r.IntN(5)]
		case 2:
			next = 0
		case 3:
			next = entryOffset&-step - 3*step // the fourth that follows carries into reserved bits
		case 4:
			next -= step
		case 5:
			data := r.Uint64() >> 32
			bitmap = []uint64{data, 1<<32 - 1, data << 32, data | (^data << 32)}[r.IntN(4)]
		}
		if entries[i] = next; m.wordBits > 0 {
			entries[i+1] = bitmap
		}
		if next < 2 || next&^entryCopied == entryZero {
			next -= step // no place, in all of the run
		}
	}
}

// lookupEach is lookupFor by lookups of no more than a cluster.
func lookupEach(m *Image, off, n int64, use purpose) (span, error) {
	part := func(off, n int64) (span, error) {
		return unpinned(m.lookupFor(off, min(n, m.clusterSize-m.inCluster(off)), 0, use))
	}
	s, err := part(off, n)
	for err == nil && s.length < n && s.kind != kindCompressed && m.inCluster(off+s.length) == 0 {
		next, err := part(off+s.length, n-s.length)
		if err != nil || !s.continues(&next, use) {
			break
		}
		s.length += next.length
	}
	return s, err
}

// unpinned is the result of a lookup that nobody uses.
func unpinned(s span, err error) (span, error) {
	if err == nil {
		s.pin.leave()
		s.pin = nil
	}
	return s, err
}

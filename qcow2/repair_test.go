package qcow2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// leaky returns an image with data, whose counts are too high in many places,
// and its contents. It is marked dirty and corrupt.
func leaky(t *testing.T) (b, want []byte) {
	t.Helper()
	r := newSeed(t)
	path := create(t, CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 16})
	m := open(t, path, Options{})
	want = make([]byte, m.Size())
	fillRandom(r, want[:100<<10])
	must(t, m.WritevAt([][]byte{want[:100<<10]}, 0))
	table := m.refs.table
	closeImage(t, m)
	b, err := os.ReadFile(path)
	must(t, err)
	b = append(b, bytes.Repeat([]byte{0xee}, 40*512)...) // clusters of nobody
	for range 60 {
		c := r.IntN(len(b) / 512)
		count := b[int(table[c/256])+c%256*2:]
		count[1] += byte(1 + r.IntN(3))
	}
	last := len(b)/512 - 1
	b[int(table[last/256])+last%256*2+1] = 1
	put(b, offIncompatible, 8, 1<<incompatDirty|1<<incompatCorrupt)
	put(b, offAutoclear, 8, 1<<63)
	return b, want
}

// TestRepairLeaks mends an image; QEMU finds it clean, it has its data, and it
// opens for writing.
func TestRepairLeaks(t *testing.T) {
	b, want := leaky(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	writeFile(t, path, b)
	found := sameVerdict(t, path)
	before, after, err := Repair(t.Context(), path, RepairLeaks, CheckOptions{})
	must(t, err)
	if before.Leaks != found.Leaks || before.Leaks == 0 || !after.Clean() {
		t.Errorf("%d leaks, then %+v", before.Leaks, after)
	}
	sameVerdict(t, path)
	qemu(t, "qemu-img", "check", "-q", path)
	compare(t, dir, path, want)
	mended, err := os.ReadFile(path)
	must(t, err)
	if mended[offIncompatible+7] != 0 || mended[offAutoclear] != 0 {
		t.Error("the marks stayed")
	}
	_, after, err = Repair(t.Context(), path, RepairLeaks, CheckOptions{})
	must(t, err)
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, mended) || !after.Clean() {
		t.Error("the repair of a clean image changed it")
	}
	m := open(t, path, Options{})
	if _, _, err := Repair(t.Context(), path, RepairLeaks, CheckOptions{}); !errors.Is(err, ErrLocked) {
		t.Errorf("beside a writer: %v", err)
	}
	closeImage(t, m)
}

// TestRepairCorrupt shows that an image with a corruption is not touched.
func TestRepairCorrupt(t *testing.T) {
	b, _ := leaky(t)
	f := &memFile{data: append([]byte(nil), b...)}
	m, err := newChecker(t.Context(), f, "memory", CheckOptions{})
	must(t, err)
	put(f.data, int64(m.l1[0]&entryOffset), 8, 0x8000000000800000)
	b = append(b[:0], f.data...)
	before, after, err := repairIn(t.Context(), f, "memory", RepairLeaks, CheckOptions{})
	must(t, err)
	if before.Corruptions == 0 || before != after || !bytes.Equal(f.data, b) {
		t.Errorf("%+v, changed: %v", before, !bytes.Equal(f.data, b))
	}
}

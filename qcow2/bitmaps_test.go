package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// qemuBitmaps returns the bitmaps that QEMU sees in the image.
func qemuBitmaps(t testing.TB, path string) []Bitmap {
	t.Helper()
	var info struct {
		Format struct {
			Data struct {
				Bitmaps []struct {
					Name        string
					Granularity int64
					Flags       []string
				}
			}
		} `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(qemu(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	var all []Bitmap
	for _, b := range info.Format.Data.Bitmaps {
		x := Bitmap{Name: b.Name, Granularity: b.Granularity}
		for _, f := range b.Flags {
			x.Enabled = x.Enabled || f == "auto"
			x.InUse = x.InUse || f == "in-use"
		}
		all = append(all, x)
	}
	return all
}

// withBitmaps makes an image with data and the bitmaps a, which follows the disk
// and has some bits set, and b, which does not.
func withBitmaps(t testing.TB, opts CreateOptions) string {
	t.Helper()
	path := create(t, opts)
	qemu(t, "qemu-img", "bitmap", "--add", "-g", "64k", path, "a")
	qemu(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "b")
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 100k 200k", path)
	qemu(t, "qemu-img", "bitmap", "--disable", path, "b")
	return path
}

// sameBitmaps compares what QEMU and this package list with each other, and with
// whether a is in use.
func sameBitmaps(t testing.TB, path string, inUse bool) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-q", path)
	if r := check(t, path); !r.Clean() {
		t.Errorf("%+v", r.Findings)
	}
	want := []Bitmap{{"a", 65536, true, inUse}, {"b", 512, false, false}}
	m := open(t, path, Options{ReadOnly: true})
	got, err := m.Bitmaps()
	must(t, err)
	closeImage(t, m)
	info, err := Inspect(path)
	must(t, err)
	if qemu := qemuBitmaps(t, path); fmt.Sprint(got) != fmt.Sprint(want) || fmt.Sprint(qemu) != fmt.Sprint(want) || fmt.Sprint(info.Bitmaps) != fmt.Sprint(want) {
		t.Errorf("the bitmaps are %v and %v, QEMU sees %v; want %v", got, info.Bitmaps, qemu, want)
	}
}

// TestBitmaps shows that bitmaps stay valid as long as nobody changes the disk, and
// that each first change, of any kind, marks the one that follows it, before.
func TestBitmaps(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	start, err := os.ReadFile(path)
	must(t, err)
	for name, c := range map[string]struct {
		do    func(m *Image) error
		marks bool
	}{
		"nothing":     {func(*Image) error { return nil }, false},
		"read, flush": {func(m *Image) error { _, err := m.ReadAt(make([]byte, 9000), 0); return errors.Join(err, m.Flush()) }, false},
		"no bytes":    {func(m *Image) error { _, err := m.WriteAt(nil, 0); return err }, false},
		"outside":     {func(m *Image) error { _ = m.WriteZeroes(1<<20, 1); return nil }, false},
		"write":       {func(m *Image) error { _, err := m.WriteAt([]byte("x"), 0); return err }, true},
		"compressed":  {func(m *Image) error { return m.WriteCompressed(make([]byte, 1<<16), 0) }, true},
		"zeroes":      {func(m *Image) error { return m.WriteZeroes(0, 1<<20) }, true},
		"punch":       {func(m *Image) error { return m.PunchHole(1<<17, 1<<16) }, true},
		"discard":     {func(m *Image) error { return m.Discard(1<<17, 1<<16) }, true},
		"save":        {func(m *Image) error { return changeSnapshot(m, "-c", "s") }, false},
		"apply":       {func(m *Image) error { return errors.Join(changeSnapshot(m, "-c", "s"), changeSnapshot(m, "-a", "s")) }, true},
		"empty":       {func(m *Image) error { return changeSnapshot(m, "-e", "") }, true},
	} {
		t.Run(name, func(t *testing.T) {
			writeFile(t, path, start)
			m := open(t, path, Options{})
			must(t, c.do(m))
			closeImage(t, m)
			sameBitmaps(t, path, c.marks)
		})
	}
	writeFile(t, path, start)
	closeImage(t, open(t, path, Options{ReadOnly: true}))
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, start) {
		t.Error("a reader changed the file")
	}
	// What follows is allocated around the bitmaps.
	r := newSeed(t)
	model := content(t, path, "")
	ourWrite(t, r, path, model, 100)
	sameBitmaps(t, path, true)
	compare(t, t.TempDir(), path, model)
	for off, n := range bitmapData(t, start) {
		b, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(b[off:off+n], start[off:min(off+n, int64(len(start)))]) {
			t.Errorf("the part of a bitmap at %#x has changed", off)
		}
	}
}

// bitmapData returns where the tables and the data of the bitmaps are.
func bitmapData(t testing.TB, b []byte) map[int64]int64 {
	t.Helper()
	m, err := openFile(&memFile{data: append([]byte(nil), b...)}, "memory", Options{}, &chain{})
	must(t, err)
	defer closeImage(t, m)
	found := map[int64]int64{}
	for c := range m.cluster(int64(len(b))) {
		if m.meta.at(c) == metaBitmaps && m.offset(c) != int64(m.bitmaps.offset) {
			found[m.offset(c)] = m.clusterSize
		}
	}
	if len(found) < 3 {
		t.Fatalf("the bitmaps have %d clusters", len(found))
	}
	return found
}

// TestBitmapsGuarded shows that what bitmaps have in the file is never taken for
// free, whatever the counts say.
func TestBitmapsGuarded(t *testing.T) {
	b, err := os.ReadFile(withBitmaps(t, CreateOptions{Size: 1 << 20}))
	must(t, err)
	block := int64(tableEntry(b, int64(tableEntry(b, offRefTable))))
	for off := range bitmapData(t, b) {
		bad := append([]byte(nil), b...)
		put(bad, block+off>>16*2, 2, 0)
		f := &memFile{data: bad}
		m, err := openFile(f, "memory", Options{}, &chain{})
		must(t, err)
		if _, err := m.WriteAt(make([]byte, 1<<20), 0); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "bitmap") {
			t.Errorf("with a count of zero at %#x: %v", off, err)
		}
		_ = m.Close()
		if !bytes.Equal(f.data[off:off+1<<16], b[off:off+1<<16]) {
			t.Errorf("the part of a bitmap at %#x was overwritten", off)
		}
	}
}

// TestBitmapsVoid shows that bitmaps without the feature bit stay void, and that
// the bit goes if there is no extension for it.
func TestBitmapsVoid(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	b, err := os.ReadFile(path)
	must(t, err)
	put(b, offAutoclear, 8, 0)
	writeFile(t, path, b)
	m := open(t, path, Options{})
	if all, err := m.Bitmaps(); err != nil || len(all) > 0 {
		t.Errorf("void bitmaps are listed: %v, %v", all, err)
	}
	if _, err := m.WriteAt([]byte("x"), 0); err != nil {
		t.Error(err)
	}
	closeImage(t, m)
	bare := create(t, CreateOptions{Size: 1 << 20})
	b, err = os.ReadFile(bare)
	must(t, err)
	put(b, offAutoclear, 8, 1<<autoclearBitmaps)
	writeFile(t, bare, b)
	closeImage(t, open(t, bare, Options{}))
	if b, err = os.ReadFile(bare); err != nil || tableEntry(b, offAutoclear) != 0 {
		t.Error("the bit for bitmaps stays without them")
	}
}

// TestHostileBitmaps gives the extension, the directory and the tables of bitmaps
// contents that break the format: a writer refuses the image, a reader does not.
func TestHostileBitmaps(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	good, err := os.ReadFile(path)
	must(t, err)
	ext := int64(bytes.Index(good[:4096], []byte{0x23, 0x85, 0x28, 0x75}))
	dir := int64(tableEntry(good, ext+8+16))
	table := int64(tableEntry(good, dir))
	for _, c := range []struct {
		off   int64
		width int
		value uint64
		says  string
	}{
		{ext + 4, 4, 16, "16 bytes"},
		{ext + 8, 4, 0, "impossible"},
		{ext + 8, 4, 65536, "impossible"},
		{ext + 8, 4, 3, "ends inside bitmap 2"},
		{ext + 8, 4, 1, "behind the last"},
		{ext + 16, 8, 0, "impossible"},
		{ext + 16, 8, 64<<20 + 1, "impossible"},
		{ext + 24, 8, 512, "header"},
		{ext + 24, 8, 1 << 60, "beyond the end"},
		{ext + 24, 8, tableEntry(good, offL1Offset), "of bitmaps"},
		{dir + 20, 4, 1<<32 - 1, "ends inside bitmap 0"},
		{dir, 8, 1, "header"},
		{dir, 8, 1 << 60, "beyond the end"},
		{dir, 8, tableEntry(good, offL1Offset), "claimed by two"},
		{dir + 8, 4, 1<<32 - 1, "more than 4194304 parts"},
		{table, 8, 3, "points to no data"},
		{table, 8, 1 << 60, "points to no data"},
		{table, 8, tableEntry(good, offRefTable), "claimed by two"},
	} {
		b := append([]byte(nil), good...)
		put(b, c.off, c.width, c.value)
		writeFile(t, path, b)
		if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), c.says) || !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%#x at %#x: %v", c.value, c.off, err)
		}
		m := open(t, path, Options{ReadOnly: true})
		_, _ = m.Bitmaps()
		closeImage(t, m)
		after, err := os.ReadFile(path)
		if must(t, err); !bytes.Equal(after, b) {
			t.Errorf("%#x at %#x: the file was changed", c.value, c.off)
		}
	}
}

// bitmapsRun records first writes, of several goroutines, to an image with bitmaps.
func bitmapsRun(t *testing.T, noBarrier func(string) bool) *crashRun {
	t.Helper()
	b, err := os.ReadFile(withBitmaps(t, CreateOptions{Size: 1 << 20}))
	must(t, err)
	run := &crashRun{path: filepath.Join(t.TempDir(), "disk.qcow2"), start: b}
	run.f = &memFile{data: append([]byte(nil), b...), rec: true, noBarrier: noBarrier}
	m := run.open(t, run.f, false)
	var wg sync.WaitGroup
	for g := range int64(3) {
		wg.Go(func() {
			// The first is in place, and so waits for no other barrier.
			for _, off := range []int64{128<<10 + g*4096, g << 16} {
				if _, err := m.WriteAt(bytes.Repeat([]byte{2}, 4096), off); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	closeImage(t, m)
	return run
}

// judgeBitmaps returns an error if the disk has changed and the bitmap that follows
// it is not marked, or the other one is.
func judgeBitmaps(t *testing.T, first, data []byte) error {
	m, err := openFile(&memFile{data: data}, "memory", Options{ReadOnly: true}, &chain{})
	if err != nil {
		return err
	}
	defer closeImage(t, m)
	all, err := m.Bitmaps()
	if err != nil {
		return err
	}
	disk := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{disk}, 0); err != nil {
		return err
	}
	if len(all) != 2 || all[1].InUse {
		return fmt.Errorf("the bitmaps are %v", all)
	}
	if !all[0].InUse && !bytes.Equal(disk, first) {
		return errors.New("the disk has changed, and the bitmap that follows it does not say so")
	}
	return nil
}

// TestCrashBitmaps cuts the power while the first writes mark the bitmaps.
func TestCrashBitmaps(t *testing.T) {
	r := newSeed(t)
	run := bitmapsRun(t, nil)
	first := content(t, withBitmaps(t, CreateOptions{Size: 1 << 20}), "")
	run.states(r, 200, func(s state) bool {
		if err := judgeBitmaps(t, first, s.data); err != nil {
			t.Errorf("%s at %d: %v", s.what, s.cut, err)
		}
		return !t.Failed()
	})
}

// bitmapsWithout is the control of the barrier: see controls.
func bitmapsWithout(t *testing.T, r *rand.Rand, noBarrier func(string) bool) (found error) {
	run := bitmapsRun(t, noBarrier)
	first := content(t, withBitmaps(t, CreateOptions{Size: 1 << 20}), "")
	run.states(r, 400, func(s state) bool {
		found = judgeBitmaps(t, first, s.data)
		return found == nil
	})
	return found
}

// TestFaultyBitmaps fails the marking of the bitmaps: the write fails, and nothing
// has changed; where it can be tried again, it is.
func TestFaultyBitmaps(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	b, err := os.ReadFile(path)
	must(t, err)
	first := content(t, path, "")
	for _, op := range []string{"read", "write", "sync"} {
		f := &memFile{data: append([]byte(nil), b...)}
		m, err := openFile(f, "memory", Options{}, &chain{})
		must(t, err)
		failed := false
		f.setFail(func(this string) error {
			if this == op && !failed {
				failed = true
				return syscall.EIO
			}
			return nil
		})
		if _, err := m.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s failed: %v", op, err)
		}
		if err := judgeBitmaps(t, first, f.data); err != nil {
			t.Errorf("%s failed: %v", op, err)
		}
		_, err = m.WriteAt([]byte("x"), 0)
		if op == "sync" && !errors.Is(err, ErrFlushFailed) || op != "sync" && err != nil {
			t.Errorf("%s failed before: %v", op, err)
		}
		_ = m.Close()
		if err := judgeBitmaps(t, first, f.data); err != nil {
			t.Errorf("%s failed, afterwards: %v", op, err)
		}
	}
}

// TestBitmapsMarkedOnce shows that only the first write waits for the marks.
func TestBitmapsMarkedOnce(t *testing.T) {
	m := open(t, withBitmaps(t, CreateOptions{Size: 1 << 20}), Options{})
	var syncs []uint64
	for range 3 {
		_, err := m.WriteAt([]byte("x"), 128<<10) // in place
		must(t, err)
		syncs = append(syncs, m.Stats().Syncs)
	}
	if syncs[0] != 1 || syncs[2] != 1 {
		t.Errorf("after each write there have been %d barriers", syncs)
	}
}

// TestBitmapsForeign marks a bitmap with extra data and of a type that nobody
// knows, and keeps all else of it.
func TestBitmapsForeign(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	b, err := os.ReadFile(path)
	must(t, err)
	ext := int64(bytes.Index(b[:4096], []byte{0x23, 0x85, 0x28, 0x75}))
	dir := int64(tableEntry(b, ext+8+16))
	size := int64(tableEntry(b, ext+8+8))
	second := append([]byte(nil), b[dir+32:dir+size]...)
	row := append([]byte(nil), b[dir:dir+24]...)
	row[16] = 77
	put(row, 20, 4, 8)
	row = append(append(row, "unknown!a"...), make([]byte, 7)...)
	put(b, ext+8+8, 8, uint64(len(row)+len(second)))
	b = truncate(b, max(int64(len(b)), dir+1<<16))
	copy(b[dir:], append(append([]byte(nil), row...), second...))
	f := &memFile{data: b}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	if _, err := m.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if all, err := m.Bitmaps(); err != nil || len(all) != 2 || all[0] != (Bitmap{"a", 65536, true, true}) {
		t.Errorf("%v, %v", all, err)
	}
	closeImage(t, m)
	binary.BigEndian.PutUint32(row[12:], binary.BigEndian.Uint32(row[12:])|bitmapInUse)
	if !bytes.Equal(f.data[dir:dir+int64(len(row)+len(second))], append(row, second...)) {
		t.Error("something else was changed")
	}
}

// TestBitmapsOfCorrupt finds an image corrupt by a read. No write changes its disk
// then, so the bitmaps stay valid.
func TestBitmapsOfCorrupt(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	b := readFile(t, path)
	put(b, field(b, field(b, offL1Offset)&entryOffset)&entryOffset, 8, entryCopied|0x200)
	writeFile(t, path, b)
	m := open(t, path, Options{})
	_, err := m.ReadAt(make([]byte, 1), 0)
	_, again := m.WriteAt([]byte{1}, 100<<10)
	if !errors.Is(err, ErrCorrupt) || !errors.Is(again, ErrCorrupt) {
		t.Errorf("read: %v, write: %v", err, again)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	m = open(t, path, Options{ReadOnly: true})
	defer closeImage(t, m)
	all, err := m.Bitmaps()
	if must(t, err); len(all) != 2 || all[0].InUse || all[1].InUse {
		t.Errorf("%+v", all)
	}
}

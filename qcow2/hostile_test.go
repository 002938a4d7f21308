package qcow2

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
)

// hostileImage returns a small good image with data in its first clusters, and
// the offset of its L2 table.
func hostileImage(t testing.TB, opts CreateOptions) (b []byte, l2 int64) {
	t.Helper()
	path := create(t, opts)
	m := open(t, path, Options{})
	if _, err := m.WriteAt(make([]byte, 3*m.clusterSize), 0); err != nil {
		t.Fatal(err)
	}
	l2 = int64(m.l1[0] & entryOffset)
	closeImage(t, m)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b, l2
}

func put(b []byte, off int64, width int, v uint64) {
	var e [8]byte
	binary.BigEndian.PutUint64(e[:], v)
	copy(b[off:], e[8-width:])
}

// TestHostileHeader gives the header fields values that break the format.
func TestHostileHeader(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20})
	for _, c := range []struct {
		name  string
		off   int64
		width int
		value uint64
		kind  error
		says  string
	}{
		{"magic", 0, 4, 0x514649fa, ErrNotQCOW2, "raw"},
		{"version 1", 4, 4, 1, ErrUnsupported, "version 1"},
		{"version 4", 4, 4, 4, ErrUnsupported, "version 4"},
		{"backing offset", 8, 8, 1<<64 - 1, ErrCorrupt, "backing file name"},
		{"backing past cluster", 8, 8, 0x10001, ErrCorrupt, "backing file name"},
		{"cluster bits 8", 20, 4, 8, ErrCorrupt, "cluster size"},
		{"cluster bits 22", 20, 4, 22, ErrCorrupt, "cluster size"},
		{"cluster bits 64", 20, 4, 64, ErrCorrupt, "cluster size"},
		{"size", 24, 8, 1<<64 - 1, ErrCorrupt, "disk size"},
		{"size beyond L1", 24, 8, 1 << 40, ErrCorrupt, "too small"},
		{"AES", 32, 4, 1, ErrUnsupported, "AES"},
		{"LUKS", 32, 4, 2, ErrUnsupported, "LUKS"},
		{"crypt 3", 32, 4, 3, ErrUnsupported, "method 3"},
		{"L1 size ff", 36, 4, 0xffffffff, ErrCorrupt, "L1 table"},
		{"L1 size 7f", 36, 4, 0x7fffffff, ErrCorrupt, "L1 table"},
		{"L1 size 0", 36, 4, 0, ErrCorrupt, "too small"},
		{"L1 unaligned", 40, 8, 0x30200, ErrCorrupt, "not aligned"},
		{"L1 at header", 40, 8, 0, ErrCorrupt, "header"},
		{"L1 outside", 40, 8, 0x7fffffffffff0000, ErrCorrupt, "L1 table"},
		{"table offset unaligned", 48, 8, 0x1234567890abcdef, ErrCorrupt, "not aligned"},
		{"table offset outside", 48, 8, 0xffffffffffff0000, ErrCorrupt, "outside"},
		{"table at header", 48, 8, 0, ErrCorrupt, "header"},
		{"table clusters ff", 56, 4, 0xffffffff, ErrCorrupt, "8 MiB"},
		{"table clusters many", 56, 4, 0x20001, ErrCorrupt, "8 MiB"},
		{"table clusters 0", 56, 4, 0, ErrCorrupt, "no reference count table"},
		{"snapshots ff", 60, 4, 0xffffffff, ErrCorrupt, "snapshots"},
		{"snapshots 7f", 60, 4, 0x7fffffff, ErrCorrupt, "snapshots"},
		{"snapshot table unaligned", 64, 8, 0x1234567890abcdef, ErrCorrupt, "snapshot table"},
		{"unknown incompatible", 72, 8, 1 << 63, ErrUnsupported, "bit 63"},
		{"data file", 72, 8, 4, ErrUnsupported, "external data file"},
		{"extended L2", 72, 8, 16, ErrUnsupported, "extended L2"},
		{"compression bit alone", 72, 8, 8, ErrCorrupt, "compression"},
		{"compression type alone", 104, 1, 1, ErrCorrupt, "compression"},
		{"corrupt", 72, 8, 2, ErrCorrupt, "qemu-img check -r all"},
		{"refcount order", 96, 4, 7, ErrCorrupt, "reference counts"},
		{"header length ff", 100, 4, 0xffffffff, ErrCorrupt, "header length"},
		{"header length 7f", 100, 4, 0x7fffffff, ErrCorrupt, "header length"},
		{"header length short", 100, 4, 96, ErrCorrupt, "header length"},
		{"extension length", 116, 4, 0x7fffffff, ErrCorrupt, "extension"},
		{"L1 entry at itself", 0x30000, 8, 0x8000000000030000, ErrCorrupt, "claimed by two"},
		{"L1 entry unaligned", 0x30000, 8, 0x8000000000042a00, ErrCorrupt, "L1 entry 0"},
		{"L1 entry outside", 0x30000, 8, 0x8000000990040000, ErrCorrupt, "end of the file"},
		{"table entry unaligned", 0x10000, 8, 0x22a00, ErrCorrupt, "entry 0 of the reference count table"},
		{"table entry at header", 0x10000, 8, 0xffff2a00, ErrCorrupt, "entry 0"},
		{"two blocks in one cluster", 0x10008, 8, 0x20000, ErrCorrupt, "claimed by two"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := append([]byte(nil), good...)
			put(b, c.off, c.width, c.value)
			path := t.TempDir() + "/hostile.qcow2"
			writeFile(t, path, b)
			m, err := Open(path, Options{})
			if err == nil {
				closeImage(t, m)
				t.Fatal("opened")
			}
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %v that names the file and %q", err, c.kind, c.says)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(b) {
				t.Errorf("a refused image was changed (%v)", err)
			}
		})
	}
}

// TestFeatureNames shows that a refusal uses the image's own name of a feature.
func TestFeatureNames(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	put(good, offIncompatible, 8, 1<<61)
	name := make([]byte, featureNameEntry)
	name[1] = 61
	copy(name[2:], "time travel")
	copy(good[headerLengthOur:], append(appendExtension(nil, extFeatureNames, name), appendExtension(nil, extEnd, nil)...))
	path := t.TempDir() + "/disk.qcow2"
	writeFile(t, path, good)
	_, err := Open(path, Options{})
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `"time travel"`) {
		t.Errorf("got %v", err)
	}
}

// TestHostileTables breaks tables in ways that only a request can find. Then the
// request fails by name, an image open for writing is marked corrupt, and no
// further write is done.
func TestHostileTables(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	block := int64(0x20000)
	for _, c := range []struct {
		name        string
		off         int64
		width       int
		value       uint64
		read, write bool // whether they find it
	}{
		{"L2 entry unaligned", l2, 8, 0x8000000000052a00, true, true},
		{"L2 zero entry unaligned", l2, 8, 0x8000000000052a01, true, true},
		{"L2 entry in the header", l2, 8, 0x8000000000000200, true, true},
		{"L2 zero entry in the header", l2, 8, 0x8000000000002a01, true, true},
		{"L2 entry at the refcount block", l2, 8, 0x8000000000020000, false, true},
		{"L2 entry at the L1 table", l2, 8, 0x8000000000030000, false, true},
		{"L2 entry at itself", l2, 8, 0x8000000000000000 | uint64(l2), false, true},
		{"L2 entry far away", l2, 8, 0x8080000000000000, false, true},
		{"L2 reserved bits", l2, 8, 0xbfffffffffff0000, true, true},
		{"compressed data in the header", l2, 8, 0x4000000000000100, true, true},
		{"live L2 table counted zero", block + 2*(l2>>16), 2, 0, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := append([]byte(nil), good...)
			put(b, c.off, c.width, c.value)
			path := t.TempDir() + "/hostile.qcow2"
			writeFile(t, path, b)

			m := open(t, path, Options{ReadOnly: true})
			if _, err := m.ReadAt(make([]byte, 100), 0); errors.Is(err, ErrCorrupt) != c.read {
				t.Errorf("read: %v", err)
			}
			closeImage(t, m)

			m = open(t, path, Options{})
			var err error
			for off := int64(0); off < m.Size() && err == nil; off += m.clusterSize {
				_, err = m.WriteAt([]byte("x"), off)
			}
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "qemu-img check -r all") {
				t.Errorf("write: %v", err)
			}
			if _, err := m.WriteAt([]byte("x"), 2<<16); !errors.Is(err, ErrCorrupt) {
				t.Errorf("a write after the corruption was found: %v", err)
			}
			if err := m.Close(); !errors.Is(err, ErrCorrupt) {
				t.Errorf("close: %v", err)
			}
			if _, err := Open(path, Options{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "marked corrupt") {
				t.Errorf("opening it for writing again: %v", err)
			}
			closeImage(t, open(t, path, Options{ReadOnly: true}))
		})
	}
}

// TestCloseCorrupt shows that Close does not hide the loss of a write that was
// not flushed when something else in the image was found corrupt.
func TestCloseCorrupt(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, l2+8*8, 8, 0x8000000000052a00)
	path := t.TempDir() + "/hostile.qcow2"
	writeFile(t, path, good)
	m := open(t, path, Options{})
	if _, err := m.WriteAt([]byte("precious"), 5<<16); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(make([]byte, 10), 8<<16); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("read: %v", err)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
}

// TestHostileCompressed gives compressed clusters impossible data.
func TestHostileCompressed(t *testing.T) {
	run := compressedRun(t, 64<<10, 4096)
	m := run.open(t, &memFile{data: append([]byte(nil), run.start...)}, true)
	l2 := int64(m.l1[0] & entryOffset)
	first := binary.BigEndian.Uint64(run.start[l2:])
	for entry, good := range map[uint64]bool{
		0x4000_0000_0000_3000:         false, // a table as data
		0x40ff_0000_0000_0000:         false, // far beyond the end of the file
		first | 0x3c00_0000_0000_0000: true,  // longer than its data, past the end of the file
	} {
		f := &memFile{data: append([]byte(nil), run.start...)}
		put(f.data, l2, 8, entry)
		m := run.open(t, f, false)
		if _, err := m.ReadAt(make([]byte, 10), 0); (err == nil) != good {
			t.Errorf("entry %#x: %v", entry, err)
		}
		if _, err := m.ReadAt(make([]byte, 10), 4096); err != nil {
			t.Errorf("entry %#x: the next cluster: %v", entry, err)
		}
		_ = m.Close() // it may have found the corruption or not
	}
}

// TestCloseMarks makes two guest clusters zero that share a host cluster which is
// counted once. Only the last commit finds that out: it still marks the image.
func TestCloseMarks(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	shared := binary.BigEndian.Uint64(good[l2:]) &^ entryCopied
	put(good, l2, 8, shared)
	put(good, l2+8, 8, shared)
	path := t.TempDir() + "/hostile.qcow2"
	writeFile(t, path, good)
	m := open(t, path, Options{})
	if err := m.Discard(0, 2*m.clusterSize); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	if _, err := Open(path, Options{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "marked corrupt") {
		t.Errorf("opening it for writing again: %v", err)
	}
}

package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// qemuSnapshots returns the snapshots that QEMU sees in the image.
func qemuSnapshots(t testing.TB, path string) []Snapshot {
	t.Helper()
	var info struct {
		Snapshots []struct {
			ID, Name    string
			VMStateSize int64 `json:"vm-state-size"`
			DateSec     int64 `json:"date-sec"`
			DateNsec    int64 `json:"date-nsec"`
			ClockSec    int64 `json:"vm-clock-sec"`
			ClockNsec   int64 `json:"vm-clock-nsec"`
			ICount      *int64
		}
	}
	if err := json.Unmarshal([]byte(qemu(t, "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	var all []Snapshot
	for _, s := range info.Snapshots {
		x := Snapshot{
			ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, Date: time.Unix(s.DateSec, s.DateNsec),
			VMClock: time.Duration(s.ClockSec*1e9 + s.ClockNsec), Instructions: -1,
		}
		if s.ICount != nil {
			x.Instructions = *s.ICount
		}
		all = append(all, x)
	}
	return all
}

// inspectSnapshots returns the snapshots of the image at path.
func inspectSnapshots(path string) ([]Snapshot, error) {
	info, err := Inspect(path)
	if err != nil {
		return nil, err
	}
	return info.Snapshots, nil
}

// sameSnapshots compares what QEMU and this package list, whose disks have the
// given sizes.
func sameSnapshots(t testing.TB, path string, sizes ...int64) {
	t.Helper()
	want := qemuSnapshots(t, path)
	got, err := inspectSnapshots(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i].DiskSize = sizes[i]
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the snapshots are\n%v, QEMU lists\n%v", got, want)
	}
}

// content returns the disk of the image, or of a snapshot of it.
func content(t testing.TB, path, snapshot string) []byte {
	t.Helper()
	m := open(t, path, Options{ReadOnly: true, Snapshot: snapshot})
	b := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	closeImage(t, m)
	return b
}

// TestOpenSnapshot opens snapshots that QEMU made, of a disk that was longer and
// shorter, over a backing file, and compares them with what was written.
func TestOpenSnapshot(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=64k", "compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			model := makeBase(t, r, dir, "qcow2", 3<<20)
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "-o", options, path)
			var states [][]byte
			var sizes []int64
			for i := range 3 {
				qemuWrite(t, r, path, model, 10)
				qemu(t, "qemu-img", "snapshot", "-c", fmt.Sprintf("state %d", i), path)
				states = append(states, append([]byte(nil), model...))
				sizes = append(sizes, int64(len(model)))
				if options != "compat=0.10" { // there, snapshots keep the size as it is
					size := 1<<20 + r.IntN(5<<20)&^0xffff // whole clusters: QEMU shows again what a part lost
					qemu(t, "qemu-img", "resize", "-q", "--shrink", path, fmt.Sprint(size))
					model = append(model[:min(len(model), size)], make([]byte, max(0, size-len(model)))...)
				}
			}
			sameSnapshots(t, path, sizes...)
			for i, want := range states {
				if !bytes.Equal(content(t, path, fmt.Sprintf("state %d", i)), want) || !bytes.Equal(content(t, path, fmt.Sprint(i+1)), want) {
					t.Errorf("snapshot %d differs from what was written", i)
				}
			}
			if !bytes.Equal(content(t, path, ""), model) {
				t.Error("the disk differs from what was written")
			}
		})
	}
}

// TestSnapshotIsReadOnly shows that an open snapshot takes no writes, even if
// nothing was said of reading only, and shares the file with other readers.
func TestSnapshotIsReadOnly(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	m := open(t, path, Options{Snapshot: "s"})
	open(t, path, Options{ReadOnly: true})
	if _, err := m.WriteAt([]byte("x"), 0); !errors.Is(err, ErrReadOnly) || !m.ReadOnly() {
		t.Errorf("a write to a snapshot: %v", err)
	}
	if got, err := m.Snapshots(); err != nil || len(got) != 1 || got[0].Name != "s" {
		t.Errorf("Snapshots: %v, %v", got, err)
	}
}

// TestNoSnapshot shows what is said of a snapshot that is not there, or is not the
// only one of its name.
func TestNoSnapshot(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	refused := func(which, says string) {
		t.Helper()
		_, err := Open(path, Options{Snapshot: which})
		if !errors.Is(err, ErrNoSnapshot) || !strings.Contains(err.Error(), says) || !strings.HasPrefix(err.Error(), path) {
			t.Errorf("snapshot %q: %v", which, err)
		}
	}
	refused("a", "nor any other")
	for _, name := range []string{"a", "b\n", "a", "1"} {
		qemu(t, "qemu-img", "snapshot", "-c", name, path)
	}
	refused("c", `it has "a" (ID "1"), "b\n" (ID "2"), "a" (ID "3")`)
	refused("a", "more than one")
	refused("1", "more than one")
	closeImage(t, open(t, path, Options{Snapshot: "3"}))
	if _, err := OpenScratch(t.TempDir(), path, "raw", Options{Snapshot: "1"}); !errors.Is(err, ErrNoSnapshot) {
		t.Errorf("a snapshot of a raw image: %v", err)
	}
}

// TestScratchOfSnapshot puts a throw-away overlay over a snapshot, and opens one
// of an overlay, whose backing file shows as it is.
func TestScratchOfSnapshot(t *testing.T) {
	dir := t.TempDir()
	base, over := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "over.qcow2")
	must(t, Create(base, CreateOptions{Size: 1 << 20}))
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", base)
	qemu(t, "qemu-img", "snapshot", "-c", "s", base)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", base)
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, over)
	qemu(t, "qemu-img", "snapshot", "-c", "s", over)
	m, err := OpenScratch(dir, base, "qcow2", Options{Snapshot: "s"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	var b [1]byte
	if _, err := m.ReadAt(b[:], 0); err != nil || b[0] != 1 {
		t.Errorf("over the snapshot the disk has %d, %v", b, err)
	}
	if got := content(t, over, "s"); got[0] != 2 {
		t.Errorf("under the snapshot of an overlay there is %d", got[0])
	}
}

// TestSnapshotShortTable opens snapshots whose L1 tables are shorter and longer
// than the disk needs, and old ones that do not say the size of theirs.
func TestSnapshotShortTable(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := (&Image{file: &memFile{data: good}}).loadHeader(int64(len(good)))
	if err != nil {
		t.Fatal(err)
	}
	entry := int64(h.snapshotsOffset)
	table := h.l1Entries(h.size)
	for _, c := range []struct {
		l1, extra uint64
		size      int64 // of the snapshot's disk
		full      int64 // what of it has data
	}{
		{table, 24, 1 << 20, 1 << 20},
		{table / 2, 24, 1 << 20, 1 << 19},
		{0, 24, 1 << 20, 0},
		{table, 24, 1 << 18, 1 << 18},
	} {
		b := append([]byte(nil), good...)
		put(b, entry+8, 4, c.l1)
		put(b, entry+snapshotFixed+8, 8, uint64(c.size))
		writeFile(t, path, b)
		got := content(t, path, "1")
		want := append(bytes.Repeat([]byte{1}, int(c.full)), make([]byte, c.size-c.full)...)
		if !bytes.Equal(got, want) {
			t.Errorf("%+v: the snapshot has %d bytes, and differs", c, len(got))
		}
	}
	// An entry as old programs made it: its names follow the fixed part.
	b := append([]byte(nil), good...)
	end := entry + snapshotFixed + 24
	copy(b[entry+snapshotFixed:], b[end:end+8])
	put(b, entry+36, 4, 0)
	writeFile(t, path, b)
	if got := content(t, path, "s"); !bytes.Equal(got, bytes.Repeat([]byte{1}, 1<<20)) {
		t.Error("an old snapshot differs")
	}
}

// TestHostileSnapshots gives the snapshot table contents that break the format.
func TestHostileSnapshots(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := (&Image{file: &memFile{data: good}}).loadHeader(int64(len(good)))
	if err != nil {
		t.Fatal(err)
	}
	entry := int64(h.snapshotsOffset)
	for _, c := range []struct {
		off   int64
		width int
		value uint64
		says  string
	}{
		{entry, 8, 0x400200, "not aligned"},
		{entry, 8, 0, "overlaps the header"},
		{entry, 8, 1 << 50, "beyond the end"},
		{entry + 8, 4, 0x10000000, "too large"},
		{entry + 36, 4, 1025, "extra data"},
		{entry + 36, 4, 1<<32 - 1, "extra data"},
		{entry + snapshotFixed + 8, 8, 1 << 63, "impossible size"},
		{entry + snapshotFixed + 8, 8, 1 << 60, "32 MiB"},
		{60, 4, 65537, "internal snapshots"},
		{64, 8, 512, "not aligned"},
	} {
		b := append([]byte(nil), good...)
		put(b, c.off, c.width, c.value)
		writeFile(t, path, b)
		if _, err := Open(path, Options{Snapshot: "s"}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%#x at %#x: %v", c.value, c.off, err)
		}
	}
	// 65536 entries of zeros, and so many that they are more than 64 MiB.
	b := append(append([]byte(nil), good...), make([]byte, 5<<20)...)
	put(b, 60, 4, maxSnapshots)
	put(b, 64, 8, uint64(len(good)+0xffff)&^0xffff)
	writeFile(t, path, b)
	if all, err := inspectSnapshots(path); err != nil || len(all) != maxSnapshots {
		t.Errorf("%d snapshots are listed: %v", len(all), err)
	}
	if brief() {
		return
	}
	table := int64(len(good)+0xffff) &^ 0xffff
	b = append(b, make([]byte, 70<<20)...)
	for off := table; off+200000 < int64(len(b)); off += snapshotFixed + 131072 {
		put(b, off+12, 4, 0xffffffff) // two names of 64 KiB
		put(b, off+36, 4, 2)
	}
	writeFile(t, path, b)
	if _, err := inspectSnapshots(path); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "64 MiB") {
		t.Errorf("a large table: %v", err)
	}
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What a check says of an image, in the exit codes of qemu-img check.
const (
	exitClean   = 0
	exitError   = 1 // QEMU cannot check it
	exitCorrupt = 2
	exitLeaks   = 3
)

func exitOf(r *CheckResult) int {
	switch {
	case r.Corruptions > 0:
		return exitCorrupt
	case r.Leaks > 0:
		return exitLeaks
	}
	return exitClean
}

// poke is a value that a test writes into an image.
type poke struct {
	off   int64
	width int
	value uint64
}

// broken is an image broken in one way, and what has to become of it.
type broken struct {
	name  string
	pokes []poke
	class int    // of the check before the repair
	says  string // is in a finding
	all   int    // class after RepairAll
	left  string // is in a finding after it

	qemu   int    // QEMU's class before, where why says why it differs
	why    string // why QEMU 7.2 sees the broken image differently
	after  int    // QEMU's class after, where thereof says why it differs
	hereof string // why QEMU 7.2 sees the repaired image differently

	lost    []int64 // guest clusters whose data the fault itself takes, -1 for all
	expands bool    // there is no free cluster, so the file may grow
}

// specimen is an image to break, with the data that its guest sees.
type specimen struct {
	dir   string
	data  []byte
	model []byte
}

// specimenOf makes an image of size bytes with QEMU and writes to it.
func specimenOf(t *testing.T, options string, size int, commands ...string) *specimen {
	t.Helper()
	s := &specimen{dir: t.TempDir(), model: make([]byte, size)}
	path := filepath.Join(s.dir, "good.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
	for _, c := range commands {
		var v byte
		var off, n int64
		switch {
		case c == "snapshot":
			qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			continue
		case strings.HasPrefix(c, "write -c"):
			scan(t, c, "write -c -P %d %d %d", &v, &off, &n)
		default:
			scan(t, c, "write -P %d %d %d", &v, &off, &n)
		}
		copy(s.model[off:off+n], bytes.Repeat([]byte{v}, int(n)))
		if out := qemu(t, "qemu-io", "-f", "qcow2", "-c", c, path); strings.Contains(out, "failed") {
			t.Fatal(out)
		}
	}
	s.data = readFile(t, path)
	return s
}

func scan(t *testing.T, s, format string, args ...any) {
	t.Helper()
	_, err := fmt.Sscanf(s, format, args...)
	must(t, err)
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// qemuClass is the exit code of qemu-img check.
func qemuClass(t *testing.T, path string) int {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img, the witness of this test, is not installed")
	}
	err := exec.Command("qemu-img", "check", "-q", "-f", "qcow2", path).Run()
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	must(t, err)
	return 0
}

// mentions reports whether a finding has the words what.
func mentions(r *CheckResult, what string) bool {
	return what == "" || slices.ContainsFunc(r.Findings, func(f Finding) bool { return strings.Contains(f.What, what) })
}

// test breaks the image, checks it, repairs it, and compares.
func (s *specimen) test(t *testing.T, c broken) {
	t.Helper()
	path := filepath.Join(s.dir, "broken.qcow2")
	b := append([]byte(nil), s.data...)
	for _, p := range c.pokes {
		put(b, p.off, p.width, p.value)
	}
	writeFile(t, path, b)
	found := check(t, path)
	if exitOf(found) != c.class || !mentions(found, c.says) {
		t.Errorf("the check finds %v, want class %d and %q", found.Findings, c.class, c.says)
	}
	if c.why == "" {
		c.qemu = c.class
	}
	if got := qemuClass(t, path); got != c.qemu {
		t.Errorf("qemu-img check finds class %d, want %d %s", got, c.qemu, c.why)
	}
	if !bytes.Equal(readFile(t, path), b) {
		t.Error("the check changed the image")
	}
	_, after, err := Repair(t.Context(), path, RepairAll, CheckOptions{})
	must(t, err)
	if again := check(t, path); exitOf(after) != c.all || exitOf(again) != c.all || !mentions(after, c.left) {
		t.Errorf("the repair leaves %v and then %v, want class %d", after.Findings, again.Findings, c.all)
	}
	if c.hereof == "" {
		c.after = c.all
	}
	if got := qemuClass(t, path); got != c.after {
		t.Errorf("after the repair qemu-img check finds class %d, want %d %s", got, c.after, c.hereof)
	}
	if now := readFile(t, path); len(now) > len(b) && !c.expands {
		t.Errorf("the file grew from %d to %d bytes", len(b), len(now))
	}
	s.sameData(t, path, c.lost)
	if c.all == exitClean {
		s.goOn(t, path)
	}
}

// sameData compares what the guest sees with the model, but for lost clusters.
func (s *specimen) sameData(t *testing.T, path string, lost []int64) {
	t.Helper()
	m, err := Open(path, Options{ReadOnly: true, DataFile: true, BackingDirs: []string{os.TempDir()}})
	if errors.Is(err, ErrCorrupt) && slices.Contains(lost, -1) {
		return
	}
	must(t, err)
	defer m.Close()
	got := make([]byte, m.ClusterSize())
	for off := int64(0); off < m.Size(); off += m.ClusterSize() {
		if slices.Contains(lost, -1) || slices.Contains(lost, off) {
			continue
		}
		want := s.model[off:min(off+m.ClusterSize(), m.Size())]
		if _, err := m.ReadAt(got[:len(want)], off); err != nil || !bytes.Equal(got[:len(want)], want) {
			t.Errorf("the cluster at guest offset %#x has other data (%v)", off, err)
			return
		}
	}
}

// goOn writes to a repaired image, which stays sound.
func (s *specimen) goOn(t *testing.T, path string) {
	t.Helper()
	m := open(t, path, Options{DataFile: true, BackingDirs: []string{os.TempDir()}})
	if m.external {
		defer writeFile(t, m.dataPath, readFile(t, m.dataPath)) // other cases share it
	}
	b := bytes.Repeat([]byte{0x77}, int(m.Size()))
	must(t, m.WritevAt([][]byte{b}, 0))
	closeImage(t, m)
	if r := check(t, path); !r.Clean() {
		t.Errorf("after writing again: %v", r.Findings)
	}
	qemu(t, "qemu-img", "check", "-q", path)
}

func (s *specimen) testAll(t *testing.T, cases []broken) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { s.test(t, c) })
	}
}

const (
	noCount = "QEMU cannot look up a count in a block that is lost, and gives up"
	refuses = "QEMU refuses to open it"
)

// TestCorruptionTables is row 060 of the table of corruptions: entries of the
// mapping tables and of the counts that lead where they must not.
func TestCorruptionTables(t *testing.T) {
	const rt, rb, l1, l2 = 0x10000, 0x20000, 0x30000, 0x40000
	s := specimenOf(t, "cluster_size=64k", 1<<20, "write -P 1 0 131072")
	s.testAll(t, []broken{
		{
			name: "L1 entry at the L1 table", pokes: []poke{{l1, 8, 0x8000000000030000}},
			class: exitCorrupt, says: "counted 1 times but used 3 times", all: exitCorrupt, lost: []int64{-1},
		},
		{
			name: "L1 entry unaligned", pokes: []poke{{l1, 8, 0x8000000000042a00}},
			class: exitCorrupt, says: "where no table can be", all: exitCorrupt, lost: []int64{-1},
		},
		{
			name: "L1 entry impossible", pokes: []poke{{l1, 8, 0x2a2a2a2a}},
			class: exitCorrupt, says: "where no table can be", all: exitCorrupt, lost: []int64{-1},
		},
		{
			name: "L2 entry at a refcount block", pokes: []poke{{l2, 8, 0x8000000000020000}},
			class: exitCorrupt, says: "block 0 at 0x20000 is something else, too",
			all: exitClean, lost: []int64{0}, expands: true, // the block takes the one free cluster
		},
		{
			name: "L2 entry at a refcount block, table not counted", pokes: []poke{{l2, 8, 0x8000000000020000}, {rb + 8, 2, 0}},
			class: exitCorrupt, says: "block 0 at 0x20000 is something else, too",
			all: exitClean, lost: []int64{0}, expands: true, // the block takes the one free cluster
		},
		{
			name: "L2 entry unaligned", pokes: []poke{{l2, 8, 0x8000000000052a00}},
			class: exitCorrupt, says: "middle of a cluster", all: exitCorrupt, lost: []int64{0},
		},
		{
			name: "zero entry unaligned", pokes: []poke{{l2, 8, 0x8000000000052a01}},
			class: exitCorrupt, says: "middle of a cluster", all: exitClean, lost: []int64{0},
		},
		{
			name: "zero entry in the header", pokes: []poke{{l2, 8, 0x8000000000002a01}},
			class: exitCorrupt, says: "middle of a cluster", all: exitClean, lost: []int64{0},
		},
		{
			name: "live table not counted", pokes: []poke{{rb + 8, 2, 0}},
			class: exitCorrupt, says: "0x40000 is counted 0 times but used 1 times", all: exitClean,
		},
		{
			name: "header not counted", pokes: []poke{{rb, 2, 0}},
			class: exitCorrupt, says: "0x0 is counted 0 times but used 1 times", all: exitClean,
		},
		{
			name: "nothing counted", pokes: []poke{{rb, 8, 0}, {rb + 8, 8, 0}},
			class: exitCorrupt, says: "0x60000 is counted 0 times but used 1 times", all: exitClean,
		},
		{
			name: "table entry unaligned", pokes: []poke{{rt, 8, 0x22a00}}, class: exitCorrupt, says: "points to no block",
			qemu: exitError, why: noCount, all: exitClean, expands: true,
		},
		{
			name: "table entry in the header", pokes: []poke{{rt, 8, 0x2a00}}, class: exitCorrupt, says: "points to no block",
			qemu: exitError, why: noCount, all: exitClean, expands: true,
		},
		{
			name: "table entry far and unaligned", pokes: []poke{{rt, 8, 0xffff2a00}}, class: exitCorrupt, says: "points to no block",
			qemu: exitError, why: noCount, all: exitClean, expands: true,
		},
		{
			name: "no block", pokes: []poke{{rt, 8, 0}},
			class: exitCorrupt, says: "counted 0 times but used 1 times",
			all: exitClean, expands: true, // the block takes the place of the lost one
		},
		{
			name: "no reference count table", pokes: []poke{{56, 4, 0}},
			class: exitCorrupt, says: "no reference count table", all: exitClean,
		},
		{
			name: "reference count table in the header", pokes: []poke{{48, 8, 0}},
			class: exitCorrupt, says: "overlaps the header", all: exitClean, expands: true,
		},
	})
}

// TestCorruptionSnapshot is the row of 060 in which the disk's table leads to one
// of a snapshot, and 217: a deletion that was cut after the first of its steps.
func TestCorruptionSnapshot(t *testing.T) {
	s := specimenOf(t, "cluster_size=64k", 1<<20, "write -P 1 0 65536", "snapshot", "write -P 2 0 65536")
	f := &memFile{data: s.data}
	x, err := newChecker(t.Context(), f, "memory", CheckOptions{})
	must(t, err)
	l2 := int64(x.l1[0] & entryOffset)
	s.testAll(t, []broken{
		{
			name: "L2 entry at a snapshot's table", pokes: []poke{{l2, 8, 0x8000000000040000}},
			class: exitCorrupt, says: "0x40000 is counted 1 times but used 2 times", all: exitClean, lost: []int64{0},
		},
		{
			name: "snapshot forgotten", pokes: []poke{{60, 4, 0}, {64, 8, 0}},
			class: exitLeaks, says: "is counted 1 times and used 0 times", all: exitClean,
		},
		{
			name: "L1 table unaligned", pokes: []poke{{int64(x.h.snapshotsOffset), 8, 0x400200}},
			class: exitCorrupt, says: "lies where no table can be", all: exitCorrupt,
		},
		{
			name: "L1 table too large", pokes: []poke{{int64(x.h.snapshotsOffset) + 8, 4, 0x10000000}},
			class: exitCorrupt, says: "too large", all: exitCorrupt,
		},
		{
			name: "snapshot table unaligned", pokes: []poke{{64, 8, 0x1234567890abcdef}},
			class: exitCorrupt, says: "not aligned", all: exitCorrupt, lost: []int64{-1},
			qemu: exitError, why: refuses, after: exitError, hereof: refuses,
		},
	})
	// The snapshot's data is the same after the first repair, and after the
	// second the disk's own cluster is no longer shared.
	b := append([]byte(nil), s.data...)
	put(b, l2, 8, 0x8000000000040000)
	path := filepath.Join(s.dir, "snapshot.qcow2")
	writeFile(t, path, b)
	_, after, err := Repair(t.Context(), path, RepairAll, CheckOptions{})
	if err != nil || !after.Clean() {
		t.Fatal(after, err)
	}
	qemu(t, "qemu-img", "snapshot", "-a", "s", path)
	copy(s.model, bytes.Repeat([]byte{1}, 65536))
	compare(t, s.dir, path, s.model)
}

// TestCorruptionCounts is rows 060, 108, 112, 138 and 305, of the structure of the
// counts and of references beyond all counts, in clusters of 512 bytes.
func TestCorruptionCounts(t *testing.T) {
	const rt, l1 = 512, 0x600
	s := specimenOf(t, "cluster_size=512,refcount_bits=64", 64<<10, "write -P 1 0 32768")
	rb := int64(1024)
	l2 := int64(binary.BigEndian.Uint64(s.data[l1:]) & entryOffset)
	count2 := rb + 8*(l2/512)
	s.data = append(s.data, make([]byte, 66<<10-len(s.data))...) // beyond the two blocks, and free
	s.testAll(t, []broken{
		{
			name: "header fields zero", pokes: []poke{{48, 8, 0}, {56, 4, 0}},
			class: exitCorrupt, says: "no reference count table", all: exitClean, // 108
		},
		{
			name: "block beyond the end", pokes: []poke{{rt + 16, 8, 0x100000}},
			class: exitCorrupt, says: "block 2 at 0x100000 lies beyond the end", all: exitClean,
		},
		{
			name: "block far beyond the end", pokes: []poke{{rt + 16, 8, 0x7fffffffffff0000}},
			class: exitCorrupt, says: "lies beyond the end", all: exitClean,
			qemu: exitError, why: noCount,
		},
		{
			name: "block beyond all files", pokes: []poke{{rt + 16, 8, 0xffffffffffff0000}},
			class: exitCorrupt, says: "points to no block", all: exitClean,
			qemu: exitError, why: noCount,
		},
		{
			name: "table entry with reserved bits", pokes: []poke{{rt + 16, 8, 6}},
			class: exitCorrupt, says: "points to no block", all: exitClean, // 305
		},
		{
			name: "data moved to a cluster that is not counted", pokes: []poke{{l2, 8, entryCopied | 65<<10}},
			class: exitCorrupt, says: "counted 0 times but used 1 times", all: exitClean, lost: []int64{0}, // 108
		},
		{
			name: "leak and flag", pokes: []poke{{rb, 8, 2}, {l1, 8, uint64(l2)}},
			class: exitCorrupt, says: "says wrongly", all: exitClean, // 112
		},
		{
			name: "table counted twice", pokes: []poke{{count2, 8, 2}},
			class: exitCorrupt, says: "says wrongly", all: exitClean, // 138
		},
		{
			name: "entry at 32 PB", pokes: []poke{{l2, 8, 0x0080000000000000}},
			class: exitCorrupt, says: "data at 0x80000000000000 lies beyond the end", all: exitCorrupt, lost: []int64{0}, // 138
		},
	})
}

// TestCorruptionNarrow is the rows of 060 with counts of one bit, which cannot
// tell of a shared cluster.
func TestCorruptionNarrow(t *testing.T) {
	const rt, l2 = 0x10000, 0x40000
	s := specimenOf(t, "cluster_size=64k,refcount_bits=1", 1<<20, "write -P 1 0 131072")
	s.testAll(t, []broken{
		{
			name: "table entry impossible", pokes: []poke{{rt + 8, 8, 0x00ffffff00000000}},
			class: exitCorrupt, says: "lies beyond the end", all: exitClean, expands: true,
		},
		{
			name: "table entry beyond the end", pokes: []poke{{rt + 8, 8, 0x1000000000}},
			class: exitCorrupt, says: "lies beyond the end", all: exitClean, expands: true,
		},
		{
			name: "two table entries", pokes: []poke{{rt + 8, 8, 0x1000000000}, {rt + 16, 8, 0x200}},
			class: exitCorrupt, says: "points to no block", all: exitClean, expands: true,
		},
		{
			name: "shared beyond its count", pokes: []poke{{l2, 8, 0x8000000000060000}},
			class: exitCorrupt, says: "used 2 times", all: exitCorrupt, lost: []int64{0},
			left: "says wrongly", // its flags, for the counts, but truly
		},
		{
			name: "shared beyond its count, which is lost", pokes: []poke{{l2, 8, 0x8000000000060000}, {rt, 8, 0x400}},
			class: exitCorrupt, says: "points to no block", all: exitCorrupt, lost: []int64{0}, expands: true,
			left: "counted 1 times but used 2 times", qemu: exitError, why: noCount,
		},
	})
}

// TestCorruptionCompressed is row 214: compressed clusters whose data is shorter
// than their entries say.
func TestCorruptionCompressed(t *testing.T) {
	const l2 = 0x800000
	s := specimenOf(t, "cluster_size=2M", 8<<20, "write -c -P 17 0 2097152", "write -c -P 18 2097152 2097152", "write -P 19 4194304 2097152")
	s.testAll(t, []broken{
		{
			name: "cut short", pokes: []poke{{l2, 2, 0x4006}},
			class: exitClean, all: exitClean, lost: []int64{0}, // no check decodes what it counts
		},
		{
			name: "longer than it can be", pokes: []poke{{l2, 2, 0x7ffe}},
			class: exitCorrupt, says: "used 2 times", all: exitClean,
		},
		{
			name: "marked as owned", pokes: []poke{{l2, 1, 0xc0}},
			class: exitCorrupt, says: "marked as not shared", all: exitClean,
		},
		{
			name: "in the header", pokes: []poke{{l2, 8, 0x4000000000000200}},
			class: exitCorrupt, says: "data in the header", all: exitCorrupt, lost: []int64{0},
		},
	})
}

// TestCorruptionExtended is row 271, of extended L2 entries.
func TestCorruptionExtended(t *testing.T) {
	const l2, rb = 0x40000, 0x20000
	s := specimenOf(t, "cluster_size=64k,extended_l2=on", 1<<20,
		"write -P 1 0 4096", "write -P 2 65536 65536", "write -c -P 3 131072 65536", "write -P 4 200704 2048")
	const fourth, fifth = l2 + 3*16, l2 + 4*16
	s.testAll(t, []broken{
		{name: "nothing", class: exitClean, all: exitClean},
		{
			name: "data and zero at once", pokes: []poke{{l2 + 8, 8, 0x00000001_00000003}},
			class: exitCorrupt, says: "data and zero at once", all: exitCorrupt, lost: []int64{0},
		},
		{
			name: "data without a cluster", pokes: []poke{{fifth + 8, 8, 1}},
			class: exitCorrupt, says: "without a cluster", all: exitCorrupt, lost: []int64{4 << 16},
		},
		{
			name: "zero without a cluster", pokes: []poke{{fifth + 8, 8, 0xffffffff_00000000}},
			class: exitClean, all: exitClean,
		},
		{
			name: "compressed with subclusters", pokes: []poke{{l2 + 2*16 + 8, 8, 1}},
			class: exitCorrupt, says: "has subclusters", all: exitClean,
		},
		{
			name: "unaligned with data", pokes: []poke{{l2, 8, 0x8000000000050200}},
			class: exitCorrupt, says: "middle of a cluster", all: exitCorrupt, lost: []int64{0},
		},
		{
			name: "unaligned without data", pokes: []poke{{fourth, 8, 0x8000000000050200}, {fourth + 8, 8, 0xffffffff_00000000}},
			class: exitCorrupt, says: "middle of a cluster", all: exitClean, lost: []int64{3 << 16},
		},
		{
			name: "not marked as owned", pokes: []poke{{l2, 8, 0x50000}},
			class: exitCorrupt, says: "says wrongly", all: exitClean,
		},
		{
			name: "not counted", pokes: []poke{{rb, 8, 0}, {rb + 8, 8, 0}},
			class: exitCorrupt, says: "counted 0 times but used 1 times", all: exitClean,
		},
		{
			name: "no reference count table", pokes: []poke{{56, 4, 0}},
			class: exitCorrupt, says: "no reference count table", all: exitClean,
		},
	})
}

// TestCorruptionExternal breaks images with an external data file, which a check
// does not open.
func TestCorruptionExternal(t *testing.T) {
	const l2, l1 = 0x40000, 0x30000
	s := specimenOf(t, "cluster_size=64k,data_file="+t.TempDir()+"/data,data_file_raw=on", 1<<20, "write -P 1 0 131072")
	const unseen = "QEMU looks at these offsets only when it uses them"
	s.testAll(t, []broken{
		{name: "nothing", class: exitClean, all: exitClean},
		{
			name: "data elsewhere", pokes: []poke{{l2 + 8, 8, 0x8000000000020000}},
			class: exitCorrupt, says: "points to 0x20000 in the external data file", all: exitCorrupt, lost: []int64{1 << 16},
			qemu: exitClean, why: unseen, after: exitClean, hereof: unseen,
		},
		{
			name: "compressed", pokes: []poke{{l2 + 8, 8, 0x4000000000020000}},
			class: exitCorrupt, says: "is of a compressed cluster", all: exitCorrupt, lost: []int64{1 << 16},
		},
		{
			name: "not marked as owned", pokes: []poke{{l2 + 8, 8, 0x10000}, {l1, 8, l2}},
			class: exitCorrupt, says: "says wrongly", all: exitClean,
		},
		{
			name: "no reference count table", pokes: []poke{{56, 4, 0}},
			class: exitCorrupt, says: "no reference count table", all: exitClean, expands: true,
		},
	})
	b := append([]byte(nil), s.data...)
	put(b, offAutoclear, 8, 1<<63|1<<autoclearRawData)
	put(b, l1, 8, l2)
	f := &memFile{data: b}
	if _, after, err := repairIn(t.Context(), f, "memory", RepairLeaks, CheckOptions{}); err != nil || !after.Clean() {
		t.Error(after, err)
	}
	if got := binary.BigEndian.Uint64(f.data[offAutoclear:]); got != 1<<autoclearRawData {
		t.Errorf("the repair leaves the autoclear bits %#x", got)
	}
}

// TestCorruptionHeader is rows 036 and 287: what a check does not understand it
// refuses by name, and the repair writes nothing.
func TestCorruptionHeader(t *testing.T) {
	good := specimenOf(t, "cluster_size=64k", 1<<20).data
	for _, c := range []struct {
		name string
		poke poke
		kind error
		says string
	}{
		{"unknown feature", poke{offIncompatible, 8, 1 << 61}, ErrUnsupported, "bit 61"},
		{"compression bit alone", poke{offIncompatible, 8, 1 << incompatCompression}, ErrCorrupt, "compression"},
		{"compression type alone", poke{104, 1, 1}, ErrCorrupt, "compression"},
		{"encryption", poke{32, 4, 2}, ErrUnsupported, "LUKS"},
		{"cluster size", poke{20, 4, 64}, ErrCorrupt, "cluster size"},
	} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		b := append([]byte(nil), good...)
		put(b, c.poke.off, c.poke.width, c.poke.value)
		writeFile(t, path, b)
		_, err := Check(t.Context(), path, CheckOptions{})
		_, _, also := Repair(t.Context(), path, RepairAll, CheckOptions{})
		for _, err := range []error{err, also} {
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		if got := qemuClass(t, path); got != exitError {
			t.Errorf("%s: QEMU's class %d", c.name, got)
		}
		if !bytes.Equal(readFile(t, path), b) {
			t.Errorf("%s: the image was changed", c.name)
		}
	}
	// An unknown autoclear bit is no fault; it goes with the first write.
	b := append([]byte(nil), good...)
	put(b, offAutoclear, 8, 1<<63)
	f := &memFile{data: b}
	_, after, err := repairIn(t.Context(), f, "memory", RepairAll, CheckOptions{})
	if err != nil || !after.Clean() || f.data[offAutoclear] != 0x80 {
		t.Errorf("a clean image: %v, %v, autoclear %#x", after, err, f.data[offAutoclear])
	}
	put(f.data, 56, 4, 0)
	_, after, err = repairIn(t.Context(), f, "memory", RepairAll, CheckOptions{})
	if err != nil || !after.Clean() || f.data[offAutoclear] != 0 {
		t.Errorf("a broken image: %v, %v, autoclear %#x", after, err, f.data[offAutoclear])
	}
}

// withSnapshots returns the specimen with a snapshot table of the given entries
// at the end of the file, whose clusters are counted.
func (s *specimen) withSnapshots(t *testing.T, number int, table []byte) *specimen {
	t.Helper()
	const rb, cs = 0x20000, 0x10000
	at := (len(s.data) + cs - 1) &^ (cs - 1)
	b := append([]byte(nil), s.data...)
	b = append(b, make([]byte, at-len(b))...)
	b = append(b, table...)
	old := int64(binary.BigEndian.Uint64(b[64:]))
	put(b, rb+2*(old/cs), 2, 0)
	put(b, 60, 4, uint64(number))
	put(b, 64, 8, uint64(at))
	for c := at / cs; c*cs < len(b); c++ {
		put(b, rb+2*int64(c), 2, 1)
	}
	return &specimen{dir: s.dir, data: b, model: s.model}
}

// snapshotEntry returns the entry of a snapshot table: the one at b, with extra
// bytes of extra data.
func snapshotEntry(b []byte, extra int) []byte {
	old := 40 + int(binary.BigEndian.Uint32(b[36:]))
	names := int(binary.BigEndian.Uint16(b[12:])) + int(binary.BigEndian.Uint16(b[14:]))
	e := append([]byte(nil), b[:40]...)
	put(e, 36, 4, uint64(extra))
	data := bytes.Repeat([]byte{0xa5}, extra)
	copy(data, b[40:old])
	e = append(append(e, data...), b[old:old+names]...)
	return append(e, make([]byte, -len(e)&7)...)
}

// TestCorruptionSnapshotTable is row 261: extra data that is too short or too
// long, and more snapshots than a table may have.
func TestCorruptionSnapshotTable(t *testing.T) {
	const unread = "QEMU cannot read the snapshot table without a repair"
	s := specimenOf(t, "cluster_size=64k", 1<<20, "write -P 1 0 65536", "snapshot", "write -P 2 0 65536")
	entry := s.data[binary.BigEndian.Uint64(s.data[64:]):]
	for _, c := range []struct {
		extra, want int
		broken
	}{
		{0, 24, broken{class: exitCorrupt, says: "0 bytes of extra data", all: exitClean, expands: true}},
		{8, 24, broken{class: exitCorrupt, says: "8 bytes of extra data", all: exitClean, expands: true}},
		{16, 16, broken{class: exitClean, all: exitClean}},
		{50, 50, broken{class: exitClean, all: exitClean}},
		{1024, 1024, broken{class: exitClean, all: exitClean}},
		{65536, 24, broken{class: exitCorrupt, says: "65536 bytes of extra data", all: exitClean, qemu: exitError, why: unread, expands: true}},
	} {
		t.Run(fmt.Sprint("extra ", c.extra), func(t *testing.T) {
			x := s.withSnapshots(t, 1, snapshotEntry(entry, c.extra))
			path := filepath.Join(x.dir, "broken.qcow2")
			x.test(t, c.broken)
			now := readFile(t, path)
			now = now[binary.BigEndian.Uint64(now[64:]):]
			if !bytes.Equal(now[40+c.want:][:2], entry[64:66]) || binary.BigEndian.Uint32(now[36:]) != uint32(c.want) {
				t.Errorf("the entry is %x", now[:128])
			}
			if c.want == 24 && (binary.BigEndian.Uint64(now[48:]) != 1<<20 || c.extra == 0 && now[56] != 0xff) {
				t.Errorf("the extra data is %x", now[40:64])
			}
			if c.want == 50 && now[40+49] != 0xa5 {
				t.Error("unknown extra data is gone")
			}
			model := append(bytes.Repeat([]byte{1}, 65536), make([]byte, 1<<20-65536)...)
			qemu(t, "qemu-img", "snapshot", "-a", "s", path)
			compare(t, x.dir, path, model)
		})
	}
}

// TestCorruptionManySnapshots is the rest of row 261: more snapshots than a table
// may have, or may have room for. Those at its end are dropped.
func TestCorruptionManySnapshots(t *testing.T) {
	s := specimenOf(t, "cluster_size=64k", 1<<20, "write -P 1 0 65536", "snapshot", "write -P 2 0 65536")
	entry := s.data[binary.BigEndian.Uint64(s.data[64:]):]
	for _, c := range []struct {
		number, kept int
		name         int  // length of each name and identifier
		qemu         bool // whether QEMU can judge it in reasonable time
	}{
		{maxSnapshots + 3, maxSnapshots, 6, false},
		{520, 512, 0xffff, true},
	} {
		t.Run(fmt.Sprint(c.number), func(t *testing.T) {
			if c.qemu && brief() {
				t.Skip("long")
			}
			table := snapshotEntry(entry, 24)
			other := append([]byte(nil), entry[:64]...)
			clear(other[:12]) // no L1 table: two snapshots cannot share one
			put(other, 12, 4, uint64(c.name<<16|c.name))
			other = append(other, bytes.Repeat([]byte{'n'}, (2*c.name+7)&^7)...)
			for i := 1; i < c.number; i++ {
				copy(other[64:], fmt.Sprintf("%06d", i)) // the beginning of the identifier
				table = append(table, other...)
			}
			x := s.withSnapshots(t, c.number, table)
			path := filepath.Join(x.dir, "broken.qcow2")
			writeFile(t, path, x.data)
			before, after, err := Repair(t.Context(), path, RepairAll, CheckOptions{})
			must(t, err)
			if before.Corruptions != 1 || !strings.Contains(before.Findings[0].What, "it has room for") || !after.Clean() {
				t.Errorf("%v, then %v", before.Findings, after.Findings)
			}
			if got := int(binary.BigEndian.Uint32(readFile(t, path)[60:])); got != c.kept {
				t.Errorf("%d snapshots are left, want %d", got, c.kept)
			}
			x.sameData(t, path, nil)
			if c.qemu {
				qemu(t, "qemu-img", "check", "-q", path)
			}
		})
	}
}

package qcow2

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// qemuVerdict is what qemu-img check says.
type qemuVerdict struct {
	Corruptions, Leaks int64
	End                int64 `json:"image-end-offset"`
	Total              int64 `json:"total-clusters"`
	Allocated          int64 `json:"allocated-clusters"`
	Fragmented         int64 `json:"fragmented-clusters"`
	Compressed         int64 `json:"compressed-clusters"`
}

// qemuCheckJSON lets QEMU check the image. ok is false if it cannot.
func qemuCheckJSON(t testing.TB, path string) (v qemuVerdict, ok bool) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img, the witness of this test, is not installed")
	}
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", "--output=json", path).Output()
	if e, is := errors.AsType[*exec.ExitError](err); is && e.ExitCode() == 1 {
		return v, false
	}
	if err := json.Unmarshal(out, &v); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return v, true
}

func check(t testing.TB, path string) *CheckResult {
	t.Helper()
	r, err := Check(t.Context(), path, CheckOptions{})
	must(t, err)
	return r
}

// sameVerdict compares all the counts of a check with QEMU's.
func sameVerdict(t testing.TB, path string) *CheckResult {
	t.Helper()
	r := check(t, path)
	theirs, ok := qemuCheckJSON(t, path)
	corruptions := r.Corruptions
	for _, f := range r.Findings {
		if strings.Contains(f.What, "is claimed by two") || strings.Contains(f.What, "something else points to it") {
			corruptions-- // QEMU minds the counts of such a table only
		}
	}
	ours := qemuVerdict{corruptions, r.Leaks, r.ImageEnd, r.Total, r.Allocated, r.Fragmented, r.Compressed}
	if d := cmp.Diff(theirs, ours); !ok || d != "" {
		t.Errorf("QEMU's verdict, and ours: %s%v", d, r.Findings)
	}
	return r
}

// TestCheckGood checks images of all kinds that QEMU made and both wrote.
func TestCheckGood(t *testing.T) {
	for _, c := range []struct {
		options     string
		packed      bool
		snap        bool
		bitmap      bool
		clusterSize int
	}{
		{"compat=0.10,cluster_size=4k", true, true, false, 4096},
		{"compat=1.1,cluster_size=512,refcount_bits=64", false, true, true, 512},
		{"compat=1.1,cluster_size=4k,refcount_bits=32", true, true, true, 4096},
		{"compat=1.1,cluster_size=2k,refcount_bits=1", false, false, true, 2048},
		{"compat=1.1,cluster_size=2M,compression_type=zstd", true, true, true, 2 << 20},
		{"compat=1.1,extended_l2=on,cluster_size=16k", true, true, true, 16 << 10},
		{"compat=1.1,extended_l2=on,refcount_bits=64,preallocation=metadata", false, true, false, 65536},
		{"compat=1.1,preallocation=metadata", false, false, false, 65536},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			model := make([]byte, 2<<20+512)
			patch(r, model, 20)
			raw := filepath.Join(dir, "raw")
			writeFile(t, raw, model)
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", c.options}
			if c.packed {
				args = append(args, "-c")
			}
			qemu(t, "qemu-img", append(args, raw, path)...)
			sameVerdict(t, path)
			qemuWrite(t, r, path, model, 10)
			if c.snap {
				qemu(t, "qemu-img", "snapshot", "-c", "one", path)
				qemuWrite(t, r, path, model, 10)
				qemu(t, "qemu-img", "snapshot", "-c", "two", path)
			}
			qemuWrite(t, r, path, model, 10)
			if c.bitmap {
				qemu(t, "qemu-img", "bitmap", "--add", path, "b0")
				qemu(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "b1")
				qemuWrite(t, r, path, model, 5)
			}
			if v := sameVerdict(t, path); !v.Clean() {
				t.Errorf("not clean: %v", v.Findings)
			}
			ourWrite(t, r, path, model, 30)
			// Our writes made the bitmaps void, so their clusters leak.
			if v := sameVerdict(t, path); v.Corruptions > 0 || v.Leaks > 0 && !c.bitmap {
				t.Errorf("not clean: %v", v.Findings)
			}
		})
	}
}

// TestCheckCorrupt breaks an image with a snapshot and compressed clusters in
// the ways that QEMU's own tests break images.
func TestCheckCorrupt(t *testing.T) {
	path := create(t, CreateOptions{Size: 4 << 20})
	m := open(t, path, Options{})
	must(t, m.WritevAt([][]byte{make([]byte, 3<<16)}, 0))
	l2 := int64(m.l1[0] & entryOffset)
	closeImage(t, m)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 1 1M 64k", "-c", "write -c -P 2 1088k 64k", "-c", "write -z 2M 64k", path)
	plain, err := os.ReadFile(path)
	must(t, err)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", path)
	shared, err := os.ReadFile(path)
	must(t, err)
	for _, c := range []struct {
		name   string
		off    int64
		width  int
		value  uint64
		broken string // which of the two images is beyond repair
	}{
		{"nothing", 0, 4, magic, ""},
		{"L1 entry at itself", 0x30000, 8, 0x8000000000030000, "plain shared"},
		{"L1 entry reserved bits", 0x30000, 8, 0xf000000000000000 | uint64(l2), "plain shared"},
		{"L1 entry dropped", 0x30000, 8, 0, ""},
		{"L1 entry at the refcount block", 0x30000, 8, 0x8000000000020000, "plain shared"},
		{"L1 entry not COPIED", 0x30000, 8, uint64(l2), ""},
		{"L2 entry at the refcount block", l2, 8, 0x8000000000020000, ""},
		{"L2 entry at the header", l2, 8, 0x8000000000000001, ""},
		{"L2 entry at itself", l2, 8, entryCopied | uint64(l2), ""},
		{"L2 entry far away", l2, 8, 0x0080000000000000, "plain shared"},
		{"L2 entry beyond the end", l2, 8, 0x8000000000900000, "plain shared"},
		{"L2 entry dropped", l2, 8, 0, ""},
		{"L2 entry not COPIED", l2, 8, 0x50000, ""},
		{"L2 reserved bits", l2, 8, 0xbf00000000050000, "plain shared"},
		{"two L2 entries at one cluster", l2, 8, 0x8000000000060000, ""},
		{"compressed data moved", l2 + 16*8, 8, 0x4000000000050010, ""},
		{"compressed data far away", l2 + 16*8, 8, 0x403fff0000000000, "plain shared"},
		{"compressed and COPIED", l2 + 16*8, 8, 0xc000000000050010, ""},
		{"compressed data long", l2 + 17*8, 1, 0x7f, "plain shared"},
		{"count of the header zero", 0x20000, 2, 0, ""},
		{"count of the header two", 0x20000, 2, 2, ""},
		{"count of live data zero", 0x20000 + 10, 2, 0, ""},
		{"count of live data five", 0x20000 + 10, 2, 5, ""},
		{"count of nothing", 0x20000 + 2*14, 2, 1, ""},
		{"two blocks at one cluster", 0x10008, 8, 0x20000, ""},
		{"table entry far", 0x10008, 8, 0x7fffffffffff0000, ""},
		{"table entry reserved bits", 0x10008, 8, 0x100, ""},
		{"dirty", 72, 8, 1, ""},
		{"corrupt", 72, 8, 2, ""},
	} {
		for name, good := range map[string][]byte{"plain": plain, "shared": shared} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				b := append([]byte(nil), good...)
				put(b, c.off, c.width, c.value)
				path := filepath.Join(t.TempDir(), "disk.qcow2")
				writeFile(t, path, b)
				sameVerdict(t, path)
				after, err := os.ReadFile(path)
				if err != nil || string(after) != string(b) {
					t.Error("the check changed the image")
				}
				_, repaired, err := Repair(t.Context(), path, RepairLeaks, CheckOptions{})
				must(t, err)
				after, err = os.ReadFile(path)
				if !repaired.Clean() && (err != nil || string(after) != string(b)) {
					t.Error("the repair changed an image that it cannot mend")
				}
				if again := sameVerdict(t, path); again.Clean() != repaired.Clean() {
					t.Errorf("the repair is content with %v", again.Findings)
				}
				_, repaired, err = Repair(t.Context(), path, RepairAll, CheckOptions{})
				must(t, err)
				if again := sameVerdict(t, path); again.Clean() != repaired.Clean() || again.Clean() == strings.Contains(c.broken, name) {
					t.Errorf("the repair of all leaves %v", again.Findings)
				}
				if repaired.Clean() {
					closeImage(t, open(t, path, Options{}))
				}
			})
		}
	}
}

// TestCheckRuns breaks single entries and counts inside long runs of clusters that
// follow each other, and of clusters that snapshots share, which a check counts
// many at a time.
func TestCheckRuns(t *testing.T) {
	rounds := 12
	if brief() {
		rounds = 3
	}
	for options, size := range map[string]string{
		"cluster_size=512,refcount_bits=64":                "1M",
		"cluster_size=4k,refcount_bits=16":                 "5M",
		"cluster_size=64k,refcount_bits=1":                 "12M",
		"cluster_size=64k,refcount_bits=16":                "12M",
		"cluster_size=16k,extended_l2=on,refcount_bits=32": "12M",
	} {
		t.Run(options, func(t *testing.T) {
			r := newSeed(t)
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,"+options, path, size)
			for i := range rounds {
				if i == rounds/2 && !strings.HasSuffix(options, "refcount_bits=1") {
					qemu(t, "qemu-img", "snapshot", "-c", "s", path)
				}
				sound, err := os.ReadFile(path)
				must(t, err)
				broken := slices.Clone(sound)
				for range 1 + r.IntN(3) {
					breakRun(t, r, path, broken)
				}
				writeFile(t, path, broken)
				sameVerdict(t, path)
				writeFile(t, path, sound)
				if v := sameVerdict(t, path); !v.Clean() {
					t.Errorf("%v", v.Findings)
				}
			}
		})
	}
}

// breakRun changes an L2 entry or a count of the image in b, which is that at path.
func breakRun(t *testing.T, r *rand.Rand, path string, b []byte) {
	t.Helper()
	m := open(t, path, Options{})
	defer closeImage(t, m)
	table := int64(m.l1[r.IntN(len(m.l1))] & entryOffset)
	if table == 0 {
		return
	}
	at := table + r.Int64N(m.clusterSize>>3>>m.wordBits)<<3<<m.wordBits
	e := binary.BigEndian.Uint64(b[at:])
	if e == 0 {
		return
	}
	kind := r.IntN(5)
	if e&entryCopied == 0 {
		kind &^= 2 // QEMU reports pointers that lead nowhere once for each snapshot
	}
	switch kind {
	case 0:
		put(b, at, 8, e^entryCopied)
	case 1:
		put(b, at, 8, 0)
	case 2:
		put(b, at, 8, e+uint64(m.clusterSize)*uint64(r.IntN(100))) //nolint:gosec // G115: positive
	case 3:
		put(b, at, 8, e+512)
	case 4:
		block := int64(m.refs.table[m.cluster(int64(e&entryOffset))>>m.refBlockBits] & entryOffset)
		count := m.cluster(int64(e&entryOffset)) & (1<<m.refBlockBits - 1)
		setCount(b[block:][:m.clusterSize], m.refcountOrder, count, uint64(r.IntN(2))*m.maxCount())
	}
}

// TestCheckEnds gives a check no memory, no time, and images it must refuse.
func TestCheckEnds(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	if _, err := Check(t.Context(), path, CheckOptions{MemoryBytes: 100}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without memory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Check(ctx, path, CheckOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	m := open(t, path, Options{})
	if _, err := Check(t.Context(), path, CheckOptions{}); !errors.Is(err, ErrLocked) {
		t.Errorf("beside a writer: %v", err)
	}
	closeImage(t, m)
	for bit, name := range map[uint]string{5: "bit 5", 40: "bit 40"} {
		b, err := os.ReadFile(path)
		must(t, err)
		put(b, offIncompatible, 8, 1<<bit)
		other := filepath.Join(t.TempDir(), "other")
		writeFile(t, other, b)
		if _, err := Check(t.Context(), other, CheckOptions{}); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f := &memFile{data: plainImage(t), fail: nil}
	total := 0
	f.setFail(func(string) error { total++; return nil })
	_, err := checkIn(t.Context(), f, "memory", CheckOptions{})
	must(t, err)
	for at := 1; at <= total; at++ {
		n := 0
		f.setFail(func(string) error {
			if n++; n == at {
				return errors.New("broken")
			}
			return nil
		})
		if _, err := checkIn(t.Context(), f, "memory", CheckOptions{}); err == nil {
			t.Errorf("failure %d of %d was ignored", at, total)
		}
	}
}

func plainImage(t testing.TB) []byte {
	b, _ := hostileImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	return b
}

// FuzzCheck changes bytes of a good image with a bitmap directory's worth of
// extension and checks it: it ends, in bounded memory, and never panics.
func FuzzCheck(f *testing.F) {
	good := plainImage(f)
	f.Add(uint16(60), uint64(0x00000003_00000000), uint16(66), uint64(0x1000_0000_0000))
	f.Add(uint16(0x3000), uint64(0x8000_0000_0000_3000), uint16(0x1000), uint64(0x7000))
	f.Add(uint16(112), uint64(extBitmaps)<<32|24, uint16(88), uint64(1))
	f.Fuzz(func(t *testing.T, off1 uint16, v1 uint64, off2 uint16, v2 uint64) {
		b := append([]byte(nil), good...)
		put(b, int64(off1)%int64(len(b)-8), 8, v1)
		put(b, int64(off2)%int64(len(b)-8), 8, v2)
		r, err := checkIn(t.Context(), &memFile{data: b}, "fuzz", CheckOptions{MemoryBytes: 1 << 20})
		if err == nil && int64(len(r.Findings)) != min(r.Leaks+r.Corruptions, maxFindings) {
			t.Errorf("%d findings of %d leaks and %d corruptions", len(r.Findings), r.Leaks, r.Corruptions)
		}
	})
}

// bothCheck compares the library's verdict with that of the checker of the
// tests.
func bothCheck(data []byte, v verdict) error {
	r, err := checkIn(context.Background(), &memFile{data: data}, "memory", CheckOptions{})
	if err != nil {
		return err
	}
	if (r.Corruptions > 0) != (len(v.corruptions) > 0) || r.Leaks != int64(v.leaks) {
		return fmt.Errorf("Check finds %v, the tests' checker %v and %d leaks", r.Findings, v.corruptions, v.leaks)
	}
	return nil
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// control is work that goes wrong without a barrier, by the oracles of the crash
// tests, or the reason why none does.
type control struct {
	work func(t *testing.T, r *rand.Rand, noBarrier func(site string) bool) error
	why  string
}

// controls has an entry for each barrier in the package: named by the function
// that asks for it, and its number there.
var controls = map[string]control{
	// Raised counts before pointers.
	"Image.commit 1": {work: workloadOf("512")},
	// Pointers before the reuse of what they pointed to, and before Flush returns.
	"Image.commit 2": {work: workloadOf("512")},
	// A refcount block before the table's entry for it, and the contents of a
	// larger refcount table before the header points to it.
	"refcounts.writeNewBlocks 1": {work: workloadOf("refcounts grow")},
	// The header's pointer to the larger table before the old one is punched.
	"refcounts.switchTable 1": {work: workloadOf("table grows")},
	// The clearing of autoclear bits before the data that they speak of changes.
	"Image.clearAutoclear 1": {work: workloadOf("autoclear")},
	// The contents of a larger L1 table before the header points to it.
	"Image.switchL1 1": {work: workloadOf("resized")},
	// The disk's new length before Resize returns.
	"Image.switchSize 1": {work: workloadOf("resized")},
	// All tables before the header that makes the file an image.
	"plan.write 1": {work: creation},
	// The header before Create returns.
	"plan.write 2":                 {work: creation},
	"plan.writeData 1":             {why: "the length and the zeros of a new data file follow when it is lost"},
	"checker.clearVoid 1":          {work: repairOf("shared")},
	"checker.clearMarks 1":         {work: repairOf("shared")},
	"checker.mendCounts 1":         {work: repairOf("leaks")},
	"checker.mendFlags 1":          {work: repairOf("shared")},
	"checker.mendZeroes 1":         {work: repairOf("zero")},
	"checker.rebuildCounts 1":      {work: repairOf("lost")},
	"checker.rebuildCounts 2":      {work: repairOf("table lost")},
	"checker.writeStrays 1":        {why: "the counts of the copies change before, and have a barrier"},
	"checker.writeStrays 2":        {why: "the counts of the tables that the data leaves change next, and have a barrier"},
	"checker.writeSnapshotTable 1": {work: repairOf("snapshot")},
	"checker.writeSnapshotTable 2": {work: repairOf("snapshot")},
	// The marks of the bitmaps before the disk changes.
	"Image.markAll 1": {work: bitmapsWithout},
	// The extension for bitmaps before the bit without which it is void, and each
	// step to it before the next.
	"bitmapChange.writeDurably 1": {work: bitmapChangesWithout},
	// All new tables before the header points to them, and that before a change of
	// snapshots returns and what it freed is used again.
	"rewrite.prepare 1":    {work: snapshotsWithout},
	"rewrite.switchOver 1": {work: snapshotsWithout},
	// The extensions and the name before the sector that leads to them, and that
	// before what it led to is written over.
	"Image.putFirst 1":      {work: underWithout},
	"Image.putFirst 2":      {work: underWithout},
	"rawBacking.Flush 1":    {why: "nothing in a raw file depends on it: it is for whoever asks"},
	"Image.setCorruptBit 1": {why: "an image that lost its corrupt bit is found corrupt again"},
}

// TestCrashHarnessDetects removes each barrier in turn. The harness finds a
// broken state, or the table says why there is none.
func TestCrashHarnessDetects(t *testing.T) {
	sites := barrierSites(t)
	for _, name := range slices.Sorted(maps.Values(sites)) {
		c, ok := controls[name]
		if !ok {
			t.Errorf("%s: say in controls what goes wrong without this barrier", name)
		}
		if c.work == nil {
			continue
		}
		t.Run(name, func(t *testing.T) {
			r := newSeed(t)
			err := error(nil)
			for range 10 {
				if err = c.work(t, r, func(site string) bool { return sites[site] == name }); err != nil {
					break
				}
			}
			if err == nil {
				t.Error("without this barrier no broken state was found")
			} else {
				t.Log(err)
			}
		})
	}
	for name := range controls {
		if !slices.Contains(slices.Collect(maps.Values(sites)), name) {
			t.Errorf("%s: no such barrier", name)
		}
	}
}

// workloadOf records the workload with the given name and returns what the
// oracles find.
func workloadOf(name string) func(*testing.T, *rand.Rand, func(string) bool) error {
	return func(t *testing.T, r *rand.Rand, noBarrier func(string) bool) error {
		w := workloads[slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })]
		run := record(t, w, r, noBarrier)
		o := newOracles(t, run, w, r)
		o.qemuEvery, o.moreEvery, o.repairEvery = 0, 0, 0
		found := error(nil)
		run.statesAt(afterLost(run.f.log, cuts(run.f.log, r, 20000), 400), func(s state) bool {
			found = o.judge(s)
			return found == nil
		})
		return found
	}
}

// creation records the making of an image. A file is a whole image or none, and
// a whole one once Create has returned.
func creation(t *testing.T, r *rand.Rand, noBarrier func(string) bool) error {
	opts := CreateOptions{Size: 1 << 20, ClusterSize: 512, Preallocation: PreallocateMetadata}
	p, err := opts.plan()
	must(t, err)
	run := &crashRun{f: &memFile{rec: true, noBarrier: noBarrier}, path: filepath.Join(t.TempDir(), "disk.qcow2")}
	must(t, p.write(run.f))
	made := run.f.mark("flush")
	found := error(nil)
	run.states(r, 200, func(s state) bool {
		if bytes.HasPrefix(s.data, []byte("QFI\xfb")) {
			found = checkState(s.data)
		} else if s.cut > made {
			found = errors.New("no image")
		}
		return found == nil
	})
	return found
}

// TestCrashCreate cuts the power while an image is made.
func TestCrashCreate(t *testing.T) {
	if err := creation(t, newSeed(t), nil); err != nil {
		t.Error(err)
	}
}

// flaws break an image with data and a snapshot in clusters of 4 KiB.
var flaws = map[string]func(b []byte){
	// The count of the last cluster, which nobody uses.
	"leaks": func(b []byte) { put(b, field(b, field(b, offRefTable))+int64(len(b)-1)>>12*2, 2, 1) },
	// Clusters counted twice and used once, with flags that say so.
	"shared": func(b []byte) {
		for i := range int64(8) {
			l2 := field(b, field(b, offL1Offset)&entryOffset)&entryOffset + 8*i
			e := field(b, l2)
			put(b, l2, 8, uint64(e)&^entryCopied)
			put(b, field(b, field(b, offRefTable))+(e&entryOffset)>>12*2, 2, 2)
		}
	},
	// A reserved cluster that is none.
	"zero": func(b []byte) {
		put(b, field(b, field(b, offL1Offset)&entryOffset)&entryOffset+8*12, 8, 0x5200|entryZero)
	},
	// Guest data where the L1 table is.
	"stray": func(b []byte) {
		put(b, field(b, field(b, offL1Offset)&entryOffset)&entryOffset+8*12, 8, uint64(field(b, offL1Offset))|entryCopied)
	},
	// A block of counts, and their table.
	"table lost": func(b []byte) { put(b, offRefTable, 8, 1<<40) },
	"lost":       func(b []byte) { put(b, field(b, offRefTable), 8, 0) },
	// The length of a snapshot's disk.
	"snapshot": func(b []byte) { put(b, field(b, offSnapshots+4)+36, 4, 8) },
}

// field reads the 8 bytes at off of an image.
func field(b []byte, off int64) int64 { return int64(binary.BigEndian.Uint64(b[off:])) }

// repairOf records the repair of an image with a flaw, which was not closed
// cleanly and has data of an unknown feature.
func repairOf(flaw string) func(*testing.T, *rand.Rand, func(string) bool) error {
	return func(t *testing.T, r *rand.Rand, noBarrier func(string) bool) error {
		w := workload{opts: CreateOptions{Size: 64 << 10, ClusterSize: 4096}, prepare: filled(40 << 10)}
		if flaw == "snapshot" {
			w.prepare = snapshotted(40 << 10)
		}
		run := newRun(t, w)
		disk := run.disk
		if flaw == "leaks" {
			run.start = append(run.start, make([]byte, 4096)...)
		}
		flaws[flaw](run.start)
		if flaw == "stray" {
			copy(disk[12*4096:][:4096], run.start[field(run.start, offL1Offset):])
		}
		put(run.start, offIncompatible, 8, 1<<incompatDirty|1<<incompatCorrupt)
		put(run.start, offAutoclear, 8, 1<<63)
		run.f = &memFile{data: slices.Clone(run.start), rec: true, noBarrier: noBarrier}
		before, after, err := repairIn(t.Context(), run.f, run.path, RepairAll, CheckOptions{})
		if err != nil || before.Clean() || !after.Clean() {
			t.Fatalf("%+v, repaired: %+v, %v", before, after, err)
		}
		end := run.f.mark("flush")
		_, err = run.verify(t, state{data: run.start})
		readable, found := err == nil, error(nil)
		run.states(r, 250, func(s state) bool {
			found = run.noWorse(t, s, before, disk)
			if _, err := run.verify(t, s); found == nil && readable {
				found = err
			}
			if marks := s.data[offIncompatible+7]; found == nil && s.cut > end && marks != 0 {
				found = errors.New("the marks came back")
			}
			return found == nil
		})
		return found
	}
}

// noWorse judges what is left of an interrupted repair.
func (run *crashRun) noWorse(t *testing.T, s state, before *CheckResult, disk []byte) error {
	x, err := newChecker(t.Context(), &memFile{data: s.data}, run.path, CheckOptions{})
	must(t, err)
	must(t, x.check())
	switch check := &x.result; {
	case check.Corruptions-x.flags > before.Corruptions: // a flag is valid either way
		return fmt.Errorf("%s at %d: worse: %v", s.what, s.cut, check.Findings)
	case s.data[offIncompatible+7] == 0 && !check.Clean():
		return fmt.Errorf("%s at %d: not marked and not clean: %v", s.what, s.cut, check.Findings)
	case s.data[offAutoclear] != 0 && !bytes.Equal(s.data[sector:], run.start[sector:]):
		return fmt.Errorf("%s at %d: an unknown autoclear bit stands beside changes", s.what, s.cut)
	}
	return run.repaired(t, s, disk)
}

// TestCrashRepair cuts the power while images are repaired.
func TestCrashRepair(t *testing.T) {
	for flaw := range flaws {
		if err := repairOf(flaw)(t, newSeed(t), nil); err != nil {
			t.Errorf("%s: %v", flaw, err)
		}
	}
}

func siteOf(file string, line int) string { return fmt.Sprintf("%s:%d", filepath.Base(file), line) }

// barrierSites finds every barrier in the package's code, by its place.
func barrierSites(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	must(t, err)
	sites := map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		parsed, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		must(t, err)
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Name.Name == "datasync" || f.Name.Name == "Fdatasync" {
				continue
			}
			n := 0
			ast.Inspect(f, func(node ast.Node) bool {
				if s, ok := node.(*ast.SelectorExpr); ok && (s.Sel.Name == "datasync" || s.Sel.Name == "Fdatasync") {
					n++
					sites[siteOf(name, set.Position(s.Sel.Pos()).Line)] = fmt.Sprintf("%s %d", funcName(f), n)
				}
				return true
			})
		}
	}
	return sites
}

// funcName returns the name of the function, with its receiver's type.
func funcName(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return f.Name.Name
	}
	of := f.Recv.List[0].Type
	if star, ok := of.(*ast.StarExpr); ok {
		of = star.X
	}
	return fmt.Sprintf("%s.%s", of, f.Name.Name)
}

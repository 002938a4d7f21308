package qcow2

import (
	"bytes"
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
	// All tables before the header that makes the file an image.
	"plan.write 1": {work: creation},
	// The header before Create returns.
	"plan.write 2":          {work: creation},
	"plan.writeData 1":      {why: "the length and the zeros of a new data file follow when it is lost"},
	"Image.setCorruptBit 1": {why: "an image that lost its corrupt bit is found corrupt again"},
}

// TestCrashHarnessDetects removes each barrier in turn. The harness finds a
// broken state, or the table says why there is none.
func TestCrashHarnessDetects(t *testing.T) {
	sites := barrierSites(t)
	for _, name := range slices.Sorted(maps.Values(sites)) {
		c, ok := controls[name]
		if !ok {
			t.Logf("%s: no control in the table", name)
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
	run.states(r, 500, func(s state) bool {
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

package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

// bitmapScript is a series of changes of bitmaps, in which an empty one is a write
// to the disk.
var bitmapScript = []bitmapOp{
	{how: "add", name: "a", opts: BitmapOptions{Granularity: 512}},
	{how: "merge", name: "a", source: "512", from: "other"},
	{how: "add", name: "b", opts: BitmapOptions{Granularity: 4096, Disabled: true}},
	{how: "merge", name: "b", source: "a"},
	{how: "resize", size: 300<<10 + 512},
	{how: "resize"}, // to what it was
	{how: "disable", name: "a"},
	{how: "enable", name: "b"},
	{how: "clear", name: "a"},
	{},
	{how: "resize", size: 800 << 10}, // with one that is in use
	{how: "remove", name: "b"},
	{how: "resize"},
	{how: "merge", name: "a", source: "32768", from: "other"},
	{how: "remove", name: "a"},
	{how: "add", name: "c", opts: BitmapOptions{Granularity: 1 << 20}},
}

// bitmapMark is a moment of a recorded script: what the image has from there on.
type bitmapMark struct {
	pos  int
	have tracked
	size int64 // of the disk
	used bool  // any of them may be in use
}

// inUse is the same where any of the bitmaps may be in use.
func (m bitmapMark) inUse() bitmapMark {
	m.used = true
	return m
}

// bitmapCase is an image on which changes of bitmaps are cut short.
type bitmapCase struct {
	workload
	// void says that the extension lies across two sectors, so that a power cut
	// may leave no bitmaps.
	void bool
}

// bitmapCases differ in where the header has room for an extension.
var bitmapCases = []bitmapCase{
	{workload: workload{opts: CreateOptions{Size: 5<<20 + 512, ClusterSize: 512}}}, // with tables of several entries
	{workload: workload{opts: CreateOptions{Size: 1 << 20, ClusterSize: 4096}, under: 4096, prepare: longName}},
	{workload: workload{opts: CreateOptions{Size: 1 << 20, ClusterSize: 4096}, prepare: withExtension(488)}, void: true},
	{workload: workload{opts: CreateOptions{Size: 1 << 20, ClusterSize: 64 << 10}}},
}

// withExtension puts an unknown extension of n bytes before all others.
func withExtension(n int) func(testing.TB, string) {
	return func(t testing.TB, path string) {
		b := readFile(t, path)
		copy(b[headerLengthOur:4096], append(appendExtension(nil, 0x12345678, make([]byte, n)), b[headerLengthOur:4096]...))
		writeFile(t, path, b)
	}
}

// longName gives the backing file a name that is longer than the extension, before
// which it has to move.
func longName(t testing.TB, path string) {
	b := readFile(t, path)
	name := strings.Repeat("./", 40) + "base"
	copy(b[field(b, offBackingName):4096], name)
	put(b, offBackingName+8, 4, uint64(len(name)))
	writeFile(t, path, b)
}

// bitmapRun records the script. It also returns the bitmaps of the other image.
func bitmapRun(t *testing.T, r *rand.Rand, c bitmapCase, noBarrier func(string) bool) (*crashRun, []bitmapMark, tracked) {
	t.Helper()
	size := c.opts.Size
	run := newRun(t, c.workload)
	run.f.noBarrier = noBarrier
	_, others := otherBitmaps(t, r, filepath.Dir(run.path), size)
	m := run.open(t, run.f, false)
	have := tracked{}
	marks := []bitmapMark{{have: have.clone(), size: size}}
	for _, o := range bitmapScript {
		if o.how == "" {
			if _, err := m.WriteAt(stamps(100, 3, 1), 100*sector); err != nil {
				t.Fatal(err)
			}
			for _, b := range have {
				b.InUse = b.InUse || b.Enabled
			}
		} else {
			o = o.in(run)
			must(t, o.do(t.Context(), m))
			have.track(o, size, others)
		}
		marks = append(marks, bitmapMark{pos: run.f.mark("flush"), have: have.clone(), size: m.Size()})
	}
	closeImage(t, m)
	return run, marks, others
}

// in is o for the image of the run, beside which the other one lies.
func (o bitmapOp) in(run *crashRun) bitmapOp {
	if o.from != "" {
		o.from = filepath.Join(filepath.Dir(run.path), o.from+".qcow2")
	}
	if o.how == "resize" && o.size == 0 {
		o.size = int64(len(run.disk))
	}
	return o
}

// bitmapsIn returns an error unless the image has the bitmaps of the mark.
func (run *crashRun) bitmapsIn(t *testing.T, data []byte, mark bitmapMark) error {
	want := mark.have
	m, err := run.openIn(&memFile{data: data}, Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer closeImage(t, m)
	list, err := m.Bitmaps()
	if err != nil || len(list) != len(want) || m.Size() != mark.size {
		return fmt.Errorf("the bitmaps are %v (%w)", list, err)
	}
	for _, b := range list {
		is := b
		is.InUse = is.InUse && !mark.used
		if want[b.Name] == nil || want[b.Name].Bitmap != is && want[b.Name].Bitmap != b {
			return fmt.Errorf("there is the bitmap %v", b)
		}
		if b.InUse {
			continue
		}
		got, err := dirtyOf(m, b.Name)
		if ranges := want[b.Name].ranges(m.Size()); err != nil || !reflect.DeepEqual(got, ranges) {
			return fmt.Errorf("%v says %v instead of %v (%w)", b, got, ranges, err)
		}
	}
	return nil
}

// bitmapsInAny returns an error unless the image has the bitmaps of one of the marks.
func (run *crashRun) bitmapsInAny(t *testing.T, data []byte, marks []bitmapMark) (err error) {
	for _, mark := range marks {
		if err = run.bitmapsIn(t, data, mark); err == nil {
			return nil
		}
	}
	return err
}

// judgeBitmapChange returns an error unless the state is one that a power cut between
// the marks may leave.
func (run *crashRun) judgeBitmapChange(t *testing.T, c bitmapCase, s state, marks []bitmapMark) error {
	if err := checkState(s.data); err != nil {
		return err
	}
	i := 0
	for i+1 < len(marks) && marks[i+1].pos < s.cut {
		i++
	}
	may := []bitmapMark{marks[i]}
	if i+1 < len(marks) {
		next := marks[i+1]
		may = append(may, next)
		if next.size != marks[i].size {
			may = append(may, marks[i].inUse(), next.inUse())
		}
	}
	if c.void {
		may = append(may, bitmapMark{size: marks[i].size}, bitmapMark{size: may[len(may)-1].size})
	}
	old := run.bitmapsInAny(t, s.data, may)
	if old == nil {
		return nil
	}
	return fmt.Errorf("%s at %d, after change %d: %w", s.what, s.cut, i, old)
}

// TestCrashBitmapChanges cuts the power while bitmaps are changed: each change has
// happened wholly or not at all.
func TestCrashBitmapChanges(t *testing.T) {
	n := 1500
	if brief() {
		n = 200
	}
	for _, c := range bitmapCases {
		r := newSeed(t)
		run, marks, _ := bitmapRun(t, r, c, nil)
		if v := checkImage(run.f.data); v.leaks > 0 {
			t.Errorf("%d clusters leaked", v.leaks)
		}
		run.states(r, n, func(s state) bool {
			if err := run.judgeBitmapChange(t, c, s, marks); err != nil {
				t.Error(err)
			}
			return !t.Failed()
		})
	}
}

// bitmapChangesWithout is the control of a barrier: see controls.
func bitmapChangesWithout(t *testing.T, r *rand.Rand, noBarrier func(string) bool) (found error) {
	run, marks, _ := bitmapRun(t, r, bitmapCases[1], noBarrier)
	run.statesAt(afterLost(run.f.log, cuts(run.f.log, r, 5000), 300), func(s state) bool {
		found = run.judgeBitmapChange(t, bitmapCases[1], s, marks)
		return found == nil
	})
	return found
}

// TestFaultyBitmapChanges fails the file operations of changes of bitmaps, once or
// from then on. A change that fails has not happened, or the image takes no more
// writes; then the next open shows it done or not, or no bitmaps at all. What leaks
// can be mended, and nothing leaks when the image goes on.
func TestFaultyBitmapChanges(t *testing.T) {
	r := newSeed(t)
	for _, c := range bitmapCases[:2] {
		run, marks, _ := bitmapRun(t, r, c, nil)
		for i, o := range bitmapScript {
			if o.how == "" {
				continue
			}
			start := append([]byte(nil), run.start...)
			for _, e := range run.f.log[:marks[i].pos] {
				start = e.apply(start)
			}
			for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
				for _, always := range []bool{false, true} {
					step := 1
					if brief() {
						step = 7
					}
					for at := 1 + r.IntN(step); run.faultyBitmapChange(t, start, marks[i], marks[i+1], o.in(run), fault{at, errno, always}); at += step {
						if t.Failed() {
							t.Fatalf("%+v: %v", o, fault{at, errno, always})
						}
					}
				}
			}
		}
	}
}

// faultyBitmapChange does one change with a fault, and returns whether the fault
// happened before the change was complete.
func (run *crashRun) faultyBitmapChange(t *testing.T, start []byte, from, to bitmapMark, o bitmapOp, bad fault) bool {
	t.Helper()
	f := &memFile{data: append([]byte(nil), start...)}
	m := run.open(t, f, false)
	ops, hit := 0, ""
	f.setFail(func(op string) error {
		if ops++; bad.hits(ops, op) {
			hit = op
			return bad.errno
		}
		return nil
	})
	err := o.do(t.Context(), m)
	f.setFail(nil)
	if err == nil && hit != "" && hit != "punch" && hit != "truncate" {
		t.Errorf("nobody was told that a %s failed", hit)
	}
	want := []bitmapMark{to}
	switch {
	case err == nil:
	case !known(err):
		t.Errorf("%+v: %v", o, err)
	case m.usable() != nil:
		want = append(want, from, bitmapMark{size: from.size}, from.inUse(), to.inUse())
	default: // and then it goes well
		if err := o.do(t.Context(), m); err != nil {
			t.Errorf("the second time: %v", err)
		}
		if o.how == "resize" {
			want = append(want, to.inUse())
		}
	}
	broken := m.usable() != nil
	_ = m.Close()
	// The start was cut out of a run, and may have leaks.
	if v := checkImage(f.data); len(v.corruptions) > 0 || !broken && v.leaks > checkImage(start).leaks {
		t.Errorf("afterwards: %+v", v)
	}
	if err := run.bitmapsInAny(t, f.data, want); err != nil {
		t.Error(err)
	}
	return hit != ""
}

// TestCancelledBitmapChange cancels changes at every step: the image is as it was,
// and takes the same change afterwards.
func TestCancelledBitmapChange(t *testing.T) {
	r := newSeed(t)
	run, _, others := bitmapRun(t, r, bitmapCases[0], nil)
	m := run.open(t, run.f, false)
	have := tracked{"c": newTracked("c", 1<<20, m.Size(), true)}
	for _, o := range []bitmapOp{
		{how: "add", name: "d", opts: BitmapOptions{Granularity: 512}},
		{how: "merge", name: "d", source: "512", from: "other"},
		{how: "clear", name: "d"},
	} {
		cancelled := 0
		for steps := 0; ; steps++ {
			err := o.in(run).do(&lateContext{Context: t.Context(), left: steps}, m)
			if err == nil {
				break
			}
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			cancelled++
			must(t, m.commits.run(m.commitAll)) // which lowers the counts
			if err := run.bitmapsIn(t, run.f.data, bitmapMark{have: have, size: m.Size()}); err != nil {
				t.Fatalf("%+v after %d steps: %v", o, steps, err)
			}
			if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
				t.Fatalf("%+v after %d steps: %+v", o, steps, v)
			}
		}
		have.track(o, m.Size(), others)
		if cancelled < 2 {
			t.Errorf("%+v: only %d cancellations", o, cancelled)
		}
	}
	closeImage(t, m)
	if err := run.bitmapsIn(t, run.f.data, bitmapMark{have: have, size: m.Size()}); err != nil {
		t.Error(err)
	}
}

// bitmap changes a persistent bitmap. What they have is judged by tests of their own;
// here they are in the way of everything else.
func (w *worker) bitmap() error {
	m, ctx := w.run.m, context.Background()
	all, err := m.Bitmaps()
	if err != nil {
		return err
	}
	if len(all) < 1+w.r.IntN(3) {
		return m.AddBitmap(ctx, fmt.Sprint("b", w.run.seq.Add(1)), BitmapOptions{Granularity: 512 << w.r.IntN(4)})
	}
	b := all[w.r.IntN(len(all))]
	switch {
	case b.InUse || w.r.IntN(4) == 0:
		return m.RemoveBitmap(ctx, b.Name)
	case b.Enabled:
		return m.DisableBitmap(ctx, b.Name)
	case w.r.IntN(2) == 0:
		return m.ClearBitmap(ctx, b.Name)
	}
	return m.MergeBitmap(ctx, b.Name, m, b.Name)
}

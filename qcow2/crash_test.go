package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

const sector = 512

// stamp fills a sector with its number, the sequence number of the write, and
// bytes that depend on both, half of which do not compress.
func stamp(b []byte, lba, seq uint64) {
	clear(b[:sector])
	x := lba<<32 ^ seq
	for i := 0; i < sector/2; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x^x>>29)
	}
	binary.LittleEndian.PutUint64(b, lba)
	binary.LittleEndian.PutUint64(b[8:], seq)
}

// readStamp returns the sequence number that a sector carries: 0 if it is zero.
func readStamp(b []byte, lba uint64) (uint64, error) {
	l, seq := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	var want [sector]byte
	if l != 0 || seq != 0 {
		stamp(want[:], lba, seq)
	}
	if string(b[:sector]) != string(want[:]) {
		return 0, fmt.Errorf("sector %d is mixed, or shows sector %d, write %d", lba, l, seq)
	}
	return seq, nil
}

// history is what was done to one sector.
type history struct {
	issued []change // ascending
	floors []change // from pos on, the value is that of this change or a later one
}

// change is a write to a sector, or its becoming zero.
type change struct {
	pos, seq uint64 // position in the log, sequence number
	zero     bool
}

// value is what the sector's stamp says after the change.
func (c change) value() uint64 {
	if c.zero {
		return 0
	}
	return c.seq
}

// crashRun records a workload on an image.
type crashRun struct {
	f       *memFile
	start   []byte // the file before the workload
	under   backing
	sectors []history
	past    uint64 // sequence numbers used before the record begins
}

// crashImage makes the image that a run starts from.
func crashImage(t testing.TB, opts CreateOptions, under []byte) *crashRun {
	t.Helper()
	path := create(t, opts)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	run := &crashRun{start: b, sectors: make([]history, opts.Size/sector)}
	if under != nil {
		run.under = &rawBacking{file: &memFile{data: under}, size: int64(len(under))}
		for i := range run.sectors {
			if (i+1)*sector <= len(under) {
				run.sectors[i].floors = append(run.sectors[i].floors, change{seq: 1})
			}
		}
	}
	run.f = &memFile{data: append([]byte(nil), b...), rec: true}
	return run
}

func (run *crashRun) open(t testing.TB, f *memFile, readOnly bool) *Image {
	t.Helper()
	m, err := openFile(f, "memory", Options{ReadOnly: readOnly}, &chain{})
	if err != nil {
		t.Fatal(err)
	}
	m.backing = run.under
	return m
}

// work writes and flushes as goroutine g of n, which owns every n-th sector, so
// that all share clusters and none shares sectors.
func (run *crashRun) work(t testing.TB, m *Image, r *rand.Rand, g, n, ops int) {
	written := map[uint64]change{} // by sector
	seq := run.past + 2
	for range ops {
		if r.IntN(6) == 0 {
			before := map[uint64]change{}
			maps.Copy(before, written)
			if err := m.Flush(); err != nil {
				t.Error(err)
				return
			}
			pos := uint64(run.f.mark("flush"))
			for lba, last := range before {
				last.pos = pos
				run.sectors[lba].floors = append(run.sectors[lba].floors, last)
			}
			continue
		}
		count := uint64(1)
		if n == 1 {
			count += r.Uint64N(12)
		}
		lba := r.Uint64N((uint64(len(run.sectors))-count)/uint64(n))*uint64(n) + uint64(g)
		if r.IntN(3) == 0 {
			lba = lba%(64*uint64(n))/uint64(n)*uint64(n) + uint64(g) // a hot spot
		}
		off, size := int64(lba)*sector, int64(count)*sector
		do := func() error { return writeStamps(m, lba, count, seq) }
		how := r.IntN(12)
		if how <= eraseDiscard {
			do = func() error { return eraser(m, how)(off, size) }
		}
		touched, n := off, size
		if how == eraseDiscard {
			touched, n = wholeClusters(m, off, size)
		}
		for ; n > 0; touched, n = touched+sector, n-sector {
			c := change{pos: uint64(run.f.mark("change")), seq: seq, zero: how <= eraseDiscard}
			h := &run.sectors[touched/sector]
			h.issued = append(h.issued, c)
			written[uint64(touched/sector)] = c
		}
		if err := do(); err != nil {
			t.Error(err)
			return
		}
		seq++
	}
}

// writeStamps writes count sectors of change seq, from lba on.
func writeStamps(m *Image, lba, count, seq uint64) error {
	b := make([]byte, count*sector)
	for i := range count {
		stamp(b[i*sector:], lba+i, seq)
	}
	_, err := m.WriteAt(b, int64(lba)*sector)
	return err
}

// state is the file as a power cut at log position cut may leave it.
type state struct {
	cut  int
	what string
	data []byte
}

// states calls check with the states that a power cut may leave: every prefix
// of the log, and from the writes that no barrier covers random subsets, torn at
// sectors, and each one alone or lost.
func (run *crashRun) states(r *rand.Rand, subsets int, check func(state) bool) int {
	log := run.f.log
	durable := append([]byte(nil), run.start...) // everything before log[base]
	base, n := 0, 0
	prefix := append([]byte(nil), run.start...)
	emit := func(cut int, what string, data []byte) bool {
		n++
		return check(state{cut, what, data})
	}
	for k, e := range log {
		switch e.kind {
		case evWrite, evTruncate:
			prefix = e.apply(prefix)
			if !emit(k+1, "prefix", prefix) {
				return n
			}
		case evSyncEnd:
			for _, e := range log[base:e.sync] {
				durable = e.apply(durable)
			}
			base = e.sync
		}
		if e.kind == evMark && e.note != "flush" {
			continue
		}
		var pending []event
		for _, p := range log[base : k+1] {
			if p.changes() {
				pending = append(pending, p)
			}
		}
		if len(pending) < 2 {
			continue
		}
		for range subsets {
			data := append([]byte(nil), durable...)
			alone := r.IntN(len(pending))
			mode := r.IntN(4)
			for i, p := range pending {
				if mode == 0 && i != alone || mode == 1 && i == alone {
					continue
				}
				if p.kind == evTruncate && (mode < 2 || r.IntN(2) == 0) {
					data = p.apply(data)
				}
				for off := 0; off < len(p.data); {
					cut := min(off+sector-int(p.off+int64(off))%sector, len(p.data))
					if mode < 2 || r.IntN(2) == 0 || mode == 3 && r.IntN(8) != 0 {
						data = apply(data, p.data[off:cut], p.off+int64(off))
					}
					off = cut
				}
			}
			if !emit(k+1, "subset", data) {
				return n
			}
		}
	}
	return n
}

// verify applies the oracles to s.
func (run *crashRun) verify(t testing.TB, s state) error {
	v := checkImage(s.data)
	if len(v.corruptions) > 0 {
		return fmt.Errorf("%s at %d: %v", s.what, s.cut, v.corruptions)
	}
	if err := bothCheck(s.data, v); err != nil {
		return fmt.Errorf("%s at %d: %w", s.what, s.cut, err)
	}
	m := run.open(t, &memFile{data: s.data}, true)
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil {
		return err
	}
	for lba := range run.sectors {
		seq, err := readStamp(got[lba*sector:(lba+1)*sector], uint64(lba))
		if err != nil {
			return fmt.Errorf("%s at %d: %w", s.what, s.cut, err)
		}
		if err := run.sectors[lba].allows(uint64(s.cut), seq); err != nil {
			return fmt.Errorf("%s at %d: sector %d: %w", s.what, s.cut, lba, err)
		}
	}
	return nil
}

// allows reports whether the sector may have the value of write seq after a cut.
func (h *history) allows(cut, seq uint64) error {
	var floor change
	for _, f := range h.floors {
		if f.pos < cut {
			floor = f
		}
	}
	if seq == floor.value() {
		return nil
	}
	for _, w := range h.issued {
		if w.value() == seq && w.pos < cut && w.seq > floor.seq {
			return nil
		}
	}
	return fmt.Errorf("has write %d where %d was flushed", seq, floor.value())
}

func qemuCheck(t testing.TB, data []byte) (int, string) {
	path := filepath.Join(t.TempDir(), "state.qcow2")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			return e.ExitCode(), string(out)
		}
		t.Fatal(err)
	}
	return 0, string(out)
}

// again runs a second workload on a state, as after a reboot, and checks it.
func (run *crashRun) again(t testing.TB, s state, r *rand.Rand) error {
	f := &memFile{data: append([]byte(nil), s.data...)}
	was := run.open(t, &memFile{data: s.data}, true)
	want := make([]byte, was.Size())
	if _, err := was.ReadAt(want, 0); err != nil {
		return err
	}
	if r.IntN(2) == 0 {
		if _, after, err := repairIn(t.Context(), f, "memory", RepairLeaks, CheckOptions{}); err != nil || !after.Clean() {
			return fmt.Errorf("%s at %d: the repair left %+v (%w)", s.what, s.cut, after, err)
		}
	}
	m := run.open(t, f, false)
	for range 30 {
		off, n := randomRange(r, m.Size(), 6000)
		fillRandom(r, want[off:off+n])
		if _, err := m.WriteAt(want[off:off+n], off); err != nil {
			return err
		}
		off, n = randomRange(r, m.Size(), 6000)
		erase(t, m, want, r.IntN(3), off, n)
	}
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil {
		return err
	}
	if err := m.Close(); err != nil {
		return err
	}
	if string(got) != string(want) {
		return fmt.Errorf("%s at %d: contents differ after going on", s.what, s.cut)
	}
	if v := checkImage(f.data); len(v.corruptions) > 0 {
		return fmt.Errorf("%s at %d, after going on: %v", s.what, s.cut, v.corruptions)
	}
	return nil
}

func TestCrash(t *testing.T) {
	_, lookErr := exec.LookPath("qemu-img")
	for _, c := range []struct {
		name       string
		opts       CreateOptions
		under      int // bytes of backing file
		goroutines int
		ops        int
	}{
		{"512", CreateOptions{Size: 256 << 10, ClusterSize: 512}, 0, 1, 150},
		{"512 overlay", CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 64}, 100 << 10, 1, 100},
		{"4K overlay", CreateOptions{Size: 1 << 20, ClusterSize: 4096}, 512 << 10, 1, 120},
		{"4K shared", CreateOptions{Size: 512 << 10, ClusterSize: 4096, RefcountBits: 1}, 0, 4, 40},
		{"512 shared overlay", CreateOptions{Size: 128 << 10, ClusterSize: 512}, 64 << 10, 4, 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newSeed(t)
			run := crashRecord(t, c.opts, c.under, c.goroutines, c.ops, r, nil)
			subsets, every := 6, 1
			if brief() {
				subsets, every = 1, 4
			}
			i := 0
			n := run.states(r, subsets, func(s state) bool {
				if i++; i%every != 0 {
					return true
				}
				if err := run.verify(t, s); err != nil {
					t.Error(err)
					return false
				}
				if i%50 == 0 {
					if err := run.again(t, s, r); err != nil {
						t.Error(err)
						return false
					}
				}
				if i%400 == 0 && lookErr == nil {
					if rc, out := qemuCheck(t, s.data); rc != 0 && rc != 3 {
						t.Errorf("qemu-img check: %d\n%s", rc, out)
						return false
					}
				}
				return true
			})
			t.Logf("%d states", n)
		})
	}
}

// compressedRun returns a run that starts from an image full of compressed
// clusters, every write to one of which frees host clusters.
func compressedRun(t *testing.T, size int, clusterSize int) *crashRun {
	t.Helper()
	dir := t.TempDir()
	b := make([]byte, size)
	for lba := range size / sector {
		stamp(b[lba*sector:], uint64(lba), 1)
	}
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "packed.qcow2")
	if err := os.WriteFile(raw, b, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", fmt.Sprintf("cluster_size=%d", clusterSize), raw, path)
	start, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	run := &crashRun{start: start, sectors: make([]history, size/sector)}
	for i := range run.sectors {
		run.sectors[i].floors = append(run.sectors[i].floors, change{seq: 1})
	}
	run.f = &memFile{data: append([]byte(nil), start...), rec: true}
	return run
}

// TestCrashSnapshot cuts the power while clusters and tables are copied because
// an internal snapshot shares them, and applies the snapshot afterwards.
func TestCrashSnapshot(t *testing.T) {
	r := newSeed(t)
	run := crashImage(t, CreateOptions{Size: 256 << 10, ClusterSize: 1024}, nil)
	m := run.open(t, run.f, false)
	run.work(t, m, r, 0, 1, 60)
	closeImage(t, m)
	want := make([]byte, m.Size())
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	writeFile(t, path, run.f.data)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	start, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	run.past = 1000
	run.start, run.f = start, &memFile{data: append([]byte(nil), start...), rec: true}
	m = run.open(t, run.f, false)
	if _, err := m.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	run.sectors = make([]history, len(run.sectors))
	for lba := range run.sectors {
		seq, err := readStamp(want[lba*sector:], uint64(lba))
		if err != nil {
			t.Fatal(err)
		}
		run.sectors[lba].floors = append(run.sectors[lba].floors, change{seq: seq})
	}
	run.work(t, m, r, 0, 1, 60)
	closeImage(t, m)
	i, last := 0, []byte(nil)
	run.states(r, 2, func(s state) bool {
		last = append(last[:0], s.data...)
		if i++; brief() && i%10 != 0 {
			return true
		}
		if err := run.verify(t, s); err != nil {
			t.Error(err)
			return false
		}
		return true
	})
	writeFile(t, path, last)
	qemu(t, "qemu-img", "snapshot", "-a", "s", path)
	compare(t, t.TempDir(), path, want)
}

// TestCrashReuse cuts the power while freed clusters are reused.
func TestCrashReuse(t *testing.T) {
	r := newSeed(t)
	run := compressedRun(t, 512<<10, 4096)
	m := run.open(t, run.f, false)
	reused := false
	var wg sync.WaitGroup
	for g := range 2 {
		rg := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() { run.work(t, m, rg, g, 2, 150) })
	}
	wg.Wait()
	closeImage(t, m)
	end := int64(len(run.start))
	for _, e := range run.f.log {
		reused = reused || e.kind == evWrite && len(e.data) == 4096 && e.off > 5*4096 && e.off < end
	}
	if !reused {
		t.Error("the workload reused no cluster")
	}
	i := 0
	n := run.states(r, 2, func(s state) bool {
		if i++; brief() && i%10 != 0 {
			return true
		}
		if err := run.verify(t, s); err != nil {
			t.Error(err)
			return false
		}
		return true
	})
	t.Logf("%d states", n)
}

// crashRecord runs a workload and returns its record.
func crashRecord(t *testing.T, opts CreateOptions, under, goroutines, ops int, r *rand.Rand, noBarrier func(int) bool) *crashRun {
	var b []byte
	if under > 0 {
		b = make([]byte, under)
		for lba := range under / sector {
			stamp(b[lba*sector:], uint64(lba), 1)
		}
	}
	run := crashImage(t, opts, b)
	run.f.noBarrier = noBarrier
	m := run.open(t, run.f, false)
	var wg sync.WaitGroup
	for g := range goroutines {
		rg := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() { run.work(t, m, rg, g, goroutines, ops) })
	}
	wg.Wait()
	closeImage(t, m)
	return run
}

// TestCrashHarnessDetects shows that the crash test would notice the loss of
// any one kind of barrier: with every second sync removed, either phase A's or
// phase B's, it finds a broken state.
func TestCrashHarnessDetects(t *testing.T) {
	for parity := range 2 {
		r := newSeed(t)
		run := crashRecord(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096}, 64<<10, 1, 80, r,
			func(n int) bool { return n%2 == parity })
		found := error(nil)
		run.states(r, 10, func(s state) bool {
			found = run.verify(t, s)
			return found == nil
		})
		if found == nil {
			t.Errorf("parity %d: no broken state found without barriers", parity)
		} else {
			t.Log(found)
		}
	}
}

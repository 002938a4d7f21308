package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// oracles judge the states of one run. What they need not do for equal states
// they do once.
type oracles struct {
	t    testing.TB
	run  *crashRun
	r    *rand.Rand
	more workload // the steps with which work goes on
	// qemuEvery, moreEvery and repairEvery say how many different states each
	// of the slower oracles has one of; 0 is none.
	qemuEvery, moreEvery, repairEvery int

	hash  maphash.Seed
	known map[uint64]struct{}
	counts
}

// counts are how many states each oracle has judged.
type counts struct {
	states, distinct, qemu, went, repairs int
}

func (c *counts) add(o counts) {
	c.states += o.states
	c.distinct += o.distinct
	c.qemu += o.qemu
	c.went += o.went
	c.repairs += o.repairs
}

func (c counts) String() string {
	return fmt.Sprintf("%d states judged by their stamps; %d distinct ones by both checks, %d by QEMU's check and reading, %d by going on, %d by a repair",
		c.states, c.distinct, c.qemu, c.went, c.repairs)
}

func newOracles(t testing.TB, run *crashRun, w workload, r *rand.Rand) *oracles {
	t.Helper()
	w.queues, w.ops, w.fails = 1, 25, 0
	o := &oracles{
		t: t, run: run, r: r, more: w, hash: maphash.MakeSeed(), known: map[uint64]struct{}{},
		qemuEvery: 100, moreEvery: 20, repairEvery: 10,
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		o.qemuEvery = 0
	}
	return o
}

// judge applies the oracles to s.
func (o *oracles) judge(s state) error {
	if err := o.judgeState(s); err != nil {
		return fmt.Errorf("%s at %d: %w", s.what, s.cut, err)
	}
	return nil
}

func (o *oracles) judgeState(s state) error {
	o.states++
	h := maphash.Bytes(o.hash, s.data) ^ maphash.Bytes(o.hash, s.ext)<<1
	_, seen := o.known[h]
	if !seen {
		o.known[h] = struct{}{}
		o.distinct++
		if err := checkState(s.data); err != nil {
			return err
		}
	}
	disk, err := o.run.verify(o.t, s)
	if err != nil || seen {
		return err
	}
	if s.data[offAutoclear] != 0 && !bytes.Equal(disk, o.run.disk) {
		return errors.New("an unknown autoclear bit stands beside changed data")
	}
	if o.due(o.qemuEvery, 1) {
		o.qemu++
		if err := o.witness(s, disk); err != nil {
			return err
		}
	}
	if o.due(o.repairEvery, 2) {
		o.repairs++
		if err := o.run.repaired(o.t, s, disk); err != nil {
			return err
		}
	}
	if o.due(o.moreEvery, 3) {
		o.went++
		return o.goOn(s, disk)
	}
	return nil
}

// due reports whether it is the turn of an oracle that judges one of every states.
func (o *oracles) due(every, turn int) bool { return every > 0 && o.distinct%every == turn }

// checkState has two checkers look at the file, which may have leaks and nothing
// else.
func checkState(data []byte) error {
	v := checkImage(data)
	if n := len(v.corruptions); n > 0 {
		return fmt.Errorf("%d corruptions: %v", n, v.corruptions[:min(n, 3)])
	}
	return bothCheck(data, v)
}

// verify reads the disk of a state and returns its contents, if every sector is
// what it may be.
func (run *crashRun) verify(t testing.TB, s state) ([]byte, error) {
	f := (&memFile{data: s.data}).withExt(s.ext)
	m, err := run.openIn(f, Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer closeImage(t, m)
	disk := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{disk}, 0); err != nil {
		return nil, err
	}
	if err := run.judgeKept(f, m, s.cut); err != nil {
		return nil, err
	}
	return disk, run.judgeDisk(disk, s.cut)
}

// now is the state of the file as it is.
func (run *crashRun) now() state {
	data, ext := run.f.contents()
	return state{cut: math.MaxInt, what: "now", data: data, ext: ext}
}

// judgeDisk judges the contents of the disk after a power cut.
func (run *crashRun) judgeDisk(disk []byte, at int) error {
	sectors, length := run.flushed(at)
	if err := run.length.may(uint64(len(disk)/sector), length, at); err != nil {
		return fmt.Errorf("the disk's length %w", err)
	}
	return run.judgeSectors(0, disk, sectors, at)
}

// judgeSectors returns an error unless the sectors from lba on may be what b has
// for a reader who began at from and ended at to.
func (run *crashRun) judgeSectors(lba uint64, b []byte, from, to int) error {
	for ; len(b) > 0; lba, b = lba+1, b[sector:] {
		seq, err := readStamp(b, lba)
		if err != nil {
			return err
		}
		if err := run.sectors[lba].may(seq, from, to); err != nil {
			return fmt.Errorf("sector %d %w", lba, err)
		}
	}
	return nil
}

// witness has QEMU check the image and read the same disk and snapshots.
func (o *oracles) witness(s state, disk []byte) error {
	dir := filepath.Dir(o.run.path)
	path := filepath.Join(dir, "state.qcow2")
	writeFile(o.t, path, s.data)
	if s.ext != nil {
		writeFile(o.t, filepath.Join(dir, dataFileName), s.ext)
	}
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	if e, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || e.ExitCode() != 3) {
		return fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	raw := filepath.Join(dir, "state.raw")
	qemu(o.t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
	got, err := os.ReadFile(raw)
	if err != nil || !bytes.Equal(got, disk) {
		return fmt.Errorf("QEMU reads other data (%w)", err)
	}
	for _, name := range o.run.keptIn(s) {
		qemu(o.t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name="+name, path, raw)
		got, err := os.ReadFile(raw) // as long as the disk is now
		want := o.run.kept[name].disk
		if n := min(len(got), len(want)); err != nil || !bytes.Equal(got[:n], want[:n]) {
			return fmt.Errorf("QEMU reads other data from the snapshot %s (%w)", name, err)
		}
	}
	return nil
}

// repaired repairs a copy of the image: it is clean then and has the same
// contents.
func (run *crashRun) repaired(t testing.TB, s state, disk []byte) error {
	f := s.file()
	_, after, err := repairIn(t.Context(), f, run.path, RepairAll, CheckOptions{})
	if err != nil || !after.Clean() {
		return fmt.Errorf("the repair left %+v (%w)", after, err)
	}
	if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		return fmt.Errorf("after the repair: %+v", v)
	}
	m := run.open(t, f, true)
	defer closeImage(t, m)
	got := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, disk) {
		return fmt.Errorf("other contents after the repair (%w)", err)
	}
	return nil
}

// goOn opens a copy of the image for writing, as after a reboot, goes on with
// the steps of the workload, and judges the result.
func (o *oracles) goOn(s state, disk []byte) error {
	next := o.run.resume(s, disk)
	next.m = next.open(o.t, next.f, false)
	next.play(o.t, o.more, o.r)
	must(o.t, next.close())
	if err := checkState(next.f.data); err != nil {
		return fmt.Errorf("after going on: %w", err)
	}
	if _, err := next.verify(o.t, next.now()); err != nil {
		return fmt.Errorf("after going on: %w", err)
	}
	return nil
}

// resume returns a run that begins with the given file, whose disk is known.
func (run *crashRun) resume(s state, disk []byte) *crashRun {
	next := &crashRun{
		path: run.path, start: s.data, startExt: s.ext, disk: disk, opts: run.opts,
		f:      s.file(),
		length: newHistory(uint64(len(disk)) / sector),
	}
	next.f.rec = true
	next.seq.Store(run.seq.Load() + 1)
	next.kept = map[string]*kept{}
	for _, name := range run.keptIn(s) {
		next.kept[name] = &kept{exists: newHistory(1), disk: run.kept[name].disk}
	}
	for lba := range uint64(len(disk)) / sector {
		seq, _ := readStamp(disk[lba*sector:], lba) // verified, or of no stamps
		next.sectors = append(next.sectors, newHistory(seq))
	}
	return next
}

package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// saved is what an image is to have: its disk, and its snapshots by name.
type saved struct {
	disk      []byte
	snapshots map[string][]byte
}

func (s saved) clone() saved {
	return saved{append([]byte(nil), s.disk...), maps.Clone(s.snapshots)}
}

// pick returns the name of a snapshot, empty if there is none.
func (s saved) pick(r *rand.Rand) string {
	names := slices.Sorted(maps.Keys(s.snapshots))
	if len(names) == 0 {
		return ""
	}
	return names[r.IntN(len(names))]
}

// change does to s, which is the image's, what a change of the snapshots does to
// the image.
func (s *saved) change(how, name string) {
	switch how {
	case "-c":
		s.snapshots[name] = append([]byte(nil), s.disk...)
	case "-a":
		s.disk = append([]byte(nil), s.snapshots[name]...)
	case "-d":
		delete(s.snapshots, name)
	case "-e":
		s.disk = make([]byte, len(s.disk))
	}
}

// changeSnapshot is qemu-img snapshot; -e empties the disk.
func changeSnapshot(m *Image, how, name string) error {
	switch how {
	case "-c":
		s, err := m.CreateSnapshot(context.Background(), name)
		if err == nil && s.Name != name {
			err = fmt.Errorf("the new snapshot is %+v", s)
		}
		return err
	case "-a":
		return m.ApplySnapshot(context.Background(), name)
	case "-e":
		return m.Empty(context.Background())
	}
	return m.DeleteSnapshot(context.Background(), name)
}

// randomChange chooses a change of the snapshots of s.
func randomChange(r *rand.Rand, s saved, n int) (how, name string) {
	if name = s.pick(r); name == "" || len(s.snapshots) < 4 && r.IntN(2) == 0 {
		return "-c", fmt.Sprintf("state %d", n)
	}
	return [...]string{"-a", "-d"}[r.IntN(2)], name
}

// verifySaved compares the image at path with s, in every respect.
func verifySaved(t *testing.T, path string, s saved) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-q", path)
	if r := check(t, path); !r.Clean() {
		t.Fatalf("%+v", r.Findings)
	}
	ours, err := inspectSnapshots(path)
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int64
	for _, x := range ours {
		sizes = append(sizes, int64(len(s.snapshots[x.Name])))
	}
	if len(ours) != len(s.snapshots) {
		t.Fatalf("there are the snapshots %v instead of %v", ours, slices.Sorted(maps.Keys(s.snapshots)))
	}
	sameSnapshots(t, path, sizes...)
	raw := filepath.Join(filepath.Dir(path), "snapshot.raw")
	for name, want := range s.snapshots {
		if !bytes.Equal(content(t, path, name), want) {
			t.Fatalf("snapshot %q differs", name)
		}
		qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name="+name, path, raw)
		got, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		n := min(len(got), len(want)) // QEMU shows it with the length of the disk
		if !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("QEMU sees another snapshot %q", name)
		}
	}
	if !bytes.Equal(content(t, path, ""), s.disk) {
		t.Fatal("the disk differs")
	}
	compare(t, filepath.Dir(path), path, s.disk)
}

// TestSnapshots writes, and makes, applies and deletes snapshots, by turns with us
// and with QEMU, and lets both compare all that the image has after each turn.
func TestSnapshots(t *testing.T) {
	turns := 10
	if brief() {
		turns = 4
	}
	for _, c := range []struct {
		options string
		start   string // "", "base" or "packed"
		resize  bool
	}{
		{options: "cluster_size=512", resize: true},
		{options: "cluster_size=4k,refcount_bits=64", start: "base", resize: true},
		{options: "cluster_size=64k,refcount_bits=8", start: "packed"},
		{options: "compat=0.10,cluster_size=4k", start: "base"},
		{options: "extended_l2=on,cluster_size=16k", start: "base", resize: true},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			s := saved{make([]byte, 1<<20), map[string][]byte{}}
			switch c.start {
			case "base":
				s.disk = makeBase(t, r, dir, "qcow2", 1<<20)
				qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "-o", c.options, path)
			case "packed":
				patch(r, s.disk, 20)
				writeFile(t, filepath.Join(dir, "raw"), s.disk)
				qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", c.options, filepath.Join(dir, "raw"), path)
			default:
				qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.options, path, "1M")
			}
			for i := range turns {
				if i%2 == 0 {
					snapshotsByUs(t, r, path, &s, i, c.resize)
				} else {
					qemuWrite(t, r, path, s.disk, 4)
					how, name := randomChange(r, s, i)
					qemu(t, "qemu-img", "snapshot", how, name, path)
					s.change(how, name)
				}
				verifySaved(t, path, s)
			}
		})
	}
}

// snapshotsByUs does some writes and changes of snapshots to an image while it is
// open.
func snapshotsByUs(t *testing.T, r *rand.Rand, path string, s *saved, turn int, resize bool) {
	t.Helper()
	m := open(t, path, Options{L2CacheBytes: 1})
	for i := range 4 {
		for range 4 {
			off, n := randomRange(r, m.Size(), m.Size()/8)
			if r.IntN(4) == 0 {
				erase(t, m, s.disk, r.IntN(3), off, n)
				continue
			}
			fillRandom(r, s.disk[off:off+n])
			if _, err := m.WriteAt(s.disk[off:off+n], off); err != nil {
				t.Fatal(err)
			}
		}
		if resize && r.IntN(3) == 0 {
			size := 512<<10 + r.Int64N(1<<20)&^511
			must(t, m.Resize(t.Context(), size, ResizeOptions{Shrink: true}))
			s.disk = truncate(slices.Clip(s.disk), size)
		}
		how, name := randomChange(r, *s, turn*4+i+100)
		must(t, changeSnapshot(m, how, name))
		s.change(how, name)
		got := make([]byte, m.Size())
		if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, s.disk) {
			t.Fatalf("after %s %s the open disk differs, %v", how, name, err)
		}
	}
	closeImage(t, m)
}

// TestSnapshotIsOneInstant makes snapshots while goroutines write. Each writes its
// sectors in turn, so a snapshot has to have all of its writes up to one of those
// that were under way, and none after it.
func TestSnapshotIsOneInstant(t *testing.T) {
	const workers, slots, rounds = 4, 256, 8
	// Each sector is a cluster, so most writes after a snapshot change tables.
	path := create(t, CreateOptions{Size: workers * slots * sector, ClusterSize: sector})
	m := open(t, path, Options{})
	var begun, done [workers]atomic.Uint64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range uint64(workers) {
		wg.Go(func() {
			for seq := uint64(1); ; seq++ {
				select {
				case <-stop:
					return
				default:
				}
				lba := seq%slots*workers + g // all share tables
				begun[g].Store(seq)
				if err := m.WritevAt([][]byte{stamps(lba, 1, seq)}, int64(lba*sector)); err != nil {
					t.Error(err)
					return
				}
				done[g].Store(seq)
			}
		})
	}
	var least, most [rounds][workers]uint64
	for i := range rounds {
		for g := range workers {
			least[i][g] = done[g].Load()
		}
		must(t, changeSnapshot(m, "-c", fmt.Sprint("s", i)))
		for g := range workers {
			most[i][g] = begun[g].Load()
		}
	}
	close(stop)
	wg.Wait()
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", path)
	for i := range rounds {
		disk := content(t, path, fmt.Sprint("s", i))
		for g := range uint64(workers) {
			var has [slots]uint64
			for slot := range uint64(slots) {
				lba := slot*workers + g
				seq, err := readStamp(disk[lba*sector:], lba)
				must(t, err)
				has[slot] = seq
			}
			last := slices.Max(has[:])
			if last < least[i][g] || last > most[i][g] {
				t.Errorf("snapshot %d has write %d of worker %d as the last, %d to %d are possible", i, last, g, least[i][g], most[i][g])
			}
			for back := range min(last, slots) {
				if seq := last - back; has[seq%slots] != seq {
					t.Errorf("snapshot %d has write %d of worker %d, and not write %d", i, last, g, seq)
				}
			}
		}
	}
}

// TestWritesInPlaceAfterDelete shows that once its only snapshot is deleted, or
// applied and deleted, a disk owns its clusters again: writes allocate nothing.
func TestWritesInPlaceAfterDelete(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}), Options{})
	b := make([]byte, 1<<20)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	for _, apply := range []bool{false, true} {
		must(t, changeSnapshot(m, "-c", "s"))
		if apply {
			must(t, changeSnapshot(m, "-a", "s"))
		}
		must(t, changeSnapshot(m, "-d", "s"))
		before := m.Stats().Allocated
		if _, err := m.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if n := m.Stats().Allocated - before; n != 0 {
			t.Errorf("applied %v: a write of the whole disk took %d new clusters", apply, n)
		}
	}
}

// TestCompressedBesideSnapshot shows that a compressed cluster which nothing else
// uses is not marked as owned once its snapshot is gone.
func TestCompressedBesideSnapshot(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	m := open(t, path, Options{})
	must(t, m.WriteCompressed(bytes.Repeat([]byte{1}, 1<<16), 0))
	must(t, changeSnapshot(m, "-c", "s"))
	must(t, changeSnapshot(m, "-d", "s"))
	closeImage(t, m)
	verifySaved(t, path, saved{append(bytes.Repeat([]byte{1}, 1<<16), make([]byte, 15<<16)...), nil})
}

// TestManySnapshotsStaySmall shows that the tables which changes of snapshots
// replace give their room back.
func TestManySnapshotsStaySmall(t *testing.T) {
	r := newSeed(t)
	path := create(t, CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	m := open(t, path, Options{})
	b := make([]byte, 4<<20)
	fillRandom(r, b)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	rounds := 100
	if brief() {
		rounds = 20
	}
	for range rounds {
		must(t, changeSnapshot(m, "-c", "s"))
		must(t, changeSnapshot(m, "-d", "s"))
	}
	closeImage(t, m)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > 4<<20+256<<10 {
		t.Errorf("the file of 4 MiB of data has %d bytes", fi.Size())
	}
	verifySaved(t, path, saved{b, nil})
}

// snapshotScript is a series of changes, each after some writes.
var snapshotScript = []string{"-c a", "-c b", "resize", "-c c", "-a a", "-d a", "-e the disk", "-a c", "-d b", "-d c", "-e the disk"}

// snapshotMark is a moment of a recorded script: what the image has from there on.
// Until the next mark, the disk may be that one's, and where change is set only
// together with its snapshots.
type snapshotMark struct {
	pos    int
	change bool
	saved
}

// snapshotRun records the script.
func snapshotRun(t *testing.T, r *rand.Rand, opts CreateOptions, noBarrier func(string) bool) (*crashRun, []snapshotMark) {
	t.Helper()
	run := newRun(t, workload{opts: opts})
	run.f.noBarrier = noBarrier
	m := run.open(t, run.f, false)
	s := saved{make([]byte, opts.Size), map[string][]byte{}}
	marks := []snapshotMark{{saved: s.clone()}}
	mark := func(change bool) {
		marks = append(marks, snapshotMark{run.f.mark("flush"), change, s.clone()})
	}
	for _, step := range snapshotScript {
		for range 6 {
			lba := r.Uint64N(uint64(m.Size()/sector) - 20)
			b := stamps(lba, 1+r.Uint64N(20), r.Uint64N(1000)+1)
			copy(s.disk[lba*sector:], b)
			if _, err := m.WriteAt(b, int64(lba*sector)); err != nil {
				t.Fatal(err)
			}
		}
		if step == "resize" {
			must(t, m.Resize(t.Context(), opts.Size/2, ResizeOptions{Shrink: true}))
			s.disk = s.disk[:opts.Size/2]
		}
		must(t, m.Flush())
		mark(false)
		if how, name, ok := strings.Cut(step, " "); ok {
			must(t, changeSnapshot(m, how, name))
			s.change(how, name)
			mark(true)
		}
	}
	closeImage(t, m)
	return run, marks
}

// judgeSnapshots returns an error unless the state is one that a power cut between
// the marks may leave.
func judgeSnapshots(t *testing.T, s state, marks []snapshotMark) error {
	if err := checkState(s.data); err != nil {
		return err
	}
	i := 0
	for i+1 < len(marks) && marks[i+1].pos < s.cut {
		i++
	}
	next := marks[min(i+1, len(marks)-1)]
	old := savedIn(t, s.data, marks[i].saved, next.change || i+1 == len(marks))
	if old == nil || next.change && savedIn(t, s.data, next.saved, true) == nil {
		return nil
	}
	return fmt.Errorf("%s at %d, after mark %d: %w", s.what, s.cut, i, old)
}

// savedIn returns an error unless the image has the snapshots of want, and its disk
// if that counts.
func savedIn(t *testing.T, data []byte, want saved, disk bool) error {
	t.Helper()
	read := func(snapshot string) ([]byte, error) {
		m, err := openFile(&memFile{data: data}, "memory", Options{ReadOnly: true, Snapshot: snapshot}, &chain{})
		if err != nil {
			return nil, err
		}
		defer closeImage(t, m)
		all, err := m.Snapshots()
		if err == nil && len(all) != len(want.snapshots) {
			err = fmt.Errorf("there are the snapshots %v", all)
		}
		b := make([]byte, m.Size())
		return b, errors.Join(err, m.ReadvAt([][]byte{b}, 0))
	}
	got, err := read("")
	if err != nil {
		return err
	}
	if disk && !bytes.Equal(got, want.disk) {
		return errors.New("the disk differs")
	}
	for name, b := range want.snapshots {
		if got, err = read(name); err != nil {
			return err
		}
		if !bytes.Equal(got, b) {
			return fmt.Errorf("snapshot %q differs", name)
		}
	}
	return nil
}

// snapshotImages are what changes of snapshots are cut short on.
var snapshotImages = []CreateOptions{
	{Size: 128 << 10, ClusterSize: 4096},
	{Size: 96 << 10, ClusterSize: 512, RefcountBits: 64},
	{Size: 96 << 10, ClusterSize: 512, RefcountBits: 4},
	{Size: 512 << 10, ClusterSize: 16 << 10, ExtendedL2: true},
}

// TestCrashSnapshots cuts the power while snapshots are made, applied and deleted:
// each change has happened wholly or not at all, and nothing else is lost.
func TestCrashSnapshots(t *testing.T) {
	n := 1000
	if brief() {
		n = 150
	}
	for _, opts := range snapshotImages {
		r := newSeed(t)
		run, marks := snapshotRun(t, r, opts, nil)
		if v := checkImage(run.f.data); v.leaks > 0 {
			t.Errorf("%d clusters leaked", v.leaks)
		}
		run.states(r, n, func(s state) bool {
			if err := judgeSnapshots(t, s, marks); err != nil {
				t.Error(err)
			}
			return !t.Failed()
		})
	}
}

// snapshotsWithout is the control of a barrier: see controls.
func snapshotsWithout(t *testing.T, r *rand.Rand, noBarrier func(string) bool) (found error) {
	run, marks := snapshotRun(t, r, snapshotImages[0], noBarrier)
	run.statesAt(afterLost(run.f.log, cuts(run.f.log, r, 5000), 300), func(s state) bool {
		found = judgeSnapshots(t, s, marks)
		return found == nil
	})
	return found
}

// TestFaultySnapshots fails the file operations of changes of snapshots, once or
// from then on. A change that fails has not happened, or the image takes no more
// writes; then the next open shows it done or not. Nothing leaks in either case,
// and the other snapshots and the disk are as before.
func TestFaultySnapshots(t *testing.T) {
	r := newSeed(t)
	for _, opts := range snapshotImages[:2] {
		run, marks := snapshotRun(t, r, opts, nil)
		for i, mark := range marks[1:] {
			if !mark.change {
				continue
			}
			before := marks[i] // i counts from 1
			how, name := changeBetween(before.saved, mark.saved)
			start := append([]byte(nil), run.start...)
			for _, e := range run.f.log[:before.pos] {
				start = e.apply(start)
			}
			for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
				for _, always := range []bool{false, true} {
					step := 1
					if brief() {
						step = 29
					}
					for at := 1 + r.IntN(step); faultySnapshot(t, start, before.saved, mark.saved, how, name, fault{at, errno, always}); at += step {
						if t.Failed() {
							t.Fatalf("%s %s: %v", how, name, fault{at, errno, always})
						}
					}
				}
			}
		}
	}
}

// changeBetween returns the change of snapshots that leads from one to the other.
func changeBetween(from, to saved) (how, name string) {
	if isZero(to.disk) {
		return "-e", ""
	}
	for name := range to.snapshots {
		if from.snapshots[name] == nil {
			return "-c", name
		}
	}
	for name := range from.snapshots {
		if to.snapshots[name] == nil {
			return "-d", name
		}
	}
	for name, b := range to.snapshots {
		if bytes.Equal(b, to.disk) {
			return "-a", name
		}
	}
	panic("BUG: nothing was changed")
}

// faultySnapshot does one change with a fault, and returns whether the fault
// happened before the change was complete.
func faultySnapshot(t *testing.T, start []byte, from, to saved, how, name string, bad fault) bool {
	t.Helper()
	f := &memFile{data: append([]byte(nil), start...)}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	ops, hit := 0, ""
	f.setFail(func(op string) error {
		if ops++; bad.hits(ops, op) {
			hit = op
			return bad.errno
		}
		return nil
	})
	err = changeSnapshot(m, how, name)
	f.setFail(nil)
	if err == nil && hit != "" && hit != "punch" && hit != "truncate" {
		t.Errorf("nobody was told that a %s failed", hit)
	}
	want := []saved{from}
	switch {
	case err == nil:
		want = []saved{to}
	case !known(err):
		t.Errorf("%s %s: %v", how, name, err)
	case m.usable() != nil:
		want = []saved{from, to}
	}
	if err != nil && m.usable() == nil { // and then it goes well
		if err := changeSnapshot(m, how, name); err != nil {
			t.Errorf("the second time: %v", err)
		}
		want = []saved{to}
	}
	_ = m.Close()
	// The start was cut out of a run, and may have leaks.
	if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > checkImage(start).leaks {
		t.Errorf("afterwards: %+v", v)
	}
	found := error(nil)
	for _, s := range want {
		if found = savedIn(t, f.data, s, true); found == nil {
			break
		}
	}
	if found != nil {
		t.Error(found)
	}
	return hit != ""
}

// TestCancelledSnapshot cancels changes of snapshots at every step: the image is as
// it was, to the last byte in use, and takes the same change afterwards.
func TestCancelledSnapshot(t *testing.T) {
	r := newSeed(t)
	b := make([]byte, 256<<10)
	fillRandom(r, b)
	run := newRun(t, workload{opts: CreateOptions{Size: 256 << 10, ClusterSize: 512}})
	m := run.open(t, run.f, false)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	must(t, changeSnapshot(m, "-c", "s"))
	for _, change := range []func(context.Context) error{
		func(ctx context.Context) error { _, err := m.CreateSnapshot(ctx, "new"); return err },
		func(ctx context.Context) error { return m.ApplySnapshot(ctx, "s") },
		func(ctx context.Context) error { return m.DeleteSnapshot(ctx, "s") },
		func(ctx context.Context) error { return m.Empty(ctx) },
	} {
		cancelled := 0
		for steps := 0; ; steps += 1 + steps/4 {
			ctx := &lateContext{Context: t.Context(), left: steps}
			err := change(ctx)
			if err == nil {
				break
			}
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			cancelled++
			if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
				t.Fatalf("after %d steps: %+v", steps, v)
			}
		}
		if cancelled < 5 {
			t.Errorf("only %d cancellations", cancelled)
		}
	}
	if n := len(run.f.data); n > 2*len(b) {
		t.Errorf("the file has grown to %d bytes: what was reserved is lost", n)
	}
	closeImage(t, m)
	if err := savedIn(t, run.f.data, saved{make([]byte, len(b)), map[string][]byte{"new": b}}, true); err != nil {
		t.Error(err)
	}
}

// lateContext is cancelled when it was asked left times whether it is.
type lateContext struct {
	context.Context
	left int
}

func (c *lateContext) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestSnapshotRefused shows what changes of snapshots are refused, and that the
// image is what it was then, but for the corrupt bit where its disk is.
func TestSnapshotRefused(t *testing.T) {
	good := readBack(t, func(m *Image) {
		if _, err := m.WriteAt(make([]byte, 3<<16), 0); err != nil {
			t.Fatal(err)
		}
		must(t, changeSnapshot(m, "-c", "s"))
	}, CreateOptions{Size: 1 << 20})
	be := func(b []byte, off int64) int64 { return int64(tableEntry(b, off) & entryOffset) }
	active := func(b []byte) int64 { return be(b, be(b, offL1Offset)) }
	shared := func(b []byte) int64 { return be(b, be(b, be(b, offSnapshots+4))) }
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
		how    string // and of which
		kind   error
		says   string
	}{
		{"no name", nil, "-c ", ErrInvalidOption, "1 to 255 bytes"},
		{"zero in the name", nil, "-c a\x00b", ErrInvalidOption, "none of them zero"},
		{"long name", nil, "-c " + strings.Repeat("x", 256), ErrInvalidOption, "1 to 255 bytes"},
		{"name taken", nil, "-c s", ErrInvalidOption, `the name or ID "s"`},
		{"ID taken", nil, "-c 1", ErrInvalidOption, `the name or ID "1"`},
		{"unknown applied", nil, "-a t", ErrNoSnapshot, `it has "s" (ID "1")`},
		{"unknown deleted", nil, "-d t", ErrNoSnapshot, `it has "s" (ID "1")`},
		{"080 65536 snapshots", func(b []byte) []byte {
			end := (int64(len(b)) + 0xffff) &^ 0xffff
			put(b, offSnapshots, 4, maxSnapshots)
			put(b, offSnapshots+4, 8, uint64(end))
			return truncate(b, end+4<<20)
		}, "-c t", ErrUnsupported, "65536 internal snapshots"},
		{"080 L2 entry beyond", func(b []byte) []byte { put(b, active(b), 8, 0xbfffffffffff0000); return b }, "-c t", ErrCorrupt, "reserved bits"},
		{"080 L2 entry far", func(b []byte) []byte { put(b, active(b), 8, 0x800000ffffff0000); return b }, "-c t", ErrCorrupt, "reference count of zero"},
		{"L2 entry at metadata", func(b []byte) []byte { put(b, active(b), 8, uint64(be(b, offRefTable))); return b }, "-c t", ErrCorrupt, "reference count table"},
		{"L2 entry unaligned", func(b []byte) []byte { b[active(b)+6] |= 2; return b }, "-c t", ErrCorrupt, "middle of a cluster"},
		{"snapshot's L2 entry far", func(b []byte) []byte { put(b, shared(b), 8, 0xffffffff0000); return b }, "-d s", ErrCorrupt, "no reference count"},
		{"snapshot's L2 entry applied", func(b []byte) []byte { put(b, shared(b), 8, 0xffffffff0000); return b }, "-a s", ErrCorrupt, "no reference count"},
		{"snapshot's L1 entry at metadata", func(b []byte) []byte {
			put(b, be(b, be(b, offSnapshots+4)), 8, uint64(be(b, offRefTable)))
			return b
		}, "-d s", ErrCorrupt, "reference count table"},
		{"snapshot's disk too large", func(b []byte) []byte {
			put(b, be(b, offSnapshots+4)+snapshotFixed+8, 8, 1<<60)
			return b
		}, "-a s", ErrUnsupported, "too large"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := append([]byte(nil), good...)
			if c.change != nil {
				b = c.change(b)
			}
			f := &memFile{data: append([]byte(nil), b...)}
			m, err := openFile(f, "memory", Options{}, &chain{})
			must(t, err)
			how, name, _ := strings.Cut(c.how, " ")
			if err := changeSnapshot(m, how, name); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
			// A fault of the disk's own tables ends all writing.
			marked := errors.Is(c.kind, ErrCorrupt) && how == "-c"
			if err := m.usable(); errors.Is(err, ErrCorrupt) != marked {
				t.Errorf("afterwards: %v", err)
			}
			if err := m.Close(); errors.Is(err, ErrCorrupt) != marked {
				t.Errorf("close: %v", err)
			}
			if marked {
				b[offIncompatible+7] |= 1 << incompatCorrupt
			}
			for c := range referenced(good) {
				if at := c << 16; !bytes.Equal(f.data[at:min(at+1<<16, uint64(len(b)))], b[at:min(at+1<<16, uint64(len(b)))]) {
					t.Errorf("the cluster at %#x was changed", at)
				}
			}
		})
	}
}

// TestSnapshotRepeatsTable refuses to apply and to delete a snapshot whose L1 table
// points to one L2 table twice, which no disk may, and which could take as long as
// reading a table for each entry of the greatest L1 table.
func TestSnapshotRepeatsTable(t *testing.T) {
	path := create(t, CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write 0 4k", path)
	qemu(t, "qemu-img", "snapshot", "-c", "t", path)
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write 0 4k", path)
	b, err := os.ReadFile(path)
	must(t, err)
	l1 := int64(tableEntry(b, int64(tableEntry(b, offSnapshots+4))))
	put(b, l1+8, 8, tableEntry(b, l1))
	for c := range referenced(b) { // counted as often as it is used then
		block := int64(tableEntry(b, int64(tableEntry(b, offRefTable))))
		put(b, block+int64(c)*2, 2, referenced(b)[c])
	}
	m, err := openFile(&memFile{data: b}, path, Options{}, &chain{})
	must(t, err)
	defer closeImage(t, m)
	for _, how := range []string{"-a", "-d"} {
		if err := changeSnapshot(m, how, "t"); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "claimed by two") {
			t.Errorf("%s: %v", how, err)
		}
	}
}

// TestSnapshotCountsLie refuses to delete a snapshot where that would free what the
// disk uses, because its count is too low.
func TestSnapshotCountsLie(t *testing.T) {
	const cs = 4096
	for name, shared := range map[string]func(b []byte, l2 int64) int64{
		"data":       func(b []byte, l2 int64) int64 { return field(b, l2) & entryOffset / cs },
		"compressed": func(b []byte, l2 int64) int64 { return field(b, l2+8) & (1<<50 - 1) / cs },
		"table":      func(b []byte, l2 int64) int64 { return field(b, field(b, offL1Offset)+8) & entryOffset / cs },
	} {
		t.Run(name, func(t *testing.T) {
			b := readBack(t, func(m *Image) {
				p := bytes.Repeat([]byte{7}, cs)
				must(t, m.WritevAt([][]byte{p}, 0))
				must(t, m.WriteCompressed(p, cs))
				must(t, m.WriteCompressed(p, cs/8*cs))
				must(t, m.PunchHole(cs/8*cs, cs)) // a table without clusters stays shared
				must(t, changeSnapshot(m, "-c", "s"))
			}, CreateOptions{Size: 2 * cs / 8 * cs, ClusterSize: cs})
			c := shared(b, field(b, field(b, offL1Offset))&entryOffset)
			put(b, field(b, field(b, offRefTable))+c*2, 2, 1)
			f := &memFile{data: bytes.Clone(b)}
			m, err := openFile(f, "memory", Options{}, &chain{})
			must(t, err)
			if err := changeSnapshot(m, "-d", "s"); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "count of zero") {
				t.Error(err)
			}
			if err := m.Close(); !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
			if !bytes.Equal(f.data[c*cs:][:cs], b[c*cs:][:cs]) {
				t.Error("what the disk uses was changed")
			}
		})
	}
}

// TestSnapshotExternalData refuses a snapshot of an image with an external data
// file.
func TestSnapshotExternalData(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), path, "1M")
	m := open(t, path, Options{DataFile: true})
	if err := changeSnapshot(m, "-c", "s"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "external data file has no") {
		t.Error(err)
	}
}

// readBack makes an image, does work to it, and returns the file.
func readBack(t *testing.T, work func(m *Image), opts CreateOptions) []byte {
	t.Helper()
	path := create(t, opts)
	m := open(t, path, Options{})
	work(m)
	closeImage(t, m)
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// tableEntry reads the 8 bytes at off.
func tableEntry(b []byte, off int64) uint64 { return decodeTable(b[off : off+8])[0] }

// TestSnapshotNarrowCounts shows that counts which cannot count a snapshot refuse
// it, and change nothing.
func TestSnapshotNarrowCounts(t *testing.T) {
	for _, bits := range []int{1, 2} {
		path := create(t, CreateOptions{Size: 1 << 20, RefcountBits: bits})
		m := open(t, path, Options{})
		if _, err := m.WriteAt([]byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		made, err := 0, error(nil)
		for ; err == nil; made++ {
			err = changeSnapshot(m, "-c", fmt.Sprint("s", made))
		}
		if want := 1<<bits - 1; made != want || !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "too narrow") {
			t.Errorf("%d bits: try %d failed: %v", bits, made, err)
		}
		if _, err := m.WriteAt([]byte("y"), 1<<19); err != nil {
			t.Error(err)
		}
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", path)
	}
}

// TestSnapshotKeepsRows shows that what is unknown in the rows of other snapshots
// stays, and what IDs new ones get.
func TestSnapshotKeepsRows(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	for _, name := range []string{"a", "b"} {
		qemu(t, "qemu-img", "snapshot", "-c", name, path)
	}
	b, err := os.ReadFile(path)
	must(t, err)
	at := int64(tableEntry(b, offSnapshots+4))
	// The first row gets 9 bytes of extra data more, and an ID beyond the
	// range of numbers; the second no extra data at all.
	row := func(l1 []byte, extra []byte, id, name string) []byte {
		h := append([]byte(nil), l1[:snapshotFixed]...)
		put(h, 12, 2, uint64(len(id)))
		put(h, 14, 2, uint64(len(name)))
		put(h, 36, 4, uint64(len(extra)))
		h = append(append(append(h, extra...), id...), name...)
		return append(h, make([]byte, -len(h)&7)...)
	}
	first := row(b[at:], append(append([]byte(nil), b[at+40:at+64]...), "unknown!?"...), "7x", "a")
	second := row(b[at+72:], nil, "18446744073709551615", "b")
	b = truncate(b, at+512)
	copy(b[at:], append(append(append([]byte(nil), first...), second...), make([]byte, 100)...))
	writeFile(t, path, b)
	m := open(t, path, Options{})
	must(t, changeSnapshot(m, "-c", "c"))
	must(t, changeSnapshot(m, "-c", "d"))
	must(t, changeSnapshot(m, "-d", "c"))
	all, err := m.Snapshots()
	must(t, err)
	closeImage(t, m)
	var ids []string
	for _, s := range all {
		ids = append(ids, s.ID)
	}
	if fmt.Sprint(ids) != "[7x 18446744073709551615 1]" {
		t.Errorf("the IDs are %v", ids)
	}
	b, err = os.ReadFile(path)
	must(t, err)
	at = int64(tableEntry(b, offSnapshots+4))
	if !bytes.HasPrefix(b[at:], append(append([]byte(nil), first...), second...)) {
		t.Error("the other rows have changed")
	}
}

// TestSnapshotLargeTables makes snapshots of a disk whose L1 table is longer than
// what one refcount block counts.
func TestSnapshotLargeTables(t *testing.T) {
	const size = 256 << 20
	path := create(t, CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 64})
	m := open(t, path, Options{})
	write := func(v byte) {
		for off := int64(0); off < size; off += size / 8 {
			if _, err := m.WriteAt(bytes.Repeat([]byte{v}, 3000), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(1)
	for range 10 {
		must(t, changeSnapshot(m, "-c", "s"))
		must(t, changeSnapshot(m, "-d", "s"))
	}
	must(t, changeSnapshot(m, "-c", "s"))
	write(2)
	must(t, changeSnapshot(m, "-c", "t"))
	must(t, changeSnapshot(m, "-a", "s"))
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", path)
	fi, err := os.Stat(path)
	must(t, err)
	if fi.Size() > 16<<20 {
		t.Errorf("the file has %d bytes", fi.Size())
	}
	for name, want := range map[string]byte{"": 1, "s": 1, "t": 2} {
		if b := content(t, path, name); b[0] != want || b[2999] != want || b[3000] != 0 || b[size/8] != want {
			t.Errorf("snapshot %q begins with %d", name, b[0])
		}
	}
}

// TestSnapshotTooLargeTables refuses a snapshot of a disk whose L1 table is too long
// for the places between the refcount blocks, and changes nothing.
func TestSnapshotTooLargeTables(t *testing.T) {
	path := create(t, CreateOptions{Size: 9 << 30, ClusterSize: 512, RefcountBits: 64})
	m := open(t, path, Options{})
	if err := changeSnapshot(m, "-c", "s"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "does not fit") {
		t.Error(err)
	}
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", path)
}

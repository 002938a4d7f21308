package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// workload says what is done to an image while its file is recorded, or fails.
// The crash and the fault tests go through the same ones.
type workload struct {
	name string
	opts CreateOptions
	// under is the length in bytes of the backing file, which may be none;
	// packed makes it a compressed QCOW2 image rather than a raw one.
	under  int
	packed bool
	// full begins with an image full of compressed clusters, every write to
	// one of which frees host clusters.
	full bool
	// data puts guest data into an external data file.
	data bool
	// prepare, if set, changes the image at path before it is opened.
	prepare func(t testing.TB, path string)
	queues  int    // goroutines
	ops     int    // of each
	mix     string // steps by name, each as often as it is to be likely
	slow    bool   // a large file, of which fewer states have to do
	// fails, if not 0, is how many changes of the file out of a hundred find
	// the host's disk full.
	fails int
}

// Mixes of steps.
const (
	mixedMix = "write write write write write write write read zero punch discard flush flush"
	stormMix = "write write read zero punch punch discard discard discard flush"
	// A discard leaves parts of compressed clusters that have subclusters.
	snapMix   = "write write write write read zero punch discard flush snap snap"
	wholeMix  = "pack pack write write write read zero punch flush"
	resizeMix = "write write write write fill read zero punch flush flush resize"
	packedMix = "pack pack pack pack write read discard flush"
	growthMix = "write write write fill zero discard flush"
)

// step is what a worker does between two looks at its random source.
type step struct {
	do func(w *worker) error
	// alone lets no other step run beside it.
	alone bool
}

// steps are all that workloads are made of. A new operation of the engine is one
// entry more.
var steps = map[string]step{
	"write":   {do: (*worker).write},
	"pack":    {do: (*worker).pack},
	"resize":  {do: (*worker).resize},
	"snap":    {do: (*worker).snapshot, alone: true},
	"bitmap":  {do: (*worker).bitmap, alone: true},
	"read":    {do: (*worker).read},
	"fill":    {do: (*worker).fill},
	"zero":    {do: func(w *worker) error { return w.erase(eraseWrite) }},
	"punch":   {do: func(w *worker) error { return w.erase(erasePunch) }},
	"discard": {do: func(w *worker) error { return w.erase(eraseDiscard) }},
	"flush":   {do: (*worker).flush},
	"reopen":  {do: (*worker).reopen, alone: true},
	"clone":   {do: (*worker).clone},
	"audit":   {do: (*worker).audit},
	"settle":  {do: (*worker).settle, alone: true},
}

// crashRun is an image, its file, and what its sectors may be.
type crashRun struct {
	f    *memFile
	path string // the image's, beside its backing file
	// The file and its data file at the beginning, and the contents of the disk.
	start, startExt, disk []byte
	opts                  Options

	mu      sync.Mutex // guards what follows up to seq; taken before f.mu
	sectors []history
	length  history // of the disk in sectors
	flushes []flush
	kept    map[string]*kept // snapshots, by name; changed by steps that are alone
	leaky   bool             // whether there may be leaks after Close

	seq atomic.Uint64 // sequence number of the last write
	// tolerate says which errors of a step are to be expected; none if nil.
	tolerate func(error) bool

	resizing sync.Mutex   // held by one who resizes
	turn     sync.RWMutex // held by each step, exclusively by those that are alone
	m        *Image       // changes only while turn is held exclusively
}

// flush is a flush that succeeded, by positions in the log.
type flush struct {
	begin, end int
	// length is set if it is only for the length of the disk and the snapshots.
	length bool
}

// flushed returns the beginning of the last flush that had succeeded before at,
// for the sectors and for the length of the disk.
func (run *crashRun) flushed(at int) (sectors, length int) {
	for _, f := range run.flushes {
		if f.end < at {
			length = max(length, f.begin)
			if !f.length {
				sectors = max(sectors, f.begin)
			}
		}
	}
	return sectors, length
}

// newRun makes the image that a workload starts from.
func newRun(t testing.TB, w workload) *crashRun {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	switch {
	case w.full:
		raw := filepath.Join(dir, "raw")
		writeFile(t, raw, stamps(0, uint64(w.opts.Size/sector), 1))
		pack(t, raw, path, w.opts.ClusterSize)
	case w.under > 0:
		w.opts.BackingFile, w.opts.BackingFormat = "base", "raw"
		writeFile(t, filepath.Join(dir, "base"), stamps(0, uint64(w.under/sector), 1))
		if w.packed {
			w.opts.BackingFile, w.opts.BackingFormat = "base.qcow2", "qcow2"
			pack(t, filepath.Join(dir, "base"), filepath.Join(dir, "base.qcow2"), 4096)
		}
		fallthrough
	default:
		if w.data {
			w.opts.DataFile = filepath.Join(dir, dataFileName)
		}
		must(t, Create(path, w.opts))
	}
	if w.prepare != nil {
		w.prepare(t, path)
	}
	b, err := os.ReadFile(path)
	must(t, err)
	var ext []byte
	if w.data {
		ext, err = os.ReadFile(w.opts.DataFile)
		must(t, err)
	}
	m := open(t, path, Options{ReadOnly: true, DataFile: true})
	disk := make([]byte, m.Size())
	must(t, m.ReadvAt([][]byte{disk}, 0))
	snapshots, err := m.Snapshots()
	must(t, err)
	closeImage(t, m)
	run := &crashRun{path: path, opts: Options{DataFile: true}}
	for _, s := range snapshots {
		run.kept = map[string]*kept{s.Name: {disk: disk}} // prepare makes one at most, at its end
	}
	return run.resume(state{data: b, ext: ext}, disk)
}

// pack makes a compressed QCOW2 image of a raw one.
func pack(t testing.TB, raw, path string, clusterSize int64) {
	t.Helper()
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", fmt.Sprintf("cluster_size=%d", clusterSize), raw, path)
}

// crashImage makes an empty image over a backing file with the contents under,
// if there are any.
func crashImage(t testing.TB, opts CreateOptions, under []byte) *crashRun {
	t.Helper()
	run := newRun(t, workload{opts: opts, under: len(under)})
	if under != nil {
		writeFile(t, filepath.Join(filepath.Dir(run.path), "base"), under)
	}
	return run
}

// compressedRun makes an image full of compressed clusters.
func compressedRun(t testing.TB, size, clusterSize int64) *crashRun {
	t.Helper()
	return newRun(t, workload{opts: CreateOptions{Size: size, ClusterSize: clusterSize}, full: true})
}

func (run *crashRun) open(t testing.TB, f *memFile, readOnly bool) *Image {
	t.Helper()
	opts := run.opts
	opts.ReadOnly = readOnly
	m, err := run.openIn(f, opts)
	must(t, err)
	return m
}

// dataFileName is the name of an image's data file, beside the image.
const dataFileName = "data.raw"

// openIn opens the image in f, with its backing file where there is one, and with
// f's data file in the place of the host's.
func (run *crashRun) openIn(f *memFile, opts Options) (*Image, error) {
	opts.DataFile = run.opts.DataFile
	m, err := openFile(f, run.path, opts, &chain{dir: filepath.Dir(run.path)})
	if err != nil || f.ext == nil {
		return m, err
	}
	hosts := m.data
	m.data = f.ext
	return m, hosts.Close()
}

// record runs the workload and keeps its log.
func record(t testing.TB, w workload, r *rand.Rand, noBarrier func(site string) bool) *crashRun {
	t.Helper()
	run := newRun(t, w)
	run.f.noBarrier = noBarrier
	run.m = run.open(t, run.f, false)
	if w.fails > 0 {
		run.fillDisk(w.fails, rand.New(rand.NewPCG(r.Uint64(), 1)))
	}
	run.play(t, w, r)
	run.f.setFail(nil)
	must(t, run.close())
	run.noLeaks(t)
	return run
}

// noLeaks checks that Close has left no leaks.
func (run *crashRun) noLeaks(t testing.TB) {
	t.Helper()
	if leaks := checkImage(run.f.data).leaks; leaks > 0 && !run.leaky {
		t.Errorf("%d leaks after Close", leaks)
	}
}

// fillDisk lets so many changes of the file out of a hundred fail for want of
// room.
func (run *crashRun) fillDisk(percent int, r *rand.Rand) {
	run.tolerate = known
	run.f.setFail(func(op string) error { // under the file's lock
		if op != "read" && op != "sync" && op != "size" && r.IntN(100) < percent {
			return syscall.ENOSPC
		}
		return nil
	})
}

// play runs the workload's steps on the open image.
func (run *crashRun) play(t testing.TB, w workload, r *rand.Rand) {
	t.Helper()
	mix := strings.Fields(w.mix)
	var wg sync.WaitGroup
	for range w.queues {
		wk := &worker{run: run, r: rand.New(rand.NewPCG(r.Uint64(), 0))}
		wg.Go(func() {
			for range w.ops {
				name := mix[wk.r.IntN(len(mix))]
				if err := wk.step(steps[name]); err != nil && !run.expected(err) {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// expected reports whether a step may fail with err: while the disk is resized,
// what another worker writes to may go.
func (run *crashRun) expected(err error) bool {
	return errors.Is(err, ErrRange) || run.tolerate != nil && run.tolerate(err)
}

// worker is one goroutine of a workload. Ranges of several may overlap.
type worker struct {
	run *crashRun
	r   *rand.Rand
}

func (w *worker) step(s step) error {
	if s.alone {
		w.run.turn.Lock()
		defer w.run.turn.Unlock()
	} else {
		w.run.turn.RLock()
		defer w.run.turn.RUnlock()
	}
	return s.do(w)
}

// total is the length of the disk in sectors.
func (w *worker) total() uint64 { return uint64(w.run.m.Size() / sector) }

// pick returns a range of sectors of the disk.
func (w *worker) pick() (lba, n uint64) {
	total := w.total()
	n = min(1+w.r.Uint64N(12<<(2*w.r.UintN(2))), total)
	lba = w.r.Uint64N(total - n + 1)
	if w.r.IntN(3) == 0 {
		lba %= min(64, total-n+1) // a hot spot
	}
	return lba, n
}

// change does something after which n sectors from lba on have the given value.
func (w *worker) change(lba, n, value uint64, do func() error) error {
	run := w.run
	run.mu.Lock()
	c := run.begin(value)
	for i := lba; i < lba+n; i++ {
		h := &run.sectors[i]
		h.changes = append(h.changes, c)
	}
	run.mu.Unlock()
	err := do()
	run.end(c, err)
	return err
}

// begin returns a change that begins now. mu is held.
func (run *crashRun) begin(value uint64) *change {
	return &change{value: value, begin: run.f.mark("begin"), end: math.MaxInt}
}

// end ends a change.
func (run *crashRun) end(c *change, err error) {
	run.mu.Lock()
	defer run.mu.Unlock()
	c.end, c.done = run.f.mark("end"), err == nil
}

func (w *worker) write() error {
	lba, n := w.pick()
	return w.writeRange(lba, n)
}

func (w *worker) writeRange(lba, n uint64) error {
	seq := w.run.seq.Add(1)
	return w.change(lba, n, seq, func() error {
		_, err := w.run.m.WriteAt(stamps(lba, n, seq), int64(lba)*sector)
		return err
	})
}

// fill writes a long range.
func (w *worker) fill() error {
	lba, _ := w.pick()
	return w.writeRange(lba, 1+w.r.Uint64N(min(w.total()-lba, 200)))
}

// pack writes one cluster compressed.
func (w *worker) pack() error {
	m := w.run.m
	per := uint64(m.clusterSize / sector)
	lba := w.r.Uint64N((w.total()+per-1)/per) * per
	n := min(per, w.total()-lba)
	seq := w.run.seq.Add(1)
	return w.change(lba, n, seq, func() error { return m.WriteCompressed(stamps(lba, n, seq), int64(lba)*sector) })
}

func (w *worker) erase(how int) error {
	lba, n := w.pick()
	m := w.run.m
	off, size := int64(lba)*sector, int64(n)*sector
	if how == eraseDiscard {
		whole, length := wholeClusters(m, off, size)
		lba, n = uint64(whole/sector), uint64(length/sector)
	}
	return w.change(lba, n, 0, func() error { return eraser(m, how)(off, size) })
}

// read reads sectors, which may be what they were or became meanwhile.
func (w *worker) read() error {
	run := w.run
	lba, n := w.pick()
	b := make([]byte, n*sector)
	from := run.f.mark("begin")
	if _, err := run.m.ReadAt(b, int64(lba)*sector); err != nil {
		return err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	return run.judgeSectors(lba, b, from, run.f.mark("end"))
}

// resize makes the disk longer or shorter, by up to a half of its first length.
// What it gains is zero, what it loses will be.
func (w *worker) resize() error {
	run := w.run
	run.resizing.Lock() // the options go by the length
	defer run.resizing.Unlock()
	first := int64(len(run.disk))
	size := (first/2 + w.r.Int64N(first)) &^ (sector - 1)
	run.mu.Lock()
	from := uint64(min(size, run.m.Size()) / sector)
	length, lost := run.begin(uint64(size/sector)), run.begin(0)
	run.length.changes = append(run.length.changes, length)
	for uint64(len(run.sectors)) < uint64(size/sector) {
		run.sectors = append(run.sectors, newHistory(0))
	}
	for i := from; i < uint64(len(run.sectors)); i++ {
		run.sectors[i].changes = append(run.sectors[i].changes, lost)
	}
	run.mu.Unlock()
	opts := ResizeOptions{Shrink: true}
	if size > run.m.Size() {
		opts.Preallocation = [...]Preallocation{0, 0, PreallocateMetadata, PreallocateFalloc, PreallocateFull}[w.r.IntN(5)]
	}
	err := run.m.Resize(context.Background(), size, opts)
	run.end(length, err)
	run.end(lost, err)
	if err != nil {
		return err
	}
	run.durable(true)
	return nil
}

// durable notes that all that has succeeded is durable; or only the length of the
// disk and the snapshots.
func (run *crashRun) durable(length bool) {
	run.mu.Lock()
	defer run.mu.Unlock()
	run.flushes = append(run.flushes, flush{begin: run.f.mark("begin"), end: run.f.mark("flush"), length: length})
}

// flush makes all that has succeeded before durable.
func (w *worker) flush() error {
	run := w.run
	from := run.f.mark("begin")
	if err := run.m.Flush(); err != nil {
		return err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	run.flushes = append(run.flushes, flush{begin: from, end: run.f.mark("flush")})
	return nil
}

// reopen closes the image, which flushes it, and opens it again.
func (w *worker) reopen() error {
	run := w.run
	err := run.close()
	m, failed := run.openIn(run.f, run.opts)
	if failed != nil {
		fail := run.f.fail
		run.f.setFail(nil)
		if m, err = run.openIn(run.f, run.opts); err != nil {
			return err
		}
		run.f.setFail(fail)
	}
	run.m = m
	return errors.Join(err, failed)
}

// close closes the image, of which nothing else makes use.
func (run *crashRun) close() error {
	from := run.f.mark("begin")
	err := run.m.Close()
	end := run.f.mark("flush")
	if err == nil {
		run.flushes = append(run.flushes, flush{begin: from, end: end})
		return nil
	}
	// What was not flushed may be lost, and clusters leaked.
	run.leaky = true
	last, _ := run.flushed(end)
	for _, h := range run.sectors {
		for _, c := range h.changes {
			c.done = c.done && c.end < last
		}
	}
	return err
}

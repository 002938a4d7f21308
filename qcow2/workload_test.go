package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
	mixedMix  = "write write write write write write write read zero punch discard flush flush"
	stormMix  = "write write read zero punch punch discard discard discard flush"
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
	"read":    {do: (*worker).read},
	"fill":    {do: (*worker).fill},
	"zero":    {do: func(w *worker) error { return w.erase(eraseWrite) }},
	"punch":   {do: func(w *worker) error { return w.erase(erasePunch) }},
	"discard": {do: func(w *worker) error { return w.erase(eraseDiscard) }},
	"flush":   {do: (*worker).flush},
	"reopen":  {do: (*worker).reopen, alone: true},
	"resize":  {do: (*worker).resize, alone: true},
}

// crashRun is an image, its file, and what its sectors may be.
type crashRun struct {
	f     *memFile
	path  string // the image's, beside its backing file
	start []byte // the file at the beginning

	mu      sync.Mutex // guards sectors and length, taken before f.mu
	sectors []history
	length  history // of the disk in sectors
	past    uint64  // sequence numbers used by what went before
	leaky   bool    // whether there may be leaks after Close
	// tolerate says which errors of a step are to be expected; none if nil.
	tolerate func(error) bool

	turn sync.RWMutex // held by each step, exclusively by those that are alone
	m    *Image       // changes only while turn is held exclusively
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
		must(t, Create(path, w.opts))
	}
	if w.prepare != nil {
		w.prepare(t, path)
	}
	b, err := os.ReadFile(path)
	must(t, err)
	m := open(t, path, Options{ReadOnly: true})
	disk := make([]byte, m.Size())
	must(t, m.ReadvAt([][]byte{disk}, 0))
	closeImage(t, m)
	return (&crashRun{path: path}).resume(b, disk)
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
	m, err := run.openIn(f, Options{ReadOnly: readOnly})
	must(t, err)
	return m
}

// openIn opens the image in f, with its backing file where there is one.
func (run *crashRun) openIn(f *memFile, opts Options) (*Image, error) {
	return openFile(f, run.path, opts, &chain{dir: filepath.Dir(run.path)})
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
	run.f.fail = nil
	must(t, run.m.Close())
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
	run.f.fail = func(op string) error { // under the file's lock
		if op != "read" && op != "sync" && op != "size" && r.IntN(100) < percent {
			return syscall.ENOSPC
		}
		return nil
	}
}

// play runs the workload's steps on the open image.
func (run *crashRun) play(t testing.TB, w workload, r *rand.Rand) {
	t.Helper()
	mix := strings.Fields(w.mix)
	var wg sync.WaitGroup
	for g := range w.queues {
		wk := &worker{run: run, r: rand.New(rand.NewPCG(r.Uint64(), 0)), g: uint64(g), n: uint64(w.queues), seq: run.past + 2}
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

func (run *crashRun) expected(err error) bool { return run.tolerate != nil && run.tolerate(err) }

// worker is one goroutine of a workload. All share clusters; none shares
// sectors.
type worker struct {
	run  *crashRun
	r    *rand.Rand
	g, n uint64 // it is worker g of n
	seq  uint64 // of its next write
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

// coarse is how many sectors in a row one worker owns in the upper half of the
// disk, whole clusters of up to 8 KiB. In the lower half each owns every n-th.
const coarse = 16

// total is the length of the disk in sectors.
func (w *worker) total() uint64 { return uint64(w.run.m.Size()) / sector }

// pick returns a range of sectors that the worker owns.
func (w *worker) pick() (lba, n uint64) {
	total := w.total()
	half := total / 2
	switch {
	case w.n == 1:
		n = 1 + w.r.Uint64N(12<<(2*w.r.UintN(2)))
		lba = w.r.Uint64N(total - n + 1)
		if w.r.IntN(3) == 0 {
			lba %= min(64, total-n+1) // a hot spot
		}
	case w.r.IntN(2) == 0:
		n = 1
		lba = w.r.Uint64N(half/w.n)*w.n + w.g
		if w.r.IntN(3) == 0 {
			lba = w.r.Uint64N(16)*w.n + w.g
		}
	default:
		at := w.r.Uint64N(coarse)
		n = 1 + w.r.Uint64N(coarse-at)
		if w.r.IntN(3) == 0 {
			at, n = 0, coarse
		}
		lba = half + (w.r.Uint64N((total-half)/coarse/w.n)*w.n+w.g)*coarse + at
	}
	return lba, n
}

// change does something after which n sectors from lba on have the given value.
func (w *worker) change(lba, n, value uint64, do func() error) error {
	run := w.run
	run.mu.Lock()
	pos := run.f.mark("change")
	for i := lba; i < lba+n; i++ {
		run.sectors[i].begin(pos, value)
	}
	run.mu.Unlock()
	if err := do(); err != nil {
		return err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	for i := lba; i < lba+n; i++ {
		run.sectors[i].finish()
	}
	return nil
}

func (w *worker) write() error {
	lba, n := w.pick()
	return w.writeRange(lba, n)
}

func (w *worker) writeRange(lba, n uint64) error {
	seq := w.seq
	w.seq++
	return w.change(lba, n, seq, func() error {
		_, err := w.run.m.WriteAt(stamps(lba, n, seq), int64(lba)*sector)
		return err
	})
}

// pack writes one cluster compressed, of those that the worker owns as a whole.
func (w *worker) pack() error {
	m := w.run.m
	per := uint64(m.clusterSize / sector)
	total := w.total()
	lba := w.r.Uint64N(total/per) * per
	if w.n > 1 {
		lba = total/2 + (w.r.Uint64N(total/2/coarse/w.n)*w.n+w.g)*coarse
	}
	seq := w.seq
	w.seq++
	return w.change(lba, per, seq, func() error { return m.WriteCompressed(stamps(lba, per, seq), int64(lba)*sector) })
}

// read reads sectors of the worker's own.
func (w *worker) read() error {
	lba, n := w.pick()
	b := make([]byte, n*sector)
	if _, err := w.run.m.ReadAt(b, int64(lba)*sector); err != nil {
		return err
	}
	w.run.mu.Lock()
	defer w.run.mu.Unlock()
	for i := range n {
		seq, err := readStamp(b[i*sector:], lba+i)
		if err == nil {
			err = w.run.sectors[lba+i].now(seq)
		}
		if err != nil {
			return fmt.Errorf("sector %d: %w", lba+i, err)
		}
	}
	return nil
}

// fill writes a long range, for a worker that is the only one.
func (w *worker) fill() error {
	lba, most := w.pick()
	most = min(w.total()-lba, 200)
	return w.writeRange(lba, 1+w.r.Uint64N(most))
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

// flush makes all that has succeeded before durable, whoever did it.
func (w *worker) flush() error {
	run := w.run
	run.mu.Lock()
	done := make([]int, len(run.sectors))
	for i := range run.sectors {
		done[i] = run.sectors[i].done
	}
	length := run.length.done
	run.mu.Unlock()
	if err := run.m.Flush(); err != nil {
		return err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	pos := run.f.mark("flush")
	for i := range done {
		run.sectors[i].flushed(pos, done[i])
	}
	run.length.flushed(pos, length)
	return nil
}

// reopen closes the image, which flushes it, and opens it again.
func (w *worker) reopen() error {
	run := w.run
	err := run.m.Close()
	if err == nil {
		run.flushAll()
	} else {
		run.crashed()
	}
	m, failed := run.openIn(run.f, Options{})
	if failed != nil {
		fail := run.f.fail
		run.f.fail = nil
		if m, err = run.openIn(run.f, Options{}); err != nil {
			return err
		}
		run.f.fail = fail
	}
	run.m = m
	return errors.Join(err, failed)
}

// resize makes the disk longer or shorter, by up to a half of its first length.
// What a disk loses is still there as long as it has its old length, and zero when
// it is longer again.
func (w *worker) resize() error {
	run := w.run
	old, first := w.total(), run.length.changes[0].value
	n := max(first/2+w.r.Uint64N(first), 64) // as much as pick takes
	run.mu.Lock()
	pos := run.f.mark("change")
	run.length.begin(pos, n)
	for i := old; i < uint64(len(run.sectors)); i++ {
		run.sectors[i].begin(pos, 0) // if a failed resize has lost it
		run.sectors[i].finish()
	}
	for uint64(len(run.sectors)) < n {
		run.sectors = append(run.sectors, newHistory(0))
	}
	run.mu.Unlock()
	opts := ResizeOptions{Shrink: true}
	if n > old {
		opts.Preallocation = [...]Preallocation{0, 0, PreallocateMetadata, PreallocateFalloc, PreallocateFull}[w.r.IntN(5)]
	}
	err := run.m.Resize(context.Background(), int64(n)*sector, opts)
	run.mu.Lock()
	defer run.mu.Unlock()
	pos = run.f.mark("flush")
	if err == nil {
		run.length.finish()
		run.length.flushed(pos, run.length.done)
	}
	for i := w.total(); i < old; i++ {
		s := &run.sectors[i]
		s.begin(pos, 0)
		s.finish()
		if err == nil {
			s.flushed(pos, s.done)
		}
	}
	return err
}

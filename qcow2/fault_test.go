package qcow2

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"syscall"
	"testing"
)

// TestFaults fails every file operation of a workload, one run each: once or
// from then on, with EIO or ENOSPC. Whatever failed, the image afterwards checks
// with leaks at worst, a write that succeeded and was flushed is there, and no
// sector shows what was never written to it.
func TestFaults(t *testing.T) {
	r := newSeed(t)
	seed := r.Uint64()
	packed := compressedRun(t, 128<<10, 4096)
	fresh := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 64}, nil)
	over := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512}, make([]byte, 20000))
	for i := range over.sectors {
		over.sectors[i].floors = nil
	}
	for name, run := range map[string]*crashRun{"compressed": packed, "fresh": fresh, "overlay": over} {
		total := faultRun(t, run, seed, func(int, string) error { return nil })
		step := 1
		if brief() {
			step = 11
		}
		for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
			for _, always := range []bool{false, true} {
				for at := 1 + r.IntN(step); at <= total; at += step {
					if t.Failed() {
						return
					}
					what := fmt.Sprintf("%s, %v at operation %d, always %v", name, errno, at, always)
					t.Log(what)
					faultRun(t, run, seed, func(n int, op string) error {
						if (n == at || always && n > at) && (op != "sync" || errno != syscall.ENOSPC) {
							return errno
						}
						return nil
					})
				}
			}
		}
	}
}

// faultRun writes and flushes with fail deciding about each file operation by
// its number, and returns how many there were.
func faultRun(t *testing.T, run *crashRun, seed uint64, fail func(n int, op string) error) int {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	f := &memFile{data: append([]byte(nil), run.start...)}
	m := run.open(t, f, false)
	ops := 0
	f.fail = func(op string) error { ops++; return fail(ops, op) }
	may := make([]map[uint64]bool, len(run.sectors)) // what a sector may have after a crash
	now := make([]map[uint64]bool, len(run.sectors)) // and what it may read as now
	first := uint64(0)
	if len(run.sectors[0].floors) > 0 {
		first = 1
	}
	for i := range may {
		may[i], now[i] = map[uint64]bool{first: true}, map[uint64]bool{first: true}
	}
	for seq := uint64(2); seq < 60; seq++ {
		if seq%7 == 0 {
			if err := m.Flush(); err == nil {
				for i := range may {
					may[i] = maps.Clone(now[i])
				}
			} else if !known(err) {
				t.Errorf("flush: %v", err)
			}
			continue
		}
		n := 1 + r.Uint64N(20)
		lba := r.Uint64N(uint64(len(may)) - n)
		value, err := seq, error(nil)
		how := r.IntN(9)
		if how <= eraseDiscard {
			value = 0
			off, size := int64(lba*sector), int64(n*sector)
			if how == eraseDiscard {
				off, size = wholeClusters(m, off, size)
				lba, n = uint64(off/sector), uint64(size/sector)
			}
			err = eraser(m, how)(off, size)
		} else {
			err = writeStamps(m, lba, n, seq)
		}
		for i := range n {
			may[lba+i][value], now[lba+i][value] = true, true
		}
		if err != nil && !known(err) {
			t.Errorf("write: %v", err)
		}
		if err != nil {
			continue // the old or the new
		}
		for i := range n {
			now[lba+i] = map[uint64]bool{value: true}
		}
	}
	f.fail = nil
	total := ops
	if m.Close() == nil {
		may = now
	}
	verifyFaulted(t, run, f, may)
	return total
}

func known(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrFlushFailed)
}

func verifyFaulted(t *testing.T, run *crashRun, f *memFile, may []map[uint64]bool) {
	t.Helper()
	v := checkImage(f.data)
	if len(v.corruptions) > 0 {
		t.Errorf("corrupt: %v", v.corruptions)
		return
	}
	m := run.open(t, &memFile{data: f.data}, true)
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Error(err)
		return
	}
	for lba := range may {
		seq, err := readStamp(got[lba*sector:], uint64(lba))
		if err != nil || !may[lba][seq] {
			t.Errorf("sector %d has write %d, allowed are %v: %v", lba, seq, may[lba], err)
			return
		}
	}
}

// TestFailedSyncStays shows that after a failed fdatasync no flush and no write
// succeeds, and that nothing more reaches the file.
func TestFailedSyncStays(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512}, nil)
	m := run.open(t, run.f, false)
	b := make([]byte, 1000)
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	run.f.fail = func(op string) error {
		if op == "sync" {
			return syscall.EIO
		}
		return nil
	}
	if err := m.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	run.f.fail = nil
	before := len(run.f.log)
	if err := m.Flush(); !errors.Is(err, ErrFlushFailed) || !errors.Is(err, syscall.EIO) {
		t.Errorf("second flush: %v", err)
	}
	if _, err := m.WriteAt(b, 0); !errors.Is(err, ErrFlushFailed) {
		t.Errorf("write: %v", err)
	}
	if _, err := m.ReadAt(b, 0); err != nil {
		t.Errorf("read: %v", err)
	}
	if err := m.Close(); !errors.Is(err, ErrFlushFailed) {
		t.Errorf("close: %v", err)
	}
	if len(run.f.log) != before {
		t.Error("something was written after the failure")
	}
}

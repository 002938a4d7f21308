package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fault is the failure of a file operation, by its number in a workload.
type fault struct {
	at     int
	errno  syscall.Errno
	always bool // and of all that follow
}

func (f fault) String() string {
	return fmt.Sprintf("%v at operation %d, always: %v", f.errno, f.at, f.always)
}

// hits reports whether operation n, an op, fails.
func (f fault) hits(n int, op string) bool {
	return (n == f.at || f.always && n > f.at) && (op != "sync" || f.errno != syscall.ENOSPC)
}

// known reports whether err is one that a faulty file brings about.
func known(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrFlushFailed)
}

// TestFaults fails every file operation of every workload, one run each: once or
// from then on, with EIO or ENOSPC. The error reaches a caller. The disk reads
// right before and after, what was flushed is there, killed or closed, and the
// image has leaks at worst.
func TestFaults(t *testing.T) {
	for _, w := range workloads {
		t.Run(w.name, func(t *testing.T) {
			r := newSeed(t)
			w.queues, w.ops, w.fails = 1, 40, 0
			base, seed := newRun(t, w), r.Uint64()
			total := faultRun(t, base, w, seed, fault{})
			step := 1 // all of them in the long run
			if *crashStates == 0 {
				step = 1 + total/5
			}
			runs := 0
			for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
				for _, always := range []bool{false, true} {
					for at := 1 + r.IntN(step); at <= total; at += step {
						f := fault{at, errno, always}
						if faultRun(t, base, w, seed, f); t.Failed() {
							t.Fatal(f)
						}
						runs++
					}
				}
			}
			t.Logf("%d of %d faults", runs, 4*total)
		})
	}
}

// faultRun runs the workload with one fault and returns how many file operations
// there were.
func faultRun(t *testing.T, base *crashRun, w workload, seed uint64, bad fault) int {
	t.Helper()
	run := base.resume(state{data: base.start, ext: base.startExt}, base.disk)
	run.f.rec = false
	run.m = run.open(t, run.f, false)
	ops, hit, told := 0, "", false
	run.f.setFail(func(op string) error {
		if ops++; !bad.hits(ops, op) {
			return nil
		}
		if hit == "" {
			hit = op
		}
		// The host need not take back what it is offered, nor the end of a
		// file; and the goroutine in the background has nobody to tell: a
		// flush tries the same again.
		told = told || op == "punch" || op == "truncate" || inBackground()
		return bad.errno
	})
	run.tolerate = func(err error) bool { told = true; return known(err) }
	run.play(t, w, rand.New(rand.NewPCG(seed, 1)))
	run.f.setFail(nil)
	run.sound(t, "in memory")
	run.reopened(t, "killed")
	if err := run.close(); err == nil {
		run.noLeaks(t)
	} else if told = true; !known(err) {
		t.Errorf("close: %v", err)
	}
	run.reopened(t, "closed")
	if hit != "" && !told {
		t.Errorf("nobody was told that a %s failed", hit)
	}
	return ops
}

// inBackground reports whether the goroutine is the one that commits in the
// background.
func inBackground() bool {
	b := make([]byte, 8<<10)
	return strings.Contains(string(b[:runtime.Stack(b, false)]), "(*commits).start")
}

// sound reads the disk of the open image.
func (run *crashRun) sound(t *testing.T, when string) {
	t.Helper()
	disk := make([]byte, run.m.Size())
	if err := run.m.ReadvAt([][]byte{disk}, 0); err != nil {
		t.Errorf("%s: %v", when, err)
		return
	}
	now := run.f.mark("now")
	err := run.length.may(uint64(len(disk)/sector), now, now)
	if err == nil {
		err = run.judgeSectors(0, disk, now, now)
	}
	if err != nil {
		t.Errorf("%s: %v", when, err)
	}
}

// reopened checks the file as it is and reads its disk.
func (run *crashRun) reopened(t *testing.T, when string) {
	t.Helper()
	now := run.now()
	err := checkState(now.data)
	if err == nil {
		_, err = run.verify(t, now)
	}
	if err != nil {
		t.Errorf("%s: %v", when, err)
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
	run.f.setFail(func(op string) error {
		if op == "sync" {
			return syscall.EIO
		}
		return nil
	})
	if err := m.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	run.f.setFail(nil)
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

// TestSyncAfterFailedSync has a second fdatasync wait for one that fails: it is
// never begun, because the kernel would report that all is well.
func TestSyncAfterFailedSync(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512}, nil)
	m := run.open(t, run.f, false)
	blocking := &blockingFile{file: m.file, stuck: make(chan struct{}), release: make(chan struct{})}
	m.file = blocking
	run.f.setFail(func(op string) error {
		if op == "sync" && run.f.syncs == 1 {
			return syscall.EIO
		}
		return nil
	})
	done := make(chan error, 2)
	go func() { done <- m.datasync() }()
	<-blocking.stuck
	go func() { done <- m.datasync() }()
	time.Sleep(20 * time.Millisecond) // the second waits for its turn
	close(blocking.release)
	for range 2 {
		if err := <-done; !errors.Is(err, ErrFlushFailed) {
			t.Errorf("got %v", err)
		}
	}
	if run.f.syncs != 1 {
		t.Errorf("%d syncs", run.f.syncs)
	}
}

// TestCountsAfterFailedCommit fails the reading of the counts in a commit. The
// next one raises them before it publishes the pointers.
func TestCountsAfterFailedCommit(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 512}, nil)
	m := run.open(t, run.f, false)
	must(t, m.WritevAt([][]byte{stamps(0, 8, 1)}, 0))
	m.refs.mu.Lock()
	m.refs.slices.Purge() // nothing in it is dirty before the first commit
	m.refs.mu.Unlock()
	run.f.setFail(func(op string) error {
		if op == "read" {
			return syscall.EIO
		}
		return nil
	})
	if err := m.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	run.f.setFail(nil)
	must(t, m.Flush())
	if v := checkImage(run.f.data); len(v.corruptions) > 0 {
		t.Error(v)
	}
	closeImage(t, m)
}

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

// liveResize is a disk that shrinks and grows under its users. Its first keep
// sectors are always there. All others go with each shrinking.
type liveResize struct {
	m          *Image
	keep, most uint64       // sectors
	begun      atomic.Int64 // shrinkings
	done       atomic.Int64 // of those
	over       atomic.Bool
}

// resize shrinks and grows the disk n times.
func (l *liveResize) resize(t *testing.T, r *rand.Rand, n int) {
	defer l.over.Store(true)
	for range n {
		l.begun.Add(1)
		small := int64(l.keep) * sector
		if err := l.m.Resize(t.Context(), small, ResizeOptions{Shrink: true}); err != nil || l.m.Size() != small {
			t.Errorf("shrink: size %d, %v", l.m.Size(), err)
			return
		}
		l.done.Add(1)
		big := int64(l.keep+1+r.Uint64N(l.most-l.keep)) * sector
		if r.IntN(3) == 0 {
			big = int64(l.most) * sector
		}
		mode := [...]Preallocation{0, 0, 0, PreallocateMetadata, PreallocateFull}[r.IntN(5)]
		if err := l.m.Resize(t.Context(), big, ResizeOptions{Preallocation: mode}); err != nil || l.m.Size() != big {
			t.Errorf("grow: size %d, %v", l.m.Size(), err)
			return
		}
	}
}

// seen is the last that a user did to a sector beyond those that are kept.
type seen struct {
	seq   uint64
	begun int64 // shrinkings when it returned, and how many had ended
	done  int64
}

func (l *liveResize) saw(seq uint64) seen {
	done := l.done.Load() // first, so that it is not taken for more
	return seen{seq: seq, begun: l.begun.Load(), done: done}
}

// use does random things to every n-th sector, from g on, until the resizing is
// over, and returns how many reads of what comes and goes succeeded. kept is what
// the sectors hold that are always there.
func (l *liveResize) use(t *testing.T, r *rand.Rand, g, n uint64, kept []byte) (reads int) {
	far := map[uint64]seen{}
	b := make([]byte, sector)
	for seq := uint64(2); !l.over.Load() && !t.Failed(); seq++ {
		lba := r.Uint64N(l.keep/n)*n + g
		beyond := r.IntN(2) == 0
		if beyond {
			lba = l.keep + r.Uint64N((l.most-l.keep)/n)*n + g
		}
		off := int64(lba) * sector
		done := l.done.Load()
		var err error
		switch how := r.IntN(12); {
		case how == 0:
			err = l.m.Flush()
		case how < 3:
			if err = eraser(l.m, r.IntN(2))(off, sector); !beyond {
				clear(kept[off : off+sector])
			} else if err == nil {
				far[lba] = l.saw(0)
			}
		case how < 7:
			if err = l.m.ReadvAt([][]byte{b}, off); err == nil {
				err = l.judge(b, lba, kept, far, done)
				reads += int(b2u(beyond))
			}
		default:
			stamp(b, lba, seq)
			if _, err = l.m.WriteAt(b, off); !beyond {
				copy(kept[off:], b)
			} else if err == nil {
				far[lba] = l.saw(seq)
			}
		}
		if err != nil && (!beyond || !errors.Is(err, ErrRange)) {
			t.Errorf("sector %d of %d: %v", lba, l.m.Size()/sector, err)
		}
		if err != nil {
			delete(far, lba) // done or not: not judged until the next write
		}
	}
	return reads
}

// judge checks what a read of a sector returned. done is how many shrinkings had
// ended when it began.
func (l *liveResize) judge(b []byte, lba uint64, kept []byte, far map[uint64]seen, done int64) error {
	if lba < l.keep {
		if !bytes.Equal(b, kept[lba*sector:(lba+1)*sector]) {
			return errors.New("differs from what was written")
		}
		return nil
	}
	seq, err := readStamp(b, lba)
	last, known := far[lba]
	switch {
	case err != nil || !known:
		return err
	case seq == last.seq && last.begun < done && seq != 0:
		return fmt.Errorf("shows write %d from before the disk shrank", seq)
	case seq != last.seq && seq != 0:
		return fmt.Errorf("shows write %d after %d", seq, last.seq)
	case seq != last.seq && last.done == l.begun.Load():
		return fmt.Errorf("lost write %d", last.seq)
	}
	return nil
}

// TestResizeLive resizes a disk up and down while goroutines read, write, erase
// and flush all over it.
func TestResizeLive(t *testing.T) {
	for _, c := range []struct {
		opts CreateOptions
		base int64
		snap bool
	}{
		{CreateOptions{ClusterSize: 512}, 0, false},
		{CreateOptions{ClusterSize: 4096}, 1 << 20, false},
		{CreateOptions{ClusterSize: 1024, RefcountBits: 64}, 100 << 10, true},
	} {
		t.Run(fmt.Sprint(c.opts.ClusterSize), func(t *testing.T) {
			r := newSeed(t)
			l := &liveResize{keep: 211, most: 1111}
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			c.opts.Size = int64(l.keep) * sector
			kept := make([]byte, c.opts.Size)
			if c.base > 0 {
				copy(kept, makeBase(t, r, dir, "raw", c.base))
				c.opts.BackingFile, c.opts.BackingFormat = "base.raw", "raw"
			}
			must(t, Create(path, c.opts))
			qemuWrite(t, r, path, kept, 10)
			if c.snap {
				qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			}
			l.m = open(t, path, Options{L2CacheBytes: 1})
			const users = 4
			reads := make([]int, users)
			var wg sync.WaitGroup
			for g := range uint64(users) {
				r := rand.New(rand.NewPCG(r.Uint64(), 0))
				wg.Go(func() { reads[g] = l.use(t, r, g, users, kept) })
			}
			l.resize(t, r, 30)
			wg.Wait()
			for _, n := range reads {
				if n == 0 {
					t.Errorf("%v reads of what comes and goes succeeded", reads)
				}
			}
			got := make([]byte, len(kept))
			if _, err := l.m.ReadAt(got, 0); err != nil || !bytes.Equal(got, kept) {
				t.Errorf("what is always there differs (%v)", err)
			}
			must(t, l.m.Resize(t.Context(), c.opts.Size, ResizeOptions{Shrink: true}))
			checkFile(t, l.m, path)
			closeImage(t, l.m)
			checkClean(t, path)
			compare(t, dir, path, kept)
		})
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/calfvm/calf/qcow2"
)

const (
	block   = 4096      // bytes: what has one version
	near    = 4         // blocks in a row of one goroutine in the first half of the disk
	far     = 1 << 8    // and in the second, whole clusters
	slack   = 24 << 20  // bytes of metadata and of clusters found free ahead of need
	longest = 1 << 6    // blocks of one request
	hot     = 512 << 10 // bytes at the beginning of each half that get a part of all requests
)

// soak is the work on one image. The image is shared; each block belongs to one
// goroutine, so that all know what theirs have. Clusters belong to several.
type soak struct {
	config
	// gate is held by each request, exclusively by who looks at the whole image.
	gate sync.RWMutex
	img  *qcow2.Image // changes while the gate is held exclusively
	// versions are what the blocks have, by number: 0 is zeros. A block's is its
	// owner's while the gate is not held exclusively.
	versions []uint32

	requests, loaded, stored atomic.Int64 // loaded are bytes read, stored those written
	reported                 time.Time    // when the last report was
	longest                  int64        // the greatest length of the file that was seen
}

// newSoak makes the image and its backing file, half as long as the disk.
func newSoak(c config) (*soak, error) {
	s := &soak{config: c, versions: make([]uint32, c.size/block)}
	base := filepath.Join(filepath.Dir(c.image), filepath.Base(c.image)+".base")
	f, err := os.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	b := make([]byte, block)
	for i := range s.versions[:len(s.versions)/2] {
		s.versions[i] = 1
		stamp(b, int64(i), 1)
		if _, err := f.Write(b); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	opts := qcow2.CreateOptions{Size: c.size, BackingFile: filepath.Base(base), BackingFormat: "raw"}
	if err := qcow2.Create(c.image, opts); err != nil {
		return nil, err
	}
	s.img, err = qcow2.Open(c.image, qcow2.Options{})
	return s, err
}

// run works until ctx ends or something is wrong.
func (s *soak) run(ctx context.Context, w io.Writer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.reported = time.Now()
	var wg sync.WaitGroup
	for g := range s.goroutines {
		wk := &worker{soak: s, r: rand.New(rand.NewPCG(s.seed, uint64(g))), g: int64(g), seq: 2, buf: make([]byte, longest*block)}
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := wk.request(); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := s.watch(ctx, w); err != nil {
			cancel(err)
		}
	})
	wg.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return errors.Join(err, s.img.Close())
	}
	err := s.report(w)
	if err == nil {
		err = s.inspect(w)
	}
	return errors.Join(err, s.img.Close())
}

// watch reports and checks in time, until ctx ends.
func (s *soak) watch(ctx context.Context, w io.Writer) error {
	report, check := time.NewTicker(s.every), time.NewTicker(s.check)
	defer report.Stop()
	defer check.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-report.C:
			err = s.report(w)
		case <-check.C:
			err = s.inspect(w)
		}
		if err != nil {
			return err
		}
	}
}

// report prints what was done since the last report and what the image takes.
func (s *soak) report(w io.Writer) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	live, err := s.live()
	if err != nil {
		return err
	}
	if err := s.img.Flush(); err != nil {
		return err
	}
	fi, err := os.Stat(s.image)
	if err != nil {
		return err
	}
	grown := fi.Size() - s.longest
	s.longest = max(s.longest, fi.Size())
	taken := fi.Sys().(*syscall.Stat_t).Blocks * 512
	seconds := time.Since(s.reported).Seconds()
	s.reported = time.Now()
	_, err = fmt.Fprintf(w, "%6.0f requests/s, read %6.1f MB/s, written %6.1f MB/s; live %6.1f MB, taken %6.1f MB (%.2f), file %6.1f MB (%+.1f)\n",
		float64(s.requests.Swap(0))/seconds, mb(s.loaded.Swap(0))/seconds, mb(s.stored.Swap(0))/seconds,
		mb(live), mb(taken), float64(taken)/float64(max(live, 1)), mb(fi.Size()), mb(grown))
	if err != nil {
		return err
	}
	return s.bounded(live, taken, fi.Size())
}

func mb(n int64) float64 { return float64(n) / 1e6 }

// bounded returns an error if the file takes a tenth more room than its live
// clusters, or is a tenth longer than the disk.
func (s *soak) bounded(live, taken, length int64) error {
	if taken > live+live/10+slack {
		return fmt.Errorf("the file takes %d bytes for %d of data", taken, live)
	}
	if length > s.size+s.size/10+slack {
		return fmt.Errorf("the file is %d bytes long, for a disk of %d", length, s.size)
	}
	return nil
}

// live is the number of bytes that the image itself stores.
func (s *soak) live() (int64, error) {
	var n int64
	for r, err := range s.img.Map(0, s.size) {
		if err != nil {
			return 0, err
		}
		if r.Kind == qcow2.MapData && r.Layer == 0 {
			n += r.Length
		}
	}
	return n, nil
}

// inspect closes the image, checks it, and reads all of it.
func (s *soak) inspect(w io.Writer) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if err := s.img.Close(); err != nil {
		return err
	}
	found, err := qcow2.Check(context.Background(), s.image, qcow2.CheckOptions{})
	if err != nil {
		return err
	}
	if !found.Clean() {
		return fmt.Errorf("the check finds %d corruptions and %d leaks, first: %+v", found.Corruptions, found.Leaks, found.Findings[0])
	}
	if s.img, err = qcow2.Open(s.image, qcow2.Options{}); err != nil {
		return err
	}
	b := make([]byte, longest*block)
	for i := int64(0); i < int64(len(s.versions)); i += longest {
		if err := s.verify(b, i, longest); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(w, "checked: clean; all %d blocks are right\n", len(s.versions))
	return err
}

// verify reads n blocks from the first on and compares them with their versions.
func (s *soak) verify(b []byte, first, n int64) error {
	b = b[:n*block]
	if _, err := s.img.ReadAt(b, first*block); err != nil {
		return err
	}
	want := make([]byte, block)
	for i := range n {
		stamp(want, first+i, s.versions[first+i])
		if got := b[i*block:][:block]; string(got) != string(want) {
			return fmt.Errorf("block %d, version %d, has other data", first+i, s.versions[first+i])
		}
	}
	return nil
}

package image

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// watchedDisk is a disk of a mebibyte that takes a while and notes what is done to it.
type watchedDisk struct {
	all  chan struct{} // closed once as many requests are under way as are to be
	late time.Time     // when nobody waits for that any more

	mu              sync.Mutex
	want            int64 // how many that is
	under, most     int64 // requests under way, and the most there were
	offs            map[int64]int
	flushes, beside int // flushes, and those while requests were under way
	fails           error
}

func newWatchedDisk(want int64) *watchedDisk {
	return &watchedDisk{all: make(chan struct{}), late: time.Now().Add(10 * time.Second), want: want, offs: map[int64]int{}}
}

func (d *watchedDisk) request(off int64) error {
	d.mu.Lock()
	d.under++
	if d.most = max(d.most, d.under); d.most == d.want {
		close(d.all)
		d.want = 0
	}
	d.offs[off]++
	d.mu.Unlock()
	select {
	case <-d.all:
	case <-time.After(time.Until(d.late)):
	}
	time.Sleep(100 * time.Microsecond)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.under--
	return d.fails
}

func (d *watchedDisk) ReadvAt(_ [][]byte, off int64) error  { return d.request(off) }
func (d *watchedDisk) WritevAt(_ [][]byte, off int64) error { return d.request(off) }
func (d *watchedDisk) Size() int64                          { return 1 << 20 }
func (d *watchedDisk) ReadOnly() bool                       { return false }
func (d *watchedDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	if d.under > 0 {
		d.beside++
	}
	return nil
}

// TestBenchRequests counts the requests of a bench, where they are and how many are
// under way at once, and its flushes.
func TestBenchRequests(t *testing.T) {
	for _, c := range []struct {
		o       BenchOptions
		places  int // where requests were; 0 is not looked at
		flushes int
		beside  bool // flushes beside requests
	}{
		{BenchOptions{Count: 500, Queues: 1, Depth: 1, Size: 4096, Step: 4096}, 256, 0, false},
		{BenchOptions{Count: 500, Queues: 4, Depth: 4, Size: 4096, Step: 4096}, 256, 0, false},
		{BenchOptions{Count: 100, Queues: 3, Depth: 8, Size: 512, Step: 1024, Offset: 512}, 100, 0, false},
		{BenchOptions{Count: 300, Queues: 2, Depth: 3, Size: 1 << 19, Step: 1 << 18, Offset: 1}, 2, 0, false},
		{BenchOptions{Count: 300, Queues: 2, Depth: 8, Size: 4096, Step: 512, Random: true}, 0, 0, false},
		{BenchOptions{Count: 100, Queues: 1, Depth: 8, Size: 4096, Step: 4096, Write: true, FlushInterval: 10}, 100, 10, false},
		{BenchOptions{Count: 100, Queues: 2, Depth: 8, Size: 4096, Step: 4096, Write: true, FlushInterval: 10, Undrained: true}, 100, 10, true},
		{BenchOptions{Queues: 2, Depth: 2, Size: 4096, Step: 4096}, 0, 0, false},
	} {
		if err := c.o.Check(); err != nil {
			t.Errorf("%+v: %v", c.o, err)
		}
		want := c.o.Queues * c.o.Depth
		d := newWatchedDisk(want)
		b := &bench{BenchOptions: c.o, disk: d, places: (d.Size()-c.o.Offset-c.o.Size)/c.o.Step + 1}
		r, err := b.run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for off, n := range d.offs {
			if total += n; off < c.o.Offset || (off-c.o.Offset)%c.o.Step != 0 || off > d.Size()-c.o.Size {
				t.Errorf("%+v: a request at %d", c.o, off)
			}
		}
		if int64(total) != c.o.Count || r.Requests != c.o.Count || r.Bytes != c.o.Count*c.o.Size {
			t.Errorf("%+v: %d requests, the report is %+v", c.o, total, r)
		}
		if len(d.offs) != c.places && c.places > 0 {
			t.Errorf("%+v: requests at %d places, want %d", c.o, len(d.offs), c.places)
		}
		if d.most != want && c.o.Count > 0 {
			t.Errorf("%+v: %d requests at once", c.o, d.most)
		}
		if d.flushes != c.flushes || r.Flushes != int64(c.flushes) || (d.beside > 0) != c.beside {
			t.Errorf("%+v: %d flushes, %d of them beside requests", c.o, d.flushes, d.beside)
		}
		if l := r.Latency; c.o.Count > 0 && (l.P50 < 95_000 || l.P50 > l.P99 || l.P99 > l.P999 || l.P999 > l.Max || r.Seconds <= 0) {
			t.Errorf("%+v: the report is %+v", c.o, r)
		}
	}
}

// TestBenchEnds ends a bench by an error and by its context.
func TestBenchEnds(t *testing.T) {
	o := BenchOptions{Count: 1 << 40, Queues: 2, Depth: 4, Size: 512, Step: 512}
	gone := errors.New("the disk is gone")
	d := newWatchedDisk(1)
	d.fails = gone
	if _, err := (&bench{BenchOptions: o, disk: d, places: 1}).run(t.Context()); !errors.Is(err, gone) {
		t.Errorf("got error %v", err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer stop()
	d.fails = nil
	if _, err := (&bench{BenchOptions: o, disk: d, places: 1}).run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v", err)
	}
}

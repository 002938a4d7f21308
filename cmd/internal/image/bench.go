package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/docker/go-units"

	"github.com/calfvm/calf/blk"
)

// BenchOptions say what requests a Bench makes.
type BenchOptions struct {
	Open  OpenOptions
	Write bool
	Fill  byte // of which the data is made that is written
	// Count requests are made in all, by Queues queues, each of which has up to
	// Depth of them under way.
	Count, Queues, Depth int64
	// Size is the length of a request. The first is at Offset, and each further one
	// by Step after the last, in turns from the beginning where the disk ends; or
	// at such a place by chance, if they are Random.
	Size, Step, Offset int64
	Random             bool
	// FlushInterval is after how many of its requests a queue flushes; 0 is never.
	// Others of the queue are over then and wait, unless Undrained is set.
	FlushInterval int64
	Undrained     bool
}

// benchMemory is the most memory for the data of requests, in bytes.
const benchMemory = 128 << 20

// Check refuses options that make no sense.
func (o *BenchOptions) Check() error {
	switch {
	case o.Count < 0:
		return errors.New("the number of requests cannot be negative")
	case o.Queues < 1 || o.Depth < 1 || o.Queues > 1024 || o.Depth > 1024 || o.Queues*o.Depth > 1024:
		return errors.New("queues and requests under way in each are 1 at least, and 1024 in all")
	case o.Size < 1 || o.Size > benchMemory/(o.Queues*o.Depth):
		return fmt.Errorf("a request has 1 byte at least, and all that are under way have %s at most", units.BytesSize(benchMemory))
	case o.Step < 1 || o.Offset < 0:
		return errors.New("the step is 1 byte at least, and the offset not negative")
	case o.FlushInterval < 0:
		return errors.New("--flush-interval cannot be negative")
	case o.FlushInterval > 0 && !o.Write:
		return errors.New("--flush-interval is only available in write tests")
	case o.FlushInterval > 0 && o.FlushInterval < o.Depth:
		return errors.New("flush interval can't be smaller than depth")
	case o.Write && o.Open.ForceShare:
		return errors.New("an image that is written is not shared: leave out -U or -w")
	}
	return nil
}

// BenchReport is what a Bench has measured. Latencies are in nanoseconds, right to
// a hundredth of what they are.
type BenchReport struct {
	Filename string  `json:"filename"`
	Format   string  `json:"format"`
	Engine   string  `json:"engine"`
	Requests int64   `json:"requests"`
	Bytes    int64   `json:"bytes"`
	Flushes  int64   `json:"flushes"`
	Seconds  float64 `json:"seconds"`
	PerSec   float64 `json:"requests-per-second"`
	MiBPerS  float64 `json:"mib-per-second"`
	Latency  latency `json:"latency-ns"`
}

type latency struct {
	Mean float64 `json:"mean"`
	P50  int64   `json:"p50"`
	P99  int64   `json:"p99"`
	P999 int64   `json:"p99.9"`
	Max  int64   `json:"max"`
}

// Heading describes the requests, in qemu-img's lines.
func (o *BenchOptions) Heading() string {
	what := "read"
	if o.Write {
		what = "write"
	}
	s := fmt.Sprintf("Sending %d %s requests, %d bytes each, %d in parallel (starting at offset %d, step size %d)\n",
		o.Count, what, o.Size, o.Queues*o.Depth, o.Offset, o.Step)
	if o.FlushInterval > 0 {
		s += fmt.Sprintf("Sending flush every %d requests\n", o.FlushInterval)
	}
	return s
}

// Text writes the report for people, after qemu-img's line.
func (r *BenchReport) Text(w io.Writer) error {
	d := func(ns int64) time.Duration { return time.Duration(ns).Round(10 * time.Nanosecond) }
	_, err := fmt.Fprintf(w, "Run completed in %.3f seconds.\n%.0f requests/s, %.1f MiB/s\nlatency: p50 %v, p99 %v, p99.9 %v, max %v\n",
		r.Seconds, r.PerSec, r.MiBPerS, d(r.Latency.P50), d(r.Latency.P99), d(r.Latency.P999), d(r.Latency.Max))
	return err
}

// Bench makes requests to the image at path as the queues of a guest do, and
// measures them. The time includes the last flush, if it flushes at all.
func Bench(ctx context.Context, path string, o BenchOptions) (report *BenchReport, err error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	o.Open.ReadOnly = !o.Write
	m, err := Open(path, o.Open)
	if err != nil {
		return nil, err
	}
	defer closing(m, &err)
	if m.Size()-o.Offset < o.Size {
		return nil, fmt.Errorf("%s has %d bytes: a request of %d bytes at %d lies beyond its end", path, m.Size(), o.Size, o.Offset)
	}
	b := &bench{BenchOptions: o, disk: m, places: (m.Size()-o.Offset-o.Size)/o.Step + 1}
	r, err := b.run(ctx)
	if err != nil {
		return nil, err
	}
	r.Filename, r.Format, r.Engine = m.Path, m.Format, "sync"
	return r, nil
}

// bench is a Bench of an open disk.
type bench struct {
	BenchOptions
	disk    blk.Disk
	places  int64 // where requests may begin
	flushes atomic.Int64
}

// run has all queues make their requests.
func (b *bench) run(ctx context.Context) (*BenchReport, error) {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var (
		workers sync.WaitGroup
		taken   []*hdrhistogram.Histogram
		start   = time.Now()
	)
	for i := range b.Queues {
		q := &benchQueue{bench: b, first: i, count: (b.Count - i + b.Queues - 1) / b.Queues}
		for k := range b.Depth {
			h := hdrhistogram.New(1, int64(time.Hour), 2)
			taken = append(taken, h)
			workers.Go(func() {
				if err := q.work(ctx, rand.New(rand.NewPCG(uint64(i), uint64(k))), h); err != nil { //nolint:gosec // G115: not negative
					fail(err)
				}
			})
		}
	}
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return b.report(time.Since(start), taken), nil
}

// report sums up what was taken.
func (b *bench) report(after time.Duration, taken []*hdrhistogram.Histogram) *BenchReport {
	all := taken[0]
	for _, h := range taken[1:] {
		all.Merge(h)
	}
	seconds := max(after.Seconds(), 1e-9)
	return &BenchReport{
		Requests: b.Count, Bytes: b.Count * b.Size, Flushes: b.flushes.Load(), Seconds: seconds,
		PerSec: float64(b.Count) / seconds, MiBPerS: float64(b.Count*b.Size) / (1 << 20) / seconds,
		Latency: latency{
			Mean: all.Mean(), P50: all.ValueAtQuantile(50), P99: all.ValueAtQuantile(99),
			P999: all.ValueAtQuantile(99.9), Max: all.Max(),
		},
	}
}

// benchQueue is one queue. Of all requests it makes every one that is its own by
// turns, so that queues share no counter.
type benchQueue struct {
	*bench
	first, count int64
	next         atomic.Int64
	gate         sync.RWMutex // held shared by requests, exclusively by a flush that drains
}

// work makes requests of the queue, one after the other, until there are no more.
func (q *benchQueue) work(ctx context.Context, r *rand.Rand, taken *hdrhistogram.Histogram) error {
	buf := [][]byte{bytes.Repeat([]byte{q.Fill}, int(q.Size))}
	for ctx.Err() == nil {
		k := q.next.Add(1) - 1
		if k >= q.count {
			return nil
		}
		place := q.first + k*q.Queues
		if q.Random {
			place = r.Int64N(q.places)
		}
		off := q.Offset + place%q.places*q.Step
		q.gate.RLock()
		start := time.Now()
		err := q.request(buf, off)
		_ = taken.RecordValue(int64(time.Since(start))) // one of more than an hour is not counted
		q.gate.RUnlock()
		if err == nil && q.FlushInterval > 0 && (k+1)%q.FlushInterval == 0 {
			err = q.flush()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (q *benchQueue) request(buf [][]byte, off int64) error {
	if q.Write {
		return q.disk.WritevAt(buf, off)
	}
	return q.disk.ReadvAt(buf, off)
}

func (q *benchQueue) flush() error {
	if !q.Undrained {
		q.gate.Lock()
		defer q.gate.Unlock()
	}
	q.flushes.Add(1)
	return q.disk.Flush()
}

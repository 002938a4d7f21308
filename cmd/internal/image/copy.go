package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"sync"
	"time"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// source is what a copy reads. A Disk is one.
type source interface {
	ReadvAt(iov [][]byte, off int64) error
	Map(off, n int64) iter.Seq2[qcow2.Mapping, error]
	Size() int64
}

// copying says how a source is copied to a sink. What the source holds is learned
// from its map, so that holes and zero ranges are never read; in what is data, zeros
// are found by looking.
type copying struct {
	from source
	to   sink
	// fresh says that the sink reads as zero where it has not been written.
	fresh bool
	// base, if not nil, is what the sink shows where it has not been written:
	// what is equal there is left out. From layer shared on, if that is not
	// negative, the source is the base itself.
	base   source
	shared int
	// plan says what to do with each range, in order and without gaps; nil leaves
	// that to the map of the source.
	plan iter.Seq2[task, error]
	// sparse is the least length of zeros, a multiple of 512 bytes, that are not
	// written as data. 0 writes them all.
	sparse int64
	// ordered makes writes in the order of their offsets.
	ordered bool
	// leave, if not nil, says which ranges of the source stay out of it all.
	leave   func(*qcow2.Mapping) bool
	workers int
	rate    int64 // bytes in a second; 0 is no limit
	// lost, if not nil, takes what cannot be read and becomes zero; else that is
	// an error.
	lost *Lost
	// offload, if not nil, has the host copy the n bytes at off. An error that wraps
	// errors.ErrUnsupported says that it cannot.
	offload func(off, n int64) error
	meter   *progress.Meter

	free chan []byte // buffers that no piece has
}

// action is what to do with a range. Where several ranges share a grain of the sink,
// and there is no base, the greatest is right for all of it.
type action uint8

const (
	keep     action = iota // what the sink shows is right
	makeZero               // without reading the source
	compare                // with the base, and copy what differs
	copyAll
)

// task is an action for the range [off, end).
type task struct {
	action
	off, end int64
}

// piece is a task for one worker.
type piece struct {
	task
	buf    []byte // for the data; nil for makeZero
	filled bool   // buf has the data
	// turn is closed when all before this is written, done when this is, too.
	turn <-chan struct{}
	done chan struct{}
}

const (
	// pieceBytes is the length of a piece that is copied, if neither the grain of
	// the sink nor the least run of zeros is longer.
	pieceBytes = 1 << 20
	// zeroBytes is the length of one that is made zero.
	zeroBytes = 1 << 30
	// minSparse is the least length of zeros that are worth a hole.
	minSparse = 4096
	// copyMemory bounds the buffers of a copy, of which there are two at least.
	copyMemory = 64 << 20
)

// defaultWorkers is how many pieces are in work at once unless it is said.
func defaultWorkers() int { return max(4, runtime.GOMAXPROCS(0)) }

// packing makes packed, which compresses clusters, the sink. Each worker that does so
// has an encoder, which takes memory for several clusters, and a CPU.
func (c *copying) packing(packed packedSink) {
	const memory, clusters = 96 << 20, 8
	c.to = packed
	c.workers = max(1, min(c.workers, runtime.GOMAXPROCS(0), int(memory/(clusters*packed.grain()))))
}

// run has workers do the pieces that produce emits, until one fails or ctx is done.
func (c *copying) run(ctx context.Context, produce func(ctx context.Context, emit func(piece) error) error) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	c.free = make(chan []byte, max(2, min(int64(c.workers)+1, copyMemory/c.pieceLength())))
	for range cap(c.free) {
		c.free <- make([]byte, c.pieceLength())
	}
	pieces := make(chan piece)
	var workers sync.WaitGroup
	for range c.workers {
		workers.Go(func() {
			for p := range pieces {
				if err := c.do(ctx, p); err != nil {
					fail(err)
				}
			}
		})
	}
	turn := make(chan struct{})
	close(turn)
	err := produce(ctx, func(p piece) error {
		p.turn, p.done = turn, make(chan struct{})
		turn = p.done
		select {
		case pieces <- p:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		fail(err)
	}
	close(pieces)
	workers.Wait()
	if err = context.Cause(ctx); errors.Is(err, context.Canceled) {
		err = fmt.Errorf("the copy was interrupted: %w", err)
	}
	return err
}

// pieceLength is a multiple of the sink's grain.
func (c *copying) pieceLength() int64 {
	n, grain := max(pieceBytes, c.sparse), c.to.grain()
	return (n + grain - 1) / grain * grain
}

// buffer waits for a free buffer.
func (c *copying) buffer(ctx context.Context) ([]byte, error) {
	select {
	case b := <-c.free:
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// disk copies the source.
func (c *copying) disk(ctx context.Context) error {
	length, pace := c.pieceLength(), pacer{rate: c.rate, start: time.Now()}
	return c.run(ctx, func(ctx context.Context, emit func(piece) error) error {
		for t, err := range aligned(c.tasks(), c.to.grain()) {
			if err != nil {
				return err
			}
			for off := t.off; off < t.end && t.action != keep; {
				p := piece{task: task{makeZero, off, min(t.end, off+zeroBytes)}}
				if t.action != makeZero {
					p.task = task{t.action, off, min(t.end, off-off%length+length)}
					if p.buf, err = c.buffer(ctx); err != nil {
						return err
					}
					if err := pace.wait(ctx, p.end-off); err != nil {
						return err
					}
				}
				if err := emit(p); err != nil {
					return err
				}
				off = p.end
			}
		}
		return nil
	})
}

// expect tells the meter how many bytes have to be copied, and returns that.
func (c *copying) expect() int64 {
	look := *c
	if c.lost != nil {
		look.lost = new(Lost) // what is lost is said once
	}
	var n int64
	for t, err := range look.tasks() {
		if err != nil {
			break // the copy will say so
		}
		if t.action >= compare {
			n += t.end - t.off
		}
	}
	c.meter.Expect(n)
	return n
}

// pacer keeps a rate of bytes in a second; 0 is no limit.
type pacer struct {
	rate, done int64
	start      time.Time
}

// wait returns when the next n bytes may begin.
func (p *pacer) wait(ctx context.Context, n int64) error {
	if p.rate == 0 {
		return nil
	}
	due := p.start.Add(time.Duration(float64(p.done) / float64(p.rate) * float64(time.Second)))
	p.done += n
	select {
	case <-time.After(time.Until(due)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tasks says of all ranges of the source, in order and without gaps, what to do.
func (c *copying) tasks() iter.Seq2[task, error] {
	if c.plan != nil {
		return c.plan
	}
	return func(yield func(task, error) bool) {
		for off, size := int64(0), c.from.Size(); off < size; {
			for m, err := range c.from.Map(off, size-off) {
				if err != nil && c.lost == nil {
					yield(task{}, fmt.Errorf("what lies at %d cannot be found: %w", off, err))
					return
				}
				if err != nil { // reading it says what is lost
					m = qcow2.Mapping{Length: min(size-off, pieceBytes-off%pieceBytes), Kind: qcow2.MapData}
				}
				if m.Missing {
					gone := fmt.Errorf("%s was cut off: byte %d of the disk, at %d in it, is not there", m.Path, off, m.HostOffset)
					if c.lost == nil {
						yield(task{}, gone)
						return
					}
					c.lost.add(off, off+m.Length, gone)
				}
				if !yield(task{c.actionFor(&m), off, off + m.Length}, nil) {
					return
				}
				off += m.Length
			}
		}
	}
}

func (c *copying) actionFor(m *qcow2.Mapping) action {
	zero := m.Kind == qcow2.MapZero || m.Kind == qcow2.MapUnallocated || m.Hole || m.Missing
	switch {
	case c.leave != nil && c.leave(m):
		return keep
	case c.base != nil && c.shared >= 0 && m.Layer >= c.shared:
		return keep
	case zero && c.sparse > 0 && c.fresh:
		return keep
	case zero && c.sparse > 0:
		return makeZero
	case c.base != nil && c.shared < 0 && m.Layer > 0:
		return compare
	}
	return copyAll
}

// aligned makes tasks, which follow each other without gaps, such ones of whole
// grains. A grain of several gets the greatest of their actions; one that is zero in
// part and the base's in part is compared.
func aligned(tasks iter.Seq2[task, error], grain int64) iter.Seq2[task, error] {
	return func(yield func(task, error) bool) {
		var part task // a grain that is not complete
		for t, err := range tasks {
			if err != nil {
				yield(t, err)
				return
			}
			if part.off < part.end {
				if part.action != t.action {
					part.action = max(part.action, t.action, compare)
				}
				part.end = min(t.end, part.off+grain)
				t.off = part.end
				if part.end == part.off+grain {
					if !yield(part, nil) {
						return
					}
					part = task{}
				}
			}
			whole := task{t.action, t.off, t.end / grain * grain}
			if whole.off < whole.end {
				if !yield(whole, nil) {
					return
				}
				t.off = whole.end
			}
			if t.off < t.end {
				part = t
			}
		}
		if part.off < part.end {
			yield(part, nil)
		}
	}
}

// do does a piece and gives its buffer back.
func (c *copying) do(ctx context.Context, p piece) error {
	if p.buf != nil {
		defer func() { c.free <- p.buf }()
	}
	finish, err := c.begin(&p)
	if err != nil {
		return err
	}
	if c.ordered {
		select {
		case <-p.turn:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := finish(); err != nil {
		return err
	}
	close(p.done) // what waits for a piece that failed is stopped by ctx
	return nil
}

// begin does what of a piece may be done before its turn, and returns the rest.
func (c *copying) begin(p *piece) (finish func() error, err error) {
	if p.action == makeZero {
		return func() error { return c.to.zero(p.off, p.end-p.off) }, nil
	}
	if c.offload != nil && p.action == copyAll && !p.filled {
		err := c.offload(p.off, p.end-p.off)
		if err == nil {
			c.meter.Add(p.end - p.off)
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return func() error { return nil }, err
		}
	}
	data, base, err := c.load(p)
	return func() error { return c.store(data, base, p.off) }, err
}

// load reads the data of a piece, and what the sink shows there if that is to be
// compared.
func (c *copying) load(p *piece) (data, base []byte, err error) {
	data = p.buf[:p.end-p.off]
	if !p.filled {
		if err := c.read(data, p.off); err != nil {
			return nil, nil, err
		}
	}
	if p.action == compare && c.base != nil {
		base, err = readPadded(c.base, len(data), p.off)
	}
	return data, base, err
}

// store writes the runs of data, which is at off.
func (c *copying) store(data, base []byte, off int64) (err error) {
	for r := range c.runs(data, base, off) {
		if r.action == makeZero {
			err = c.to.zero(r.off, r.end-r.off)
		} else {
			err = c.to.write(data[r.off-off:r.end-off], r.off)
		}
		if err != nil {
			return err
		}
	}
	c.meter.Add(int64(len(data)))
	return nil
}

// readPadded reads n bytes at off, zeros beyond the end of d.
func readPadded(d source, n int, off int64) ([]byte, error) {
	b := make([]byte, n)
	have := min(int64(n), d.Size()-off)
	if have <= 0 {
		return b, nil
	}
	return b, d.ReadvAt([][]byte{b[:have]}, off)
}

// runs are the ranges of data, which is at off, that are to be copied, or made zero:
// those that the sink does not show already. If base is not nil, it is what that
// shows.
func (c *copying) runs(data, base []byte, off int64) iter.Seq[task] {
	unit, n := c.unit(), int64(len(data))
	return func(yield func(task) bool) {
		// What is not yielded yet: data from begin on, zeros from zero on.
		var begin, zero int64
		flush := func(end int64) bool {
			if end-zero < c.sparse {
				zero = end
			}
			ok := begin == zero || yield(task{copyAll, off + begin, off + zero})
			ok = ok && (zero == end || c.fresh || yield(task{makeZero, off + zero, off + end}))
			begin, zero = end, end
			return ok
		}
		for at, next := int64(0), int64(0); at < n; at = next {
			next = min(n, at+unit-(off+at)%unit)
			block := data[at:next]
			switch {
			case base != nil && bytes.Equal(block, base[at:next]):
				if !flush(at) {
					return
				}
				begin, zero = next, next
			case c.sparse > 0 && isZero(block):
			default:
				if zero < at && at-zero >= c.sparse && !flush(at) {
					return
				}
				zero = next
			}
		}
		flush(n)
	}
}

// unit is the length of the aligned blocks that are looked at one by one.
func (c *copying) unit() int64 {
	const sector, page = 512, 4096
	switch {
	case c.to.grain() > 1:
		return c.to.grain()
	case c.sparse%page != 0:
		return sector
	}
	return page
}

var zeros [64 << 10]byte

// isZero reports whether all of p is zero.
func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

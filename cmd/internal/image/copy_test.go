package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// modelSource is a disk in memory. Reads of what its map calls zero fail if they are
// not allowed, and so do all of the byte at broken, if that is not negative.
type modelSource struct {
	data      []byte
	maps      []qcow2.Mapping
	readZeros bool
	broken    int64
}

func (s *modelSource) Size() int64 { return int64(len(s.data)) }

func (s *modelSource) ReadvAt(iov [][]byte, off int64) error {
	end := off + int64(len(iov[0]))
	if s.broken >= off && s.broken < end {
		return errors.New("broken")
	}
	if !s.readZeros && touches(s.of(func(m *qcow2.Mapping) bool { return m.Kind == qcow2.MapZero }), off, end) {
		return fmt.Errorf("zeros in [%d, %d) are read", off, end)
	}
	copy(iov[0], s.data[off:])
	return nil
}

// of are the ranges of a kind.
func (s *modelSource) of(kind func(*qcow2.Mapping) bool) []qcow2.Mapping {
	return slices.DeleteFunc(slices.Clone(s.maps), func(m qcow2.Mapping) bool { return !kind(&m) })
}

func (s *modelSource) Map(off, n int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		for _, m := range s.maps {
			from, to := max(m.Offset, off), min(m.Offset+m.Length, off+n)
			m.Offset, m.Length = from, to-from
			if from < to && !yield(m, nil) {
				return
			}
		}
	}
}

// modelSink is a disk in memory that checks what is done to it.
type modelSink struct {
	mu      sync.Mutex
	data    []byte
	unit    int64
	ordered bool
	last    int64 // end of the last write
	fresh   bool
	written int64
	// All of kept is to be left alone, and zeros shorter than sparse are data, but
	// for the ranges of zeros.
	kept, zeros []qcow2.Mapping
	sparse      int64
	wrong       []string
}

// touches reports whether [off, end) has a part in common with any of maps.
func touches(maps []qcow2.Mapping, off, end int64) bool {
	return slices.ContainsFunc(maps, func(m qcow2.Mapping) bool { return off < m.Offset+m.Length && m.Offset < end })
}

func (s *modelSink) grain() int64 { return s.unit }

func (s *modelSink) write(p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := off + int64(len(p))
	if off%s.unit != 0 || end%s.unit != 0 && end != int64(len(s.data)) ||
		s.ordered && off < s.last || touches(s.kept, off, end) {
		s.wrong = append(s.wrong, fmt.Sprintf("write of [%d, %d) after %d", off, end, s.last))
	}
	s.last = end
	s.written += int64(len(p))
	copy(s.data[off:], p)
	return nil
}

func (s *modelSink) zero(off, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fresh || off%s.unit != 0 || (off+n)%s.unit != 0 && off+n != int64(len(s.data)) ||
		n < s.sparse && !touches(s.zeros, off, off+n) || touches(s.kept, off, off+n) {
		s.wrong = append(s.wrong, fmt.Sprintf("zeros to [%d, %d)", off, off+n))
	}
	clear(s.data[off : off+n])
	return nil
}

// randomSource is a disk of two layers; base is what the lower one has.
func randomSource(r *rand.Rand) (s *modelSource, base []byte) {
	size := (1 + r.Int64N(5000)) * 512
	s = &modelSource{data: make([]byte, size), broken: -1}
	base = make([]byte, size)
	base = base[:r.Int64N(size+1)]
	for i := range base {
		base[i] = byte(i>>12) & 3 // zero at times
	}
	for off := int64(0); off < size; {
		m := qcow2.Mapping{Offset: off, Length: min(size-off, (1+r.Int64N(600))*512), Kind: qcow2.MapData, Layer: r.IntN(2)}
		here := s.data[off : off+m.Length]
		switch {
		case m.Layer == 1:
			copy(here, base[min(off, int64(len(base))):])
		case r.IntN(3) == 0:
			m.Kind = qcow2.MapZero
		default:
			for i := range here {
				if i>>11&1 == 0 { // zeros of half a page
					here[i] = byte(i*7 + int(off))
				}
			}
		}
		s.maps = append(s.maps, m)
		off += m.Length
	}
	return s, base
}

// TestCopy copies random disks in every way to a sink that is strict.
func TestCopy(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	for i := range 50 {
		from, base := randomSource(r)
		to := &modelSink{unit: []int64{1, 1, 512, 4096, 65536}[r.IntN(5)], data: make([]byte, len(from.data)), ordered: r.IntN(2) == 0}
		c := &copying{
			from: from, to: to, ordered: to.ordered, workers: 1 + r.IntN(5),
			sparse: []int64{0, 512, 1024, 4096, 1 << 20}[r.IntN(5)], meter: new(progress.Meter),
		}
		from.readZeros = to.unit > 1 || c.sparse == 0
		to.sparse, to.zeros = c.sparse, from.of(func(m *qcow2.Mapping) bool { return m.Kind == qcow2.MapZero })
		switch r.IntN(3) {
		case 0:
			c.fresh, to.fresh = true, true
		case 1: // it has something else before
			for k := range to.data {
				to.data[k] = 7
			}
		case 2:
			copy(to.data, base)
			c.base, c.shared = &modelSource{data: base, broken: -1}, r.IntN(2)*2-1
			if to.unit == 1 {
				to.kept = from.of(func(m *qcow2.Mapping) bool { return m.Layer == 1 })
			}
		}
		err := c.disk(t.Context())
		if c.sparse == 0 && c.base == nil && to.written != from.Size() {
			t.Errorf("seed %d: %d bytes of %d are written", seed, to.written, from.Size())
		}
		if err != nil || len(to.wrong) > 0 || !bytes.Equal(to.data, from.data) {
			t.Fatalf("seed %d, round %d, grain %d, sparse %d, fresh %t, base %t %d: %v, %q, the disk is right: %t",
				seed, i, to.unit, c.sparse, c.fresh, c.base != nil, c.shared, err, to.wrong, bytes.Equal(to.data, from.data))
		}
	}
}

// TestCopyFails ends a copy by what cannot be read or written, or by its context.
func TestCopyFails(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	for range 8 {
		data := bytes.Repeat([]byte{1}, 3<<20)
		from := &modelSource{data: data, broken: r.Int64N(3 << 20), maps: []qcow2.Mapping{{Length: 3 << 20, Kind: qcow2.MapData}}}
		c := &copying{from: from, workers: 1 + r.IntN(5), sparse: 4096, ordered: true, fresh: true}
		var out bytes.Buffer
		c.to = &streamSink{w: &out}
		err := c.disk(t.Context())
		if want := fmt.Sprintf("byte %d of the disk", from.broken&^511); err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Fatalf("seed %d: got %v, want %s", seed, err, want)
		}
		if n := int64(out.Len()); n > from.broken || !bytes.Equal(out.Bytes(), data[:n]) {
			t.Fatalf("seed %d: %d bytes went out, byte %d is broken", seed, n, from.broken)
		}
		c.lost, c.free = new(Lost), nil
		to := &modelSink{unit: 1, data: make([]byte, len(data)), fresh: true}
		c.to = to
		if err := c.disk(t.Context()); err != nil {
			t.Fatal(err)
		}
		at := from.broken &^ 511
		clear(data[at : at+512])
		if !bytes.Equal(to.data, data) || len(c.lost.ranges) != 1 {
			t.Fatalf("seed %d: lost %v", seed, c.lost.ranges)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.disk(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
	}
}

// TestLost merges what is lost and bounds it.
func TestLost(t *testing.T) {
	var l Lost
	why := errors.New("why")
	for _, off := range []int64{4096, 0, 512, 8192, 8704} {
		l.add(off, off+512, why)
	}
	for i := range int64(2 * mostLost) {
		l.add(1<<20+i*1024, 1<<20+i*1024+512, why)
	}
	var s bytes.Buffer
	if err := l.Text(&s); err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitN(s.Bytes(), []byte("\n"), 4)
	for i, want := range []string{
		"lost: 1024 bytes at 0 are zero now: why", "lost: 512 bytes at 4096 are zero now: why", "lost: 1024 bytes at 8192 are zero now: why",
	} {
		if string(lines[i]) != want {
			t.Errorf("got %s, want %s", lines[i], want)
		}
	}
	if more := fmt.Sprintf("lost: %d bytes elsewhere\n", 512*(2*mostLost-mostLost+3)); !bytes.HasSuffix(s.Bytes(), []byte(more)) {
		t.Errorf("it does not end with %s", more)
	}
}

// TestCopyRate keeps a rate, within what a busy machine does to it.
func TestCopyRate(t *testing.T) {
	data := bytes.Repeat([]byte{1}, 6<<20)
	from := &modelSource{data: data, broken: -1, maps: []qcow2.Mapping{{Length: 6 << 20, Kind: qcow2.MapData}}}
	to := &modelSink{unit: 1, data: make([]byte, len(data)), fresh: true}
	start := time.Now()
	if err := (&copying{from: from, to: to, workers: 2, fresh: true, rate: 20 << 20}).disk(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 240*time.Millisecond { // the last of six pieces begins after five
		t.Errorf("6 MiB at 20 MiB/s took %v", took)
	}
}

// TestStreamStops ends a copy whose input never comes.
func TestStreamStops(t *testing.T) {
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(in.Close(), out.Close()) }()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := &copying{to: &streamSink{w: io.Discard}, workers: 2, ordered: true, fresh: true}
	if _, err := c.stream(ctx, in, func(int64) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestAligned compares with what each grain has, looked up one by one.
func TestAligned(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	for range 1000 {
		grain, size := int64(1+r.IntN(8)), int64(1+r.IntN(100))
		var tasks []task
		want := map[int64][]action{}
		for off := int64(0); off < size; {
			tk := task{action(r.IntN(4)), off, min(size, off+1+r.Int64N(20))}
			tasks = append(tasks, tk)
			for ; off < tk.end; off++ {
				want[off/grain] = append(want[off/grain], tk.action)
			}
		}
		next := int64(0)
		for tk, err := range aligned(func(yield func(task, error) bool) {
			for _, tk := range tasks {
				if !yield(tk, nil) {
					return
				}
			}
		}, grain) {
			if err != nil || tk.off != next || tk.off%grain != 0 || tk.end <= tk.off || tk.end%grain != 0 && tk.end != size {
				t.Fatalf("seed %d: %+v follows %d, in grains of %d", seed, tk, next, grain)
			}
			next = tk.end
			for g := tk.off / grain; g*grain < tk.end; g++ {
				is := want[g][0]
				if slices.Max(want[g]) != slices.Min(want[g]) {
					is = max(compare, slices.Max(want[g]))
				}
				if tk.action != is {
					t.Fatalf("seed %d: grain %d has %v and gets %v", seed, g, want[g], tk.action)
				}
			}
		}
		if next != size {
			t.Fatalf("seed %d: it ends at %d of %d", seed, next, size)
		}
	}
}

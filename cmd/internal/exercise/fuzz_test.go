package exercise

import (
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/qcow2"
)

// memDisk is a disk in memory that cannot become large.
type memDisk struct {
	mu   sync.Mutex
	data []byte
}

const memDiskLimit = 1 << 20

func (d *memDisk) span(off, n int64) []byte { return d.data[off : off+n] }

func (d *memDisk) move(iov [][]byte, off int64, copyPart func(disk, p []byte)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range iov {
		copyPart(d.span(off, int64(len(p))), p)
		off += int64(len(p))
	}
	return nil
}

func (d *memDisk) ReadvAt(iov [][]byte, off int64) error {
	return d.move(iov, off, func(disk, p []byte) { copy(p, disk) })
}

func (d *memDisk) WritevAt(iov [][]byte, off int64) error {
	return d.move(iov, off, func(disk, p []byte) { copy(disk, p) })
}

func (d *memDisk) WriteZeroes(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.span(off, n))
	return nil
}

func (d *memDisk) PunchHole(off, n int64) error              { return d.WriteZeroes(off, n) }
func (d *memDisk) Discard(off, n int64) error                { return d.WriteZeroes(off, n) }
func (d *memDisk) WriteCompressed(p []byte, off int64) error { return d.WritevAt([][]byte{p}, off) }
func (d *memDisk) CompressionUnit() int64                    { return 4096 }
func (d *memDisk) ZeroUnit() int64                           { return 4096 }
func (d *memDisk) Size() int64                               { return int64(len(d.data)) }
func (d *memDisk) ReadOnly() bool                            { return false }
func (d *memDisk) Flush() error                              { return nil }
func (d *memDisk) Info(io.Writer) error                      { return nil }
func (d *memDisk) Close() error                              { return nil }

func (d *memDisk) Map(off, n int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		if off < 0 || n < 0 || off+n > d.Size() {
			yield(qcow2.Mapping{}, syscall.EINVAL)
		} else if n > 0 {
			yield(qcow2.Mapping{Offset: off, Length: n, HostOffset: qcow2.NoOffset, Kind: qcow2.MapZero}, nil)
		}
	}
}

func (d *memDisk) Resize(_ context.Context, size int64, _ qcow2.Preallocation) error {
	if size > memDiskLimit {
		return syscall.EFBIG
	}
	d.data = append(d.data, make([]byte, memDiskLimit)...)[:size]
	return nil
}

// FuzzLines does lines that are anything. No command may panic, take long, or print
// more than what it reads asks for.
func FuzzLines(f *testing.F) {
	for _, line := range commandsToCompare {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, script string) {
		if strings.Contains(script, "sigraise") || strings.Contains(script, "abort") || strings.Contains(script, "-s") || len(script) > 1000 {
			return // what these do is done to this process, or reads its files
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		var out, messages bytes.Buffer
		s := New(Config{Out: &out, Messages: &messages, Open: func(Options) (Disk, error) { return &memDisk{data: make([]byte, 1<<16)}, nil }})
		if err := s.OpenFile(Options{Path: "x"}); err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(script, ";") {
			if !s.Do(ctx, line) {
				break
			}
		}
		s.Close()
		if out.Len() > 100*memDiskLimit {
			t.Errorf("%d bytes of output", out.Len())
		}
	})
}

// FuzzNumber parses numbers, which are never negative, and whole ones exactly.
func FuzzNumber(f *testing.F) {
	for _, s := range []string{"", "0", "1.5k", "0x1F", "7.9999999999999999E", "1.", "+1", "9223372036854775807", "0.00000000000000000001E"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseNumber(s)
		if err == nil && n < 0 {
			t.Errorf("%q: %d", s, n)
		}
		if err == nil {
			if again, err := parseNumber(size(float64(n))); err == nil && again != n && n < 1024 {
				t.Errorf("%q: %d, shown as %s", s, n, size(float64(n)))
			}
		}
	})
}

// TestAsynchronousIsBounded begins more transfers than may run at once, of which
// none ends before others wait.
func TestAsynchronousIsBounded(t *testing.T) {
	d := &slowDisk{memDisk: memDisk{data: make([]byte, 1<<16)}, gate: make(chan struct{})}
	var out, messages bytes.Buffer
	s := New(Config{Out: &out, Messages: &messages, Open: func(Options) (Disk, error) { return d, nil }})
	if err := s.OpenFile(Options{Path: "x"}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for range 3 * maxInflight {
			d.gate <- struct{}{}
		}
	}()
	for range 3 * maxInflight {
		if !s.Do(t.Context(), "aio_write 0 512") {
			t.Fatal("the session has ended")
		}
		if s.inflight.count > maxInflight {
			t.Fatalf("%d transfers at once", s.inflight.count)
		}
	}
	s.Do(t.Context(), "aio_flush")
	if got := strings.Count(out.String(), "wrote 512/512 bytes at offset 0\n"); got != 3*maxInflight || s.inflight.count+int(s.inflight.memory) != 0 {
		t.Errorf("%d reports, want %d; %d under way", got, 3*maxInflight, s.inflight.count)
	}
	if !s.Close() {
		t.Errorf("it failed: %s", &messages)
	}
}

// TestStable flushes after what was written with -f, and nothing else.
func TestStable(t *testing.T) {
	d := &countingDisk{memDisk: memDisk{data: make([]byte, 1<<16)}}
	var out, messages bytes.Buffer
	s := New(Config{Out: &out, Messages: &messages, Open: func(Options) (Disk, error) { return d, nil }})
	if err := s.OpenFile(Options{Path: "x"}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"write -f 0 512", "write -zf 0 512", "writev -f 0 512", "aio_write -f 0 512", "aio_write -zf 0 512", "flush"} {
		before := d.flushes
		s.Do(t.Context(), line)
		s.Do(t.Context(), "aio_flush")
		if d.flushes != before+1 {
			t.Errorf("%s: %d flushes", line, d.flushes-before)
		}
		if s.Do(t.Context(), strings.ReplaceAll(strings.ReplaceAll(line, "-f ", ""), "f ", " ")); line != "flush" && d.flushes != before+1 {
			t.Errorf("without -f: %d flushes", d.flushes-before-1)
		}
	}
	if !s.Close() {
		t.Errorf("it failed: %s", &messages)
	}
}

// TestMisalign looks at where the buffers of transfers are.
func TestMisalign(t *testing.T) {
	for _, misalign := range []bool{false, true} {
		d := &countingDisk{memDisk: memDisk{data: make([]byte, 1<<16)}}
		s := New(Config{Out: io.Discard, Messages: io.Discard, Misalign: misalign, Open: func(Options) (Disk, error) { return d, nil }})
		if err := s.OpenFile(Options{Path: "x"}); err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"write 0 4k", "writev 0 4k 4k", "aio_write 0 4k", "read 0 4k", "readv 0 4k 4k", "aio_read 0 4k"} {
			s.Do(t.Context(), line)
			if s.Do(t.Context(), "aio_flush"); (d.odd > 0) != misalign {
				t.Errorf("%s, misaligned %t: %d of its buffers are", line, misalign, d.odd)
			}
			d.odd = 0
		}
		s.Close()
	}
}

// countingDisk counts flushes, and buffers that begin inside of 512 bytes.
type countingDisk struct {
	memDisk

	flushes, odd int
}

func (d *countingDisk) Flush() error { d.flushes++; return nil }

func (d *countingDisk) count(iov [][]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range iov {
		if reflect.ValueOf(p).Pointer()%512 != 0 {
			d.odd++
		}
	}
}

func (d *countingDisk) ReadvAt(iov [][]byte, off int64) error {
	d.count(iov)
	return d.memDisk.ReadvAt(iov, off)
}

func (d *countingDisk) WritevAt(iov [][]byte, off int64) error {
	d.count(iov)
	return d.memDisk.WritevAt(iov, off)
}

// slowDisk lets a write through for each element of gate.
type slowDisk struct {
	memDisk

	gate chan struct{}
}

func (d *slowDisk) WritevAt(iov [][]byte, off int64) error {
	<-d.gate
	return d.memDisk.WritevAt(iov, off)
}

// TestFailures are said in the words of C on the output, and in ours beside it.
func TestFailures(t *testing.T) {
	d := &failingDisk{memDisk: memDisk{data: make([]byte, 1<<16)}}
	for _, c := range []struct {
		err          error
		line         string
		out, message string
	}{
		{syscall.ENOSPC, "write 0 512", "write failed: No space left on device\n", ""},
		{&qcow2.Error{Path: "a", What: "is full", Err: syscall.ENOSPC}, "write 0 512", "write failed: No space left on device\n", "calf: a: is full: no space left on device\n"},
		{&qcow2.Error{Path: "a", Kind: qcow2.ErrCorrupt, What: "is broken"}, "writev 0 512", "writev failed: Input/output error\n", "calf: a: is broken\n"},
		{&qcow2.Error{Path: "a", Kind: qcow2.ErrUnsupported, What: "has none"}, "write 0 512", "write failed: Operation not supported\n", "calf: a: has none\n"},
		{errors.New("odd"), "aio_write 0 512", "aio_write failed: Input/output error\n", "calf: odd\n"},
	} {
		d.err = c.err
		var out, messages bytes.Buffer
		s := New(Config{Out: &out, Messages: &messages, Name: "calf", Open: func(Options) (Disk, error) { return d, nil }})
		if err := s.OpenFile(Options{Path: "x"}); err != nil {
			t.Fatal(err)
		}
		s.Do(t.Context(), c.line)
		if ok := s.Close(); ok != strings.HasPrefix(c.line, "aio") {
			t.Errorf("%s: it succeeded: %t", c.line, ok)
		}
		if out.String() != c.out || messages.String() != c.message {
			t.Errorf("%s: prints %q and says %q; want %q and %q", c.line, &out, &messages, c.out, c.message)
		}
	}
}

type failingDisk struct {
	memDisk

	err error
}

func (d *failingDisk) WritevAt([][]byte, int64) error { return d.err }

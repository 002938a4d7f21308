package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/blk/nbd"
)

// The numbers that the tests send and expect, as the specification has them.
const (
	initMagic   = uint64(0x4e42444d41474943)
	optionMagic = uint64(0x49484156454f5054)
	replyMagic  = uint64(0x3e889045565a9)
	request     = uint32(0x25609513)
	simple      = uint32(0x67446698)
	chunk       = uint32(0x668e33ef)

	read, write, disc, flush, trim, cache, zeroes, status = uint16(0), uint16(1), uint16(2), uint16(3), uint16(4), uint16(5), uint16(6), uint16(7)

	fua, noHole, df, one, fast = uint16(1), uint16(2), uint16(4), uint16(8), uint16(16)

	ack        = uint32(1)
	errUnsup   = uint32(1<<31 + 1)
	errPolicy  = uint32(1<<31 + 2)
	errInvalid = uint32(1<<31 + 3)
	errUnknown = uint32(1<<31 + 6)
	errTooBig  = uint32(1<<31 + 9)

	eperm, eio, einval, enospc, enotsup, eshutdown = uint32(1), uint32(5), uint32(22), uint32(28), uint32(95), uint32(108)
)

// server is a server under test.
type server struct {
	t    *testing.T
	srv  *nbd.Server
	path string
	stop func()
	done chan error // what Serve has returned
}

// serve starts a server, which ends with the test and must leave no goroutine.
func serve(t *testing.T, cfg nbd.Config) *server {
	t.Helper()
	srv, err := nbd.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, srv: srv, path: filepath.Join(t.TempDir(), "s"), done: make(chan error, 1)}
	ln, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s.stop = cancel
	go func() { s.done <- srv.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := s.wait(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		noneLeft(t)
	})
	return s
}

// wait returns what Serve returns, however often it is called.
func (s *server) wait() error {
	select {
	case err := <-s.done:
		s.done <- err
		return err
	case <-time.After(20 * time.Second):
		return errors.New("it does not end")
	}
}

// noneLeft fails if a goroutine of the server goes on.
func noneLeft(t *testing.T) {
	t.Helper()
	var stacks string
	for range 200 {
		b := make([]byte, 1<<20)
		stacks = string(b[:runtime.Stack(b, true)])
		if !strings.Contains(stacks, "nbd.(*conn)") && !strings.Contains(stacks, "nbd.(*Server)") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("goroutines are left:\n%s", stacks)
}

// export serves one disk under the name "disk".
func export(d blk.Disk) nbd.Config {
	return nbd.Config{Exports: []nbd.Export{{Name: "disk", Description: "a disk", Disk: d}}}
}

// client speaks the protocol byte by byte.
type client struct {
	t  *testing.T
	nc net.Conn
}

// dial connects, and reads what the server begins with.
func (s *server) dial() *client {
	s.t.Helper()
	nc, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		s.t.Fatal(err)
	}
	c := &client{s.t, nc}
	c.want(initMagic, optionMagic, uint16(3))
	return c
}

// enter connects and chooses the only export, with structured replies and
// base:allocation, or without.
func (s *server) enter(structured bool) *client {
	s.t.Helper()
	c := s.dial()
	c.send(uint32(3))
	if structured {
		c.option(8)
		c.want(replyMagic, uint32(8), ack, uint32(0))
		c.option(10, str(""), uint32(1), str("base:allocation"))
		c.want(replyMagic, uint32(10), uint32(4), uint32(19), uint32(0), "base:allocation")
		c.want(replyMagic, uint32(10), ack, uint32(0))
	}
	c.option(7, str(""), uint16(0))
	c.skip(replyMagic, uint32(7), uint32(3), uint32(12), uint16(0), uint64(0), uint16(0))
	c.want(replyMagic, uint32(7), ack, uint32(0))
	return c
}

// encode writes values one after the other, in network byte order.
func encode(values ...any) []byte {
	var b []byte
	for _, v := range values {
		switch v := v.(type) {
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			var err error
			if b, err = binary.Append(b, binary.BigEndian, v); err != nil {
				panic(err)
			}
		}
	}
	return b
}

// str is a string after its length.
func str(s string) []byte { return encode(uint32(len(s)), s) }

func (c *client) send(values ...any) {
	c.t.Helper()
	if _, err := c.nc.Write(encode(values...)); err != nil {
		c.t.Fatal(err)
	}
}

// option sends an option.
func (c *client) option(opt uint32, data ...any) {
	c.t.Helper()
	b := encode(data...)
	c.send(optionMagic, opt, uint32(len(b)), b)
}

// request sends a request.
func (c *client) request(flags, command uint16, cookie, off uint64, n uint32, payload ...any) {
	c.t.Helper()
	c.send(request, flags, command, cookie, off, n, encode(payload...))
}

// get reads n bytes.
func (c *client) get(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if got, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("%d bytes of %d, then %v: %x", got, n, err, b[:min(got, 64)])
	}
	return b
}

// want reads what has to come next.
func (c *client) want(values ...any) {
	c.t.Helper()
	want := encode(values...)
	if got := c.get(len(want)); !bytes.Equal(got, want) {
		c.t.Fatalf("got  %x\nwant %x", clip(got), clip(want))
	}
}

func clip(b []byte) []byte { return b[:min(len(b), 200)] }

// skip reads as much as values would be.
func (c *client) skip(values ...any) {
	c.t.Helper()
	c.get(len(encode(values...)))
}

// gone expects the server to hang up without another word, before a handshake that
// does not go on would end.
func (c *client) gone() {
	c.t.Helper()
	if err := c.nc.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		c.t.Fatal(err)
	}
	var b [1]byte
	if n, err := c.nc.Read(b[:]); n != 0 || !hungUp(err) {
		c.t.Fatalf("got %x, %v; want the connection to be over", b[:n], err)
	}
}

// hungUp reports whether err is what a connection that the server has closed ends
// with; a reset if it has not read all.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || err != nil && strings.Contains(err.Error(), "reset by peer")
}

// fault expects an error, in a structured reply with a message.
func (c *client) fault(cookie uint64, code uint32) {
	c.t.Helper()
	c.want(chunk, uint16(1), uint16(1<<15+1), cookie)
	b := c.get(int(binary.BigEndian.Uint32(c.get(4))))
	if got := binary.BigEndian.Uint32(b); got != code {
		c.t.Fatalf("error %d (%q), want %d", got, b[6:], code)
	}
	if n := binary.BigEndian.Uint16(b[4:]); int(n) != len(b)-6 || n == 0 {
		c.t.Fatalf("a message of %d bytes in %d", n, len(b)-6)
	}
}

// ok expects a success without data.
func (c *client) ok(cookie uint64) {
	c.t.Helper()
	c.want(simple, uint32(0), cookie)
}

// flushingDisk keeps beside what it holds what would be left after a power cut.
type flushingDisk struct {
	*blktest.Thin
	mu     sync.Mutex
	stable []byte
}

func newFlushing(size int) *flushingDisk {
	return &flushingDisk{Thin: thin(size), stable: make([]byte, size)}
}

func (d *flushingDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.ReadvAt([][]byte{d.stable}, 0); err != nil {
		return err
	}
	return d.Thin.Flush()
}

// stableAt is what is stable of n bytes at off.
func (d *flushingDisk) stableAt(off, n int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.stable[off:][:n])
}

// thin is a disk of so many random bytes.
func thin(size int) *blktest.Thin {
	d := &blktest.Thin{Memory: blktest.Memory{Bytes: make([]byte, size)}}
	_, _ = rand.NewChaCha8([32]byte{1}).Read(d.Bytes)
	return d
}

// mappedDisk says of each 4 KiB that is zero that it is a hole.
type mappedDisk struct {
	*blktest.Thin
	fault func(off int64) error
}

const mapUnit = 4096

func (d *mappedDisk) Extents(off, n int64) iter.Seq2[nbd.Extent, error] {
	return func(yield func(nbd.Extent, error) bool) {
		b := make([]byte, mapUnit)
		for end := off + n; off < end; {
			if d.fault != nil {
				if err := d.fault(off); err != nil {
					yield(nbd.Extent{}, err)
					return
				}
			}
			e := nbd.Extent{Length: min(end-off, mapUnit-off%mapUnit)}
			b = b[:e.Length]
			if err := d.ReadvAt([][]byte{b}, off); err != nil {
				yield(nbd.Extent{}, err)
				return
			}
			if len(bytes.Trim(b, "\x00")) == 0 {
				e.Status = nbd.StateHole | nbd.StateZero
			}
			if !yield(e, nil) {
				return
			}
			off += e.Length
		}
	}
}

// vastDisk is a disk too large for any memory; it takes every write and reads as
// zero.
type vastDisk struct{ delay time.Duration }

func (d vastDisk) ReadvAt(iov [][]byte, _ int64) error {
	time.Sleep(d.delay)
	for _, b := range iov {
		clear(b)
	}
	return nil
}

func (d vastDisk) WritevAt([][]byte, int64) error { time.Sleep(d.delay); return nil }
func (d vastDisk) Flush() error                   { return nil }
func (d vastDisk) Size() int64                    { return 1 << 60 }
func (d vastDisk) ReadOnly() bool                 { return false }

// seeded returns a generator whose seed is printed if the test fails.
func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %#x", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

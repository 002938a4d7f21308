package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/blk/nbd"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// TestRefusedRequests are answered with the errors that the specification has for
// them, in both kinds of replies, and leave the connection and the disk as they
// were.
func TestRefusedRequests(t *testing.T) {
	const size = 64 * kib
	for _, c := range []struct {
		name           string
		flags, command uint16
		off            uint64
		n              uint32
		code           uint32
	}{
		{"unknown command", 0, 8, 0, 512, einval},
		{"largest command", 0, 0xffff, 0, 512, einval},
		{"unknown flag", 1 << 5, read, 0, 512, einval},
		{"flag of another command", noHole, read, 0, 512, einval},
		{"flag of another write", fast, write, 0, 512, einval},
		{"read beyond the end", 0, read, size - 511, 512, einval},
		{"read at the end of everything", 0, read, 1<<64 - 1, 512, einval},
		{"read around", 0, read, 1<<64 - 256, 512, einval},
		{"read too much", 0, read, 0, 32*mib + 1, einval},
		{"write beyond the end", 0, write, size, 1, enospc},
		{"write around", 0, write, 1<<64 - 256, 512, enospc},
		{"write zeroes beyond the end", 0, zeroes, 1, size, enospc},
		{"trim beyond the end", 0, trim, 1, 1<<32 - 1, einval},
		{"cache beyond the end", 0, cache, 1, size, einval},
		{"status beyond the end", 0, status, 1, size, einval},
		{"status of nothing", 0, status, 1, 0, einval},
		{"flush of a range", 0, flush, 0, 512, einval},
		{"flush at an offset", 0, flush, 512, 0, einval},
		{"fast zeroes without a hole", fast | noHole, zeroes, 0, 512, enotsup},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newFlushing(size)
			before := bytes.Clone(disk.Bytes)
			s := serve(t, export(disk))
			for _, structured := range []bool{true, false} {
				cl := s.enter(structured)
				payload := make([]byte, 0)
				if c.command == write {
					payload = make([]byte, c.n)
				}
				cl.request(c.flags, c.command, 1<<63|77, c.off, c.n, payload)
				if structured {
					cl.fault(1<<63|77, c.code)
				} else {
					cl.want(simple, c.code, uint64(1<<63|77))
				}
				cl.request(0, flush, 78, 0, 0) // the connection goes on
				cl.ok(78)
			}
			if !bytes.Equal(disk.Bytes, before) {
				t.Error("the disk has changed")
			}
			if got := s.srv.Stats(); got.Requests != 4 || got.Errors != 2 {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestReadOnly lets nothing change the disk, and flushes do nothing.
func TestReadOnly(t *testing.T) {
	disk := newFlushing(64 * kib)
	before := bytes.Clone(disk.Bytes)
	cfg := export(disk)
	cfg.Exports[0].ReadOnly = true
	s := serve(t, cfg)
	c := s.enter(true)
	c.request(0, write, 1, 0, 4, "data")
	c.fault(1, eperm)
	c.request(0, zeroes, 2, 0, 512)
	c.fault(2, eperm)
	c.request(0, trim, 3, 0, 512)
	c.fault(3, eperm)
	c.request(0, flush, 4, 0, 0)
	c.ok(4)
	s.stop()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(disk.Bytes, before) || disk.Flushes() != 0 {
		t.Errorf("the disk has changed, or was flushed %d times", disk.Flushes())
	}
}

// TestRead compares replies byte by byte: whole with simple replies and with DF, as
// data and holes otherwise.
func TestRead(t *testing.T) {
	disk := &mappedDisk{Thin: thin(1 * mib)}
	clear(disk.Bytes[128*kib:][:64*kib]) // a hole
	clear(disk.Bytes[200*kib:][:2*kib])  // none, but zeros in data
	s := serve(t, export(disk))
	data := func(flags uint16, cookie uint64, off, n int) []byte {
		return encode(chunk, flags, uint16(1), cookie, uint32(8+n), uint64(off), disk.Bytes[off:][:n])
	}
	hole := func(flags uint16, cookie uint64, off, n int) []byte {
		return encode(chunk, flags, uint16(2), cookie, uint32(12), uint64(off), uint32(n))
	}
	c := s.enter(true)
	c.request(0, read, 1, 100, 1000) // short: not looked at for holes
	c.want(data(1, 1, 100, 1000))
	c.request(0, read, 2, 64*kib, 160*kib)
	c.want(data(0, 2, 64*kib, 64*kib), hole(0, 2, 128*kib, 64*kib), data(1, 2, 192*kib, 32*kib))
	c.request(0, read, 3, 130*kib+1, 40*kib)
	c.want(hole(1, 3, 130*kib+1, 40*kib))
	c.request(0, read, 8, 191*kib, 64*kib) // the end of the hole is too short for one
	c.want(data(1, 8, 191*kib, 64*kib))
	c.request(df, read, 4, 64*kib, 160*kib)
	c.want(data(1, 4, 64*kib, 160*kib))
	c.request(df, read, 5, 200*kib, 700*kib) // more than a piece
	c.want(data(0, 5, 200*kib, 700*kib), chunk, uint16(1), uint16(0), uint64(5), uint32(0))
	c.request(fua, read, 6, 1*mib, 0)
	c.want(chunk, uint16(1), uint16(0), uint64(6), uint32(0))

	c = s.enter(false)
	c.request(df, read, 1, 0, 512)
	c.want(simple, einval, uint64(1)) // DF needs structured replies
	for _, r := range [][2]int{{100, 1000}, {64 * kib, 160 * kib}, {1, mib - 1}, {0, mib}, {5, 0}} {
		c.request(0, read, 7, uint64(r[0]), uint32(r[1]))
		c.want(simple, uint32(0), uint64(7), disk.Bytes[r[0]:][:r[1]])
	}
	if got, want := s.srv.Stats().BytesRead, uint64(1000+96*kib+64*kib+160*kib+700*kib+1000+160*kib+2*mib-1); got != want {
		t.Errorf("%d bytes read, want %d", got, want)
	}
}

// TestReadInPieces puts the chunks of a large read together, which come in any
// order, and each byte once.
func TestReadInPieces(t *testing.T) {
	disk := &mappedDisk{Thin: thin(8 * mib)}
	for off := 0; off < 8*mib; off += 112 * kib {
		clear(disk.Bytes[off:min(off+36*kib, 8*mib)])
	}
	c := serve(t, export(disk)).enter(true)
	for _, r := range [][2]int{{0, 8 * mib}, {1000, 3*mib + 7}, {256*kib - 1, 2}, {256*kib - 1, 256*kib + 2}} {
		c.request(0, read, 42, uint64(r[0]), uint32(r[1]))
		got, holes := c.collect(42, r[0], r[1])
		if !bytes.Equal(got, disk.Bytes[r[0]:][:r[1]]) {
			t.Errorf("%d bytes at %d differ", r[1], r[0])
		}
		if r[1] > mib && holes == 0 {
			t.Errorf("%d bytes at %d without a hole", r[1], r[0])
		}
	}
}

// collect takes the chunks of a successful read of n bytes at off.
func (c *client) collect(cookie uint64, off, n int) (data []byte, holes int) {
	c.t.Helper()
	data = bytes.Repeat([]byte{0xee}, n)
	left := n
	seen := make([]bool, n)
	for {
		c.want(chunk)
		h := c.get(16)
		flags, kind, length := binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:]), int(binary.BigEndian.Uint32(h[12:]))
		if binary.BigEndian.Uint64(h[4:]) != cookie {
			c.t.Fatalf("the cookie is %x", h[4:12])
		}
		if kind == 0 && length == 0 {
			break
		}
		at := int(binary.BigEndian.Uint64(c.get(8))) - off
		switch kind {
		case 1:
			length -= 8
			copy(data[at:], c.get(length))
		case 2:
			length = int(binary.BigEndian.Uint32(c.get(4)))
			clear(data[at:][:length])
			holes++
		default:
			c.t.Fatalf("a chunk of type %d", kind)
		}
		for i := range seen[at:][:length] {
			if seen[at+i] {
				c.t.Fatalf("byte %d comes twice", at+i)
			}
			seen[at+i] = true
		}
		left -= length
		if flags&1 != 0 {
			break
		}
	}
	if left != 0 {
		c.t.Fatalf("%d bytes are missing", left)
	}
	return data, holes
}

// TestReadErrors fails reads at their first and at a later piece.
func TestReadErrors(t *testing.T) {
	const bad = 512 * kib
	var fault atomic.Pointer[error]
	disk := thin(2 * mib)
	disk.Fault = func(op string, off int64) error {
		if err := fault.Load(); err != nil && op == "read" && off <= bad && bad < off+256*kib {
			return *err
		}
		return nil
	}
	s := serve(t, export(disk))
	eioErr := fmt.Errorf("read /secret/path: %w", unix.EIO)
	fault.Store(&eioErr)

	c := s.enter(true)
	c.request(0, read, 1, bad, 512)
	c.fault(1, eio)
	c.request(df, read, 2, bad, 512)
	c.fault(2, eio)
	c.request(df, read, 3, 256*kib, mib) // fails in its second piece
	c.want(chunk, uint16(0), uint16(1), uint64(3), uint32(8+mib), uint64(256*kib))
	c.want(disk.Bytes[256*kib:][:256*kib], make([]byte, 768*kib))
	c.fault(3, eio)
	c.request(0, read, 4, 0, 2*mib)
	if text := c.failed(4); bytes.Contains(text, []byte("secret")) {
		t.Errorf("the client is told %q", text)
	}

	c = s.enter(false)
	c.request(0, read, 1, bad, 512)
	c.want(simple, eio, uint64(1))
	c.request(0, read, 2, 0, 512)
	c.want(simple, uint32(0), uint64(2), disk.Bytes[:512])
	c.request(0, read, 3, 0, 2*mib)
	c.want(simple, uint32(0), uint64(3), disk.Bytes[:bad])
	c.gone() // there is no other way to say it
	if got := s.srv.Stats(); got.Requests != 7 || got.Errors != 6 {
		t.Errorf("%+v", got)
	}
}

// failed takes the chunks of a read that ends with an error, and returns its text.
func (c *client) failed(cookie uint64) []byte {
	c.t.Helper()
	for {
		c.want(chunk)
		h := c.get(16)
		payload := c.get(int(binary.BigEndian.Uint32(h[12:])))
		if binary.BigEndian.Uint64(h[4:]) != cookie {
			c.t.Fatalf("the cookie is %x", h[4:12])
		}
		if h[1]&1 != 0 {
			if binary.BigEndian.Uint16(h[2:]) != 1<<15+1 {
				c.t.Fatalf("it ends with %x", h)
			}
			return payload[6:]
		}
	}
}

// TestDiskErrors are those that a client can tell apart.
func TestDiskErrors(t *testing.T) {
	for want, errs := range map[uint32][]error{
		enospc: {unix.ENOSPC, unix.EDQUOT, unix.EFBIG},
		eio:    {unix.EIO, errors.New("qcow2: broken"), io.ErrUnexpectedEOF, unix.EBADF},
		eperm:  {unix.EROFS},
		einval: {blk.ErrBounds},
		12:     {unix.ENOMEM},
	} {
		for _, err := range errs {
			disk := thin(mib)
			var failing atomic.Bool
			disk.Fault = func(op string, _ int64) error {
				if failing.Load() && op != "flush" {
					return fmt.Errorf("wrapped: %w", err)
				}
				return nil
			}
			c := serve(t, export(disk)).enter(true)
			failing.Store(true)
			c.request(0, write, 1, 0, 512*kib, make([]byte, 512*kib))
			c.fault(1, want)
			for i, command := range []uint16{trim, cache, zeroes} {
				c.request(fua, command, uint64(i), 0, 512*kib)
				c.fault(uint64(i), want)
			}
		}
	}
}

// TestWrite compares what a disk holds after writes of all kinds, by a disk that
// knows better ways and by one that does not.
func TestWrite(t *testing.T) {
	const size = 2 * mib
	rich, poor := thin(size), &blktest.Memory{Bytes: bytes.Clone(thin(size).Bytes)}
	for _, d := range []blk.Disk{rich, poor} {
		t.Run(fmt.Sprintf("%T", d), func(t *testing.T) {
			want := bytes.Clone(thin(size).Bytes)
			s := serve(t, export(d))
			c := s.enter(false)
			payload := thin(size + 999).Bytes[999:]
			for i, r := range [][2]int{{0, 512}, {1000, 3}, {5, 0}, {200 * kib, 100 * kib}, {256*kib - 1, 600 * kib}, {size - 1, 1}, {3, size - 3}} {
				c.request(0, write, uint64(i), uint64(r[0]), uint32(r[1]), payload[:r[1]])
				c.ok(uint64(i))
				copy(want[r[0]:], payload[:r[1]])
			}
			for i, r := range [][2]int{{7, 100}, {256*kib - 7, 14}, {512 * kib, mib + 5}, {9, 0}} {
				for _, flags := range []uint16{0, noHole} {
					c.request(flags, zeroes, uint64(i), uint64(r[0]), uint32(r[1]))
					c.ok(uint64(i))
				}
				clear(want[r[0]:][:r[1]])
			}
			c.request(fast, zeroes, 1, 100*kib, 50*kib)
			if d == rich {
				c.ok(1)
				clear(want[100*kib:][:50*kib])
			} else {
				c.want(simple, enotsup, uint64(1))
			}
			c.request(0, trim, 1, 0, 4096)
			if d == rich {
				c.ok(1)
				copy(want, bytes.Repeat([]byte{0xdb}, 4096)) // see blktest.Thin
			} else {
				c.want(simple, einval, uint64(1))
			}
			c.request(0, cache, 1, 3, size-3)
			c.ok(1)
			got := make([]byte, size)
			if err := d.ReadvAt([][]byte{got}, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("the disk holds something else")
			}
		})
	}
	if discards, zeroed, punched := rich.Calls(); discards != 1 || zeroed != 3 || punched != 4 {
		t.Errorf("%d discards, %d ranges zeroed and %d punched", discards, zeroed, punched)
	}
}

// TestNoDiscard keeps the room of what is made zero.
func TestNoDiscard(t *testing.T) {
	disk := thin(mib)
	cfg := export(disk)
	cfg.Exports[0].NoDiscard = true
	c := serve(t, cfg).enter(false)
	c.request(0, zeroes, 1, 0, 4096)
	c.ok(1)
	c.request(0, trim, 1, 0, 4096)
	c.want(simple, einval, uint64(1))
	if discards, zeroed, punched := disk.Calls(); discards != 0 || zeroed != 1 || punched != 0 {
		t.Errorf("%d discards, %d ranges zeroed and %d punched", discards, zeroed, punched)
	}
}

// TestLongZeroes make ranges zero that no request could carry, in pieces.
func TestLongZeroes(t *testing.T) {
	d := &zeroingDisk{}
	s := serve(t, export(d))
	c := s.enter(true)
	c.request(0, zeroes, 1, 5, 1<<32-1)
	c.ok(1)
	s.stop()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	end := int64(5)
	for _, z := range d.calls {
		if z[0] != end || z[1] <= 0 || z[1] > 32*mib || (z[0]+z[1])%(32*mib) != 0 && z[0]+z[1] != 5+1<<32-1 {
			t.Errorf("a piece of %d bytes at %d, after %d", z[1], z[0], end)
		}
		end = z[0] + z[1]
	}
	if end != 5+1<<32-1 {
		t.Errorf("they end at %d", end)
	}
}

// zeroingDisk is vast, and notes what is made zero.
type zeroingDisk struct {
	vastDisk
	calls [][2]int64
}

func (d *zeroingDisk) WriteZeroes(int64, int64) error { return errors.New("not asked for") }
func (d *zeroingDisk) PunchHole(off, n int64) error {
	d.calls = append(d.calls, [2]int64{off, n})
	return nil
}

var errFlush = errors.New("the flush fails")

// TestFlush finds on stable storage what was answered before a flush, on whatever
// connection, or with the flag FUA, and nothing of it before.
func TestFlush(t *testing.T) {
	disk := newFlushing(mib)
	var failing atomic.Bool
	disk.Fault = func(op string, _ int64) error {
		if failing.Load() && op == "flush" {
			return errFlush
		}
		return nil
	}
	s := serve(t, export(disk))
	a, b := s.enter(true), s.enter(false)
	data := bytes.Repeat([]byte{0xab}, 300*kib)
	a.request(0, write, 1, 0, 300*kib, data)
	a.ok(1)
	if bytes.Equal(disk.stableAt(0, 300*kib), data) {
		t.Error("a write without a flush is stable")
	}
	b.request(0, flush, 2, 0, 0)
	b.ok(2)
	if !bytes.Equal(disk.stableAt(0, 300*kib), data) {
		t.Error("a flush has missed a write on another connection")
	}
	a.request(fua, write, 3, 400*kib, 300*kib, data)
	a.ok(3)
	if !bytes.Equal(disk.stableAt(400*kib, 300*kib), data) {
		t.Error("a write with FUA is not stable")
	}
	b.request(fua, zeroes, 4, 0, mib)
	b.ok(4)
	if !bytes.Equal(disk.stableAt(0, mib), make([]byte, mib)) {
		t.Error("zeroes with FUA are not stable")
	}
	b.request(fua, trim, 5, 0, mib)
	b.ok(5)
	if bytes.Equal(disk.stableAt(0, mib), make([]byte, mib)) {
		t.Error("a trim with FUA is not stable")
	}
	if got := s.srv.Stats(); got.Flushes != 4 || got.BytesWritten != 600*kib {
		t.Errorf("%+v", got)
	}

	failing.Store(true)
	a.request(0, flush, 6, 0, 0)
	a.fault(6, eio)
	a.request(fua, write, 7, 0, 1, "x")
	a.fault(7, eio)
	s.stop()
	if err := s.wait(); !errors.Is(err, errFlush) {
		t.Errorf("Serve ends with %v, want the error of the last flush", err)
	}
	s.done = make(chan error, 1)
	s.done <- nil
}

// TestBlockStatus compares the extents of two contexts, byte by byte.
func TestBlockStatus(t *testing.T) {
	var failing atomic.Bool
	disk := &mappedDisk{Thin: thin(mib), fault: func(off int64) error {
		if failing.Load() && off >= 12*kib {
			return unix.EIO
		}
		return nil
	}}
	clear(disk.Bytes[8*kib:][:4*kib])
	clear(disk.Bytes[16*kib:][:8*kib])
	cfg := export(disk)
	cfg.Exports[0].Contexts = []nbd.Context{{Name: "x-test:plain", Extents: (&mappedDisk{Thin: thin(mib)}).Extents}}
	s := serve(t, cfg)
	c := s.dial()
	c.send(uint32(3), option(8), option(10, str("disk"), uint32(2), str("x-test:plain"), str("base:allocation")), option(7, str(""), uint16(0)))
	c.skip(reply(8, ack), reply(10, 4, uint32(0), "base:allocation"), reply(10, 4, uint32(0), "x-test:plain"), reply(10, ack))
	c.skip(reply(7, 3, make([]byte, 12)), reply(7, ack))
	both := func(cookie uint64, first []uint32, second ...uint32) {
		t.Helper()
		c.want(chunk, uint16(0), uint16(5), cookie, uint32(4+4*len(first)), uint32(0), first)
		c.want(chunk, uint16(1), uint16(5), cookie, uint32(4+4*len(second)), uint32(1), second)
	}
	c.request(0, status, 1, 0, 32*kib)
	both(1, []uint32{8 * kib, 0, 4 * kib, 3, 4 * kib, 0, 8 * kib, 3, 8 * kib, 0}, 32*kib, 0)
	c.request(one, status, 2, 0, mib)
	both(2, []uint32{8 * kib, 0}, mib, 0)
	c.request(0, status, 3, 10*kib+1, kib)
	both(3, []uint32{kib, 3}, kib, 0)
	c.request(one|fua, status, 4, mib-1, 1)
	both(4, []uint32{1, 0}, 1, 0)

	failing.Store(true)
	c.request(0, status, 5, 0, 32*kib) // as far as it is known
	both(5, []uint32{8 * kib, 0, 4 * kib, 3}, 32*kib, 0)
	c.request(0, status, 6, 12*kib, 32*kib)
	c.fault(6, eio)
	c.request(0, read, 7, 0, 64*kib) // reads do without
	c.want(chunk, uint16(0), uint16(1), uint64(7), uint32(8+8*kib), uint64(0), disk.Bytes[:8*kib])
	c.want(chunk, uint16(0), uint16(2), uint64(7), uint32(12), uint64(8*kib), uint32(4*kib))
	c.want(chunk, uint16(1), uint16(1), uint64(7), uint32(8+52*kib), uint64(12*kib), disk.Bytes[12*kib:][:52*kib])

	c = serve(t, export(thin(mib))).enter(true) // a disk that knows nothing of its ranges
	c.request(0, status, 1, 3, 512*kib)
	c.want(chunk, uint16(1), uint16(5), uint64(1), uint32(12), uint32(0), uint32(512*kib), uint32(0))
}

// TestManyExtents bounds the extents of an answer, which the client can go on from.
func TestManyExtents(t *testing.T) {
	disk := &mappedDisk{Thin: thin(32 * mib)}
	for off := 0; off < len(disk.Bytes); off += 2 * mapUnit {
		clear(disk.Bytes[off:][:mapUnit])
	}
	c := serve(t, export(disk)).enter(true)
	c.request(0, status, 1, 0, 32*mib)
	c.want(chunk, uint16(1), uint16(5), uint64(1), uint32(4+8*2048), uint32(0))
	want := slices.Repeat([]uint32{mapUnit, 3, mapUnit, 0}, 1024)
	c.want(want)
}

// TestHostileRequests are such that only hanging up is left.
func TestHostileRequests(t *testing.T) {
	for name, send := range map[string][]byte{
		"wrong magic":           encode(request+1, uint16(0), read, uint64(1), uint64(0), uint32(512)),
		"a write of 4 GiB":      encode(request, uint16(0), write, uint64(1), uint64(0), uint32(1<<32-1), make([]byte, 1<<16)),
		"a write above 32 MiB":  encode(request, uint16(0), write, uint64(1), uint64(0), uint32(32*mib+1)),
		"an option":             option(3, make([]byte, 12)),
		"an end in the header":  encode(request, uint16(0)),
		"an end in the payload": encode(request, uint16(0), write, uint64(1), uint64(0), uint32(mib), make([]byte, 300*kib)),
		"an end where it fails": encode(request, uint16(0), write, uint64(1), uint64(1<<63), uint32(mib), make([]byte, 300*kib)),
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, export(thin(2*mib)))
			other := s.enter(false)
			c := s.enter(true)
			// What is sent after the server has hung up fails.
			_, _ = c.nc.Write(send)
			if name[:5] == "an en" {
				if err := c.nc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			c.gone()
			other.request(0, flush, 3, 0, 0)
			other.ok(3)
		})
	}
}

// TestWholeReplies sends large replies that may not have parts beside small ones,
// which must not get between them.
func TestWholeReplies(t *testing.T) {
	const n = 1 * mib
	disk := thin(n)
	disk.Fault = func(op string, off int64) error {
		if op == "read" && off > 0 {
			time.Sleep(time.Millisecond) // in the middle of a reply
		}
		return nil
	}
	s := serve(t, export(disk))
	for _, structured := range []bool{false, true} {
		c := s.enter(structured)
		flags, requests := uint16(0), []byte(nil)
		if structured {
			flags = df
		}
		for i := range uint64(20) {
			requests = append(requests, encode(request, flags, read, i, uint64(0), uint32(n))...)
			for range 10 {
				requests = append(requests, encode(request, uint16(0), flush, uint64(99), uint64(0), uint32(0))...)
			}
		}
		go func() { _, _ = c.nc.Write(requests) }()
		for range 20 + 20*10 {
			switch magic := binary.BigEndian.Uint32(c.get(4)); {
			case magic == chunk:
				c.skip(make([]byte, 16), uint64(0))
				c.want(disk.Bytes, chunk, uint16(1), uint16(0))
				c.skip(make([]byte, 12))
			case magic != simple:
				t.Fatalf("a message begins with %x", magic)
			case binary.BigEndian.Uint64(c.get(12)[4:]) != 99:
				c.want(disk.Bytes)
			}
		}
	}
}

// rudeDisk is a Mapper that breaks its promises.
type rudeDisk struct {
	*blktest.Thin
	extents []nbd.Extent
}

func (d *rudeDisk) Extents(int64, int64) iter.Seq2[nbd.Extent, error] {
	return func(yield func(nbd.Extent, error) bool) {
		for _, e := range d.extents {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// TestRudeMapper answers with what is asked for, whatever a disk says of itself.
func TestRudeMapper(t *testing.T) {
	const n = 64 * kib
	for name, c := range map[string]struct {
		extents []nbd.Extent
		want    []uint32
	}{
		"nothing":  {nil, []uint32{n, 0}},
		"too much": {[]nbd.Extent{{Length: 1 << 62}}, []uint32{n, 0}},
		"too many": {[]nbd.Extent{{Length: n - 4096}, {Length: n, Status: 2}, {Length: n}}, []uint32{n - 4096, 0, 4096, 2}},
		"no range": {[]nbd.Extent{{Length: -5, Status: 2}, {Status: 2}, {Length: n}}, []uint32{n, 0}},
		"a part":   {[]nbd.Extent{{Length: 4096, Status: 3}}, []uint32{4096, 3, n - 4096, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := &rudeDisk{thin(n), c.extents}
			cl := serve(t, export(disk)).enter(true)
			cl.request(0, status, 1, 0, n)
			cl.want(chunk, uint16(1), uint16(5), uint64(1), uint32(4+4*len(c.want)), uint32(0), c.want)
			want := bytes.Clone(disk.Bytes)
			for i, off := 0, uint32(0); i < len(c.want); i += 2 {
				if c.want[i+1]&2 != 0 {
					clear(want[off:][:c.want[i]])
				}
				off += c.want[i]
			}
			cl.request(0, read, 2, 0, n)
			if got, _ := cl.collect(2, 0, n); !bytes.Equal(got, want) {
				t.Error("the data differs")
			}
		})
	}
}

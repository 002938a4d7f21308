package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/nbd"
)

// script is a connection whose client has sent everything already. What the server
// says is kept.
type script struct {
	in     bytes.Reader
	out    bytes.Buffer
	closed func()
}

func (s *script) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error)      { return s.out.Write(p) }
func (s *script) Close() error                     { s.closed(); return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// oneConn is a listener with one client.
type oneConn struct {
	conn chan net.Conn
	over chan struct{}
}

func (l oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.over:
		return nil, net.ErrClosed
	}
}

func (l oneConn) Close() error   { close(l.over); return nil }
func (l oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// strictDisk remembers whether it was asked for what it has not, for more at once
// than a piece, or to change though it is read-only.
type strictDisk struct {
	mappedDisk
	wrong atomic.Pointer[string]
}

func (d *strictDisk) note(what string, n int, err error) error {
	if errors.Is(err, blk.ErrBounds) || n > 256*kib {
		d.wrong.Store(&what)
	}
	return err
}

func (d *strictDisk) ReadvAt(iov [][]byte, off int64) error {
	return d.note("read", len(iov[0]), d.mappedDisk.ReadvAt(iov, off))
}

func (d *strictDisk) WritevAt(iov [][]byte, off int64) error {
	return d.note("write", len(iov[0]), d.mappedDisk.WritevAt(iov, off))
}

func (d *strictDisk) Discard(off, n int64) error {
	return d.note("discard", 0, d.mappedDisk.Discard(off, n))
}

func (d *strictDisk) WriteZeroes(off, n int64) error {
	return d.note("write zeroes", 0, d.mappedDisk.WriteZeroes(off, n))
}

func (d *strictDisk) PunchHole(off, n int64) error {
	return d.note("punch hole", 0, d.mappedDisk.PunchHole(off, n))
}

// FuzzServer is a client that sends anything. The server must hang up once it has
// all, have said nothing but whole messages, and have asked its disks only for what
// they have; the read-only one is what it was.
func FuzzServer(f *testing.F) {
	f.Add(encode(uint32(3), option(3), option(8), option(9, str("a"), uint32(0)), option(10, str("a"), uint32(1), str("base:allocation")), option(6, str("a"), uint16(1), uint16(3)), option(7, str("a"), uint16(0)),
		request, uint16(0), read, uint64(1), uint64(0), uint32(64*kib), request, df, read, uint64(2), uint64(1), uint32(40000),
		request, fua, write, uint64(3), uint64(9), uint32(5), "hello", request, uint16(0), status, uint64(4), uint64(0), uint32(64*kib),
		request, noHole, zeroes, uint64(5), uint64(512), uint32(1024), request, fast, zeroes, uint64(5), uint64(512), uint32(1024),
		request, uint16(0), trim, uint64(6), uint64(0), uint32(4096), request, uint16(0), cache, uint64(7), uint64(0), uint32(4096),
		request, uint16(0), flush, uint64(8), uint64(0), uint32(0), request, uint16(0), disc, uint64(0), uint64(0), uint32(0)))
	f.Add(encode(uint32(0), option(1, "b"), request, uint16(0), write, uint64(3), uint64(9), uint32(5), "hello", request, uint16(0), read, uint64(1), uint64(0), uint32(512)))
	f.Add(encode(uint32(3), option(5), option(11), option(4711, "?"), option(7, str("c"), uint16(0)), option(10, "?"), option(2)))
	f.Add(encode(uint32(2), option(1, "a"), request, uint16(0), read, uint64(1), uint64(0), uint32(64*kib)))
	f.Fuzz(func(t *testing.T, in []byte) {
		disks := [2]*strictDisk{{mappedDisk: mappedDisk{Thin: thin(64 * kib)}}, {mappedDisk: mappedDisk{Thin: thin(64 * kib)}}}
		clear(disks[0].Bytes[16*kib:][:24*kib])
		before := bytes.Clone(disks[1].Bytes)
		srv, err := nbd.New(nbd.Config{Exports: []nbd.Export{{Name: "a", Disk: disks[0]}, {Name: "b", Disk: disks[1], ReadOnly: true}}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := &script{closed: cancel}
		s.in.Reset(in)
		ln := oneConn{make(chan net.Conn, 1), make(chan struct{})}
		ln.conn <- s
		if err := srv.Serve(ctx, ln); err != nil {
			t.Fatal(err)
		}
		for _, d := range disks {
			if what := d.wrong.Load(); what != nil {
				t.Error("the disk was wrongly asked to", *what)
			}
		}
		if !bytes.Equal(disks[1].Bytes, before) {
			t.Error("the read-only disk has changed")
		}
		if err := parse(s.out.Bytes()); err != nil {
			t.Errorf("%v in\n%x", err, s.out.Bytes())
		}
	})
}

// parse takes what a server has said apart, as far as that can be done without what
// the client has said.
func parse(b []byte) error {
	r := bytes.NewReader(b)
	next := func(v any) error { return binary.Read(r, binary.BigEndian, v) }
	skip := func(n uint32) error {
		if n > 33*mib {
			return errors.New("a message is too long")
		}
		if _, err := io.CopyN(io.Discard, r, int64(n)); err != nil {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	if err := skip(18); err != nil {
		return err
	}
	structured := false
	for r.Len() > 0 {
		var head struct {
			Magic             uint64
			Opt, Kind, Length uint32
		}
		if err := next(&head); err != nil || head.Magic != replyMagic {
			return nil // the answer to NBD_OPT_EXPORT_NAME; what follows may be anything
		}
		if err := skip(head.Length); err != nil {
			return err
		}
		structured = structured || head.Opt == 8 && head.Kind == ack
		if head.Opt == 7 && head.Kind == ack {
			break
		}
	}
	for structured && r.Len() > 0 {
		var magic uint32
		if err := next(&magic); err != nil {
			return err
		}
		switch magic {
		case simple:
			if err := skip(12); err != nil {
				return err
			}
		case chunk:
			var head struct {
				Flags, Kind uint16
				Cookie      uint64
				Length      uint32
			}
			if err := next(&head); err != nil {
				return err
			}
			if err := skip(head.Length); err != nil {
				return err
			}
		default:
			return errors.New("a message has no magic")
		}
	}
	return nil
}

package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
)

// request is what a client asks for. Its range lies on the disk, once check has
// found no fault.
type request struct {
	command, flags uint16
	cookie         uint64
	off            uint64
	n              uint32

	// left is the number of pieces that are not finished, and failed the first
	// fault of one. The goroutines of its pieces count and set them.
	left   atomic.Int32
	failed atomic.Pointer[fault]
}

// fault is why a request fails, for the client: text names nothing of the host.
type fault struct {
	code uint32
	text string
}

// commands are the requests that are answered, with the flags that each may have,
// and whether it changes the disk.
var commands = [...]struct {
	name    string
	flags   uint16
	changes bool
}{
	cmdRead:        {name: "read", flags: flagFUA | flagDF},
	cmdWrite:       {name: "write", flags: flagFUA, changes: true},
	cmdDisconnect:  {},
	cmdFlush:       {name: "flush", flags: flagFUA},
	cmdTrim:        {name: "trim", flags: flagFUA, changes: true},
	cmdCache:       {name: "cache", flags: flagFUA},
	cmdWriteZeroes: {name: "write zeroes", flags: flagFUA | flagNoHole | flagFastZero, changes: true},
	cmdBlockStatus: {name: "block status", flags: flagFUA | flagOne},
}

// transmit serves requests until the client is gone, or the server stops.
func (c *conn) transmit() error {
	for !c.over() {
		var head [requestHeader]byte
		if _, err := io.ReadFull(c.in, head[:]); err != nil {
			return err
		}
		if magic := binary.BigEndian.Uint32(head[:]); magic != magicRequest {
			return fmt.Errorf("%w: a request begins with %#x", errProtocol, magic)
		}
		r := &request{
			flags:   binary.BigEndian.Uint16(head[4:]),
			command: binary.BigEndian.Uint16(head[6:]),
			cookie:  binary.BigEndian.Uint64(head[8:]),
			off:     binary.BigEndian.Uint64(head[16:]),
			n:       binary.BigEndian.Uint32(head[24:]),
		}
		if r.command == cmdDisconnect {
			return nil
		}
		if err := c.begin(r); err != nil {
			return err
		}
	}
	return nil
}

// over reports whether nothing new is to be begun.
func (c *conn) over() bool { return c.draining.Load() || c.dead.Load() }

// begin takes what belongs to r off the connection and has r served.
func (c *conn) begin(r *request) error {
	if r.command == cmdWrite && r.n > maxPayload {
		return fmt.Errorf("%w: a write of %d bytes", errProtocol, r.n)
	}
	f := c.check(r)
	if f != nil && r.command == cmdWrite {
		if _, err := c.in.Discard(int(r.n)); err != nil {
			return err
		}
	}
	switch {
	case f != nil:
		c.start(0, func(s *slot) { c.answer(s, r, f) })
	case r.command == cmdWrite && r.n > 0:
		return c.receive(r)
	case r.command == cmdRead:
		c.read(r)
	case r.command == cmdBlockStatus:
		c.start(statusRoom, func(s *slot) { c.blockStatus(s, r) })
	default:
		c.start(0, func(s *slot) { c.answer(s, r, c.act(s, r)) })
	}
	return nil
}

// start has work done in a slot with room for n bytes, once there is one.
func (c *conn) start(n int64, work func(s *slot)) {
	s := c.take(n)
	c.run(s, work)
}

// run has work done in s and gives s back then.
func (c *conn) run(s *slot, work func(s *slot)) {
	c.work.Go(func() {
		defer c.give(s)
		work(s)
	})
}

// check returns what is wrong with r, nil if it can be served.
func (c *conn) check(r *request) *fault {
	if int(r.command) >= len(commands) {
		return &fault{errInvalid, "the command is not known"}
	}
	command := commands[r.command]
	size := uint64(c.size) //nolint:gosec // G115: not negative
	switch {
	case r.flags&^command.flags != 0 || r.flags&flagDF != 0 && !c.structured:
		return &fault{errInvalid, command.name + ": the command has no such flag"}
	case command.changes && c.export.readOnly:
		return &fault{errPerm, command.name + ": the export is read-only"}
	case r.off > size || uint64(r.n) > size-r.off:
		f := &fault{errInvalid, command.name + ": the range is outside the disk"}
		if r.command == cmdWrite || r.command == cmdWriteZeroes {
			f.code = errNoSpace
		}
		return f
	case r.command == cmdRead && r.n > maxPayload:
		return &fault{errInvalid, fmt.Sprintf("read: more than %d bytes", maxPayload)}
	case r.command == cmdFlush && (r.off != 0 || r.n != 0):
		return &fault{errInvalid, "flush: it has no range"}
	case r.command == cmdTrim && c.export.discard == nil:
		return &fault{errInvalid, "trim: the disk cannot"}
	case r.command == cmdBlockStatus && (len(c.contexts) == 0 || r.n == 0):
		return &fault{errInvalid, "block status: there is nothing to tell"}
	}
	return nil
}

// span is the range of a request that check has found no fault with.
func (r *request) span() (off, n int64) {
	return int64(r.off), int64(r.n) //nolint:gosec // G115: inside the disk
}

// piece is the length of the piece at off of a range with left bytes to go.
func piece(off, left, size int64) int64 { return min(left, size-off%size) }

// pieces is the number of pieces of r.
func (r *request) pieces() int32 {
	off, n := r.span()
	if n == 0 {
		return 1
	}
	return int32((off+n-1)/pieceSize - off/pieceSize + 1) //nolint:gosec // G115: n is at most maxPayload
}

// receive takes the data of a write off the connection, piece by piece.
func (c *conn) receive(r *request) error {
	r.left.Store(r.pieces())
	for off, left := r.span(); left > 0; {
		n := piece(off, left, pieceSize)
		s := c.take(n)
		if _, err := io.ReadFull(c.in, s.data); err != nil {
			c.give(s)
			return err
		}
		at := off
		c.run(s, func(s *slot) { c.write(s, r, at) })
		off, left = off+n, left-n
	}
	return nil
}

// write writes a piece of r, which is in s, at off, and answers r if it is the last.
func (c *conn) write(s *slot, r *request, off int64) {
	if err := c.export.write(s.vector(s.data), off); err != nil {
		r.failed.CompareAndSwap(nil, c.diskFault(r, off, err))
	}
	if r.left.Add(-1) > 0 {
		return
	}
	f := r.failed.Load()
	if f == nil {
		f = c.settle(r)
	}
	if f == nil {
		c.srv.stats.written.Add(uint64(r.n))
	}
	c.answer(s, r, f)
}

// settle makes durable what r has changed, if its flags say so.
func (c *conn) settle(r *request) *fault {
	if r.flags&flagFUA == 0 {
		return nil
	}
	return c.flush(r)
}

func (c *conn) flush(r *request) *fault {
	if c.export.readOnly {
		return nil
	}
	c.srv.stats.flushes.Add(1)
	if err := c.export.Disk.Flush(); err != nil {
		return c.diskFault(r, 0, err)
	}
	return nil
}

// act carries out a request that moves no data over the connection.
func (c *conn) act(s *slot, r *request) *fault {
	switch r.command {
	case cmdFlush:
		return c.flush(r)
	case cmdTrim:
		return c.change(r, maxPayload, c.export.discard.Discard)
	case cmdWriteZeroes:
		return c.writeZeroes(s, r)
	case cmdCache:
		s.grow(pieceSize)
		return c.inPieces(r, pieceSize, func(off, n int64) error {
			return c.export.Disk.ReadvAt(s.vector(s.data[:n]), off)
		})
	}
	return nil // a write of nothing
}

func (c *conn) writeZeroes(s *slot, r *request) *fault {
	zero := c.export.zero
	switch {
	case r.flags&flagFastZero != 0 && (zero == nil || r.flags&flagNoHole != 0):
		return &fault{errNotSup, "write zeroes: it would not be faster than writing zeros"}
	case zero == nil:
		s.grow(pieceSize)
		clear(s.data)
		return c.change(r, pieceSize, func(off, n int64) error {
			return c.export.write(s.vector(s.data[:n]), off)
		})
	case r.flags&flagNoHole != 0 || c.export.NoDiscard:
		return c.change(r, maxPayload, zero.WriteZeroes)
	}
	return c.change(r, maxPayload, zero.PunchHole)
}

// change is inPieces for what changes the disk, and makes it durable if the flags
// of r say so.
func (c *conn) change(r *request, size int64, act func(off, n int64) error) *fault {
	if f := c.inPieces(r, size, act); f != nil {
		return f
	}
	return c.settle(r)
}

// inPieces does act on the range of r, in pieces that end at multiples of size. If
// the server stops, or the client is gone, it does not finish.
func (c *conn) inPieces(r *request, size int64, act func(off, n int64) error) *fault {
	start, left := r.span()
	for off := start; left > 0; {
		if off > start && c.over() {
			return &fault{errShutdown, "the server stops"}
		}
		n := piece(off, left, size)
		if err := act(off, n); err != nil {
			return c.diskFault(r, off, err)
		}
		off, left = off+n, left-n
	}
	return nil
}

// diskFault logs an error of the disk, unless there have been too many, and returns
// what the client gets to know of it.
func (c *conn) diskFault(r *request, off int64, err error) *fault {
	op := commands[r.command].name
	if dropped, ok := c.srv.limit.Allow(); ok {
		c.srv.log.Error("disk error", "export", c.export.Name, "op", op, "offset", off, "err", err, "held_back", dropped)
	}
	for _, known := range []struct {
		err  error
		code uint32
	}{
		{unix.ENOSPC, errNoSpace},
		{unix.EDQUOT, errNoSpace},
		{unix.EFBIG, errNoSpace},
		{unix.ENOMEM, errNoMem},
		{unix.EROFS, errPerm},
		{blk.ErrBounds, errInvalid},
	} {
		if errors.Is(err, known.err) {
			return &fault{known.code, op + ": " + unix.Errno(known.code).Error()}
		}
	}
	return &fault{errIO, op + ": " + unix.EIO.Error()}
}

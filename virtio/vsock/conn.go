package vsock

import (
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// creditStep is how much a program has to read before the guest is told of the
// room that it has made.
const creditStep = bufferSize / 2

// goodbye is how long a guest may take to confirm the end of a connection.
const goodbye = 5 * time.Second

// Conn is a stream connection between a program in the guest and one on the host.
// Its methods are safe for concurrent use.
type Conn struct {
	dev *Device
	ports
	dialed bool // by the host
	queued bool // in Device.ready; guarded by Device.mu

	// Each is held by a program for the length of a call, before mu: there is one
	// reader at a time, and one writer.
	reading, writing sync.Mutex

	// mu guards what follows.
	mu      sync.Mutex
	changed sync.Cond // of any of it
	open    bool
	err     error // why nothing goes any more; io.EOF at an orderly end
	closed  bool  // by Close
	ended   bool  // the guest knows of no connection any more

	announce uint16 // opRequest or opResponse that has to be sent, or 0

	// To the guest. The counts of bytes wrap as those of the protocol do.
	out       ring
	sent      uint32
	peerAlloc uint32
	peerTaken uint32
	asked     bool // for the guest's credit, since it last gave some

	// From the guest.
	in    ring
	taken uint32 // by the program
	told  uint32 // of taken, to the guest
	tell  bool   // the guest has asked

	// What each side will do no more: flags of opShutdown.
	theirs, ours, oursTold uint32
}

func newConn(d *Device, p ports) *Conn {
	c := &Conn{dev: d, ports: p}
	c.changed.L = &c.mu
	return c
}

// Port is the port of the host that the connection uses.
func (c *Conn) Port() uint32 { return c.host }

// GuestPort is the port of the guest that the connection uses.
func (c *Conn) GuestPort() uint32 { return c.guest }

// Accept opens a connection that the guest has asked for.
func (c *Conn) Accept() {
	c.mu.Lock()
	c.open = true
	c.announce = opResponse
	c.mu.Unlock()
	c.dev.wake(c)
}

// established waits until the guest has answered a request.
func (c *Conn) established() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.open && c.err == nil {
		c.changed.Wait()
	}
	return c.err
}

// Read implements io.Reader. It returns io.EOF once the guest sends no more, and
// ECONNRESET if the connection has broken.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	data, err := c.arrived()
	n := copy(p, data)
	c.taking(n)
	return n, err
}

// WriteTo implements io.WriterTo: what the guest sends goes to w without a copy on
// the way.
func (c *Conn) WriteTo(w io.Writer) (int64, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	for done := int64(0); ; {
		data, err := c.arrived()
		if err != nil {
			if err == io.EOF { //nolint:errorlint // it is never wrapped
				err = nil
			}
			return done, err
		}
		n, err := w.Write(data)
		c.taking(n)
		done += int64(n)
		if err != nil {
			return done, err
		}
	}
}

// arrived waits for data of the guest, and returns what there is, or why there is
// none. reading is held.
func (c *Conn) arrived() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.in.n == 0 && c.err == nil && !c.closed && c.theirs&shutdownSend == 0 {
		c.changed.Wait()
	}
	switch {
	case c.closed:
		return nil, io.ErrClosedPipe
	case c.in.n > 0:
		return c.in.front(), nil
	case c.theirs&shutdownSend != 0:
		return nil, io.EOF
	}
	return nil, c.err
}

// taking takes note that a program has n bytes of what arrived has returned. reading
// is held.
func (c *Conn) taking(n int) {
	c.mu.Lock()
	if !c.closed { // else all has been taken
		c.in.drop(n)
		c.taken += uint32(n) //nolint:gosec // G115: at most bufferSize
	}
	wake := c.taken-c.told >= creditStep
	c.mu.Unlock()
	if wake {
		c.dev.wake(c)
	}
}

// Write implements io.Writer. It returns when the data is on its way, which is
// before the guest has read it. It fails with EPIPE once the guest reads no more.
func (c *Conn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	done := 0
	for done < len(p) {
		room, err := c.vacant()
		if err != nil {
			return done, err
		}
		n := copy(room, p[done:])
		if err := c.giving(n); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// ReadFrom implements io.ReaderFrom: what comes from r goes to the guest without a
// copy on the way.
func (c *Conn) ReadFrom(r io.Reader) (int64, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for done := int64(0); ; {
		room, err := c.vacant()
		if err != nil {
			return done, err
		}
		n, readErr := r.Read(room)
		done += int64(n)
		switch err := c.giving(n); {
		case err != nil:
			return done, err
		case readErr == io.EOF:
			return done, nil
		case readErr != nil:
			return done, readErr
		}
	}
}

// vacant waits for room for data to the guest, and returns it. writing is held.
func (c *Conn) vacant() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.out.room() == 0 && c.writable() == nil {
		c.changed.Wait()
	}
	if err := c.writable(); err != nil {
		return nil, err
	}
	return c.out.free(), nil
}

// giving sends the first n bytes of what vacant has returned on their way. writing
// is held.
func (c *Conn) giving(n int) error {
	c.mu.Lock()
	err := c.writable()
	if err == nil {
		c.out.grow(n)
	}
	c.mu.Unlock()
	if err == nil && n > 0 {
		c.dev.wake(c)
	}
	return err
}

// writable says why nothing can be written. mu is held.
func (c *Conn) writable() error {
	switch {
	case c.closed || c.ours&shutdownSend != 0:
		return io.ErrClosedPipe
	case c.theirs&shutdownReceive != 0 || c.err == io.EOF: //nolint:errorlint // it is never wrapped
		return unix.EPIPE
	}
	return c.err
}

// CloseWrite tells the guest that nothing follows what has been written.
func (c *Conn) CloseWrite() error {
	c.shut(shutdownSend)
	return nil
}

// Close ends the connection. What has been written still reaches a guest that
// reads it; what has not been read is lost.
func (c *Conn) Close() error {
	c.shut(shutdownBoth)
	return nil
}

func (c *Conn) shut(flags uint32) {
	c.mu.Lock()
	c.ours |= flags
	if flags == shutdownBoth && !c.closed {
		c.closed = true
		c.taken += uint32(c.in.n) //nolint:gosec // G115: at most bufferSize
		c.in = ring{}
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	c.dev.wake(c)
}

// finish closes a connection that Config.Serve is done with, or refuses it.
func (c *Conn) finish() {
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	if !open {
		c.dev.abort(c)
	}
	_ = c.Close() // it never fails
}

// fail ends the connection on the side of the host.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(err)
}

func (c *Conn) failLocked(err error) {
	if c.err == nil {
		c.err = err
	}
	c.out = ring{}
	c.ended = true
	c.changed.Broadcast()
}

// header is that of a packet to the guest without what changes from packet to
// packet.
func (c *Conn) header(op uint16) header {
	return header{
		srcCID: hostCID, dstCID: uint64(c.dev.cfg.CID), srcPort: c.host, dstPort: c.guest,
		kind: typeStream, op: op, bufAlloc: bufferSize,
	}
}

// packet writes the next packet for the guest to bufs, which have room bytes, and
// returns its length, 0 if there is nothing to say, and whether there may be more.
func (c *Conn) packet(bufs [][]byte, room uint64) (n uint32, more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return 0, false
	}
	op, length := c.nextOp(room - headerSize)
	if op == 0 {
		return 0, false
	}
	h := c.header(op)
	h.length, h.fwdCnt = uint32(length), c.taken //nolint:gosec // G115: at most bufferSize
	if op == opShutdown {
		h.flags = c.ours
	}
	c.told, c.tell = c.taken, false
	b := h.encode()
	bufs = scatter(bufs, b[:])
	for left := length; left > 0; bufs = bufs[1:] {
		part := bufs[0][:min(left, len(bufs[0]))]
		c.out.take(part)
		left -= len(part)
	}
	if length > 0 {
		c.sent += uint32(length) //nolint:gosec // G115: at most bufferSize
		c.changed.Broadcast()
	}
	return headerSize + h.length, true
}

// nextOp decides what the next packet says and how much data of at most room bytes
// it has; 0 if there is nothing to say. mu is held.
func (c *Conn) nextOp(room uint64) (op uint16, length int) {
	switch credit := c.room(); {
	case c.announce != 0:
		op = c.announce
		c.announce = 0
		return op, 0
	case !c.open:
		return 0, 0
	case c.out.n > 0 && credit > 0 && room > 0:
		return opData, int(min(uint64(c.out.n), uint64(credit), room)) //nolint:gosec // G115: at most bufferSize
	case c.out.n > 0 && !c.asked:
		c.asked = true
		return opCreditRequest, 0
	case c.out.n == 0 && c.ours&^c.oursTold != 0:
		c.oursTold = c.ours
		if c.ours == shutdownBoth {
			time.AfterFunc(goodbye, func() { c.dev.abort(c) })
		}
		return opShutdown, 0
	case c.tell || c.taken-c.told >= creditStep:
		return opCreditUpdate, 0
	}
	return 0, 0
}

// room is how much the guest has room for (5.10.6.3). mu is held.
func (c *Conn) room() uint32 {
	if under := c.sent - c.peerTaken; under < c.peerAlloc {
		return c.peerAlloc - under
	}
	return 0
}

// credit takes note of the room that a packet tells of. mu is held, or nobody else
// knows c. A guest that tells of no room, because it is asked, tells by itself when it
// has some: asked anew it would go on telling of none.
func (c *Conn) credit(h *header) {
	c.peerAlloc, c.peerTaken = h.bufAlloc, h.fwdCnt
	if c.room() > 0 {
		c.asked = false
	}
}

// verdict is what becomes of a connection after a packet.
type verdict int

const (
	verdictNone  verdict = iota
	verdictWake          // there may be something to send
	verdictDrop          // the guest knows of it no more
	verdictAbort         // it is to be reset
)

// take handles a packet of the guest with its data.
func (c *Conn) take(h *header, data [][]byte) verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.credit(h)
	switch h.op {
	case opResponse:
		if c.open || !c.dialed {
			return c.broken()
		}
		c.open = true
		c.changed.Broadcast()
	case opReset:
		c.failLocked(c.lastWord())
		return verdictDrop
	case opShutdown:
		c.theirs |= h.flags & shutdownBoth
		c.changed.Broadcast()
		if c.theirs == shutdownBoth {
			c.failLocked(io.EOF)
			return verdictAbort // which confirms it (5.10.6.5)
		}
		if c.theirs&shutdownReceive != 0 {
			c.out = ring{}
		}
	case opData:
		return c.takeData(int64(h.length), data)
	case opCreditUpdate:
	case opCreditRequest:
		c.tell = true
	default:
		return c.broken()
	}
	return verdictWake
}

// takeData takes n bytes of data. mu is held.
func (c *Conn) takeData(n int64, data [][]byte) verdict {
	switch {
	case !c.open || c.theirs&shutdownSend != 0 || n > int64(c.in.room()):
		return c.broken()
	case c.closed: // nobody reads it
		c.taken += uint32(n) //nolint:gosec // G115: at most bufferSize
		return verdictWake
	}
	for _, b := range data {
		b = b[:min(int64(len(b)), n)]
		c.in.put(b)
		n -= int64(len(b))
	}
	c.changed.Broadcast()
	return verdictNone
}

// broken ends a connection whose guest breaks the protocol. mu is held.
func (c *Conn) broken() verdict {
	c.failLocked(unix.EPROTO)
	return verdictAbort
}

// lastWord is how a reset ends the connection. mu is held.
func (c *Conn) lastWord() error {
	switch {
	case !c.open:
		return unix.ECONNREFUSED
	case c.oursTold == shutdownBoth || c.theirs == shutdownBoth:
		return io.EOF
	}
	return unix.ECONNRESET
}

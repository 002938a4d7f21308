package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// readAhead is how many bytes of requests are read at a time.
const readAhead = 32 << 10

// conn is a connection. Its fields belong to the goroutine that reads requests,
// but for those that say otherwise.
type conn struct {
	handshake

	srv    *Server
	nc     net.Conn // any goroutine closes it and, holding sending, writes
	in     *bufio.Reader
	export *export // nil until the client has chosen; constant from then on
	size   int64   // of the disk as the client knows it; as export

	// draining is set once, by any goroutine, when the server stops, and dead
	// when the connection has failed: what nobody waits for is not finished.
	draining, dead atomic.Bool

	slots chan struct{}  // holds one token for each slot that is taken
	work  sync.WaitGroup // for the goroutines of slots

	// sending keeps chunks and replies whole. It is held across writes to nc.
	sending sync.Mutex

	mu   sync.Mutex
	idle []*slot // guarded by mu; the last one was used last
}

// slot is the memory of one request, or piece of one, that is being served. It
// belongs to one goroutine at a time.
type slot struct {
	data   []byte // as long as is needed, at most pieceSize; grows
	head   []byte // encoded headers
	parts  []part // of a read
	one    [1][]byte
	out    net.Buffers // what send takes
	outAll [][]byte    // the memory of out
}

func newConn(s *Server, nc net.Conn) *conn {
	return &conn{srv: s, nc: nc, in: bufio.NewReaderSize(nc, readAhead), slots: make(chan struct{}, s.slots)}
}

// name is the client, for the log.
func (c *conn) name() string { return c.nc.RemoteAddr().String() }

// close ends the connection after the requests under way.
func (c *conn) close() {
	c.work.Wait()
	_ = c.nc.Close() // All that was to be said has been said.
}

// limit sets the deadlines of the connection, unless the server stops, which has
// deadlines of its own.
func (c *conn) limit(ctx context.Context, deadline time.Time) error {
	err := c.nc.SetDeadline(deadline)
	if ctx.Err() != nil { // It may have come before.
		c.drain()
	}
	return err
}

// drain ends the reading of requests, and replies that the client does not take in
// time.
func (c *conn) drain() {
	c.draining.Store(true)
	now := time.Now()
	// A connection that has no deadlines any more is closed.
	_ = c.nc.SetReadDeadline(now)
	_ = c.nc.SetWriteDeadline(now.Add(c.srv.cfg.DrainTimeout))
}

// take waits for a free slot and gives it room for n bytes of data.
func (c *conn) take(n int64) *slot {
	c.slots <- struct{}{}
	s := c.wake()
	s.grow(n)
	return s
}

// wake is the idle slot that was used last, or a new one.
func (c *conn) wake() *slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := len(c.idle) - 1
	if last < 0 {
		return new(slot)
	}
	s := c.idle[last]
	c.idle = c.idle[:last]
	return s
}

// give gives back a slot.
func (c *conn) give(s *slot) {
	c.mu.Lock()
	c.idle = append(c.idle, s)
	c.mu.Unlock()
	<-c.slots
}

// grow makes room for n bytes of data, at most pieceSize.
func (s *slot) grow(n int64) {
	if n > int64(cap(s.data)) {
		size := int64(4096)
		for size < n {
			size *= 2
		}
		s.data = make([]byte, size)
	}
	s.data = s.data[:n]
}

// vector is b as a vector of one buffer.
func (s *slot) vector(b []byte) [][]byte {
	s.one[0] = b
	return s.one[:]
}

// send sends what is queued in s.
func (c *conn) send(s *slot) {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.sendLocked(s)
}

// sendLocked is send while sending is held. After an error the connection is over.
func (c *conn) sendLocked(s *slot) {
	if c.dead.Load() || len(s.out) == 0 {
		return
	}
	if _, err := s.out.WriteTo(c.nc); err != nil {
		c.kill()
	}
}

// kill ends the connection without waiting for anything.
func (c *conn) kill() {
	c.dead.Store(true)
	_ = c.nc.Close() // The goroutine that reads learns of it.
}

// queue begins a message of bufs for sendLocked.
func (s *slot) queue(bufs ...[]byte) {
	s.outAll = append(s.outAll[:0], bufs...)
	s.out = s.outAll
}

// appendSimple appends a simple reply.
func appendSimple(b []byte, cookie uint64, code uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimple)
	b = binary.BigEndian.AppendUint32(b, code)
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of a chunk with n bytes of payload.
func appendChunk(b []byte, cookie uint64, flags, kind uint16, n int64) []byte {
	b = binary.BigEndian.AppendUint32(b, magicChunk)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(n)) //nolint:gosec // G115: bounded by maxPayload
}

// appendError appends a chunk that ends a structured reply with an error.
func appendError(b []byte, cookie uint64, f *fault) []byte {
	b = appendChunk(b, cookie, chunkDone, chunkError, int64(4+2+len(f.text)))
	b = binary.BigEndian.AppendUint32(b, f.code)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.text))) //nolint:gosec // G115: a sentence of ours
	return append(b, f.text...)
}

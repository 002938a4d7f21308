package nbd

import "encoding/binary"

const (
	// minSparse is the length in bytes of the shortest read that is looked at for
	// zeros which need not be sent, and minHole that of the shortest such range.
	minSparse = 32 << 10
	minHole   = 4096
	// statusRoom is the memory for the answer to a block status, in bytes.
	statusRoom = 8 * maxExtents
)

// part is a range of a piece of a read: data, or a hole that is only named.
type part struct {
	off, n int64
	hole   bool
}

// answer sends the one reply to a request that has no data to give.
func (c *conn) answer(s *slot, r *request, f *fault) {
	s.head = c.appendEnd(s.head[:0], r, f)
	s.queue(s.head)
	c.send(s)
}

// appendEnd appends the end of a reply, which is all of it if there is no data, and
// counts it.
func (c *conn) appendEnd(b []byte, r *request, f *fault) []byte {
	c.count(f)
	switch {
	case !c.structured && f != nil:
		return appendSimple(b, r.cookie, f.code)
	case f != nil:
		return appendError(b, r.cookie, f)
	case c.structured && r.command == cmdRead:
		return appendChunk(b, r.cookie, chunkDone, chunkNone, 0)
	}
	return appendSimple(b, r.cookie, 0)
}

// count counts a request that is answered.
func (c *conn) count(f *fault) {
	c.srv.stats.requests.Add(1)
	if f != nil {
		c.srv.stats.errors.Add(1)
	}
}

// read has r served: in pieces beside one another if its reply may have parts, and
// in order if it may not.
func (c *conn) read(r *request) {
	off, left := r.span()
	switch {
	case left == 0:
		c.start(0, func(s *slot) { c.answer(s, r, nil) })
		return
	case !c.structured || r.flags&flagDF != 0:
		c.start(piece(off, left, pieceSize), func(s *slot) { c.readWhole(s, r) })
		return
	}
	r.left.Store(r.pieces())
	for left > 0 && !c.dead.Load() {
		n, at := piece(off, left, pieceSize), off
		c.start(n, func(s *slot) { c.readPiece(s, r, at) })
		off, left = off+n, left-n
	}
}

// readPiece sends the piece of r at off, for which s has room, as chunks.
func (c *conn) readPiece(s *slot, r *request, off int64) {
	c.split(s, off)
	for _, p := range s.parts {
		if p.hole {
			continue
		}
		b := s.data[p.off-off:][:p.n]
		if err := c.export.Disk.ReadvAt(s.vector(b), p.off); err != nil {
			r.failed.CompareAndSwap(nil, c.diskFault(r, p.off, err))
			s.parts = s.parts[:0]
			break
		}
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	c.encode(s, r, off, r.left.Add(-1) == 0)
	c.sendLocked(s)
}

// split makes s.parts what the piece at off, for which s has room, consists of.
func (c *conn) split(s *slot, off int64) {
	n := int64(len(s.data))
	s.parts = s.parts[:0]
	if n < minSparse || c.export.mapper == nil {
		s.parts = append(s.parts, part{off: off, n: n})
		return
	}
	for e, err := range clipped(c.export.mapper.Extents(off, n), n) {
		if err != nil { // The read will tell.
			e = Extent{Length: n}
		}
		s.parts = join(s.parts, part{off, e.Length, e.Status&StateZero != 0})
		off, n = off+e.Length, n-e.Length
	}
	all := s.parts
	s.parts = s.parts[:0]
	for _, p := range all {
		p.hole = p.hole && p.n >= minHole
		s.parts = join(s.parts, p)
	}
}

// join appends p to parts, as a piece of the last one if that is alike.
func join(parts []part, p part) []part {
	if last := len(parts) - 1; last >= 0 && parts[last].hole == p.hole {
		parts[last].n += p.n
		return parts
	}
	return append(parts, p)
}

// encode makes s.out the chunks of the piece of r at off, with the end of the reply
// if it is the last piece. sending is held, so that all others have been sent then.
func (c *conn) encode(s *slot, r *request, off int64, last bool) {
	s.head, s.outAll = s.head[:0], s.outAll[:0]
	f := r.failed.Load()
	for i, p := range s.parts {
		flags := uint16(0)
		if last && f == nil && i == len(s.parts)-1 {
			flags = chunkDone
			c.count(nil)
		}
		begin := len(s.head)
		if p.hole {
			s.head = appendChunk(s.head, r.cookie, flags, chunkHole, 8+4)
			s.head = binary.BigEndian.AppendUint64(s.head, uint64(p.off)) //nolint:gosec // G115: on the disk
			s.head = binary.BigEndian.AppendUint32(s.head, uint32(p.n))   //nolint:gosec // G115: at most pieceSize
			s.outAll = append(s.outAll, s.head[begin:])
			continue
		}
		s.head = appendChunk(s.head, r.cookie, flags, chunkData, 8+p.n)
		s.head = binary.BigEndian.AppendUint64(s.head, uint64(p.off)) //nolint:gosec // G115: on the disk
		s.outAll = append(s.outAll, s.head[begin:], s.data[p.off-off:][:p.n])
		c.srv.stats.read.Add(uint64(p.n)) //nolint:gosec // G115: not negative
	}
	if last && f != nil {
		begin := len(s.head)
		s.head = c.appendEnd(s.head, r, f)
		s.outAll = append(s.outAll, s.head[begin:])
	}
	s.out = s.outAll
}

// readWhole sends what r asks for as one chunk, or as the data of a simple reply,
// piece by piece. After an error in a later piece the rest of a chunk is zeros, and
// the end of the reply says so; a simple reply can only be broken off.
func (c *conn) readWhole(s *slot, r *request) {
	off, left := r.span()
	if f := c.readInto(s, r, off); f != nil {
		c.answer(s, r, f)
		return
	}
	done := uint16(0)
	if int64(len(s.data)) == left {
		done = chunkDone
	}
	s.head = appendSimple(s.head[:0], r.cookie, 0)
	if c.structured {
		s.head = appendChunk(s.head[:0], r.cookie, done, chunkData, 8+left)
		s.head = binary.BigEndian.AppendUint64(s.head, r.off)
	}
	s.queue(s.head, s.data)
	c.sending.Lock()
	defer c.sending.Unlock()
	c.sendLocked(s)
	f, whole := c.readRest(s, r)
	switch {
	case !whole:
		c.count(f)
		c.kill()
		return
	case c.structured && done == 0:
		s.head = c.appendEnd(s.head[:0], r, f)
		s.queue(s.head)
		c.sendLocked(s)
	default:
		c.count(f)
	}
	if f == nil {
		c.srv.stats.read.Add(uint64(r.n))
	}
}

// readRest sends the data of r after its first piece, which is in s. It is not whole
// if there is no way to tell the client of the fault. sending is held.
func (c *conn) readRest(s *slot, r *request) (f *fault, whole bool) {
	off, left := r.span()
	for {
		n := int64(len(s.data))
		if off, left = off+n, left-n; left == 0 || c.dead.Load() {
			return f, true
		}
		s.grow(piece(off, left, pieceSize))
		if f == nil {
			f = c.readInto(s, r, off)
		}
		if f != nil {
			if !c.structured {
				return f, false
			}
			clear(s.data)
		}
		s.queue(s.data)
		c.sendLocked(s)
	}
}

// readInto fills s from off.
func (c *conn) readInto(s *slot, r *request, off int64) *fault {
	if err := c.export.Disk.ReadvAt(s.vector(s.data), off); err != nil {
		return c.diskFault(r, off, err)
	}
	return nil
}

// blockStatus answers with the ranges of r in each context that the client has
// selected, or with the first of them if that is what it asks for.
func (c *conn) blockStatus(s *slot, r *request) {
	most := maxExtents
	if r.flags&flagOne != 0 {
		most = 1
	}
	off, n := r.span()
	for id, i := range c.contexts {
		extents, err := c.export.contexts[i].describe(s.data[:0], off, n, most)
		if err != nil {
			c.answer(s, r, c.diskFault(r, off, err))
			return
		}
		flags := uint16(0)
		if id == len(c.contexts)-1 {
			flags = chunkDone
			c.count(nil)
		}
		s.head = appendChunk(s.head[:0], r.cookie, flags, chunkStatus, int64(4+len(extents)))
		s.head = binary.BigEndian.AppendUint32(s.head, uint32(id))
		s.queue(s.head, extents)
		c.send(s)
	}
}

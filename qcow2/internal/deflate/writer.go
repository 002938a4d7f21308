package deflate

import "encoding/binary"

// bitWriter writes bits, the lowest of each value first, into room that was found
// to be enough before.
type bitWriter struct {
	b       []byte // as long as what may be written, and slack more
	n       int    // bytes written
	limit   int    // of n
	pending uint64 // bits that are not written yet
	count   uint   // of them, less than 8 after each method
}

// slack is how far a store may reach beyond what is written.
const slack = 8

// reset begins at the end of dst, with room for limit bytes.
func (w *bitWriter) reset(dst []byte, limit int) {
	*w = bitWriter{b: dst, n: len(dst), limit: len(dst) + limit}
	if cap(w.b) < w.limit+slack {
		w.b = append(make([]byte, 0, w.limit+slack), dst...)
	}
	w.b = w.b[:w.limit+slack]
}

// fits reports whether size bits more fit.
func (w *bitWriter) fits(size int) bool { return w.n+(int(w.count)+size+7)/8 <= w.limit }

// finish fills the last byte and returns what was written.
func (w *bitWriter) finish() []byte {
	if w.count > 0 {
		w.b[w.n] = byte(w.pending) //nolint:gosec // G115: the lowest bits
		w.n++
		w.count = 0
	}
	return w.b[:w.n]
}

// bits writes the n lowest bits of v, at most 56, which has no others.
func (w *bitWriter) bits(v uint64, n uint) {
	w.pending |= v << w.count
	w.count += n
	binary.LittleEndian.PutUint64(w.b[w.n:], w.pending)
	w.n += int(w.count >> 3)
	w.pending >>= w.count &^ 7
	w.count &= 7
}

func (w *bitWriter) code(c code) { w.bits(uint64(c.bits), uint(c.n)) }

// header begins a block.
func (w *bitWriter) header(kind uint64, final bool) {
	if final {
		w.bits(kind<<1|1, 3)
		return
	}
	w.bits(kind<<1, 3)
}

// tokens writes tokens.
func (w *bitWriter) tokens(tokens []token, c *blockCodes) {
	pending, count, b, at := w.pending, w.count, w.b, w.n
	for _, t := range tokens {
		if t < matchFlag {
			x := c.literal[t&0xff]
			pending |= uint64(x.bits) << count
			count += uint(x.n)
		} else {
			length, dist := uint(t>>16&0xff), uint(t&(MaxDistance-1))
			s := symbols.length[length]
			x := c.literal[s]
			pending |= uint64(x.bits) << count
			count += uint(x.n)
			pending |= uint64(length-uint(symbols.lengthBase[s])) << count
			count += uint(symbols.lengthExtra[s])
			d := symbols.dist[dist]
			x = c.dist[d]
			pending |= uint64(x.bits) << count
			count += uint(x.n)
			pending |= uint64(dist-uint(symbols.distBase[d])) << count
			count += uint(symbols.distExtra[d])
		}
		binary.LittleEndian.PutUint64(b[at:], pending)
		at += int(count >> 3)
		pending >>= count &^ 7
		count &= 7
	}
	w.pending, w.count, w.n = pending, count, at
}

// storedBits is the length of n bytes as stored blocks, without the header of the
// first.
func (w *bitWriter) storedBits(n int) int {
	more := max((n-1)/maxStored, 0) // blocks, each with a header in a byte of its own
	return int(-(w.count+3)&7) + 32 + 8*n + more*40
}

// stored writes src as stored blocks.
func (w *bitWriter) stored(src []byte, final bool) {
	for {
		n := min(len(src), maxStored)
		w.header(stored, final && n == len(src))
		w.bits(0, -w.count&7)
		w.bits(uint64(n)|uint64(n^0xffff)<<16, 32) //nolint:gosec // G115: 16 bits
		w.n += copy(w.b[w.n:], src[:n])
		if src = src[n:]; len(src) == 0 {
			return
		}
	}
}

package deflate

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// Errors of a Decoder.
var (
	errEnds  = errors.New("the deflate data ends before the cluster does")
	errWrong = errors.New("the deflate data is broken")
)

// fastBits is how long the codes are that a decoder finds in one step.
const fastBits = 10

// Decoder decodes one cluster after the other. It is for one goroutine at a time.
type Decoder struct {
	literal, dist, length decodeTable
	in                    bitReader
}

// Decode decodes src, of any window, until dst is full. What follows is ignored.
func (d *Decoder) Decode(dst, src []byte) error {
	d.in = bitReader{src: src}
	out := 0
	for final := false; out < len(dst); {
		if final {
			return errEnds
		}
		head, err := d.in.take(3)
		if err != nil {
			return err
		}
		final = head&1 != 0
		if head>>1 == stored {
			out, err = d.in.stored(dst, out)
		} else if err = d.readCodes(head >> 1); err == nil {
			out, err = d.body(dst, out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readCodes prepares the codes of a block that is not stored.
func (d *Decoder) readCodes(kind uint64) error {
	var lengths [288 + 32]uint8
	switch kind {
	case fixed:
		for s := range lengths {
			switch {
			case s < 144:
				lengths[s] = 8
			case s < 256:
				lengths[s] = 9
			case s < 280:
				lengths[s] = 7
			case s < 288:
				lengths[s] = 8
			default:
				lengths[s] = 5
			}
		}
		return errors.Join(d.literal.make(lengths[:288]), d.dist.make(lengths[288:]))
	case dynamic:
		return d.readLengths(&lengths)
	}
	return errWrong
}

// readLengths reads the codes of a dynamic block (RFC 1951, 3.2.7).
func (d *Decoder) readLengths(lengths *[288 + 32]uint8) error {
	head, err := d.in.take(14)
	if err != nil {
		return err
	}
	literals, dists := int(head&31)+257, int(head>>5&31)+1
	var order [lengthSymbols]uint8
	for _, s := range lengthOrder[:head>>10+4] {
		n, err := d.in.take(3)
		if err != nil {
			return err
		}
		order[s] = uint8(n) //nolint:gosec // G115: 3 bits
	}
	if literals > literalSymbols || dists > 30 || d.length.make(order[:]) != nil {
		return errWrong
	}
	for i := 0; i < literals+dists; {
		s, err := d.in.symbol(&d.length)
		if err != nil {
			return err
		}
		value, times := uint8(s), 1 //nolint:gosec // G115: a symbol
		if s >= repeat {
			extra, err := d.in.take(uint(runExtra[s]))
			if err != nil || s == repeat && i == 0 {
				return errWrong
			}
			value, times = 0, int(extra)+3 //nolint:gosec // G115: 7 bits
			switch s {
			case repeat:
				value = lengths[i-1]
			case manyZeros:
				times += 8
			}
		}
		if times > literals+dists-i {
			return errWrong
		}
		for range times {
			lengths[i] = value
			i++
		}
	}
	return errors.Join(d.literal.make(lengths[:literals]), d.dist.make(lengths[literals:][:dists]))
}

// What the extra bits of symbols above endOfBlock, and of distances, are added to,
// and how many bits these are.
var (
	lengthBases = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthBits  = [29]uint8{8: 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
)

// body decodes the tokens of a block to dst from out on, until the block ends or dst
// is full. It returns where.
func (d *Decoder) body(dst []byte, out int) (int, error) {
	in := &d.in
	for out < len(dst) {
		// The path of most tokens: a literal whose code is short.
		if e := d.literal.fast[in.bits&(1<<fastBits-1)]; e != 0 && e < endOfBlock<<4 && in.count >= fastBits {
			in.bits >>= e & 15
			in.count -= int(e & 15)
			dst[out] = byte(e >> 4)
			out++
			continue
		}
		s, err := in.symbol(&d.literal)
		if err != nil {
			return out, err
		}
		if s < endOfBlock {
			dst[out] = byte(s) //nolint:gosec // G115: less than 256
			out++
			continue
		}
		if s == endOfBlock {
			return out, nil
		}
		s -= endOfBlock + 1
		if s >= len(lengthBases) {
			return out, errWrong
		}
		length := int(lengthBases[s]) + int(in.drop(uint(lengthBits[s]))) //nolint:gosec // G115: 5 bits
		t, err := in.symbol(&d.dist)
		if err != nil {
			return out, err
		}
		if t >= 30 {
			return out, errWrong
		}
		dist := t + 1
		if t > 3 {
			n := uint(t/2 - 1)
			dist = (2+t&1)<<n + 1 + int(in.drop(n)) //nolint:gosec // G115: 13 bits
		}
		if in.count < 0 {
			return out, errEnds
		}
		if dist > out {
			return out, errWrong
		}
		out = repeatAt(dst, out, dist, length)
	}
	return out, nil
}

// repeatAt copies length bytes from dist bytes before out to out, as far as dst goes,
// and returns where they end.
func repeatAt(dst []byte, out, dist, length int) int {
	if length <= 16 && dist >= 8 && len(dst)-out >= 16 {
		from, to := dst[out-dist:], dst[out:]
		binary.LittleEndian.PutUint64(to, binary.LittleEndian.Uint64(from))
		binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
		return out + length
	}
	from, end := out-dist, min(out+length, len(dst))
	for out < end {
		out += copy(dst[out:end], dst[from:out])
	}
	return end
}

// decodeTable finds the symbols of a canonical code.
type decodeTable struct {
	fast    [1 << fastBits]uint16 // by the next bits: symbol and length of the code, 0 if it is longer
	count   [maxBits + 1]uint16   // codes by length
	symbols [288]uint16           // in the order of their codes
}

// make prepares the table for the code with the lengths given. A code must be
// complete, or have no symbol or one.
func (t *decodeTable) make(lengths []uint8) error {
	*t = decodeTable{}
	for _, n := range lengths {
		t.count[n]++
	}
	t.count[0] = 0
	var next, code [maxBits + 2]uint16 // by length: places in symbols, codes
	left := 1                          // codes that are free
	for n := 1; n <= maxBits; n++ {
		left = left<<1 - int(t.count[n])
		if left < 0 {
			return errWrong
		}
		next[n+1] = next[n] + t.count[n]
		code[n+1] = (code[n] + t.count[n]) << 1
	}
	if left > 0 && next[maxBits+1] > 1 || next[maxBits+1] == 1 && t.count[1] != 1 {
		return errWrong
	}
	for s, n := range lengths {
		if n == 0 {
			continue
		}
		t.symbols[next[n]] = uint16(s)
		next[n]++
		if n <= fastBits {
			for b := bits.Reverse16(code[n]) >> (16 - n); b < 1<<fastBits; b += 1 << n {
				t.fast[b] = uint16(s)<<4 | uint16(n)
			}
		}
		code[n]++
	}
	return nil
}

// bitReader reads bits, the lowest of each byte first. Beyond the end of its bytes
// there are zeros, and count gets negative.
type bitReader struct {
	src   []byte
	at    int    // of the first byte that is not in bits
	bits  uint64 // the next ones; what is above count may be anything that src has there
	count int
}

// refill makes count at least 56, unless src ends before.
func (r *bitReader) refill() {
	if len(r.src)-r.at >= 8 {
		r.bits |= binary.LittleEndian.Uint64(r.src[r.at:]) << uint(r.count)
		r.at += (63 - r.count) >> 3
		r.count |= 56
		return
	}
	for ; r.count < 56 && r.at < len(r.src); r.at++ {
		r.bits |= uint64(r.src[r.at]) << uint(r.count)
		r.count += 8
	}
}

// drop returns the next n bits, which a refill has made sure of.
func (r *bitReader) drop(n uint) uint64 {
	v := r.bits & (1<<n - 1)
	r.bits >>= n
	r.count -= int(n)
	return v
}

// take returns the next n bits.
func (r *bitReader) take(n uint) (uint64, error) {
	r.refill()
	if v := r.drop(n); r.count >= 0 {
		return v, nil
	}
	return 0, errEnds
}

// symbol returns the next symbol. After it there are 41 bits more, unless src ends
// before.
func (r *bitReader) symbol(t *decodeTable) (int, error) {
	if r.count < 48 {
		r.refill()
	}
	e := t.fast[r.bits&(1<<fastBits-1)]
	if e == 0 {
		return r.longSymbol(t)
	}
	r.bits >>= e & 15
	if r.count -= int(e & 15); r.count < 0 {
		return 0, errEnds
	}
	return int(e >> 4), nil
}

// longSymbol is symbol for any code, a bit at a time.
func (r *bitReader) longSymbol(t *decodeTable) (int, error) {
	code, first, index := 0, 0, 0
	for n := 1; n <= maxBits; n++ {
		code |= int(r.bits >> (n - 1) & 1)
		count := int(t.count[n])
		if code-first < count {
			r.drop(uint(n))
			if r.count < 0 {
				return 0, errEnds
			}
			return int(t.symbols[index+code-first]), nil
		}
		index += count
		first = (first + count) << 1
		code <<= 1
	}
	if r.count < maxBits {
		return 0, errEnds
	}
	return 0, errWrong
}

// stored copies a stored block to dst from out on, as far as dst goes, and returns
// where it ends.
func (r *bitReader) stored(dst []byte, out int) (int, error) {
	r.at -= r.count >> 3 // whole bytes
	r.bits, r.count = 0, 0
	head, err := r.take(32)
	if err != nil {
		return out, err
	}
	n := int(head & 0xffff)
	if n != int(head>>16)^0xffff {
		return out, errWrong
	}
	r.at -= r.count >> 3
	r.bits, r.count = 0, 0
	n = min(n, len(dst)-out)
	if n > len(r.src)-r.at {
		return out, errEnds
	}
	copy(dst[out:], r.src[r.at:][:n])
	r.at += n
	return out + n, nil
}

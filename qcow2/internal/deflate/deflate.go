// Package deflate compresses and decompresses the clusters of a QCOW2 image, in the
// format of RFC 1951.
//
// QEMU writes and reads this data with a window of 4 KiB, and zlib documents that a
// reader with such a window may refuse any distance beyond it. So the encoder uses
// none. It looks for matches in chains of positions whose bytes have one hash, gives
// a match up for a better one at the next byte, and ends a block where what the
// tokens are like changes.
package deflate

import (
	"encoding/binary"
	"math/bits"
)

// MaxDistance is the farthest that a match reaches back.
const MaxDistance = 4096

const (
	minMatch = 3
	maxMatch = 258
	// tail is how many bytes at the end begin no match, so that four can be loaded
	// wherever one is looked for.
	tail = 3
	// maxTokens bounds a block, which ends when fewer than spare are left.
	maxTokens = 1 << 15
	spare     = 64
	// maxSkip bounds how many bytes get no look where nothing has matched for long.
	maxSkip  = 32
	hashBits = 15
)

// effort is how hard an encoder looks for matches.
type effort struct {
	depth int // candidates that are compared
	nice  int // length of a match that is good enough
	lazy  int // matches shorter than this give way to a better one at the next byte
}

// The levels of compression.
const (
	MinLevel = 1
	MaxLevel = 9
)

var efforts = [MaxLevel + 1]effort{
	1: {depth: 1, nice: 16},
	2: {depth: 3, nice: 16},
	3: {depth: 4, nice: 24, lazy: 8},
	4: {depth: 6, nice: 32, lazy: 16},
	5: {depth: 10, nice: 64, lazy: 32},
	6: {depth: 28, nice: 130, lazy: 64}, // smaller than zlib's 6 with the same window
	7: {depth: 64, nice: maxMatch, lazy: 130},
	8: {depth: 200, nice: maxMatch, lazy: maxMatch},
	9: {depth: MaxDistance, nice: maxMatch, lazy: maxMatch},
}

// Encoder compresses one cluster after the other. What it writes depends on that
// cluster alone. It is for one goroutine at a time.
type Encoder struct {
	effort

	// Where bytes with a hash were last, and where those were that had the same
	// before: positions modulo 2^16. An entry may be wrong, because what it leads
	// to is compared in any case.
	head3, head4 [1 << hashBits]uint16
	prev         [MaxDistance]uint16

	tokens [maxTokens]token
	n      int // tokens of the block
	freq   frequencies
	split  splitter
	codes  blockCodes
	out    bitWriter
}

// New returns an encoder of a level from MinLevel to MaxLevel.
func New(level int) *Encoder { return &Encoder{effort: efforts[level]} }

// token is a literal, or a match: its length and its distance, each less the least
// there is.
type token uint32

const matchFlag = 1 << 31

func match(length, dist int) token {
	return matchFlag | token(length-minMatch)<<16 | token(dist-1) //nolint:gosec // G115: in the ranges of matches
}

// Encode appends the encoding of src to dst, if that takes at most limit bytes.
func (e *Encoder) Encode(dst, src []byte, limit int) (encoded []byte, ok bool) {
	clear(e.head3[:])
	clear(e.head4[:])
	clear(e.prev[:])
	e.out.reset(dst, limit)
	e.begin()
	ok = e.parse(src)
	return e.out.finish(), ok
}

// begin begins a block.
func (e *Encoder) begin() {
	e.n = 0
	e.freq = frequencies{}
	e.split = splitter{}
}

// parse finds the tokens of src and writes them. It returns false if they need
// too much room.
func (e *Encoder) parse(src []byte) bool {
	begin, pos := 0, 0 // of the block; of what has no token yet
	last := len(src) - tail
	missed := 0 // positions without a match since the last one
	for pos < last {
		length, dist := e.longest(src, pos, minMatch-1, e.depth)
		if dist == 0 {
			missed++
			// Where nothing matches, less and less is looked for.
			for n := min(1+missed>>6, maxSkip); n > 0 && pos < last; n-- {
				e.literal(src[pos])
				pos++
			}
		} else {
			missed = 0
			pos = e.matched(src, pos, length, dist)
		}
		if e.n > maxTokens-spare || e.split.nRecent >= splitCheck && e.split.ended(pos-begin, len(src)-pos) {
			if !e.block(src[begin:pos], false) {
				return false
			}
			begin = pos
			e.begin()
		}
	}
	for ; pos < len(src); pos++ {
		e.literal(src[pos])
	}
	return e.block(src[begin:], true)
}

// matched adds the match at pos, or literals and then a better match that begins
// later. It returns where it ends.
func (e *Encoder) matched(src []byte, pos, length, dist int) int {
	last := len(src) - tail
	next := pos + 1 // the first position that is in no chain
	for length < e.lazy && next < last && e.n < maxTokens-spare/2 {
		n, d := e.longest(src, next, length-1, e.depth/2)
		next++
		// A longer match saves bits, and a farther one costs some.
		if d == 0 || 4*(n-length)+bits.Len16(uint16(dist))-bits.Len16(uint16(d)) <= 2 { //nolint:gosec // G115: distances
			break
		}
		e.literal(src[pos])
		pos, length, dist = pos+1, n, d
	}
	e.match(length, dist)
	pos += length
	for end := min(pos, last); next < end; next++ {
		e.insert(src, next)
	}
	return pos
}

func hash3(v uint32) uint32 { return v << 8 * 506832829 >> (32 - hashBits) }
func hash4(v uint32) uint32 { return v * 2654435761 >> (32 - hashBits) }

// insert puts position pos into the chains.
func (e *Encoder) insert(src []byte, pos int) {
	v := binary.LittleEndian.Uint32(src[pos:])
	h := hash4(v)
	e.prev[pos%MaxDistance] = e.head4[h]
	e.head4[h] = uint16(pos)        //nolint:gosec // G115: modulo
	e.head3[hash3(v)] = uint16(pos) //nolint:gosec // G115: modulo
}

// longest puts pos into the chains and looks for a match there that is longer than
// least bytes, among depth candidates. dist is 0 if there is none.
func (e *Encoder) longest(src []byte, pos, least, depth int) (length, dist int) {
	v := binary.LittleEndian.Uint32(src[pos:])
	h := hash4(v)
	here := uint16(pos) //nolint:gosec // G115: modulo
	near, at := e.head3[hash3(v)], e.head4[h]
	e.head3[hash3(v)], e.head4[h] = here, here
	e.prev[here%MaxDistance] = at

	reach := uint16(min(pos, MaxDistance)) //nolint:gosec // G115: small
	length = least
	if d := here - near; least < minMatch && d != 0 && d <= reach && (binary.LittleEndian.Uint32(src[pos-int(d):])^v)<<8 == 0 {
		length, dist = minMatch, int(d)
	}
	ahead := src[pos:min(len(src), pos+maxMatch)]
	if length >= len(ahead) {
		return length, dist
	}
	want := ahead[length] // what makes a match longer
	for before := uint16(0); depth > 0; depth-- {
		d := here - at
		if d <= before || d > reach {
			break
		}
		before = d
		behind := src[pos-int(d):]
		if behind[length] == want && binary.LittleEndian.Uint32(behind) == v {
			if n := common(behind, ahead); n > length {
				length, dist = n, int(d)
				if n >= e.nice || n == len(ahead) {
					break
				}
				want = ahead[n]
			}
		}
		at = e.prev[at%MaxDistance]
	}
	return length, dist
}

// common returns how many bytes a and b have in common at their beginnings. a is
// not the shorter one.
func common(a, b []byte) int {
	n := 0
	for len(b)-n >= 8 {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
		n += 8
	}
	for n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// literal adds a literal to the block.
func (e *Encoder) literal(b byte) {
	e.tokens[e.n] = token(b)
	e.n++
	e.freq.literal[b]++
	e.split.literal(b)
}

// match adds a match to the block.
func (e *Encoder) match(length, dist int) {
	e.tokens[e.n] = match(length, dist)
	e.n++
	e.freq.literal[symbols.length[length-minMatch]]++
	e.freq.dist[symbols.dist[dist-1]]++
	e.split.match(length)
}

// splitter decides where a block ends: where what came last is unlike what came
// before, by a rough classification of the tokens.
type splitter struct {
	old, recent [10]int32
	nOld        int32
	nRecent     int32
}

const (
	splitCheck = 512  // tokens between two decisions
	splitLeast = 4000 // bytes of a block
)

func (s *splitter) literal(b byte) {
	s.recent[b>>5&6|b&1]++
	s.nRecent++
}

func (s *splitter) match(length int) {
	if length < 9 {
		s.recent[8]++
	} else {
		s.recent[9]++
	}
	s.nRecent++
}

// ended decides whether a block of size bytes, which left bytes follow, ends here.
func (s *splitter) ended(size, left int) bool {
	if size < splitLeast || left < splitLeast {
		return false
	}
	if s.nOld > 0 {
		var delta int64
		for i, n := range s.recent {
			d := int64(n)*int64(s.nOld) - int64(s.old[i])*int64(s.nRecent)
			delta += max(d, -d)
		}
		cutoff := int64(s.nRecent) * 200 / 512 * int64(s.nOld)
		// A short block has to pay for its codes.
		if items := int64(s.nOld + s.nRecent); size < 10000 && items < 8192 {
			cutoff += cutoff * (8192 - items) / 8192
		}
		if delta+int64(size)/4096*int64(s.nOld) >= cutoff {
			return true
		}
	}
	for i, n := range s.recent {
		s.old[i] += n
	}
	s.nOld += s.nRecent
	s.recent, s.nRecent = [10]int32{}, 0
	return false
}

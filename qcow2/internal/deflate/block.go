package deflate

import "math/bits"

// The alphabets of deflate (RFC 1951, 3.2.5 and 3.2.7).
const (
	endOfBlock     = 256
	literalSymbols = 286
	distSymbols    = 24 // of 30: those of distances to MaxDistance
	lengthSymbols  = 19 // of the code for the lengths of the other codes
	maxBits        = 15
	maxLengthBits  = 7
	maxStored      = 65535 // bytes of a stored block
)

// The kinds of a block, as the file has them.
const (
	stored = iota
	fixed
	dynamic
)

// alphabet has the symbols of matches, by their length less the least and their
// distance less one, and what the extra bits of a symbol are added to.
type alphabet struct {
	length      [maxMatch - minMatch + 1]uint16
	lengthBase  [literalSymbols]uint16
	lengthExtra [literalSymbols]uint8
	dist        [MaxDistance]uint8
	distBase    [distSymbols]uint16
	distExtra   [distSymbols]uint8
}

var symbols = newAlphabet()

func newAlphabet() *alphabet {
	a := &alphabet{}
	const longest = literalSymbols - 1 // has no extra bits
	base := 0
	for s := endOfBlock + 1; s < longest; s++ {
		extra := max((s-endOfBlock-1)/4-1, 0)
		a.lengthBase[s], a.lengthExtra[s] = uint16(base), uint8(extra)
		for range 1 << extra {
			a.length[base] = uint16(s)
			base++
		}
	}
	a.length[maxMatch-minMatch], a.lengthBase[longest] = longest, maxMatch-minMatch
	base = 0
	for s := range distSymbols {
		extra := max(s/2-1, 0)
		a.distBase[s], a.distExtra[s] = uint16(base), uint8(extra)
		for range 1 << extra {
			a.dist[base] = uint8(s)
			base++
		}
	}
	return a
}

// frequencies is how often each symbol occurs in a block.
type frequencies struct {
	literal [literalSymbols]uint32
	dist    [distSymbols]uint32
}

// blockCodes are the two codes of a block, and how a dynamic one sends them.
type blockCodes struct {
	literal [literalSymbols]code
	dist    [distSymbols]code

	literals, dists int // symbols that are sent
	runs            [literalSymbols + distSymbols]run
	nRuns           int
	length          [lengthSymbols]code
	lengths         int
}

// run is a symbol of the code for lengths, with its extra bits.
type run struct{ symbol, extra uint8 }

var fixedCodes = newFixedCodes()

func newFixedCodes() *blockCodes {
	// Two symbols of the alphabet of literals and six of distances never occur,
	// but have their part in the codes.
	var literal [literalSymbols + 2]code
	var count [maxBits + 1]uint32
	for s := range literal {
		n := uint8(8)
		switch {
		case s >= 144 && s < endOfBlock:
			n = 9
		case s >= endOfBlock && s < 280:
			n = 7
		}
		literal[s].n = n
		count[n]++
	}
	assign(literal[:], &count)
	c := &blockCodes{}
	copy(c.literal[:], literal[:])
	for s := range c.dist {
		c.dist[s] = code{bits: bits.Reverse16(uint16(s)) >> 11, n: 5}
	}
	return c
}

// make makes the codes for a block with symbols as frequent as f says.
func (c *blockCodes) make(f *frequencies) {
	huffman(c.literal[:], f.literal[:], maxBits)
	huffman(c.dist[:], f.dist[:], maxBits)
	c.literals, c.dists = literalSymbols, distSymbols
	for c.literal[c.literals-1].n == 0 {
		c.literals--
	}
	for c.dist[c.dists-1].n == 0 {
		c.dists--
	}
	c.findRuns()
	var freq [lengthSymbols]uint32
	for _, r := range c.runs[:c.nRuns] {
		freq[r.symbol]++
	}
	huffman(c.length[:], freq[:], maxLengthBits)
	c.lengths = lengthSymbols
	for c.length[lengthOrder[c.lengths-1]].n == 0 {
		c.lengths--
	}
}

// lengthOrder is the order in which the lengths of the code for lengths are sent.
var lengthOrder = [lengthSymbols]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// The symbols of runs of lengths, and how many bits their extra bits are.
const (
	repeat    = 16 // the last length, 3 to 6 times
	fewZeros  = 17 // 3 to 10
	manyZeros = 18 // 11 to 138
)

var runExtra = [lengthSymbols]uint8{repeat: 2, fewZeros: 3, manyZeros: 7}

// findRuns finds how the lengths of both codes are sent, one after the other.
func (c *blockCodes) findRuns() {
	var all [literalSymbols + distSymbols]uint8
	n := 0
	for _, x := range c.literal[:c.literals] {
		all[n] = x.n
		n++
	}
	for _, x := range c.dist[:c.dists] {
		all[n] = x.n
		n++
	}
	c.nRuns = 0
	for i := 0; i < n; {
		same := 1
		for i+same < n && all[i+same] == all[i] {
			same++
		}
		c.addRuns(all[i], same)
		i += same
	}
}

// addRuns adds n times a length.
func (c *blockCodes) addRuns(length uint8, n int) {
	add := func(symbol uint8, extra int) {
		c.runs[c.nRuns] = run{symbol, uint8(extra)} //nolint:gosec // G115: at most 7 bits
		c.nRuns++
	}
	if length > 0 {
		add(length, 0)
		n--
	}
	for n >= 3 {
		switch {
		case length > 0:
			k := min(n, 6)
			add(repeat, k-3)
			n -= k
		case n <= 10:
			add(fewZeros, n-3)
			n = 0
		default:
			k := min(n, 138)
			add(manyZeros, k-11)
			n -= k
		}
	}
	for range n {
		add(length, 0)
	}
}

// headerBits is the length of what sends the codes.
func (c *blockCodes) headerBits() int {
	n := 14 + 3*c.lengths
	for _, r := range c.runs[:c.nRuns] {
		n += int(c.length[r.symbol].n + runExtra[r.symbol])
	}
	return n
}

// bodyBits is the length of the tokens that f counts.
func (c *blockCodes) bodyBits(f *frequencies) int {
	n := 0
	for s, k := range f.literal {
		n += int(k) * int(c.literal[s].n+symbols.lengthExtra[s])
	}
	for s, k := range f.dist {
		n += int(k) * int(c.dist[s].n+symbols.distExtra[s])
	}
	return n
}

// block writes the tokens of the block, which are those of src, in the way that
// takes least. It returns false if that needs too much room.
func (e *Encoder) block(src []byte, final bool) bool {
	e.freq.literal[endOfBlock]++
	e.codes.make(&e.freq)
	kind, codes, size := uint64(dynamic), &e.codes, e.codes.headerBits()+e.codes.bodyBits(&e.freq)
	if n := fixedCodes.bodyBits(&e.freq); n <= size {
		kind, codes, size = fixed, fixedCodes, n
	}
	if n := e.out.storedBits(len(src)); n < size {
		kind, size = stored, n
	}
	if !e.out.fits(size + 3) {
		return false
	}
	if kind == stored {
		e.out.stored(src, final)
		return true
	}
	e.out.header(kind, final)
	if kind == dynamic {
		e.sendCodes()
	}
	e.out.tokens(e.tokens[:e.n], codes)
	e.out.code(codes.literal[endOfBlock])
	return true
}

// sendCodes writes the codes of a dynamic block (RFC 1951, 3.2.7).
func (e *Encoder) sendCodes() {
	c, w := &e.codes, &e.out
	w.bits(uint64(c.literals-257), 5) //nolint:gosec // G115: at least 257
	w.bits(uint64(c.dists-1), 5)      //nolint:gosec // G115: at least 1
	w.bits(uint64(c.lengths-4), 4)    //nolint:gosec // G115: at least 4
	for _, s := range lengthOrder[:c.lengths] {
		w.bits(uint64(c.length[s].n), 3)
	}
	for _, r := range c.runs[:c.nRuns] {
		w.code(c.length[r.symbol])
		w.bits(uint64(r.extra), uint(runExtra[r.symbol]))
	}
}

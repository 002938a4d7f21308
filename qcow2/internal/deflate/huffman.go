package deflate

import (
	"math/bits"
	"slices"
)

// code is the code of a symbol, its first bit lowest.
type code struct {
	bits uint16
	n    uint8 // of bits; 0 if the symbol does not occur
}

// huffman makes an optimal code without words of more than most bits, for symbols
// as frequent as freq says. At least two symbols get one, because some decoders want
// that. There are at most 512.
func huffman(codes []code, freq []uint32, most int) {
	var buf, work [512]uint32
	symbols := buf[:0] // frequency, and below that the symbol
	for s, f := range freq {
		codes[s] = code{}
		if f > 0 {
			symbols = append(symbols, f<<9|uint32(s))
		}
	}
	for s := uint32(0); len(symbols) < 2; s++ {
		if freq[s] == 0 {
			symbols = append(symbols, 1<<9|s)
		}
	}
	slices.Sort(symbols)
	lengths := work[:len(symbols)]
	for i, s := range symbols {
		lengths[i] = s >> 9
	}
	treeDepths(lengths)
	var count [maxBits + 1]uint32 // of codes, by length
	for _, n := range lengths {
		count[min(int(n), most)]++
	}
	limitDepths(count[:most+1])

	// The least frequent get the longest.
	i := 0
	for n := most; n > 0; n-- {
		for range count[n] {
			codes[symbols[i]&511].n = uint8(n) //nolint:gosec // G115: at most 15
			i++
		}
	}
	assign(codes, &count)
}

// treeDepths replaces frequencies, ascending, by the depths of their leaves in a
// Huffman tree, in place (A. Moffat and J. Katajainen, In-Place Calculation of
// Minimum-Redundancy Codes, 1995). There are at least two.
func treeDepths(a []uint32) {
	n := len(a)
	// Inner nodes take the places of those whose parents are known; leaf is the
	// first leaf without a parent, root the first inner node without one.
	leaf, root := 0, 0
	for next := range n - 1 {
		sum := uint32(0)
		for range 2 {
			if leaf >= n || root < next && a[root] < a[leaf] {
				sum += a[root]
				a[root] = uint32(next)
				root++
			} else {
				sum += a[leaf]
				leaf++
			}
		}
		a[next] = sum
	}
	// From parents to depths of inner nodes.
	a[n-2] = 0
	for i := n - 3; i >= 0; i-- {
		a[i] = a[a[i]] + 1
	}
	// To depths of leaves, from the root down.
	inner, out := n-2, n-1
	for free, depth := 1, uint32(0); free > 0; depth++ {
		used := 0
		for ; inner >= 0 && a[inner] == depth; inner-- {
			used++
		}
		for ; free > used; free-- {
			a[out] = depth
			out--
		}
		free = 2 * used
	}
}

// limitDepths mends the numbers of codes of each length, after those that were
// longer than the last have been made that long: it lengthens shorter ones until all
// of them fit.
func limitDepths(count []uint32) {
	most := len(count) - 1
	var total uint32 // in units of the longest; all fit if it is 2^most
	for n, c := range count {
		total += c << (most - n)
	}
	for ; total > 1<<most; total-- {
		count[most]--
		for n := most - 1; n > 0; n-- {
			if count[n] > 0 {
				count[n]--
				count[n+1] += 2
				break
			}
		}
	}
}

// assign gives each symbol the code that its length implies (RFC 1951, 3.2.2).
// count is the number of codes by length.
func assign(codes []code, count *[maxBits + 1]uint32) {
	var next [maxBits + 1]uint32
	for n := 1; n < maxBits; n++ {
		next[n+1] = (next[n] + count[n]) << 1
	}
	for s := range codes {
		if n := codes[s].n; n > 0 {
			codes[s].bits = bits.Reverse16(uint16(next[n])) >> (16 - n) //nolint:gosec // G115: at most 15 bits
			next[n]++
		}
	}
}

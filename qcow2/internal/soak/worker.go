package main

import (
	"encoding/binary"
	"math/rand/v2"
)

// stamp fills b with what version v of block i has.
func stamp(b []byte, i int64, v uint32) {
	clear(b)
	if v == 0 {
		return
	}
	x := uint64(i)<<32 | uint64(v) //nolint:gosec // G115: a number of blocks
	for ; len(b) > 0; b = b[8:] {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b, x^x>>29)
	}
}

// worker is one goroutine.
type worker struct {
	*soak
	r   *rand.Rand
	g   int64
	seq uint32 // the version that its next write gives
	buf []byte
}

// pick returns n blocks of the worker's in a row, from first on.
func (w *worker) pick() (first, n int64) {
	half, unit := int64(len(w.versions))/2, int64(near)
	if w.r.IntN(2) == 0 {
		unit = far
	}
	pieces := half / unit / int64(w.goroutines)
	if w.r.IntN(4) == 0 {
		pieces = max(min(pieces, hot/block/unit), 1)
	}
	first = (w.r.Int64N(pieces)*int64(w.goroutines) + w.g) * unit
	at := w.r.Int64N(unit)
	n = 1 + w.r.Int64N(min(unit-at, longest))
	if unit == far {
		first += half
	}
	return first + at, n
}

// request does one of the things that a guest does.
func (w *worker) request() error {
	w.gate.RLock()
	defer w.gate.RUnlock()
	w.requests.Add(1)
	first, n := w.pick()
	switch how := w.r.IntN(200); {
	case how < 90:
		w.loaded.Add(n * block)
		return w.verify(w.buf, first, n)
	case how < 98:
		return w.erase(first, n, w.img.PunchHole)
	case how == 98:
		return w.erase(first, n, w.img.WriteZeroes)
	case how == 99:
		return w.img.Flush()
	case how < 106:
		return w.delete(first)
	}
	return w.write(first, n)
}

// write writes a version of each block that none has had.
func (w *worker) write(first, n int64) error {
	for i := range n {
		w.versions[first+i] = w.seq
		stamp(w.buf[i*block:][:block], first+i, w.seq)
	}
	w.seq++
	w.stored.Add(n * block)
	_, err := w.img.WriteAt(w.buf[:n*block], first*block)
	return err
}

// erase makes the blocks zero.
func (w *worker) erase(first, n int64, how func(off, n int64) error) error {
	clear(w.versions[first : first+n])
	return how(first*block, n*block)
}

// delete discards the whole piece of the worker's around a block, as a guest does
// that deletes a file.
func (w *worker) delete(at int64) error {
	unit := int64(near)
	if at >= int64(len(w.versions))/2 {
		unit = far
	}
	first := at / unit * unit
	if unit == far {
		return w.erase(first, unit, w.img.Discard)
	}
	return w.erase(first, unit, w.img.PunchHole)
}

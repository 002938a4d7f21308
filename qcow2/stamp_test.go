package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"
)

const sector = 512

// stamp fills a sector with its number, the sequence number of the write, and
// bytes that depend on both, half of which do not compress.
func stamp(b []byte, lba, seq uint64) {
	clear(b[:sector])
	x := lba<<32 ^ seq
	for i := 0; i < sector/2; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x^x>>29)
	}
	binary.LittleEndian.PutUint64(b, lba)
	binary.LittleEndian.PutUint64(b[8:], seq)
}

// stamps returns n sectors from lba on, all of write seq.
func stamps(lba, n, seq uint64) []byte {
	b := make([]byte, n*sector)
	for i := range n {
		stamp(b[i*sector:], lba+i, seq)
	}
	return b
}

// readStamp returns the sequence number that a sector carries: 0 if it is zero.
func readStamp(b []byte, lba uint64) (uint64, error) {
	l, seq := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	var want [sector]byte
	if l != 0 || seq != 0 {
		stamp(want[:], lba, seq)
	}
	if string(b[:sector]) != string(want[:]) {
		return 0, fmt.Errorf("sector %d is mixed, or shows sector %d, write %d", lba, l, seq)
	}
	return seq, nil
}

// stamped reports whether a write to the file is of guest data rather than of
// metadata: it begins with the stamp of some sector.
func stamped(b []byte) bool {
	if len(b) < sector {
		return false
	}
	_, err := readStamp(b, binary.LittleEndian.Uint64(b))
	return err == nil
}

// history is what became of one number: the stamp of a sector, or the length of
// the disk. Times in it are positions in the log of the file.
type history struct {
	changes []*change // in the order in which they began, the first at the start
}

// change is a number's becoming value.
type change struct {
	value      uint64
	begin, end int
	// done means that it succeeded. Otherwise it may or may not have come
	// about, even after its end.
	done bool
}

// newHistory begins with a value that is durable.
func newHistory(value uint64) history {
	return history{changes: []*change{{value: value, begin: -2, end: -1, done: true}}}
}

// may returns an error unless the number may be value for a reader who began at
// from and ended at to. After a power cut at to that is one who began with the
// last flush that succeeded.
func (h *history) may(value uint64, from, to int) error {
	for _, c := range slices.Backward(h.changes) {
		if c.value == value && c.begin < to && !h.superseded(c, from) {
			return nil
		}
	}
	var last *change
	for _, c := range h.changes {
		if c.done && c.end < from {
			last = c
		}
	}
	return fmt.Errorf("is %d, not %d", value, last.value)
}

// superseded reports whether a change that began after the end of c had succeeded
// before from.
func (h *history) superseded(c *change, from int) bool {
	for _, b := range slices.Backward(h.changes) {
		if b.done && b.begin > c.end && b.end < from {
			return true
		}
	}
	return false
}

package qcow2

import (
	"encoding/binary"
	"fmt"
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
// the disk. Places in it are positions in the log of the file.
type history struct {
	changes []change // in the order in which they began, the first at the start
	floors  []floor  // what flushes made durable, ascending
	done    int      // the last change that succeeded, by index
}

// change is the number's becoming value, begun at pos.
type change struct {
	pos   int
	value uint64
}

// floor says that from pos on, the number is that of a change or a later one.
type floor struct{ pos, change int }

// newHistory begins with a value that is durable.
func newHistory(value uint64) history {
	return history{changes: []change{{pos: -1, value: value}}}
}

// begin notes that the number is going to be value.
func (h *history) begin(pos int, value uint64) {
	h.changes = append(h.changes, change{pos, value})
}

// finish notes that the change begun last has succeeded. One that failed may or
// may not have come about.
func (h *history) finish() { h.done = len(h.changes) - 1 }

// flushed notes that at pos a flush succeeded that began when the change with
// index done was the last.
func (h *history) flushed(pos, done int) {
	if k := len(h.floors) - 1; k < 0 || h.floors[k].change < done {
		h.floors = append(h.floors, floor{pos, done})
	}
}

// crashed notes that all but what was flushed may be lost.
func (h *history) crashed() {
	h.done = 0
	if k := len(h.floors) - 1; k >= 0 {
		h.done = h.floors[k].change
	}
}

// after returns an error unless the number may be value after a power cut that
// left only the first at events of the log.
func (h *history) after(at int, value uint64) error {
	from := 0
	for _, f := range h.floors {
		if f.pos < at {
			from = f.change
		}
	}
	for _, c := range h.changes[from:] {
		if c.value == value && c.pos < at {
			return nil
		}
	}
	return fmt.Errorf("is %d where %d was flushed", value, h.changes[from].value)
}

// now returns an error unless the number may be value while the image is open.
func (h *history) now(value uint64) error {
	for _, c := range h.changes[h.done:] {
		if c.value == value {
			return nil
		}
	}
	return fmt.Errorf("is %d, not %d", value, h.changes[h.done].value)
}

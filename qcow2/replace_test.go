package qcow2

import (
	"encoding/binary"
	"errors"
	"testing"
)

// TestReplaceLies writes to a cluster, or discards one, that the image does not own, and of which
// the counts say that it is free, or the tables that it holds metadata. Neither
// may become free by that, nor its own replacement.
func TestReplaceLies(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 4 << 20})
	const block = 0x20000
	old := binary.BigEndian.Uint64(good[l2:]) &^ entryCopied
	for _, c := range []struct {
		name  string
		entry uint64
		zero  bool // whether the count of the cluster is
	}{
		{"counted zero", old, true},
		{"the reference count block", block, false},
		{"an L2 table", uint64(l2), false},
		{"the L1 table", 0x30000, false},
		{"far away", 0x80000000000000, false},
		{"compressed data in the reference count table", entryCompressed | 0x10100, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := append([]byte(nil), good...)
			put(b, l2, 8, c.entry)
			if c.zero {
				put(b, block+2*int64(c.entry>>16), 2, 0)
			}
			for _, discards := range []bool{false, true} {
				path := t.TempDir() + "/hostile.qcow2"
				writeFile(t, path, b)
				m := open(t, path, Options{})
				var err error
				if discards {
					err = m.Discard(0, m.clusterSize)
				} else {
					_, err = m.WriteAt(make([]byte, m.clusterSize), 0)
				}
				late := discards && c.zero // only when the count is lowered
				if !errors.Is(err, ErrCorrupt) && !late {
					t.Errorf("discards: %v, got %v", discards, err)
				}
				if err := m.Close(); !errors.Is(err, ErrCorrupt) {
					t.Errorf("close: %v", err)
				}
			}
		})
	}
}

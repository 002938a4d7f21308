package qcow2

import (
	"bytes"
	"testing"
)

// TestGreedyBitmaps checks a small image with bitmaps whose tables are large and all
// in the same place. What does not fit into the bound with the others is not read.
func TestGreedyBitmaps(t *testing.T) {
	const number = 4
	good := readFile(t, withBitmaps(t, CreateOptions{Size: 1 << 20}))
	ext := int64(bytes.Index(good[:4096], []byte{0x23, 0x85, 0x28, 0x75})) + 8
	at := (int64(len(good)) + 1<<16 - 1) &^ (1<<16 - 1)
	b := append(good, make([]byte, at+1<<16-int64(len(good)))...)
	put(b, ext, 4, number)
	put(b, ext+8, 8, number*32)
	put(b, ext+16, 8, uint64(at)) //nolint:gosec // G115: small
	for i := range int64(number) {
		row := at + i*32
		put(b, row, 8, uint64(at)) //nolint:gosec // G115: small
		put(b, row+8, 4, maxBitmapTable)
		if i == 0 {
			put(b, row+8, 4, 1)
		}
		put(b, row+16, 4, 1<<24|16<<16|1) // type, granularity, length of the name
	}
	reads := 0
	f := &memFile{data: b, fail: func(string) error {
		reads++
		return nil
	}}
	r, err := checkIn(t.Context(), f, "memory", CheckOptions{})
	must(t, err)
	if r.Corruptions < number-1 || reads > 1000 {
		t.Errorf("%d corruptions, after %d reads", r.Corruptions, reads)
	}
}

// TestGreedyStrays repairs an image in which the data of many guest clusters is the
// cluster of one table. They share one copy of it, so the file hardly grows.
func TestGreedyStrays(t *testing.T) {
	const cs = 4096
	b := readBack(t, func(m *Image) {
		_, err := m.WriteAt([]byte{1}, 0)
		must(t, err)
	}, CreateOptions{Size: cs / 8 * cs, ClusterSize: cs})
	l1 := field(b, offL1Offset)
	for i := int64(1); i < cs/8; i++ {
		put(b, field(b, l1)&entryOffset+i*8, 8, uint64(l1)|entryCopied) //nolint:gosec // G115: an offset
	}
	want := bytes.Clone(b[l1:][:cs])
	f := &memFile{data: bytes.Clone(b)}
	_, after, err := repairIn(t.Context(), f, "memory", RepairAll, CheckOptions{})
	must(t, err)
	if grown := len(f.data) - len(b); !after.Clean() || grown > 2*cs {
		t.Errorf("the file grew by %d bytes: %+v", grown, after)
	}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	defer closeImage(t, m)
	for _, off := range []int64{cs, 300 * cs, 511 * cs} {
		got := make([]byte, cs)
		if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the data at %d is another: %v", off, err)
		}
		clear(got)
		_, err := m.WriteAt(got, off) // to a cluster of its own
		must(t, err)
	}
}

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

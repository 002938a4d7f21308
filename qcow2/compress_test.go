package qcow2

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// packedImage opens an image of compressed clusters whose bytes are n, n+1, …,
// behind a gate that holds up the reads of their data.
func packedImage(t *testing.T, clusters int) (*Image, *gateFile) {
	t.Helper()
	path := create(t, CreateOptions{Size: int64(clusters) << 16})
	m := open(t, path, Options{})
	for i := range clusters {
		must(t, m.WriteCompressed(bytes.Repeat([]byte{byte(i + 1)}, 1<<16), int64(i)<<16))
	}
	closeImage(t, m)
	m = open(t, path, Options{ReadOnly: true})
	_, err := m.ReadAt(make([]byte, 1), int64(clusters-1)<<16) // loads the L2 slice
	must(t, err)
	m.decoder.forget()
	return m, newGate(m, func(write bool, _, n int64) bool { return !write && n < 4096 })
}

// readEach reads one byte of each of the clusters at once.
func readEach(t *testing.T, m *Image, clusters []int) *sync.WaitGroup {
	t.Helper()
	var wg sync.WaitGroup
	for _, c := range clusters {
		wg.Go(func() {
			var b [1]byte
			if _, err := m.ReadAt(b[:], int64(c)<<16+100); err != nil || b[0] != byte(c+1) {
				t.Errorf("cluster %d reads as %d, %v", c, b[0], err)
			}
		})
	}
	return &wg
}

// TestDecodeOnce lets many readers want a compressed cluster that is in nobody's
// memory.
func TestDecodeOnce(t *testing.T) {
	m, gate := packedImage(t, 2)
	wg := readEach(t, m, []int{0, 0, 0, 0, 0, 0, 0, 0})
	<-gate.held
	time.Sleep(20 * time.Millisecond) // the others come
	close(gate.open)
	wg.Wait()
	readEach(t, m, []int{0}).Wait()
	if n := len(gate.held); n != 0 {
		t.Errorf("the cluster was read %d times more", n)
	}
}

// TestDecodeFewAtOnce shows that not more clusters are in work than may be.
func TestDecodeFewAtOnce(t *testing.T) {
	m, gate := packedImage(t, 8)
	m.decoder.slots = make(chan struct{}, 2)
	wg := readEach(t, m, []int{0, 1, 2, 3, 4, 5, 6, 7})
	<-gate.held
	<-gate.held
	time.Sleep(20 * time.Millisecond)
	if n := len(gate.held); n != 0 {
		t.Errorf("%d clusters are in work, 2 may be", 2+n)
	}
	close(gate.open)
	wg.Wait()
}

// TestDecodedBound reads more compressed clusters than may stay in memory.
func TestDecodedBound(t *testing.T) {
	m, gate := packedImage(t, 200)
	close(gate.open)
	gate.hold = func(bool, int64, int64) bool { return false }
	for c := range 200 {
		readEach(t, m, []int{c}).Wait()
	}
	var n int
	for _, b := range m.decoder.decoded.Values() {
		n += cap(b)
	}
	if n > decodedBytes || n < decodedBytes/2 || len(m.decoder.flights) != 0 {
		t.Errorf("%d bytes of decoded clusters, the bound is %d", n, decodedBytes)
	}
}

// TestCompressedSize gives the data of the last compressed cluster of a file a
// sector less than it has, or as many as can be: what lies beyond the end of the
// file reads as zeros, and what follows the data is ignored.
func TestCompressedSize(t *testing.T) {
	r := newSeed(t)
	for _, format := range []string{"zlib", "zstd"} {
		path := create(t, CreateOptions{Size: 4 << 20, ClusterSize: 2 << 20, CompressionType: format})
		m := open(t, path, Options{})
		want := make([]byte, 2<<20)
		fillRandom(r, want[:1<<20])
		must(t, m.WriteCompressed(want, 0))
		table := int64(m.l1[0] & entryOffset)
		closeImage(t, m)
		b, err := os.ReadFile(path)
		must(t, err)
		good := binary.BigEndian.Uint64(b[table:])
		const one = 1 << (70 - 21) // sector in the entry
		read := func(e uint64) error {
			binary.BigEndian.PutUint64(b[table:], e)
			writeFile(t, path, b)
			m := open(t, path, Options{ReadOnly: true})
			got := make([]byte, 2<<20)
			_, err := m.ReadAt(got, 0)
			if err == nil && !bytes.Equal(got, want) {
				t.Errorf("%s, entry %#x: wrong contents", format, e)
			}
			closeImage(t, m)
			return err
		}
		for _, e := range []uint64{good, good + one, good | 0x3ffe<<48} {
			if err := read(e); err != nil {
				t.Errorf("%s, entry %#x instead of %#x: %v", format, e, good, err)
			}
		}
		if err := read(good - one); err == nil || !strings.Contains(err.Error(), "decompressing") {
			t.Errorf("%s, a sector less: %v", format, err)
		}
	}
}

// Package blktest is a conformance suite for implementations of blk.Disk, and
// a Disk in memory to test their users with.
package blktest

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/calfvm/calf/blk"
)

// All runs every test of the suite. Each calls newDisk for a disk of its own
// that reads as zero everywhere, can be written, and has at least 1 MiB; the
// disk is closed, if at all, by a Cleanup that newDisk registers. What a disk
// can do beyond blk.Disk is tested if it has the methods.
func All(t *testing.T, newDisk func(tb testing.TB) blk.Disk) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, blk.Disk)
	}{
		{"Zero", testZero},
		{"ReadBack", testReadBack},
		{"Unaligned", testUnaligned},
		{"Vectored", testVectored},
		{"ManyBuffers", testManyBuffers},
		{"Bounds", testBounds},
		{"KeepsIOV", testKeepsIOV},
		{"Flush", testFlush},
		{"Discard", testDiscard},
		{"WriteZeroes", testWriteZeroes},
		{"ZeroBounds", testZeroBounds},
		{"Hints", testHints},
		{"Model", testModel},
		{"Concurrent", testConcurrent},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDisk(t)
			if d.Size() < 1<<20 || d.ReadOnly() {
				t.Fatalf("the suite needs a writable disk of at least 1 MiB; got %d bytes, read-only %v", d.Size(), d.ReadOnly())
			}
			test.run(t, d)
		})
	}
}

// seeded returns a generator whose seed is printed if the test fails.
func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func read(t *testing.T, d blk.Disk, off int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if err := d.ReadvAt([][]byte{b}, off); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	return b
}

func write(t *testing.T, d blk.Disk, off int64, bufs ...[]byte) {
	t.Helper()
	if err := d.WritevAt(bufs, off); err != nil {
		t.Fatalf("write at %d: %v", off, err)
	}
}

// cut divides b into buffers of random length, some of them empty.
func cut(r *rand.Rand, b []byte, longest int) [][]byte {
	var bufs [][]byte
	for len(b) > 0 {
		n := min(r.IntN(longest+1), len(b))
		bufs = append(bufs, b[:n:n])
		b = b[n:]
	}
	return bufs
}

func testZero(t *testing.T, d blk.Disk) {
	const n = 64 << 10
	for _, off := range []int64{0, d.Size() / 2, d.Size() - n} {
		if !bytes.Equal(read(t, d, off, n), make([]byte, n)) {
			t.Errorf("a new disk does not read as zero at %d", off)
		}
	}
}

func testReadBack(t *testing.T, d blk.Disk) {
	r := seeded(t)
	for _, off := range []int64{0, 512, 65536, d.Size() - 4096} {
		want := random(r, 4096)
		write(t, d, off, want)
		if !bytes.Equal(read(t, d, off, 4096), want) {
			t.Errorf("what was written at %d does not read back", off)
		}
	}
}

func testUnaligned(t *testing.T, d blk.Disk) {
	r := seeded(t)
	before := random(r, 8192)
	write(t, d, 65536-4096, before)
	want := bytes.Clone(before)
	part := random(r, 1237)
	copy(want[3333:], part)
	write(t, d, 65536-4096+3333, part)
	if !bytes.Equal(read(t, d, 65536-4096, 8192), want) {
		t.Error("an unaligned write did not change just its own bytes")
	}
	if !bytes.Equal(read(t, d, 65536-4096+3001, 1999), want[3001:5000]) {
		t.Error("an unaligned read returned other bytes")
	}
}

func testVectored(t *testing.T, d blk.Disk) {
	r := seeded(t)
	want := random(r, 200_000)
	const off = 12345
	write(t, d, off, cut(r, want, 9000)...)
	got := make([]byte, len(want))
	if err := d.ReadvAt(cut(r, got, 7000), off); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("what was written from some buffers does not read back into others")
	}
}

// testManyBuffers uses more buffers than one system call takes.
func testManyBuffers(t *testing.T, d blk.Disk) {
	r := seeded(t)
	want := random(r, 3000*16)
	var out, in [][]byte
	got := make([]byte, len(want))
	for i := 0; i < len(want); i += 16 {
		out = append(out, want[i:i+16])
		in = append(in, got[i:i+16])
	}
	write(t, d, 4096, out...)
	if err := d.ReadvAt(in, 4096); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("what was written from 3000 buffers does not read back into 3000")
	}
}

func testBounds(t *testing.T, d blk.Disk) {
	size := d.Size()
	kept := random(seeded(t), 4096)
	write(t, d, size-4096, kept)
	big := make([]byte, 4096)
	for _, c := range []struct {
		name string
		off  int64
		bufs [][]byte
	}{
		{"negative", -1, [][]byte{big}},
		{"far negative", math.MinInt64, [][]byte{big}},
		{"across the end", size - 4095, [][]byte{big}},
		{"across the end in parts", size - 4096, [][]byte{big, big[:1]}},
		{"at the end", size, [][]byte{big[:1]}},
		{"past the end", size + 1, nil},
		{"far past the end", math.MaxInt64, [][]byte{big}},
	} {
		if err := d.ReadvAt(c.bufs, c.off); err == nil {
			t.Errorf("%s: a read succeeded", c.name)
		}
		if err := d.WritevAt(c.bufs, c.off); err == nil {
			t.Errorf("%s: a write succeeded", c.name)
		}
	}
	if d.Size() != size {
		t.Errorf("the size went from %d to %d", size, d.Size())
	}
	if !bytes.Equal(read(t, d, size-4096, 4096), kept) {
		t.Error("a refused write has changed the disk")
	}
	for _, off := range []int64{0, size} {
		if err := d.ReadvAt(nil, off); err != nil {
			t.Errorf("read nothing at %d: %v", off, err)
		}
		if err := d.WritevAt([][]byte{{}}, off); err != nil {
			t.Errorf("write nothing at %d: %v", off, err)
		}
	}
}

// testKeepsIOV checks that neither method changes the slices it is given.
func testKeepsIOV(t *testing.T, d blk.Disk) {
	b := make([]byte, 10_000)
	iov := [][]byte{b[:1000], b[1000:1003], b[1003:]}
	same := func() {
		t.Helper()
		if len(iov[0]) != 1000 || len(iov[1]) != 3 || len(iov[2]) != 8997 || &iov[2][0] != &b[1003] {
			t.Error("the elements of iov have changed")
		}
	}
	write(t, d, 777, iov...)
	same()
	if err := d.ReadvAt(iov, 777); err != nil {
		t.Fatal(err)
	}
	same()
}

func testFlush(t *testing.T, d blk.Disk) {
	want := random(seeded(t), 4096)
	for range 3 {
		write(t, d, 0, want)
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(read(t, d, 0, 4096), want) {
		t.Error("what was flushed does not read back")
	}
}

// zeroers are the two ways of z to make a range zero.
func zeroers(z blk.ZeroWriter) map[string]func(off, n int64) error {
	return map[string]func(off, n int64) error{"WriteZeroes": z.WriteZeroes, "PunchHole": z.PunchHole}
}

// testDiscard checks that a discard changes nothing beside its range, shows
// nothing that was not there, and lets the range be written again.
func testDiscard(t *testing.T, d blk.Disk) {
	disk, ok := d.(blk.Discarder)
	if !ok {
		t.Skip("the disk is no blk.Discarder")
	}
	if g := disk.DiscardGranularity(); g < 0 || g%blk.SectorSize != 0 {
		t.Errorf("granularity %d is no multiple of a sector", g)
	}
	r := seeded(t)
	const size = 512 << 10
	model := random(r, size)
	write(t, d, 0, model)
	for _, c := range []struct{ off, n int }{{0, 0}, {1000, 77}, {4096, 65536}, {131072, 131072 + 512}, {300_001, 99_999}, {size, 0}} {
		if err := disk.Discard(int64(c.off), int64(c.n)); err != nil {
			t.Fatalf("discard %d bytes at %d: %v", c.n, c.off, err)
		}
		got := read(t, d, 0, size)
		if !bytes.Equal(got[:c.off], model[:c.off]) || !bytes.Equal(got[c.off+c.n:], model[c.off+c.n:]) {
			t.Fatalf("a discard of %d bytes at %d has changed others", c.n, c.off)
		}
		copy(model[c.off:], random(r, c.n))
		write(t, d, int64(c.off), model[c.off:c.off+c.n])
		if !bytes.Equal(read(t, d, 0, size), model) {
			t.Fatalf("a write over %d discarded bytes at %d does not read back", c.n, c.off)
		}
	}
}

// testWriteZeroes makes ranges of every alignment zero.
func testWriteZeroes(t *testing.T, d blk.Disk) {
	disk, ok := d.(blk.ZeroWriter)
	if !ok {
		t.Skip("the disk is no blk.ZeroWriter")
	}
	r := seeded(t)
	const size = 512 << 10
	for name, zero := range zeroers(disk) {
		model := random(r, size)
		write(t, d, 0, model)
		for _, c := range []struct{ off, n int }{{0, 0}, {1000, 77}, {4096, 65536}, {131071, 131072 + 513}, {500_000, size - 500_000}, {0, size}, {0, size}} {
			if err := zero(int64(c.off), int64(c.n)); err != nil {
				t.Fatalf("%s of %d bytes at %d: %v", name, c.n, c.off, err)
			}
			clear(model[c.off : c.off+c.n])
			if !bytes.Equal(read(t, d, 0, size), model) {
				t.Fatalf("%s of %d bytes at %d: the disk reads wrong", name, c.n, c.off)
			}
			part := random(r, 100)
			copy(model[c.off/2:], part)
			write(t, d, int64(c.off/2), part)
		}
		if !bytes.Equal(read(t, d, 0, size), model) {
			t.Fatalf("%s: a write afterwards does not read back", name)
		}
	}
}

// testZeroBounds gives ranges that are not wholly on the disk.
func testZeroBounds(t *testing.T, d blk.Disk) {
	calls := make(map[string]func(off, n int64) error)
	if z, ok := d.(blk.ZeroWriter); ok {
		calls = zeroers(z)
	}
	if z, ok := d.(blk.Discarder); ok {
		calls["Discard"] = z.Discard
	}
	if len(calls) == 0 {
		t.Skip("the disk is neither a blk.Discarder nor a blk.ZeroWriter")
	}
	size := d.Size()
	kept := random(seeded(t), 8192)
	write(t, d, 0, kept)
	write(t, d, size-8192, kept)
	for name, call := range calls {
		for _, c := range []struct{ off, n int64 }{
			{-1, 512},
			{0, -1},
			{4096, -4096},
			{math.MinInt64, 512},
			{size - 511, 512},
			{size, 1},
			{size + 1, 0},
			{512, math.MaxInt64},
			{math.MaxInt64, 512},
			{math.MaxInt64, math.MaxInt64},
		} {
			if call(c.off, c.n) == nil {
				t.Errorf("%s of %d bytes at %d succeeded", name, c.n, c.off)
			}
		}
	}
	if !bytes.Equal(read(t, d, 0, 8192), kept) || !bytes.Equal(read(t, d, size-8192, 8192), kept) {
		t.Error("a refused call has changed the disk")
	}
	if d.Size() != size {
		t.Errorf("the size went from %d to %d", size, d.Size())
	}
}

func testHints(t *testing.T, d blk.Disk) {
	disk, ok := d.(blk.Hinter)
	if !ok {
		t.Skip("the disk is no blk.Hinter")
	}
	physical, minIO, optimal := disk.IOHints()
	if physical < 0 || physical&(physical-1) != 0 || minIO < 0 || optimal < 0 {
		t.Errorf("hints %d, %d, %d: want a power of 2 and no negative number", physical, minIO, optimal)
	}
}

// testModel does random operations on the disk and on a plain slice.
func testModel(t *testing.T, d blk.Disk) {
	r := seeded(t)
	model := make([]byte, 1<<20)
	base := d.Size() - int64(len(model))
	zero, _ := d.(blk.ZeroWriter)
	for i := range 500 {
		n := 1 + r.IntN(1<<r.IntN(18))
		off := r.IntN(len(model) - n + 1)
		op := r.IntN(10)
		if zero == nil && op < 2 {
			op += 3
		}
		switch op {
		case 0, 1:
			make0 := zero.WriteZeroes
			if op == 1 {
				make0 = zero.PunchHole
			}
			if err := make0(base+int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
			clear(model[off : off+n])
		case 2:
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
		case 3, 4, 5, 6:
			b := random(r, n)
			copy(model[off:], b)
			write(t, d, base+int64(off), cut(r, b, 1+n/2)...)
		default:
			if !bytes.Equal(read(t, d, base+int64(off), n), model[off:off+n]) {
				t.Fatalf("operation %d: %d bytes at %d differ from the model", i, n, off)
			}
		}
	}
	if !bytes.Equal(read(t, d, base, len(model)), model) {
		t.Fatal("the disk differs from the model at the end")
	}
}

// testConcurrent lets several goroutines work on interleaved stripes, which no
// two share but which lie side by side in any larger unit.
func testConcurrent(t *testing.T, d blk.Disk) {
	const workers, stripe, stripes = 4, 1536, 40
	r := seeded(t)
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		seed := r.Uint64()
		wg.Go(func() { errs <- stripeWorker(d, w, workers, stripe, stripes, seed) })
	}
	wg.Wait()
	for range workers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func stripeWorker(d blk.Disk, w, workers, stripe, stripes int, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 1))
	last := make([][]byte, stripes)
	for i := range last {
		last[i] = make([]byte, stripe)
	}
	for range 300 {
		i := r.IntN(stripes)
		off := int64((i*workers + w) * stripe)
		switch r.IntN(10) {
		case 0:
			if err := d.Flush(); err != nil {
				return err
			}
		case 1, 2, 3, 4:
			last[i] = random(r, stripe)
			if err := d.WritevAt(cut(r, last[i], stripe), off); err != nil {
				return err
			}
		default:
			got := make([]byte, stripe)
			if err := d.ReadvAt([][]byte{got}, off); err != nil {
				return err
			}
			if !bytes.Equal(got, last[i]) {
				return fmt.Errorf("worker %d: stripe at %d does not hold what was written last", w, off)
			}
		}
	}
	return nil
}

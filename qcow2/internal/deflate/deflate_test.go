package deflate

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
)

// plainReader reads bits, the lowest of each byte first.
type plainReader struct {
	b []byte
	n int // bits read
}

var errShort = errors.New("the data ends early")

func (r *plainReader) bits(n int) int {
	v := 0
	for i := range n {
		if r.n>>3 >= len(r.b) {
			panic(errShort)
		}
		v |= int(r.b[r.n>>3]>>(r.n&7)&1) << i
		r.n++
	}
	return v
}

// plainCode is a canonical code: how many words of each length there are, and their
// symbols in order.
type plainCode struct {
	count   [maxBits + 1]int
	symbols []int
}

func newPlainCode(lengths []int) *plainCode {
	d := &plainCode{}
	for n := 1; n <= maxBits; n++ {
		for s, l := range lengths {
			if l == n {
				d.count[n]++
				d.symbols = append(d.symbols, s)
			}
		}
	}
	return d
}

// symbol reads a symbol.
func (r *plainReader) symbol(d *plainCode) int {
	word, first, index := 0, 0, 0
	for _, n := range d.count[1:] {
		word |= r.bits(1)
		if word-first < n {
			return d.symbols[index+word-first]
		}
		index += n
		first = (first + n) << 1
		word <<= 1
	}
	panic(errors.New("no such code"))
}

// inflate decodes raw deflate data as RFC 1951 says, and knows nothing of the
// encoder. It fails at a distance above MaxDistance, and at bytes left over.
func inflate(b []byte) (out []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("after %d bytes: %v", len(out), r)
		}
	}()
	r := &plainReader{b: b}
	for final := 0; final == 0; {
		final = r.bits(1)
		switch kind := r.bits(2); kind {
		case 0:
			r.n = (r.n + 7) &^ 7
			n := r.bits(16)
			if r.bits(16) != n^0xffff {
				return nil, errors.New("lengths differ")
			}
			for range n {
				out = append(out, byte(r.bits(8)))
			}
		case 3:
			return nil, errors.New("no such kind of block")
		default:
			literals, dists := fixedLengths()
			if kind == 2 {
				literals, dists = r.codes()
			}
			out = r.body(out, newPlainCode(literals), newPlainCode(dists))
		}
	}
	if (r.n+7)>>3 != len(b) {
		return nil, errors.New("bytes are left over")
	}
	return out, nil
}

func fixedLengths() (literals, dists []int) {
	for s := range 288 {
		n := 8
		if s >= 144 && s < 256 {
			n = 9
		} else if s >= 256 && s < 280 {
			n = 7
		}
		literals = append(literals, n)
	}
	return literals, bytesOf(30, 5)
}

func bytesOf(n, v int) (all []int) {
	for range n {
		all = append(all, v)
	}
	return all
}

func (r *plainReader) codes() (literals, dists []int) {
	nLiterals, nDists, n := r.bits(5)+257, r.bits(5)+1, r.bits(4)+4
	lengths := make([]int, 19)
	for _, s := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:n] {
		lengths[s] = r.bits(3)
	}
	code := newPlainCode(lengths)
	var all []int
	for len(all) < nLiterals+nDists {
		switch s := r.symbol(code); s {
		case 16:
			all = append(all, bytesOf(3+r.bits(2), all[len(all)-1])...)
		case 17:
			all = append(all, bytesOf(3+r.bits(3), 0)...)
		case 18:
			all = append(all, bytesOf(11+r.bits(7), 0)...)
		default:
			all = append(all, s)
		}
	}
	return all[:nLiterals], all[nLiterals : nLiterals+nDists : nLiterals+nDists]
}

func (r *plainReader) body(out []byte, literals, dists *plainCode) []byte {
	base := []int{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	extra := []int{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	distBase := []int{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073}
	for {
		s := r.symbol(literals)
		if s < 256 {
			out = append(out, byte(s))
			continue
		}
		if s == 256 {
			return out
		}
		length := base[s-257] + r.bits(extra[s-257])
		d := r.symbol(dists)
		if d >= len(distBase) {
			panic(fmt.Errorf("a distance with symbol %d, beyond %d", d, MaxDistance))
		}
		dist := distBase[d] + r.bits(max(d/2-1, 0))
		for range length {
			out = append(out, out[len(out)-dist])
		}
	}
}

// check encodes src and decodes it with a plain decoder and with Go's.
func check(t *testing.T, e *Encoder, src []byte) int {
	t.Helper()
	limit := len(src) + len(src)/1000 + 64
	packed, ok := e.Encode([]byte("before"), src, limit)
	packed, before := bytes.CutPrefix(packed, []byte("before"))
	if !ok || !before || len(packed) > limit {
		t.Fatalf("%d bytes take more than %d: %d, %t", len(src), limit, len(packed), ok)
	}
	got, err := inflate(packed)
	if err != nil || !bytes.Equal(got, src) {
		t.Fatalf("%d bytes come back as %d: %v", len(src), len(got), err)
	}
	if got, err = io.ReadAll(flate.NewReader(bytes.NewReader(packed))); err != nil || !bytes.Equal(got, src) {
		t.Fatalf("Go reads %d bytes as %d: %v", len(src), len(got), err)
	}
	got = make([]byte, len(src))
	if err := new(Decoder).Decode(got, append(packed, 1, 2, 3)); err != nil || !bytes.Equal(got, src) {
		t.Fatalf("the decoder reads %d bytes wrong: %v", len(src), err)
	}
	again, ok := e.Encode(nil, src, len(packed))
	if !ok || !bytes.Equal(again, packed) {
		t.Fatalf("%d bytes do not fit into the room they take, or not into the same", len(src))
	}
	if _, ok := e.Encode(nil, src, len(packed)-8); ok {
		t.Fatalf("%d bytes fit into less room than they take", len(src))
	}
	return len(packed)
}

// mixed returns n bytes: noise, text, runs, records, repetitions from near and far.
func mixed(r *rand.Rand, n int) []byte {
	text, err := os.ReadFile("deflate.go")
	if err != nil {
		panic(err)
	}
	var b []byte
	for len(b) < n {
		k := 1 + r.IntN(1+n/4)
		switch r.IntN(6) {
		case 0:
			for range k {
				b = append(b, byte(r.Uint32()))
			}
		case 1:
			at := r.IntN(len(text))
			b = append(b, text[at:min(len(text), at+k)]...)
		case 2:
			b = append(b, bytes.Repeat([]byte{byte(r.Uint32())}, k)...)
		case 3:
			for i := range k / 8 {
				b = append(b, byte(i), byte(i>>8), 0, 0, byte(r.Uint32()), 7, 0, 0)
			}
		case 4:
			if len(b) > 0 {
				at := r.IntN(len(b))
				b = append(b, b[at:min(len(b), at+k)]...)
			}
		case 5: // few symbols, some of them rare
			for range k {
				b = append(b, byte(r.ExpFloat64()*float64(k%9)))
			}
		}
	}
	return b[:n]
}

func TestEncode(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	noise := make([]byte, 3*MaxDistance)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	fibonacci := []byte{} // symbols whose code would be longer than 15 bits
	for s, a, b := byte(0), 1, 1; s < 20; s, a, b = s+1, b, a+b {
		fibonacci = append(fibonacci, bytes.Repeat([]byte{s}, a)...)
	}
	r.Shuffle(len(fibonacci), func(i, j int) { fibonacci[i], fibonacci[j] = fibonacci[j], fibonacci[i] })
	for level := MinLevel; level <= MaxLevel; level++ {
		e := New(level)
		for n := range 40 {
			check(t, e, noise[:n])
			check(t, e, make([]byte, n))
		}
		check(t, e, fibonacci)
		for _, period := range []int{1, 2, 3, 7, 258, 259, MaxDistance - 1, MaxDistance} {
			src := bytes.Repeat(noise[:period], 1<<16/period)
			if n := check(t, e, src); n > period+period/100+1100 {
				t.Errorf("level %d: %d bytes of period %d take %d", level, len(src), period, n)
			}
		}
		if n := check(t, e, bytes.Repeat(noise[:MaxDistance+1], 15)); n < 14*MaxDistance {
			t.Errorf("level %d: repetitions beyond the window were found", level)
		}
		for _, n := range []int{512, 4096, 1 << 16} {
			check(t, e, mixed(r, n))
		}
	}
	check(t, New(6), mixed(r, 2<<20))
	check(t, New(1), append(make([]byte, 1<<20), bytes.Repeat(noise, 20)...)) // more literals than a block holds
}

// TestLevels shows that each level makes a text smaller.
func TestLevels(t *testing.T) {
	text, err := os.ReadFile("block.go")
	if err != nil {
		t.Fatal(err)
	}
	before := len(text)
	for level := MinLevel; level <= MaxLevel; level++ {
		n := check(t, New(level), text)
		if n > before {
			t.Errorf("level %d takes %d bytes, the one before %d", level, n, before)
		}
		before = n
	}
	if before > len(text)*2/5 {
		t.Errorf("%d of %d bytes are left", before, len(text))
	}
}

// TestForgets shows that what was encoded before makes no difference.
func TestForgets(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	e := New(6)
	for range 20 {
		src := mixed(r, 1+r.IntN(100000))
		got, _ := e.Encode(nil, src, 1<<20)
		if want, _ := New(6).Encode(nil, src, 1<<20); !bytes.Equal(got, want) {
			t.Fatal("an encoder remembers what it encoded before")
		}
		check(t, e, src)
	}
}

func TestEncodeDoesNotAllocate(t *testing.T) {
	src := mixed(rand.New(rand.NewPCG(1, 1)), 1<<16)
	e, room := New(6), make([]byte, 0, 1<<16+slack)
	if n := testing.AllocsPerRun(10, func() { room, _ = e.Encode(room[:0], src, 1<<16) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzEncode(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	for level := byte(MinLevel); level <= MaxLevel; level++ {
		f.Add(level, mixed(r, 1000), uint16(level))
	}
	f.Fuzz(func(t *testing.T, level byte, part []byte, times uint16) {
		if len(part) > 0 {
			part = bytes.Repeat(part, min(int(times), 1+20000/len(part)))
		}
		check(t, New(MinLevel+int(level)%MaxLevel), part)
	})
}

// sameAsGo decodes n bytes of b, as Go's decoder does or fails to. That one wants as
// many bits as the end of a block has before it decodes any symbol, so it is shown
// more than b where b was enough.
func sameAsGo(t *testing.T, d *Decoder, b []byte, n int) {
	t.Helper()
	got, want := make([]byte, n), make([]byte, n)
	_, wantErr := io.ReadFull(flate.NewReader(bytes.NewReader(b)), want)
	err := d.Decode(got, b)
	if err == nil && errors.Is(wantErr, io.ErrUnexpectedEOF) {
		_, wantErr = io.ReadFull(flate.NewReader(bytes.NewReader(append(b, 0, 0))), want)
	}
	if (err != nil) != (wantErr != nil) || err == nil && !bytes.Equal(got, want) {
		t.Fatalf("%d bytes: %v, Go says %v", n, err, wantErr)
	}
}

// FuzzDecode decodes anything. Go's decoder must say the same.
func FuzzDecode(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	for level := flate.HuffmanOnly; level <= flate.BestCompression; level++ {
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, level)
		if err != nil {
			f.Fatal(err)
		}
		src := mixed(r, 3000)
		if _, err := w.Write(append(src, src[:300]...)); err != nil {
			f.Fatal(err)
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes(), uint32(3300), uint32(0), byte(0))
		f.Add(b.Bytes(), uint32(100), uint32(level+2), byte(1))
	}
	fixed, _ := New(1).Encode(nil, []byte("aaaaaaaaaaaaaaaaaaaaaaaab"), 100)
	f.Add(fixed, uint32(25), uint32(0), byte(0))
	d := new(Decoder)
	f.Fuzz(func(t *testing.T, b []byte, n, at uint32, flip byte) {
		b = bytes.Clone(b)
		if len(b) > 0 {
			b[int(at)%len(b)] ^= flip
		}
		sameAsGo(t, d, b, int(n%(1<<18)))
	})
}

// TestDecodeDamaged flips bits of good data, and cuts it.
func TestDecodeDamaged(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	d := new(Decoder)
	for range 3000 {
		src := mixed(r, 1+r.IntN(3000))
		var w bytes.Buffer
		z, err := flate.NewWriter(&w, r.IntN(12)-2)
		if err != nil {
			t.Fatal(err)
		}
		_, err = z.Write(src)
		if err = errors.Join(err, z.Close()); err != nil {
			t.Fatal(err)
		}
		b := w.Bytes()
		for range r.IntN(3) {
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		}
		b = b[:len(b)-r.IntN(2)*r.IntN(len(b))]
		sameAsGo(t, d, b, len(src))
	}
}

func BenchmarkEncode(b *testing.B) {
	src := mixed(rand.New(rand.NewPCG(1, 1)), 1<<16)
	for level := MinLevel; level <= MaxLevel; level++ {
		b.Run(fmt.Sprintf("level=%d", level), func(b *testing.B) {
			e, room := New(level), make([]byte, 0, 1<<16+slack)
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				room, _ = e.Encode(room[:0], src, 1<<16)
			}
		})
	}
}

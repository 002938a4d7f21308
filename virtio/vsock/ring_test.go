package vsock

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestRing fills and empties a ring at random, beside a plain buffer. What its reader
// has been shown stays as it is while the ring is filled.
func TestRing(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var r ring
	var model bytes.Buffer
	var shown []byte
	for range 4000 {
		most := 1 + random.IntN(bufferSize)
		if random.IntN(2) == 0 {
			most = 1 + most%100 // so that it often is nearly empty
		}
		room := r.free()
		room = room[:min(len(room), most)]
		for i := range room {
			room[i] = byte(random.Uint32()) //nolint:gosec // G115: any byte is good
		}
		model.Write(room)
		r.grow(len(room))
		if !bytes.Equal(shown, model.Bytes()[:len(shown)]) {
			t.Fatal("what has been shown has changed")
		}
		front := r.front()
		taken := front[:random.IntN(len(front)+1)]
		if !bytes.Equal(taken, model.Next(len(taken))) {
			t.Fatal("something else comes out")
		}
		r.drop(len(taken))
		if shown = r.front(); r.n != model.Len() {
			t.Fatalf("%d bytes are in it, want %d", r.n, model.Len())
		}
	}
}

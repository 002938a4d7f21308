package virtio

import (
	"math/rand/v2"
	"testing"
)

// TestCrosses checks the notification decision against what it means: the
// driver asked to be told when the index passes event, and among the indices
// before+1 … now there is event+1 (V11). An index never moves by more than the
// queue size at once.
func TestCrosses(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200_000 {
		before := uint16(r.Uint32())
		moved := uint16(r.IntN(MaxQueueSize + 1))
		event := before + uint16(r.IntN(9)) - 4
		if r.IntN(2) == 0 {
			event = uint16(r.Uint32())
		}
		if r.IntN(2) == 0 {
			moved = uint16(r.IntN(8))
		}
		want := event-before < moved // event+1 lies in (before, before+moved]
		if got := crosses(event, before+moved, before); got != want {
			t.Fatalf("seed %#x: from %d by %d past %d: got %v, want %v", seed, before, moved, event, got, want)
		}
	}
	// Every distance of a few steps, by counting them.
	for before := range 20 {
		for moved := range 10 {
			for event := range 30 {
				want := false
				for i := 1; i <= moved; i++ {
					want = want || before+i == event+1
				}
				if got := crosses(uint16(event), uint16(before+moved), uint16(before)); got != want {
					t.Fatalf("from %d by %d past %d: got %v, want %v", before, moved, event, got, want)
				}
			}
		}
	}
}

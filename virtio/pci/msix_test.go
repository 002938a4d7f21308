package pci

import (
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// countingInterrupt counts what it sends.
type countingInterrupt struct{ sent atomic.Uint64 }

func (*countingInterrupt) Route(uint64, uint32) error { return nil }
func (c *countingInterrupt) Trigger()                 { c.sent.Add(1) }
func (*countingInterrupt) Close() error               { return nil }

// TestUnmaskRace masks and unmasks a vector while it is triggered. Triggers may
// be merged while it is masked, but after every one, once the vector is
// unmasked, something has been sent (K11).
func TestUnmaskRace(t *testing.T) {
	intr := &countingInterrupt{}
	m := &msix{vectors: []msixVector{{intr: intr}}}
	m.reset()
	if err := errors.Join(m.setControl(msixEnable), m.setMaster(true)); err != nil {
		t.Fatal(err)
	}
	entry := func(mask byte) {
		if err := m.writeTable(msixCtrlOffset, []byte{mask, 0, 0, 0}); err != nil {
			t.Error(err)
		}
	}
	// The other goroutine triggers as soon as a round has begun, and this one
	// unmasks a little later each time, so that they meet at every instruction.
	var begun, done atomic.Uint64
	const over = ^uint64(0)
	go func() {
		for round := uint64(1); await(&begun, round) != over; round++ {
			m.trigger(0)
			done.Store(round)
		}
	}()
	defer begun.Store(over)
	limit := time.Second
	if testing.Short() {
		limit = 200 * time.Millisecond
	}
	for round, start := uint64(1), time.Now(); time.Since(start) < limit; round++ {
		entry(msixEntryMask)
		before := intr.sent.Load()
		begun.Store(round)
		for range round % 64 {
			_ = done.Load()
		}
		entry(0)
		await(&done, round)
		if intr.sent.Load() != before+1 {
			t.Fatalf("round %d: %d messages for one trigger", round, intr.sent.Load()-before)
		}
	}
}

// await returns n's value once that is at least want. It does not sleep unless it
// must: whoever does comes too late to race.
func await(n *atomic.Uint64, want uint64) uint64 {
	for i := 0; ; i++ {
		if v := n.Load(); v >= want {
			return v
		}
		if i > 20_000 {
			runtime.Gosched()
		}
	}
}

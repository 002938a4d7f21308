package pci

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
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
	for range 20_000 {
		entry(msixEntryMask)
		before := intr.sent.Load()
		var wg sync.WaitGroup
		wg.Go(func() { m.trigger(0) })
		entry(0)
		wg.Wait()
		if intr.sent.Load() != before+1 {
			t.Fatalf("%d messages for one trigger", intr.sent.Load()-before)
		}
	}
}

package vmm

import (
	"fmt"
	"slices"
	"testing"
)

// TestSharedLine has two functions assert one line: it falls when neither does.
func TestSharedLine(t *testing.T) {
	var got []string
	bus := newPCIBus(func(gsi, level uint32) { got = append(got, fmt.Sprintf("%d:%d", gsi, level)) })
	a := bus.line(1 * functionsPerSlot)
	b := bus.line((1+pciLines)*functionsPerSlot + 3)
	other := bus.line((2 + pciLines) * functionsPerSlot)
	a.Set(true)
	b.Set(true)
	other.Set(true)
	a.Set(false)
	b.Set(false)
	b.Set(true)
	other.Set(false)
	want := []string{"17:1", "18:1", "17:0", "17:1", "18:0"}
	if !slices.Equal(got, want) || slotGSI(1) != 17 || slotGSI(9) != 17 {
		t.Errorf("the lines went %v, want %v", got, want)
	}
}

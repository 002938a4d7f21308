package boot

import "github.com/calfvm/calf/guest"

// Types of memory in an e820 map; PVH uses the same numbers.
const (
	e820RAM      = 1
	e820Reserved = 2
)

type e820Entry struct {
	Range
	Type uint32
}

// memoryMap lists RAM, less the legacy hole below 1 MiB, and what is reserved.
func memoryMap(mem *guest.Memory, reserved []Range) []e820Entry {
	var m []e820Entry
	for _, r := range mem.Regions() {
		base := r.Base
		if base < HighRAM {
			m = append(m, e820Entry{Range{base, uint64(min(lowRAMEnd, r.End()) - base)}, e820RAM})
			if r.End() <= HighRAM {
				continue
			}
			m = append(m, e820Entry{Range{lowRAMEnd, uint64(HighRAM - lowRAMEnd)}, e820Reserved})
			base = HighRAM
		}
		m = append(m, e820Entry{Range{base, uint64(r.End() - base)}, e820RAM})
	}
	for _, r := range reserved {
		m = append(m, e820Entry{r, e820Reserved})
	}
	return m
}

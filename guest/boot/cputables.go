package boot

import (
	"encoding/binary"

	"github.com/bobuhiro11/gokvm/pvh"
	"github.com/calfvm/calf/guest"
)

// Flags of a segment descriptor (Intel SDM volume 3, 3.4.5), in the form
// pvh.GdtEntry takes: access byte low, granularity and size bits high.
const (
	flagsCode64 = 0xA09B
	flagsCode32 = 0xC09B
	flagsData   = 0xC093
	flagsTSS    = 0x808B
)

// Descriptors returns the segment descriptors of the table at Entry.GDT, which
// a machine also needs to load the segment registers. The last is that of a
// task state segment, which VT-x wants in TR.
func Descriptors() []uint64 {
	const flat = 0xFFFFF
	return []uint64{
		0, 0,
		Code64Selector / 8: pvh.GdtEntry(flagsCode64, 0, flat),
		DataSelector / 8:   pvh.GdtEntry(flagsData, 0, flat),
		Code32Selector / 8: pvh.GdtEntry(flagsCode32, 0, flat),
		TSSSelector / 8:    pvh.GdtEntry(flagsTSS, 0, 0x67),
	}
}

// TSSSelector selects the task state segment of Descriptors.
const TSSSelector = 0x28

// Bits of a page table entry.
const (
	pagePresent = 1 << 0
	pageWrite   = 1 << 1
	pageLarge   = 1 << 7
)

// writeCPUTables writes the descriptor table and, for LongMode, page tables
// that map the first 4 GiB to themselves with pages of 2 MiB.
func writeCPUTables(mem *guest.Memory, e *Entry) error {
	var gdt []byte
	for _, d := range Descriptors() {
		gdt = binary.LittleEndian.AppendUint64(gdt, d)
	}
	e.GDT, e.GDTSize = gdtAddr, len(gdt)
	if err := mem.Write(gdtAddr, gdt); err != nil {
		return err
	}
	if e.Mode != LongMode {
		return nil
	}
	e.PageTable = pageTableAddr
	const directories = 4
	tables := make([]byte, (2+directories)*pageSize)
	pdpt := uint64(pageTableAddr) + pageSize
	binary.LittleEndian.PutUint64(tables, pdpt|pagePresent|pageWrite)
	for d := range uint64(directories) {
		dir := pdpt + (1+d)*pageSize
		binary.LittleEndian.PutUint64(tables[pageSize+8*d:], dir|pagePresent|pageWrite)
		for i := range uint64(512) {
			addr := d<<30 | i<<21
			binary.LittleEndian.PutUint64(tables[(2+d)*pageSize+8*i:], addr|pagePresent|pageWrite|pageLarge)
		}
	}
	return mem.Write(pageTableAddr, tables)
}

package boot

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/calfvm/calf/guest"
)

// The note that carries the PVH entry (XEN_ELFNOTE_PHYS32_ENTRY).
const (
	notePhys32Entry = 18
	noteOwner       = "Xen\x00"
	maxNotes        = 1 << 20 // bytes of one PT_NOTE segment that are looked at
)

// struct hvm_start_info, version 1, and what it points at.
const (
	startInfoMagic   = 0x336EC578
	startInfoVersion = 1
	memMapEntrySize  = 24
	modulesAddr      = startInfoAddr + 64
	memMapAddr       = startInfoAddr + 128
	maxMemMap        = (uint64(zeroPageAddr-memMapAddr) / memMapEntrySize)
)

// loadPVH loads an ELF kernel for its PVH entry.
func loadPVH(mem *guest.Memory, cfg *Config) (Entry, error) {
	f, err := elf.NewFile(cfg.Kernel)
	if err != nil {
		return Entry{}, fmt.Errorf("%w: %w", ErrNotKernel, err)
	}
	if f.Machine != elf.EM_X86_64 {
		return Entry{}, fmt.Errorf("%w: an ELF file for %v, not for x86-64", ErrNotKernel, f.Machine)
	}
	entry, end, err := loadSegments(mem, f, cfg.Kernel)
	if err != nil {
		return Entry{}, err
	}
	initrd, err := loadInitrd(mem, cfg.Initrd, end, math.MaxUint32)
	if err != nil {
		return Entry{}, err
	}
	if err := writeCmdline(mem, cfg.Cmdline); err != nil {
		return Entry{}, err
	}
	if err := writeStartInfo(mem, initrd, cfg.RSDP, memoryMap(mem, cfg.Reserved)); err != nil {
		return Entry{}, err
	}
	return Entry{Mode: ProtectedMode, RIP: entry, Params: startInfoAddr}, nil
}

// loadSegments loads the segments of f and returns its PVH entry and the first
// page after the kernel.
func loadSegments(mem *guest.Memory, f *elf.File, file File) (entry, end guest.GPA, err error) {
	found := false
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_LOAD:
			segEnd, err := loadSegment(mem, p, file)
			if err != nil {
				return 0, 0, err
			}
			end = max(end, segEnd)
		case elf.PT_NOTE:
			if e, ok := pvhNote(p); ok {
				entry, found = e, true
			}
		}
	}
	switch {
	case !found:
		return 0, 0, fmt.Errorf("%w: an ELF file without a PVH entry (CONFIG_PVH)", ErrNotKernel)
	case entry < HighRAM || entry >= end:
		return 0, 0, fmt.Errorf("%w: its PVH entry %v lies outside the kernel", ErrNotKernel, entry)
	}
	return entry, (end + pageSize - 1) &^ (pageSize - 1), nil
}

func loadSegment(mem *guest.Memory, p *elf.Prog, file File) (end guest.GPA, err error) {
	base := guest.GPA(p.Paddr)
	if p.Filesz > p.Memsz || base < HighRAM || p.Off > math.MaxInt64 {
		return 0, fmt.Errorf("%w: a segment at %v of %d bytes makes no sense", ErrNotKernel, base, p.Memsz)
	}
	end, ok := base.Add(p.Memsz)
	if !ok || end > topOfLowRAM(mem) {
		return 0, fmt.Errorf("%w: this kernel needs %d MiB to start", ErrNoRoom, mib(uint64(end)))
	}
	// What the file does not fill reads as zero: RAM starts out zeroed.
	return end, readInto(mem, base, file, int64(p.Off), p.Filesz)
}

// pvhNote looks for the PVH entry among the notes of p.
func pvhNote(p *elf.Prog) (guest.GPA, bool) {
	notes, err := io.ReadAll(io.LimitReader(p.Open(), maxNotes))
	if err != nil {
		return 0, false
	}
	le := binary.LittleEndian
	for len(notes) >= 12 {
		nameSize, descSize, kind := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		notes = notes[12:]
		desc := (nameSize + 3) &^ 3
		next := desc + (descSize+3)&^3
		if next > uint64(len(notes)) {
			return 0, false
		}
		if kind == notePhys32Entry && string(notes[:nameSize]) == noteOwner && descSize >= 4 {
			return guest.GPA(le.Uint32(notes[desc:])), true
		}
		notes = notes[next:]
	}
	return 0, false
}

func writeStartInfo(mem *guest.Memory, initrd Range, rsdp guest.GPA, memMap []e820Entry) error {
	if uint64(len(memMap)) > maxMemMap {
		return fmt.Errorf("BUG: a memory map of %d entries", len(memMap))
	}
	le := binary.LittleEndian
	info := make([]byte, zeroPageAddr-startInfoAddr)
	le.PutUint32(info[0:], startInfoMagic)
	le.PutUint32(info[4:], startInfoVersion)
	if initrd.Size > 0 {
		le.PutUint32(info[12:], 1) // nr_modules
		le.PutUint64(info[16:], uint64(modulesAddr))
		m := info[modulesAddr-startInfoAddr:]
		le.PutUint64(m[0:], uint64(initrd.Base))
		le.PutUint64(m[8:], initrd.Size)
	}
	le.PutUint64(info[24:], uint64(cmdlineAddr))
	le.PutUint64(info[32:], uint64(rsdp))
	le.PutUint64(info[40:], uint64(memMapAddr))
	le.PutUint32(info[48:], uint32(len(memMap))) //nolint:gosec // G115: at most maxMemMap
	for i, e := range memMap {
		b := info[int(memMapAddr-startInfoAddr)+memMapEntrySize*i:]
		le.PutUint64(b[0:], uint64(e.Base))
		le.PutUint64(b[8:], e.Size)
		le.PutUint32(b[16:], e.Type)
	}
	return mem.Write(startInfoAddr, info)
}

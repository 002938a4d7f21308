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
	maxNotes        = 64 << 10 // bytes of one PT_NOTE segment that are looked at
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
	segments, entry, err := openELF(cfg.Kernel)
	if err != nil {
		return Entry{}, err
	}
	var end guest.GPA
	for _, p := range segments {
		base := guest.GPA(p.Paddr)
		if err := checkRoom(base, p.Memsz, topOfLowRAM(mem)); err != nil {
			return Entry{}, err
		}
		// What the file does not fill reads as zero: RAM starts out zeroed.
		if err := readInto(mem, base, cfg.Kernel, int64(p.Off), p.Filesz); err != nil { //nolint:gosec // G115: bounded by openELF
			return Entry{}, err
		}
		end = max(end, base+guest.GPA(p.Memsz))
	}
	if entry >= end {
		return Entry{}, fmt.Errorf("%w: its PVH entry %v lies outside the kernel", ErrNotKernel, entry)
	}
	end = (end + pageSize - 1) &^ (pageSize - 1)
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

// maxSegments is many times what a kernel has.
const maxSegments = 64

// openELF returns the segments to load and the PVH entry of an ELF kernel. All
// segments together take no more bytes than the file has, so loading them is
// bounded by its size.
func openELF(file File) (segments []*elf.Prog, entry guest.GPA, err error) {
	f, err := parseELF(file)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrNotKernel, err)
	}
	switch {
	case f.Machine != elf.EM_X86_64:
		return nil, 0, fmt.Errorf("%w: an ELF file for %v, not for x86-64", ErrNotKernel, f.Machine)
	case len(f.Progs) > maxSegments:
		return nil, 0, fmt.Errorf("%w: an ELF file of %d segments makes no sense", ErrNotKernel, len(f.Progs))
	}
	left := uint64(max(file.Size, 0))
	found := false
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_LOAD:
			if p.Filesz > p.Memsz || p.Filesz > left || guest.GPA(p.Paddr) < HighRAM || p.Off > math.MaxInt64 {
				return nil, 0, fmt.Errorf("%w: a segment of %d bytes at %#x makes no sense", ErrNotKernel, p.Filesz, p.Paddr)
			}
			left -= p.Filesz
			segments = append(segments, p)
		case elf.PT_NOTE:
			if e, ok := pvhNote(p); ok {
				entry, found = e, true
			}
		}
	}
	switch {
	case !found:
		return nil, 0, fmt.Errorf("%w: an ELF file without a PVH entry (CONFIG_PVH)", ErrNotKernel)
	case entry < HighRAM:
		return nil, 0, fmt.Errorf("%w: its PVH entry %v lies outside the kernel", ErrNotKernel, entry)
	}
	return segments, entry, nil
}

// parseELF is elf.NewFile for a file that may be made to break it: that
// package does not promise to survive one.
func parseELF(f File) (file *elf.File, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a broken ELF file: %v", r)
		}
	}()
	return elf.NewFile(f)
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

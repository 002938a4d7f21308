package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/guest/guesttest"
)

func newMemory(tb testing.TB, low, high int) *guest.Memory {
	tb.Helper()
	regions := []guest.Region{{Base: 0, Bytes: make([]byte, low)}}
	if high > 0 {
		regions = append(regions, guest.Region{Base: 4 << 30, Bytes: make([]byte, high)})
	}
	m, err := guest.NewMemory(regions...)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func file(b []byte) File { return File{ReaderAt: bytes.NewReader(b), Size: int64(len(b))} }

// bzImage makes a file with the header of a relocatable 64-bit kernel that
// prefers 16 MiB and needs initSize bytes there.
func bzImage(initSize uint32, code []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, 5*sector)
	b[hdrSetupSects] = 4
	le.PutUint16(b[hdrBootFlag:], 0xAA55)
	b[hdrJump], b[hdrJump+1] = 0xEB, 0x6A
	copy(b[hdrMagic:], "HdrS")
	le.PutUint16(b[hdrVersion:], 0x20F)
	b[hdrLoadFlags] = 1
	le.PutUint32(b[hdrInitrdAddrMax:], 0x7FFF_FFFF)
	b[hdrRelocatable] = 1
	le.PutUint16(b[hdrXLoadFlags:], xlfKernel64)
	le.PutUint32(b[hdrCmdlineSize:], 2047)
	le.PutUint64(b[hdrPrefAddress:], 16<<20)
	le.PutUint32(b[hdrInitSize:], initSize)
	return append(b, code...)
}

func mustRead(tb testing.TB, mem *guest.Memory, addr guest.GPA, n int) []byte {
	tb.Helper()
	b := make([]byte, n)
	if err := mem.Read(addr, b); err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestLoadBzImage(t *testing.T) {
	mem := newMemory(t, 64<<20, 8<<20)
	code := bytes.Repeat([]byte("code"), 10_000)
	initrd := bytes.Repeat([]byte("i"), 5000)
	rd := file(initrd)
	e, err := Load(mem, Config{
		Kernel: file(bzImage(8<<20, code)), Initrd: &rd, Cmdline: "a=1 b", RSDP: 0xE0000,
		Reserved: []Range{{Base: 0xE000_0000, Size: 1 << 20}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if e.Mode != LongMode || e.RIP != 0x10_0200 || e.Params != zeroPageAddr {
		t.Errorf("entry %+v", e)
	}
	if got := mustRead(t, mem, HighRAM, len(code)); !bytes.Equal(got, code) {
		t.Error("the kernel is not at 1 MiB")
	}
	le := binary.LittleEndian
	zp := mustRead(t, mem, zeroPageAddr, pageSize)
	rdAt, rdSize := le.Uint32(zp[hdrRamdiskImage:]), le.Uint32(zp[hdrRamdiskSize:])
	if want := uint32(64<<20 - 8192); rdAt != want || rdSize != 5000 {
		t.Errorf("initrd at %#x of %d bytes, want %#x of 5000", rdAt, rdSize, want)
	}
	if got := mustRead(t, mem, guest.GPA(rdAt), len(initrd)); !bytes.Equal(got, initrd) {
		t.Error("the initrd is not where the parameters say")
	}
	if got := mustRead(t, mem, guest.GPA(le.Uint32(zp[hdrCmdLinePtr:])), 6); string(got) != "a=1 b\x00" {
		t.Errorf("command line %q", got)
	}
	if string(zp[hdrMagic:hdrMagic+4]) != "HdrS" || zp[hdrTypeOfLoader] != 0xFF || le.Uint64(zp[paramsRSDP:]) != 0xE0000 {
		t.Error("the set-up header was not passed on")
	}
	want := []e820Entry{
		{Range{0, 0x9FC00}, 1},
		{Range{0x9FC00, 0x60400}, 2},
		{Range{0x10_0000, 63 << 20}, 1},
		{Range{4 << 30, 8 << 20}, 1},
		{Range{0xE000_0000, 1 << 20}, 2},
	}
	if int(zp[paramsE820Entries]) != len(want) {
		t.Fatalf("%d e820 entries, want %d", zp[paramsE820Entries], len(want))
	}
	for i, w := range want {
		b := zp[paramsE820Table+20*i:]
		got := e820Entry{Range{guest.GPA(le.Uint64(b)), le.Uint64(b[8:])}, le.Uint32(b[16:])}
		if got != w {
			t.Errorf("e820 entry %d is %+v, want %+v", i, got, w)
		}
	}
}

// TestIdentityMap walks the page tables as a processor does.
func TestIdentityMap(t *testing.T) {
	mem := newMemory(t, 64<<20, 0)
	e, err := Load(mem, Config{Kernel: file(bzImage(1<<20, []byte("x")))})
	if err != nil {
		t.Fatal(err)
	}
	entry := func(table uint64, index uint64) uint64 {
		v := binary.LittleEndian.Uint64(mustRead(t, mem, guest.GPA(table+8*index), 8))
		if v&pagePresent == 0 || v&pageWrite == 0 {
			t.Fatalf("entry %d of the table at %#x is %#x", index, table, v)
		}
		return v
	}
	const addrMask = ^uint64(pageSize - 1)
	for _, addr := range []uint64{0, 0x1234, 2 << 20, 1<<30 - 1, 3<<30 + 5<<20 + 7, 4<<30 - 1} {
		pdpt := entry(uint64(e.PageTable), addr>>39) & addrMask
		pd := entry(pdpt, addr>>30&511) & addrMask
		leaf := entry(pd, addr>>21&511)
		if leaf&pageLarge == 0 || leaf&addrMask+addr&(2<<20-1) != addr {
			t.Errorf("%#x is mapped by %#x", addr, leaf)
		}
	}
}

func TestLoadPVH(t *testing.T) {
	mem := newMemory(t, 64<<20, 0)
	var p guesttest.Program
	p.Halt()
	rd := file([]byte("initrd"))
	e, err := Load(mem, Config{Kernel: file(p.ELF()), Initrd: &rd, Cmdline: "x", RSDP: 0xE0000})
	if err != nil {
		t.Fatal(err)
	}
	if e.Mode != ProtectedMode || e.RIP != guesttest.Base || e.Params != startInfoAddr {
		t.Errorf("entry %+v", e)
	}
	le := binary.LittleEndian
	info := mustRead(t, mem, startInfoAddr, 56)
	if le.Uint32(info) != startInfoMagic || le.Uint32(info[4:]) != 1 || le.Uint32(info[12:]) != 1 || le.Uint64(info[32:]) != 0xE0000 {
		t.Errorf("start info % x", info)
	}
	module := mustRead(t, mem, guest.GPA(le.Uint64(info[16:])), 32)
	if got := mustRead(t, mem, guest.GPA(le.Uint64(module)), 6); string(got) != "initrd" {
		t.Errorf("module holds %q", got)
	}
	if n := le.Uint32(info[48:]); n != 3 {
		t.Errorf("%d memory map entries, want 3", n)
	}
}

func TestLoadRefuses(t *testing.T) {
	good := bzImage(8<<20, make([]byte, 100))
	change := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	var p guesttest.Program
	p.Halt()
	elfFile := p.ELF()
	changeELF := func(f func(b []byte)) []byte {
		b := bytes.Clone(elfFile)
		f(b)
		return b
	}
	le := binary.LittleEndian
	big := file(make([]byte, 60<<20))
	tests := []struct {
		name   string
		kernel []byte
		initrd *File
		line   string
		want   error
		text   string
	}{
		{"empty", nil, nil, "", ErrNotKernel, "neither"},
		{"text", []byte("#!/bin/sh\n"), nil, "", ErrNotKernel, "neither"},
		{"short header", good[:0x260], nil, "", ErrNotKernel, "neither"},
		{"ends in set-up", good[:3*sector], nil, "", ErrNotKernel, "set-up code"},
		{"32-bit only", change(func(b []byte) { b[hdrXLoadFlags] = 0 }), nil, "", ErrNotKernel, "64-bit entry"},
		{"old protocol", change(func(b []byte) { le.PutUint16(b[hdrVersion:], 0x20B) }), nil, "", ErrNotKernel, "64-bit entry"},
		{"fixed address", change(func(b []byte) { b[hdrRelocatable] = 0 }), nil, "", ErrNotKernel, "CONFIG_RELOCATABLE"},
		{"needs more", change(func(b []byte) { le.PutUint32(b[hdrInitSize:], 100<<20) }), nil, "", ErrNoRoom, "needs 116 MiB"},
		{"needs the impossible", change(func(b []byte) { le.PutUint64(b[hdrPrefAddress:], 1<<64-1) }), nil, "", ErrNotKernel, "load address"},
		{"long line for this kernel", good, nil, strings.Repeat("x", 2048), ErrCmdline, "2047"},
		{"zero byte in the line", good, nil, "a\x00b", ErrCmdline, "byte 1"},
		{"huge initrd", good, &big, "", ErrNoRoom, "initrd of 60 MiB"},
		{"empty initrd", good, &File{ReaderAt: bytes.NewReader(nil)}, "", nil, "initrd"},
		{"ELF header only", elfFile[:64], nil, "", ErrNotKernel, ""},
		{"ELF for another machine", changeELF(func(b []byte) { b[18] = 0xB7 }), nil, "", ErrNotKernel, "x86-64"},
		{"ELF without the note", changeELF(func(b []byte) { b[64+56] = 0 }), nil, "", ErrNotKernel, "CONFIG_PVH"},
		{"ELF entry outside", changeELF(func(b []byte) { b[64+112+16+1] = 0xFF; b[64+112+16] = 0xFF }), nil, "", ErrNotKernel, "outside"},
		{"ELF segment in low memory", changeELF(func(b []byte) { le.PutUint64(b[64+24:], 0x7000) }), nil, "", ErrNotKernel, "segment"},
		{"ELF segment past RAM", changeELF(func(b []byte) { le.PutUint64(b[64+24:], 1<<40) }), nil, "", ErrNoRoom, ""},
		{"ELF segment that wraps", changeELF(func(b []byte) { le.PutUint64(b[64+40:], 1<<64-1) }), nil, "", ErrNotKernel, "load address"},
		{"ELF of many segments", manySegments(elfFile, 65), nil, "", ErrNotKernel, "65 segments"},
		{"ELF segments larger than the file", overlapping(elfFile, 60), nil, "", ErrNotKernel, "segment"},
		{"ELF segment larger in the file", changeELF(func(b []byte) { le.PutUint64(b[64+32:], 1<<30) }), nil, "", ErrNotKernel, "segment"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(newMemory(t, 64<<20, 0), Config{Kernel: file(tt.kernel), Initrd: tt.initrd, Cmdline: tt.line})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Load: %v; want %v with %q", err, tt.want, tt.text)
			}
		})
	}
}

// manySegments is an ELF file that says it has n program headers.
func manySegments(elfFile []byte, n uint16) []byte {
	b := append(bytes.Clone(elfFile), make([]byte, 56*int(n))...)
	binary.LittleEndian.PutUint16(b[56:], n)
	return b
}

// overlapping is an ELF file whose n segments to load all are most of the file.
func overlapping(elfFile []byte, n int) []byte {
	le := binary.LittleEndian
	var table []byte
	for range n {
		p := bytes.Clone(elfFile[64 : 64+56])
		le.PutUint64(p[32:], uint64(56*n))
		le.PutUint64(p[40:], uint64(56*n))
		table = append(table, p...)
	}
	b := append(bytes.Clone(elfFile), append(table, make([]byte, 8192)...)...)
	le.PutUint64(b[32:], uint64(len(elfFile)))
	le.PutUint16(b[56:], uint16(n))
	return b
}

// TestCheck agrees with Load about what is a kernel.
func TestCheck(t *testing.T) {
	var p guesttest.Program
	p.Halt()
	for _, b := range [][]byte{p.ELF(), bzImage(1<<20, []byte("code"))} {
		if err := Check(file(b)); err != nil {
			t.Errorf("Check: %v", err)
		}
		if err := Check(file(b[:100])); !errors.Is(err, ErrNotKernel) {
			t.Errorf("Check of the first 100 bytes: %v, want %v", err, ErrNotKernel)
		}
	}
}

// FuzzLoad: whatever the kernel file holds, Load ends with an entry inside RAM
// or an error.
func FuzzLoad(f *testing.F) {
	var p guesttest.Program
	p.PowerOff()
	f.Add(p.ELF(), []byte("initrd"), "console=ttyS0")
	f.Add(bzImage(1<<20, []byte("code")), []byte{}, "")
	f.Add([]byte("\x7fELF"), []byte{}, "")
	ram := make([]byte, 32<<20)
	f.Fuzz(func(t *testing.T, kernel, initrd []byte, line string) {
		mem, err := guest.NewMemory(guest.Region{Base: 0, Bytes: ram})
		if err != nil {
			t.Fatal(err)
		}
		rd := file(initrd)
		e, err := Load(mem, Config{Kernel: file(kernel), Initrd: &rd, Cmdline: line})
		if err != nil {
			return
		}
		if _, err := mem.Slice(e.RIP, 1); err != nil || e.RIP < HighRAM {
			t.Errorf("an entry at %v", e.RIP)
		}
	})
}

// TestLayout: what Load and a machine put into the first megabyte is disjoint.
func TestLayout(t *testing.T) {
	ranges := []Range{
		{0x400, 0x100}, // BIOS data area, with the warm-boot flag
		{gdtAddr, uint64(8 * len(Descriptors()))},
		{startInfoAddr, uint64(zeroPageAddr - startInfoAddr)},
		{zeroPageAddr, pageSize},
		{pageTableAddr, 6 * pageSize},
		{cmdlineAddr, cmdlineMax},
		{lowRAMEnd, uint64(ACPITables - lowRAMEnd)},
		{ACPITables, uint64(HighRAM - ACPITables)},
	}
	var end guest.GPA
	for _, r := range ranges {
		if r.Base < end {
			t.Errorf("what lies at %v overlaps what lies before it", r.Base)
		}
		end, _ = r.Base.Add(r.Size)
	}
}

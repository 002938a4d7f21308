package boot

import (
	"encoding/binary"
	"fmt"

	"github.com/calfvm/calf/guest"
)

// Offsets of the setup header, in the file and in struct boot_params alike
// (boot.rst, "The Real-Mode Kernel Header").
const (
	hdrSetupSects     = 0x1F1
	hdrBootFlag       = 0x1FE
	hdrJump           = 0x200
	hdrMagic          = 0x202
	hdrVersion        = 0x206
	hdrTypeOfLoader   = 0x210
	hdrLoadFlags      = 0x211
	hdrRamdiskImage   = 0x218
	hdrRamdiskSize    = 0x21C
	hdrCmdLinePtr     = 0x228
	hdrInitrdAddrMax  = 0x22C
	hdrKernelAlign    = 0x230
	hdrRelocatable    = 0x234
	hdrXLoadFlags     = 0x236
	hdrCmdlineSize    = 0x238
	hdrPrefAddress    = 0x258
	hdrInitSize       = 0x260
	hdrMinimumEnd     = 0x264 // the end of what protocol 2.10 defines
	paramsRSDP        = 0x070
	paramsE820Entries = 0x1E8
	paramsVidMode     = 0x1FA
	paramsE820Table   = 0x2D0
	maxE820           = 128

	protocol64    = 0x20C // first version with XLF_KERNEL_64
	xlfKernel64   = 1 << 0
	entry64       = 0x200 // of the 64-bit entry, from the load address
	loaderUnknown = 0xFF
	sector        = 512
	defaultSetup  = 4
)

// loadBzImage loads a bzImage for its 64-bit entry.
func loadBzImage(mem *guest.Memory, cfg *Config) (Entry, error) {
	hdr, err := readHeader(cfg.Kernel)
	if err != nil {
		return Entry{}, err
	}
	le := binary.LittleEndian
	if err := checkCmdline(cfg.Cmdline, int(min(le.Uint32(hdr[hdrCmdlineSize:]), cmdlineMax-1))); err != nil {
		return Entry{}, err
	}

	setup := int64(hdr[hdrSetupSects])
	if setup == 0 {
		setup = defaultSetup
	}
	code := (setup + 1) * sector
	if cfg.Kernel.Size <= code {
		return Entry{}, fmt.Errorf("%w: the file ends within its set-up code", ErrNotKernel)
	}
	if err := readInto(mem, HighRAM, cfg.Kernel, code, uint64(cfg.Kernel.Size-code)); err != nil { //nolint:gosec // G115: positive by the check before it
		return Entry{}, err
	}
	// The kernel unpacks itself to its preferred address and needs init_size
	// bytes there before it can say what it lacks.
	base := guest.GPA(max(le.Uint64(hdr[hdrPrefAddress:]), uint64(HighRAM)))
	size := uint64(le.Uint32(hdr[hdrInitSize:]))
	if err := checkRoom(base, size, topOfLowRAM(mem)); err != nil {
		return Entry{}, err
	}
	initrd, err := loadInitrd(mem, cfg.Initrd, base+guest.GPA(size), uint64(le.Uint32(hdr[hdrInitrdAddrMax:])))
	if err != nil {
		return Entry{}, err
	}
	if err := writeCmdline(mem, cfg.Cmdline); err != nil {
		return Entry{}, err
	}
	params, err := bootParams(hdr, initrd, cfg.RSDP, memoryMap(mem, cfg.Reserved))
	if err != nil {
		return Entry{}, err
	}
	if err := mem.Write(zeroPageAddr, params); err != nil {
		return Entry{}, err
	}
	return Entry{Mode: LongMode, RIP: HighRAM + entry64, Params: zeroPageAddr}, nil
}

// readHeader reads the first page of a bzImage, its set-up header checked.
func readHeader(f File) (hdr []byte, err error) {
	hdr = make([]byte, pageSize)
	n, _ := f.ReadAt(hdr, 0) // A short file is judged by what it lacks.
	hdr = hdr[:n]
	le := binary.LittleEndian
	switch {
	case len(hdr) < hdrMinimumEnd, le.Uint16(hdr[hdrBootFlag:]) != 0xAA55, string(hdr[hdrMagic:hdrMagic+4]) != "HdrS":
		return nil, fmt.Errorf("%w: neither a bzImage (vmlinuz) nor an ELF file (vmlinux)", ErrNotKernel)
	case le.Uint16(hdr[hdrVersion:]) < protocol64, le.Uint16(hdr[hdrXLoadFlags:])&xlfKernel64 == 0:
		return nil, fmt.Errorf("%w: it has no 64-bit entry (boot protocol %#x)", ErrNotKernel, le.Uint16(hdr[hdrVersion:]))
	case hdr[hdrRelocatable] == 0:
		return nil, fmt.Errorf("%w: it is not relocatable (CONFIG_RELOCATABLE)", ErrNotKernel)
	}
	return hdr, nil
}

// bootParams makes struct boot_params: the kernel's own set-up header with the
// loader's fields filled in, and the memory map.
func bootParams(hdr []byte, initrd Range, rsdp guest.GPA, memMap []e820Entry) ([]byte, error) {
	if len(memMap) > maxE820 {
		return nil, fmt.Errorf("BUG: a memory map of %d entries", len(memMap))
	}
	p := make([]byte, pageSize)
	// The header ends where its first instruction, a short jump, leads.
	end := min(hdrMagic+int(hdr[hdrJump+1]), len(hdr), paramsE820Table)
	copy(p[hdrSetupSects:], hdr[hdrSetupSects:end])
	le := binary.LittleEndian
	p[hdrTypeOfLoader] = loaderUnknown
	le.PutUint16(p[paramsVidMode:], 0xFFFF)                // "normal"
	le.PutUint32(p[hdrRamdiskImage:], uint32(initrd.Base)) //nolint:gosec // G115: below initrd_addr_max
	le.PutUint32(p[hdrRamdiskSize:], uint32(initrd.Size))  //nolint:gosec // G115: below 4 GiB by loadInitrd
	le.PutUint32(p[hdrCmdLinePtr:], uint32(cmdlineAddr))
	le.PutUint64(p[paramsRSDP:], uint64(rsdp))
	p[paramsE820Entries] = byte(len(memMap)) //nolint:gosec // G115: at most maxE820
	for i, e := range memMap {
		b := p[paramsE820Table+20*i:]
		le.PutUint64(b, uint64(e.Base))
		le.PutUint64(b[8:], e.Size)
		le.PutUint32(b[16:], e.Type)
	}
	return p, nil
}

// Package boot puts a Linux kernel into guest memory, the way a boot loader
// would, and says where and in which processor mode to start it.
//
// It takes a bzImage by the 64-bit protocol of Documentation/arch/x86/boot.rst
// or an ELF vmlinux by the PVH protocol (Documentation of Xen's
// arch-x86/hvm/start_info.h). Files are untrusted: nothing read from one is
// used before it is bounded.
package boot

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/calfvm/calf/guest"
)

// Where things lie in the first megabyte of the guest. The regions are
// disjoint; TestLayout holds them to it.
const (
	gdtAddr       = guest.GPA(0x500)
	startInfoAddr = guest.GPA(0x6000) // struct hvm_start_info, modules, memory map
	zeroPageAddr  = guest.GPA(0x7000) // struct boot_params
	pageTableAddr = guest.GPA(0x9000) // PML4, PDPT and four page directories
	cmdlineAddr   = guest.GPA(0x20000)
	cmdlineMax    = 0x10000

	// ACPITables is where a machine may put its ACPI tables: the last part of
	// the range in which a PC has its firmware, up to HighRAM.
	ACPITables = guest.GPA(0xE0000)
	// HighRAM is where the RAM above the legacy hole begins.
	HighRAM = guest.GPA(0x100000)

	lowRAMEnd = guest.GPA(0x9FC00)
	pageSize  = 0x1000
)

// Sentinels for what can be wrong with the files.
var (
	// ErrNotKernel is returned for a file that is neither a bzImage nor an
	// ELF kernel that calf can start.
	ErrNotKernel = errors.New("not a kernel that can be booted")
	// ErrNoRoom is returned where guest memory is too small for what is to be
	// loaded.
	ErrNoRoom = errors.New("guest memory is too small")
	// ErrCmdline is returned for a command line that is too long or holds a
	// zero byte.
	ErrCmdline = errors.New("bad kernel command line")
)

// File is a file to load: its bytes and their number.
type File struct {
	io.ReaderAt
	Size int64
}

// Config says what to load.
type Config struct {
	Kernel  File
	Initrd  *File // nil: none
	Cmdline string
	// RSDP is the address of the ACPI root pointer.
	RSDP guest.GPA
	// Reserved are ranges outside RAM that the memory map shall list as
	// reserved.
	Reserved []Range
}

// Range is the range [Base, Base+Size) of guest-physical addresses.
type Range struct {
	Base guest.GPA
	Size uint64
}

// Mode is the processor mode a kernel is entered in.
type Mode int

// Modes of Entry.
const (
	// LongMode is 64-bit mode with paging on and the first 4 GiB mapped to
	// themselves: the 64-bit entry of a bzImage.
	LongMode Mode = iota
	// ProtectedMode is 32-bit mode with flat segments and paging off: the PVH
	// entry.
	ProtectedMode
)

// Entry is the state of the boot processor at its first instruction. The
// descriptor table at GDT has 64-bit code, 32-bit code and data segments at
// the selectors below; the other registers are zero.
type Entry struct {
	Mode Mode
	RIP  guest.GPA
	// Params is the address of the boot parameters: RSI in LongMode, EBX in
	// ProtectedMode.
	Params guest.GPA
	// PageTable is CR3 in LongMode.
	PageTable guest.GPA
	GDT       guest.GPA
	GDTSize   int
}

// Selectors of the descriptor table, as boot.rst wants them (__BOOT_CS,
// __BOOT_DS).
const (
	Code64Selector = 0x10
	DataSelector   = 0x18
	Code32Selector = 0x20
)

// Check reports whether f is a kernel that Load can start, given memory enough.
func Check(f File) error {
	isELF, err := isELF(f)
	if err != nil {
		return err
	}
	if isELF {
		_, _, err = openELF(f)
	} else {
		_, err = readHeader(f)
	}
	return err
}

func isELF(f File) (bool, error) {
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("read: %w", err)
	}
	return string(magic[:]) == "\x7fELF", nil
}

// Load recognises the kernel and places it, the initrd, the command line, the
// boot parameters and the tables that the entry needs in mem.
func Load(mem *guest.Memory, cfg Config) (Entry, error) {
	if err := checkCmdline(cfg.Cmdline, cmdlineMax-1); err != nil {
		return Entry{}, err
	}
	isELF, err := isELF(cfg.Kernel)
	if err != nil {
		return Entry{}, err
	}
	load := loadBzImage
	if isELF {
		load = loadPVH
	}
	e, err := load(mem, &cfg)
	if err != nil {
		return Entry{}, err
	}
	return e, writeCPUTables(mem, &e)
}

func checkCmdline(s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%w: it is %d bytes long, the kernel takes %d", ErrCmdline, len(s), limit)
	}
	for i := range len(s) {
		if s[i] == 0 {
			return fmt.Errorf("%w: byte %d is zero", ErrCmdline, i)
		}
	}
	return nil
}

func writeCmdline(mem *guest.Memory, s string) error {
	return mem.Write(cmdlineAddr, append([]byte(s), 0))
}

// readInto reads size bytes of f at off straight into guest memory.
func readInto(mem *guest.Memory, addr guest.GPA, f File, off int64, size uint64) error {
	if off < 0 || f.Size < off || size > uint64(f.Size-off) { //nolint:gosec // G115: not negative by the checks before it
		return fmt.Errorf("%w: the file ends early", ErrNotKernel)
	}
	dst, err := mem.Slice(addr, size)
	if err != nil {
		return fmt.Errorf("%w: %d bytes do not fit at %v", ErrNoRoom, size, addr)
	}
	if _, err := io.ReadFull(io.NewSectionReader(f, off, int64(size)), dst); err != nil { //nolint:gosec // G115: at most f.Size
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

// topOfLowRAM is the end of the region that begins at 0, which is the only one
// kernels and initrds are put in.
func topOfLowRAM(mem *guest.Memory) guest.GPA {
	r := mem.Regions()
	if len(r) == 0 || r[0].Base != 0 {
		return 0
	}
	return r[0].End()
}

// loadInitrd puts the initrd as high as it may lie: its last byte at most at
// maxAddr, its first not below bottom. It returns the zero Range for no initrd.
func loadInitrd(mem *guest.Memory, f *File, bottom guest.GPA, maxAddr uint64) (Range, error) {
	if f == nil {
		return Range{}, nil
	}
	top := uint64(topOfLowRAM(mem))
	if maxAddr < math.MaxUint64 {
		top = min(top, maxAddr+1)
	}
	size := uint64(f.Size) //nolint:gosec // G115: used only once it is known to be positive
	if f.Size <= 0 || size > math.MaxUint32 {
		return Range{}, fmt.Errorf("initrd: its size, %d bytes, is not between 1 byte and 4 GiB", f.Size)
	}
	if size > top || (top-size)&^(pageSize-1) < uint64(bottom) {
		return Range{}, fmt.Errorf("%w: the initrd of %d MiB does not fit between the kernel, which needs memory up to %d MiB, and %d MiB",
			ErrNoRoom, mib(size), mib(uint64(bottom)), mib(top))
	}
	r := Range{Base: guest.GPA((top - size) &^ (pageSize - 1)), Size: size}
	if err := readInto(mem, r.Base, *f, 0, size); err != nil {
		return Range{}, fmt.Errorf("initrd: %w", err)
	}
	return r, nil
}

// checkRoom reports whether a kernel that needs size bytes from base fits below
// top.
func checkRoom(base guest.GPA, size uint64, top guest.GPA) error {
	end, ok := base.Add(size)
	if !ok {
		return fmt.Errorf("%w: its load address %v makes no sense", ErrNotKernel, base)
	}
	if end > top {
		return fmt.Errorf("%w: this kernel needs %d MiB to start; give the guest more", ErrNoRoom, mib(uint64(end)))
	}
	return nil
}

// mib rounds up, so that what it prints is enough.
func mib(n uint64) uint64 { return (n + 1<<20 - 1) >> 20 }

// Package guesttest makes guests of a few dozen instructions for tests: an
// ELF kernel with a PVH entry that checks what it sees and says so on the
// serial port. They need no Linux and run in milliseconds, also on a KVM that
// emulates every instruction.
package guesttest

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

// Addresses that programs may use. Code is loaded at Base; Scratch is RAM above
// it that reads as zero at the start.
const (
	Base    = 0x0100_0000
	Scratch = 0x0200_0000
)

const (
	portCOM1       = 0x3F8
	portPM1Control = 0x604
	portReset      = 0xCF9
	softOff        = 5<<10 | 1<<13
)

// Program is a guest in the making: 32-bit x86 code, written one step at a
// time. The zero value is an empty program.
type Program struct {
	code []byte
	step byte
}

func (p *Program) emit(b ...byte) { p.code = append(p.code, b...) }
func (p *Program) imm16(v uint16) { p.code = binary.LittleEndian.AppendUint16(p.code, v) }
func (p *Program) imm32(v uint32) { p.code = binary.LittleEndian.AppendUint32(p.code, v) }

// port loads DX.
func (p *Program) port(port uint16) {
	p.emit(0x66, 0xBA)
	p.imm16(port)
}

// Raw adds machine code.
func (p *Program) Raw(code ...byte) { p.emit(code...) }

// Out8 writes v to an I/O port.
func (p *Program) Out8(port uint16, v byte) {
	p.port(port)
	p.emit(0xB0, v, 0xEE) // mov al, v; out dx, al
}

// Out16 writes v to an I/O port.
func (p *Program) Out16(port, v uint16) {
	p.port(port)
	p.emit(0x66, 0xB8) // mov ax, v
	p.imm16(v)
	p.emit(0x66, 0xEF) // out dx, ax
}

// Out32 writes v to an I/O port.
func (p *Program) Out32(port uint16, v uint32) {
	p.port(port)
	p.emit(0xB8) // mov eax, v
	p.imm32(v)
	p.emit(0xEF) // out dx, eax
}

// In8 reads 8 bits of an I/O port into EAX, for Expect.
func (p *Program) In8(port uint16) {
	p.port(port)
	p.emit(0x31, 0xC0, 0xEC) // xor eax, eax; in al, dx
}

// In16 is In8 for 16 bits.
func (p *Program) In16(port uint16) {
	p.port(port)
	p.emit(0x31, 0xC0, 0x66, 0xED) // xor eax, eax; in ax, dx
}

// In32 is In8 for 32 bits.
func (p *Program) In32(port uint16) {
	p.port(port)
	p.emit(0xED) // in eax, dx
}

// Write8 stores v at a guest-physical address.
func (p *Program) Write8(addr uint32, v byte) {
	p.emit(0xC6, 0x05)
	p.imm32(addr)
	p.emit(v)
}

// Write16 is Write8 for 16 bits.
func (p *Program) Write16(addr uint32, v uint16) {
	p.emit(0x66, 0xC7, 0x05)
	p.imm32(addr)
	p.imm16(v)
}

// Write32 is Write8 for 32 bits.
func (p *Program) Write32(addr, v uint32) {
	p.emit(0xC7, 0x05)
	p.imm32(addr)
	p.imm32(v)
}

// Write64 stores v as two writes of 32 bits, the lower half first.
func (p *Program) Write64(addr uint32, v uint64) {
	p.Write32(addr, uint32(v))
	p.Write32(addr+4, uint32(v>>32))
}

// Read8 loads 8 bits at a guest-physical address into EAX.
func (p *Program) Read8(addr uint32) {
	p.emit(0x0F, 0xB6, 0x05) // movzx eax, byte [addr]
	p.imm32(addr)
}

// Read16 is Read8 for 16 bits.
func (p *Program) Read16(addr uint32) {
	p.emit(0x0F, 0xB7, 0x05) // movzx eax, word [addr]
	p.imm32(addr)
}

// Read32 is Read8 for 32 bits.
func (p *Program) Read32(addr uint32) {
	p.emit(0xA1) // mov eax, [addr]
	p.imm32(addr)
}

// Mask ands EAX with v.
func (p *Program) Mask(v uint32) {
	p.emit(0x25)
	p.imm32(v)
}

// Expect ends the guest by a reset if EAX is not v, after printing '!' and the
// number of the step: 'A' for the first Expect of the program, and so on.
func (p *Program) Expect(v uint32) {
	var failed Program
	failed.Print("!" + string(rune('A'+p.step)))
	failed.Out8(portReset, 6)
	failed.Halt()
	p.step++
	p.emit(0x3D) // cmp eax, v
	p.imm32(v)
	p.emit(0x0F, 0x84) // je past the failure
	p.imm32(uint32(len(failed.code)))
	p.emit(failed.code...)
}

// Poll reads 32 bits at addr until, masked, they are v.
func (p *Program) Poll(addr, mask, v uint32) {
	p.until(func() { p.Read32(addr) }, mask, v)
}

// Poll8 reads 8 bits at addr until they are v.
func (p *Program) Poll8(addr uint32, v byte) {
	p.until(func() { p.Read8(addr) }, 0xFF, uint32(v))
}

// PollPort reads 16 bits of an I/O port until, masked, they are v.
func (p *Program) PollPort(port uint16, mask, v uint32) {
	p.until(func() { p.In16(port) }, mask, v)
}

func (p *Program) until(read func(), mask, v uint32) {
	start := len(p.code)
	read()
	p.Mask(mask)
	p.emit(0x3D) // cmp eax, v
	p.imm32(v)
	p.emit(0x0F, 0x85) // jne start
	p.imm32(uint32(int32(start - len(p.code) - 4)))
}

// Print writes s to the serial port.
func (p *Program) Print(s string) {
	for i := range len(s) {
		p.Out8(portCOM1, s[i])
	}
}

// PowerOff enters the soft-off state.
func (p *Program) PowerOff() { p.Out16(portPM1Control, softOff); p.Halt() }

// Reset pulses the reset register.
func (p *Program) Reset() { p.Out8(portReset, 6); p.Halt() }

// Halt stops the processor for good, interrupts off.
func (p *Program) Halt() { p.emit(0xFA, 0xF4, 0xEB, 0xFC) } // cli; hlt; jmp -4

// Spin jumps to itself for ever.
func (p *Program) Spin() { p.emit(0xEB, 0xFE) }

// ELF returns the program as an ELF kernel with a PVH entry at Base.
func (p *Program) ELF() []byte {
	const (
		header, progHeader = 64, 56
		noteOff            = header + 2*progHeader
		noteSize           = 12 + 4 + 8
		codeOff            = noteOff + noteSize
		loadSegment        = 1
		noteSegment        = 4
	)
	le := binary.LittleEndian
	b := make([]byte, codeOff, codeOff+len(p.code))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)    // executable
	le.PutUint16(b[18:], 0x3E) // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], Base)
	le.PutUint64(b[32:], header)
	le.PutUint16(b[52:], header)
	le.PutUint16(b[54:], progHeader)
	le.PutUint16(b[56:], 2)
	le.PutUint16(b[58:], 64)
	segment := func(i int, kind uint32, off, addr, size uint64) {
		s := b[header+i*progHeader:]
		le.PutUint32(s[0:], kind)
		le.PutUint32(s[4:], 7)
		for j, v := range []uint64{off, addr, addr, size, size, 1} {
			le.PutUint64(s[8+8*j:], v)
		}
	}
	segment(0, loadSegment, codeOff, Base, uint64(len(p.code)))
	segment(1, noteSegment, noteOff, 0, noteSize)
	note := b[noteOff:]
	le.PutUint32(note[0:], 4)
	le.PutUint32(note[4:], 8)
	le.PutUint32(note[8:], 18) // XEN_ELFNOTE_PHYS32_ENTRY
	copy(note[12:], "Xen\x00")
	le.PutUint64(note[16:], Base)
	return append(b, p.code...)
}

// Kernel writes the program to a file that a machine can boot.
func (p *Program) Kernel(tb testing.TB) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "kernel")
	if err := os.WriteFile(path, p.ELF(), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

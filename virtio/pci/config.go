package pci

import (
	"encoding/binary"

	"github.com/calfvm/calf/guest"
)

// Offsets in a type 0 configuration header (PCI Local Bus 3.0, section 6.1).
const (
	cfgVendorID     = 0x00
	cfgDeviceID     = 0x02
	cfgCommand      = 0x04
	cfgStatus       = 0x06
	cfgRevision     = 0x08
	cfgClass        = 0x09
	cfgCacheLine    = 0x0c
	cfgBAR0         = 0x10
	cfgSubsysVendor = 0x2c
	cfgSubsysID     = 0x2e
	cfgCapPointer   = 0x34
	cfgIntLine      = 0x3c
	cfgIntPin       = 0x3d

	cfgHeaderSize = 0x40
	cfgSpaceSize  = 256 // what lies above, up to 4 KiB, reads as zero
)

const (
	commandMemory      = 1 << 1 // Memory Space Enable
	commandBusMaster   = 1 << 2
	commandParity      = 1 << 6
	commandSERR        = 1 << 8
	commandINTxDisable = 1 << 10

	statusInterrupt = 1 << 3 // Interrupt Status
	statusCapList   = 1 << 4

	pinINTA = 1

	barMemory64 = 0x4 // 64-bit, not prefetchable
)

// identity is what a function says it is.
type identity struct {
	vendor, device, subsysVendor, subsysID uint16
	revision                               uint8
	class                                  uint32 // base class, subclass, interface: 24 bits
}

// configSpace is the bytes of a type 0 configuration space with one 64-bit
// memory BAR, and which of their bits the guest may change. It reacts to
// nothing: its owner looks at the registers after a write. It is not safe for
// concurrent use.
type configSpace struct {
	bytes    [cfgSpaceSize]byte
	writable [cfgSpaceSize]byte
	lastCap  int // offset of the capability added last, or 0
	end      int // first free byte
}

// init sets up the header with a BAR of barSize bytes, a power of 2.
func (c *configSpace) init(id identity, barSize uint64) {
	le := binary.LittleEndian
	le.PutUint16(c.bytes[cfgVendorID:], id.vendor)
	le.PutUint16(c.bytes[cfgDeviceID:], id.device)
	le.PutUint16(c.bytes[cfgStatus:], statusCapList)
	c.bytes[cfgRevision] = id.revision
	c.bytes[cfgClass] = byte(id.class)
	le.PutUint16(c.bytes[cfgClass+1:], uint16(id.class>>8))
	le.PutUint16(c.bytes[cfgSubsysVendor:], id.subsysVendor)
	le.PutUint16(c.bytes[cfgSubsysID:], id.subsysID)

	le.PutUint16(c.writable[cfgCommand:], commandMemory|commandBusMaster|commandParity|commandSERR|commandINTxDisable)
	c.writable[cfgCacheLine] = 0xff
	c.writable[cfgIntLine] = 0xff

	// P13: the address bits below the size are zero for good, which is what
	// sizing by writing all ones finds out.
	le.PutUint32(c.bytes[cfgBAR0:], barMemory64)
	le.PutUint64(c.writable[cfgBAR0:], ^(barSize - 1))
	c.end = cfgHeaderSize
}

// addCap appends a capability whose bytes after the next-pointer are body, and
// returns its offset.
func (c *configSpace) addCap(id byte, body []byte) int {
	off := (c.end + 3) &^ 3
	if c.lastCap == 0 {
		c.bytes[cfgCapPointer] = byte(off)
	} else {
		c.bytes[c.lastCap+1] = byte(off)
	}
	c.bytes[off] = id
	copy(c.bytes[off+2:], body)
	c.lastCap = off
	c.end = off + 2 + len(body)
	return off
}

func (c *configSpace) read(off int, p []byte) {
	clear(p)
	if off < len(c.bytes) {
		copy(p, c.bytes[off:])
	}
}

func (c *configSpace) write(off int, p []byte) {
	for i, v := range p {
		if i += off; i < len(c.bytes) {
			c.bytes[i] = c.bytes[i]&^c.writable[i] | v&c.writable[i]
		}
	}
}

func (c *configSpace) uint16(off int) uint16 { return binary.LittleEndian.Uint16(c.bytes[off:]) }
func (c *configSpace) uint32(off int) uint32 { return binary.LittleEndian.Uint32(c.bytes[off:]) }

// memoryEnabled reports whether the function decodes its BAR.
func (c *configSpace) memoryEnabled() bool { return c.uint16(cfgCommand)&commandMemory != 0 }

// busMaster reports whether the function may access memory, which includes the
// sending of messages.
func (c *configSpace) busMaster() bool { return c.uint16(cfgCommand)&commandBusMaster != 0 }

// bar is the address in the BAR. Zero means that none has been assigned.
func (c *configSpace) bar() guest.GPA {
	return guest.GPA(binary.LittleEndian.Uint64(c.bytes[cfgBAR0:]) &^ 0xf)
}

func (c *configSpace) setBAR(addr guest.GPA) {
	binary.LittleEndian.PutUint64(c.bytes[cfgBAR0:], uint64(addr)|barMemory64)
}

// Package acpi makes the ACPI tables of calf's PC: RSDP, XSDT, FADT, FACS,
// MADT, MCFG and a DSDT with the PCI host bridge, the serial port, the panic
// notifier and the soft-off state (ACPI 6.5).
package acpi

import (
	"encoding/binary"
)

// Config is what the tables tell of the machine.
type Config struct {
	CPUs int // local APIC IDs 0 to CPUs-1

	LocalAPIC uint32
	IOAPIC    uint32

	// ECAM is the configuration space of bus 0, 1 MiB long.
	ECAM uint32
	// PCIWindow is where base address registers may lie.
	PCIWindow, PCIWindowSize uint32
	// INTA is the interrupt that pin INTA of each slot of bus 0 is wired to,
	// level-triggered and active low as PCI's are.
	INTA []uint32

	SCI         uint8  // interrupt of the fixed events, level-triggered and active high
	PM1Event    uint16 // status and enable registers, 2 bytes each
	PM1Control  uint16
	SleepTypeS5 uint8 // SLP_TYP that powers the machine off

	ResetPort  uint16
	ResetValue uint8

	Serial    uint16
	SerialIRQ uint
	// PVPanic is the port of the panic notifier.
	PVPanic uint16
}

const (
	headerSize = 36
	rsdpSize   = 36
	oemID      = "CALFVM"
	oemTable   = "CALFMACH"
)

// Build returns the tables as they are to lie in guest memory from base, which
// must be a multiple of 64. The RSDP comes first.
func Build(base uint64, cfg Config) []byte {
	b := builder{base: base, out: make([]byte, rsdpSize)}
	facs := b.add(facs())
	dsdt := b.add(table("DSDT", 2, dsdt(cfg)))
	xsdt := b.add(table("XSDT", 1, addresses(
		b.add(table("FACP", 6, fadt(cfg, facs, dsdt))),
		b.add(table("APIC", 5, madt(cfg))),
		b.add(table("MCFG", 1, mcfg(cfg))),
	)))
	rsdp(b.out, xsdt)
	return b.out
}

// builder lays tables one after the other on boundaries of 64 bytes, which is
// what the FACS asks for.
type builder struct {
	base uint64
	out  []byte
}

func (b *builder) add(t []byte) uint64 {
	for len(b.out)%64 != 0 {
		b.out = append(b.out, 0)
	}
	addr := b.base + uint64(len(b.out))
	b.out = append(b.out, t...)
	return addr
}

func addresses(a ...uint64) []byte {
	var b []byte
	for _, v := range a {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// table prefixes body with the system description table header (5.2.6).
func table(signature string, revision byte, body []byte) []byte {
	t := make([]byte, headerSize, headerSize+len(body))
	copy(t, signature)
	binary.LittleEndian.PutUint32(t[4:], uint32(headerSize+len(body)))
	t[8] = revision
	copy(t[10:], oemID)
	copy(t[16:], oemTable)
	binary.LittleEndian.PutUint32(t[24:], 1)
	copy(t[28:], "CALF")
	binary.LittleEndian.PutUint32(t[32:], 1)
	t = append(t, body...)
	t[9] = checksum(t)
	return t
}

// checksum is the byte that makes the sum of b zero.
func checksum(b []byte) byte {
	var sum byte
	for _, c := range b {
		sum += c
	}
	return -sum
}

// rsdp fills in the root pointer (5.2.5.3).
func rsdp(b []byte, xsdt uint64) {
	copy(b, "RSD PTR ")
	copy(b[9:], oemID)
	b[15] = 2
	binary.LittleEndian.PutUint32(b[20:], rsdpSize)
	binary.LittleEndian.PutUint64(b[24:], xsdt)
	b[8] = checksum(b[:20])
	b[32] = checksum(b[:rsdpSize])
}

// facs is a firmware control structure with nothing to say (5.2.10).
func facs() []byte {
	b := make([]byte, 64)
	copy(b, "FACS")
	binary.LittleEndian.PutUint32(b[4:], 64)
	b[32] = 2
	return b
}

// Flags of the FADT (5.2.9, 5.2.9.3).
const (
	bootLegacyDevices = 1 << 0
	bootNoVGA         = 1 << 2
	bootNoASPM        = 1 << 4
	bootNoRTC         = 1 << 5

	fadtWBINVD     = 1 << 0
	fadtC1         = 1 << 2
	fadtNoSleepBtn = 1 << 5
	fadtNoFixedRTC = 1 << 6
	fadtResetReg   = 1 << 10

	latencyNone = 0xFFFF // C2 and C3 are not supported
)

// fadt is the fixed description (5.2.9). Offsets are those of the
// specification, less the header. There is no SMI command port: the machine is
// always in ACPI mode.
func fadt(cfg Config, facs, dsdt uint64) []byte {
	const size = 276 - headerSize
	t := make([]byte, size)
	le := binary.LittleEndian
	at := func(off int) []byte { return t[off-headerSize:] }
	le.PutUint32(at(36), uint32(facs))
	le.PutUint32(at(40), uint32(dsdt))
	le.PutUint16(at(46), uint16(cfg.SCI))
	le.PutUint32(at(56), uint32(cfg.PM1Event))
	le.PutUint32(at(64), uint32(cfg.PM1Control))
	at(88)[0], at(89)[0] = 4, 2
	le.PutUint16(at(96), latencyNone)
	le.PutUint16(at(98), latencyNone)
	le.PutUint16(at(109), bootLegacyDevices|bootNoVGA|bootNoASPM|bootNoRTC)
	le.PutUint32(at(112), fadtWBINVD|fadtC1|fadtNoSleepBtn|fadtNoFixedRTC|fadtResetReg)
	ioRegister(at(116), cfg.ResetPort, 1)
	at(128)[0] = cfg.ResetValue
	at(131)[0] = 5 // of version 6.5
	le.PutUint64(at(140), dsdt)
	ioRegister(at(148), cfg.PM1Event, 4)
	ioRegister(at(172), cfg.PM1Control, 2)
	return t
}

// ioRegister writes a generic address of n bytes of I/O ports (5.2.3.2).
func ioRegister(b []byte, port uint16, n byte) {
	b[0], b[1], b[2], b[3] = 1, 8*n, 0, min(n, 3)
	binary.LittleEndian.PutUint64(b[4:], uint64(port))
}

// Polarity and trigger of an interrupt source override (5.2.12.5).
const (
	isoBus             = 0
	isoActiveHighLevel = 0xD
)

// madt lists the interrupt controllers (5.2.12). The timer's interrupt 0
// arrives at pin 2, as on every PC.
func madt(cfg Config) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, cfg.LocalAPIC)
	b = le.AppendUint32(b, 1) // PCAT_COMPAT: there are two 8259s as well
	for i := range cfg.CPUs {
		b = append(b, 0, 8, byte(i), byte(i))
		b = le.AppendUint32(b, 1)
	}
	b = append(b, 1, 12, 0, 0)
	b = le.AppendUint32(b, cfg.IOAPIC)
	b = le.AppendUint32(b, 0)
	b = override(b, 0, 2, isoBus)
	b = override(b, cfg.SCI, uint32(cfg.SCI), isoActiveHighLevel)
	return append(b, 4, 6, 0xFF, 0, 0, 1) // NMI at LINT1 of every processor
}

func override(b []byte, source uint8, gsi uint32, flags uint16) []byte {
	b = append(b, 2, 10, 0, source)
	b = binary.LittleEndian.AppendUint32(b, gsi)
	return binary.LittleEndian.AppendUint16(b, flags)
}

// mcfg says where the configuration space of bus 0 is mapped (PCI Firmware
// Specification 3.3, 4.1.2).
func mcfg(cfg Config) []byte {
	b := make([]byte, 8, 24)
	b = binary.LittleEndian.AppendUint64(b, uint64(cfg.ECAM))
	return append(b, make([]byte, 8)...) // segment 0, buses 0 to 0
}

// routes is the routing table of the pins INTA of bus 0, by slot (6.2.13): for
// each all functions of the slot, the pin, no link device, and the interrupt.
func routes(inta []uint32) term {
	var table []term
	for slot, gsi := range inta {
		table = append(table, packageOf(
			integer(uint64(slot)<<16|0xFFFF), integer(0), integer(0), integer(uint64(gsi))))
	}
	return packageOf(table...)
}

// dsdt describes what cannot be found by looking.
func dsdt(cfg Config) []byte {
	const ecamSize = 1 << 20
	return join(
		scope(path(true, "_SB"),
			device("PCI0",
				name("_HID", eisaID("PNP0A08")),
				name("_CID", eisaID("PNP0A03")),
				name("_UID", integer(0)),
				name("_SEG", integer(0)),
				name("_BBN", integer(0)),
				name("_PRT", routes(cfg.INTA)),
				name("_CRS", resources(
					busNumbers(0, 0),
					ioPorts(0xCF8, 8),
					memoryWindow(cfg.PCIWindow, cfg.PCIWindowSize),
				)),
			),
			// Linux uses the mapped configuration space only if a motherboard
			// resource claims it.
			device("MBRD",
				name("_HID", eisaID("PNP0C02")),
				name("_UID", integer(0)),
				name("_CRS", resources(fixedMemory(cfg.ECAM, ecamSize))),
			),
			device("COM1",
				name("_HID", eisaID("PNP0501")),
				name("_UID", integer(0)),
				name("_CRS", resources(ioPorts(cfg.Serial, 8), irq(cfg.SerialIRQ))),
			),
			device("PEVT",
				name("_HID", str("QEMU0001")),
				name("_UID", integer(0)),
				name("_STA", integer(0xF)),
				name("_CRS", resources(ioPorts(cfg.PVPanic, 1))),
			),
		),
		rootName("_S5", packageOf(integer(uint64(cfg.SleepTypeS5)), integer(uint64(cfg.SleepTypeS5)), integer(0), integer(0))),
	)
}

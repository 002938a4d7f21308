package vmm

import "github.com/calfvm/calf/guest"

// The guest-physical map of calf's PC. RAM fills [0, lowRAMMax) and, where
// there is more, goes on at 4 GiB; between them lies what the processor and
// the devices own.
const (
	lowRAMMax  = guest.GPA(0xC000_0000)
	highRAM    = guest.GPA(0x1_0000_0000)
	pciWindow  = guest.GPA(0xC000_0000) // base address registers
	pciWinSize = 0x2000_0000
	ecamBase   = guest.GPA(0xE000_0000) // configuration space of bus 0
	ecamSize   = 0x10_0000
	ioapicAddr = guest.GPA(0xFEC0_0000)
	lapicAddr  = guest.GPA(0xFEE0_0000)

	// VT-x without unrestricted guests needs four pages of its own for real
	// mode (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR).
	identityMapAddr = 0xFFFB_C000
	tssAddr         = 0xFFFB_D000
)

// I/O ports.
const (
	portI8042Data    = 0x60
	portI8042Command = 0x64
	portCOM1         = 0x3F8
	portPVPanic      = 0x505
	portPM1Event     = 0x600
	portPM1Control   = 0x604
	portPCIAddress   = 0xCF8
	portReset        = 0xCF9
	portPCIData      = 0xCFC
)

// Global system interrupts. Those from firstMSI on are messages.
const (
	gsiCOM1  = 4
	gsiSCI   = 9
	gsiPCI   = 16 // of the first of pciLines lines
	pciLines = 8
	firstMSI = 24
	maxGSI   = 4096
)

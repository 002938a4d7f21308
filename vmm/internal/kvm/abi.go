package kvm

// Request codes of linux/kvm.h for x86-64. Each holds the size of its
// structure, so the kernel refuses one whose structure we got wrong.
const (
	kvmGetAPIVersion       = 0xAE00
	kvmCreateVM            = 0xAE01
	kvmCheckExtension      = 0xAE03
	kvmGetVCPUMmapSize     = 0xAE04
	kvmGetSupportedCPUID   = 0xC008AE05
	kvmCreateVCPU          = 0xAE41
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmSetTSSAddr          = 0xAE47
	kvmSetIdentityMapAddr  = 0x4008AE48
	kvmCreateIRQChip       = 0xAE60
	kvmIRQLine             = 0x4008AE61
	kvmRegisterCoalesced   = 0x4010AE67
	kvmSetGSIRouting       = 0x4008AE6A
	kvmIRQFD               = 0x4020AE76
	kvmCreatePIT2          = 0x4040AE77
	kvmIOEventFD           = 0x4040AE79
	kvmRun                 = 0xAE80
	kvmGetRegs             = 0x8090AE81
	kvmSetRegs             = 0x4090AE82
	kvmGetSregs            = 0x8138AE83
	kvmSetSregs            = 0x4138AE84
	kvmSetMSRs             = 0x4008AE89
	kvmSetCPUID2           = 0x4008AE90
)

// userspaceMemoryRegion mirrors struct kvm_userspace_memory_region.
type userspaceMemoryRegion struct {
	Slot          uint32
	Flags         uint32
	GuestPhysAddr uint64
	MemorySize    uint64
	UserspaceAddr uint64
}

// irqLevel mirrors struct kvm_irq_level.
type irqLevel struct {
	IRQ   uint32
	Level uint32
}

// coalescedZone mirrors struct kvm_coalesced_mmio_zone.
type coalescedZone struct {
	Addr uint64
	Size uint32
	PIO  uint32
}

// coalescedEntry mirrors struct kvm_coalesced_mmio.
type coalescedEntry struct {
	PhysAddr uint64
	Len      uint32
	PIO      uint32
	Data     [8]byte
}

// pitConfig mirrors struct kvm_pit_config.
type pitConfig struct {
	Flags uint32
	_     [15]uint32
}

// pitSpeakerDummy has the kernel answer port 61 as well, by which Linux times
// its clocks against the PIT (KVM_PIT_SPEAKER_DUMMY).
const pitSpeakerDummy = 1

// ioEventFD mirrors struct kvm_ioeventfd.
type ioEventFD struct {
	Datamatch uint64
	Addr      uint64
	Len       uint32
	FD        int32
	Flags     uint32
	_         [36]byte
}

const ioEventFDDeassign = 1 << 2

// irqFD mirrors struct kvm_irqfd.
type irqFD struct {
	FD         uint32
	GSI        uint32
	Flags      uint32
	ResampleFD uint32
	_          [16]byte
}

const irqFDDeassign = 1 << 0

// Route mirrors struct kvm_irq_routing_entry for the two kinds that a PC has:
// a pin of an interrupt controller, or a message.
type Route struct {
	GSI   uint32
	Type  uint32
	Flags uint32
	_     uint32
	// Words is the union: {irqchip, pin} or {address_lo, address_hi, data}.
	Words [8]uint32
}

// Types of Route, and the interrupt controllers of RoutePin.
const (
	routeIRQChip = 1
	routeMSI     = 2

	PICMaster = 0
	PICSlave  = 1
	IOAPIC    = 2
)

// RoutePin sends gsi to a pin of PICMaster, PICSlave or IOAPIC.
func RoutePin(gsi, chip, pin uint32) Route {
	return Route{GSI: gsi, Type: routeIRQChip, Words: [8]uint32{chip, pin}}
}

// RouteMSI sends gsi as a message of data to address.
func RouteMSI(gsi uint32, address uint64, data uint32) Route {
	return Route{GSI: gsi, Type: routeMSI, Words: [8]uint32{uint32(address), uint32(address >> 32), data}}
}

// maxRoutes is the size of the table KVM accepts (KVM_MAX_IRQ_ROUTES).
const maxRoutes = 4096

// maxCPUIDEntries is more than any processor reports (KVM_MAX_CPUID_ENTRIES).
const maxCPUIDEntries = 256

// cpuid2 mirrors struct kvm_cpuid2 with room for every entry.
type cpuid2 struct {
	NEnt    uint32
	_       uint32
	Entries [maxCPUIDEntries]CPUIDEntry
}

// maxMSRs bounds the registers of one SetMSRs.
const maxMSRs = 32

// msrs mirrors struct kvm_msrs with room for maxMSRs entries.
type msrs struct {
	NMSRs   uint32
	_       uint32
	Entries [maxMSRs]MSREntry
}

// Exit reasons (KVM_EXIT_*).
const (
	ExitUnknown       = 0
	ExitIO            = 2
	ExitHLT           = 5
	ExitMMIO          = 6
	ExitShutdown      = 8
	ExitFailEntry     = 9
	ExitInternalError = 17
)

// Offsets into struct kvm_run.
const (
	runImmediateExit = 1
	runExitReason    = 8
	runUnion         = 32

	// union of KVM_EXIT_IO
	ioDirection  = runUnion + 0
	ioSize       = runUnion + 1
	ioPort       = runUnion + 2
	ioCount      = runUnion + 4
	ioDataOffset = runUnion + 8

	// union of KVM_EXIT_MMIO
	mmioPhysAddr = runUnion + 0
	mmioData     = runUnion + 8
	mmioLen      = runUnion + 16
	mmioIsWrite  = runUnion + 20

	// union of KVM_EXIT_FAIL_ENTRY and KVM_EXIT_INTERNAL_ERROR
	failReason    = runUnion + 0
	internalError = runUnion + 0
)

// The ring of coalesced writes is the third page of the run area
// (KVM_COALESCED_MMIO_PAGE_OFFSET is 2 on x86).
const (
	coalescedRing    = 2 * 4096
	coalescedFirst   = coalescedRing + 0
	coalescedLast    = coalescedRing + 4
	coalescedEntries = coalescedRing + 8
	coalescedSize    = 24
	coalescedMax     = (4096 - 8) / coalescedSize
)

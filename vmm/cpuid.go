package vmm

import (
	"math/bits"

	"github.com/calfvm/calf/vmm/internal/kvm"
)

// Leaves and bits of CPUID that are the machine's to say (Intel SDM volume 2,
// CPUID; AMD APM volume 3, appendix E).
const (
	leafFeatures     = 0x1
	leafCaches       = 0x4
	leafTopology     = 0xB
	leafTopologyV2   = 0x1F
	leafAMDFeatures  = 0x8000_0001
	leafSizes        = 0x8000_0008
	leafAMDCaches    = 0x8000_001D
	leafAMDTopology  = 0x8000_001E
	ecxTSCDeadline   = 1 << 24
	ecxHypervisor    = 1 << 31
	edxHTT           = 1 << 28
	ecxCmpLegacy     = 1 << 1
	cpuidIndexed     = 1 << 0 // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
	levelSMT         = 1
	levelCore        = 2
	physicalBitsMask = 0xFF
	cacheTypeMask    = 0x1F
)

// cpuidFor turns what KVM supports into what the vCPU with the given local
// APIC ID is told: one package of cpus cores with one thread each.
func cpuidFor(supported []kvm.CPUIDEntry, id, cpus int, tscDeadline bool) []kvm.CPUIDEntry {
	n, apic := uint32(cpus), uint32(id) //nolint:gosec // G115: at most maxCPUs
	amd := isAMD(supported)
	idBits := uint32(bits.Len32(n - 1)) //nolint:gosec // G115: at most 32
	var out []kvm.CPUIDEntry
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.Ebx = e.Ebx&0x0000_FFFF | min(n, 0xFF)<<16 | apic<<24
			e.Ecx |= ecxHypervisor
			if tscDeadline {
				e.Ecx |= ecxTSCDeadline
			}
			e.Edx &^= edxHTT
			if n > 1 {
				e.Edx |= edxHTT
			}
		case leafCaches:
			if e.Eax&cacheTypeMask != 0 {
				e.Eax = cacheSharing(e.Eax, n) | (1<<idBits-1)&0x3F<<26
			}
		case leafAMDCaches:
			e.Eax = cacheSharing(e.Eax, n)
		case leafTopology, leafTopologyV2:
			continue // written anew below
		case leafAMDFeatures:
			e.Ecx &^= ecxCmpLegacy
			if amd && n > 1 {
				e.Ecx |= ecxCmpLegacy
			}
		case leafSizes:
			if amd { // reserved elsewhere
				e.Ecx = e.Ecx&^0xF0FF | (n-1)&0xFF | idBits<<12
			}
		case leafAMDTopology:
			e.Eax, e.Ebx, e.Ecx = apic, apic&0xFF, 0
		}
		out = append(out, e)
	}
	return append(out,
		kvm.CPUIDEntry{Function: leafTopology, Index: 0, Flags: cpuidIndexed, Eax: 0, Ebx: 1, Ecx: 0 | levelSMT<<8, Edx: apic},
		kvm.CPUIDEntry{Function: leafTopology, Index: 1, Flags: cpuidIndexed, Eax: idBits, Ebx: n, Ecx: 1 | levelCore<<8, Edx: apic},
		kvm.CPUIDEntry{Function: leafTopology, Index: 2, Flags: cpuidIndexed, Ecx: 2, Edx: apic},
	)
}

// isAMD reports whether the vendor is AMD or Hygon, whose leaves differ.
func isAMD(supported []kvm.CPUIDEntry) bool {
	const auth, hygo = 0x6874_7541, 0x6F67_7948 // "Auth", "Hygo", as EBX holds them
	for _, e := range supported {
		if e.Function == 0 {
			return e.Ebx == auth || e.Ebx == hygo
		}
	}
	return false
}

// cacheSharing rewrites how many logical processors share a cache: the first
// two levels belong to one core, the third to all.
func cacheSharing(eax, cpus uint32) uint32 {
	const sharing = 0xFFF << 14
	eax &^= sharing | 0x3F<<26
	if level := eax >> 5 & 7; level >= 3 {
		eax |= (cpus - 1) << 14 & sharing
	}
	return eax
}

// physicalBits is the width of a guest-physical address.
func physicalBits(supported []kvm.CPUIDEntry) int {
	for _, e := range supported {
		if e.Function == leafSizes {
			return int(e.Eax & physicalBitsMask)
		}
	}
	return 36 // before the leaf existed
}

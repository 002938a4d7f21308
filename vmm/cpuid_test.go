package vmm

import (
	"testing"

	"github.com/calfvm/calf/vmm/internal/kvm"
)

// TestTopology decodes what each vCPU is told the way a kernel does: every
// APIC ID is distinct and all cores are in one package.
func TestTopology(t *testing.T) {
	supported := []kvm.CPUIDEntry{
		{Function: 0, Ebx: 0x6874_7541},
		{Function: leafFeatures, Ebx: 0xAA_BB_08_00, Ecx: 1, Edx: edxHTT},
		{Function: leafCaches, Index: 0, Flags: cpuidIndexed, Eax: 1<<5 | 1 | 0x3F<<26 | 7<<14},
		{Function: leafCaches, Index: 3, Flags: cpuidIndexed, Eax: 3<<5 | 3},
		{Function: leafTopology, Index: 0, Flags: cpuidIndexed, Eax: 7},
		{Function: leafTopologyV2, Index: 0, Flags: cpuidIndexed, Eax: 7},
		{Function: leafAMDFeatures},
		{Function: leafSizes, Eax: 48, Ecx: 0x3007},
		{Function: leafAMDTopology, Eax: 99, Ebx: 99},
	}
	for _, cpus := range []int{1, 2, 3, 4, 16, 254} {
		for id := range cpus {
			entries := map[[2]uint32]kvm.CPUIDEntry{}
			for _, e := range cpuidFor(supported, id, cpus, true) {
				key := [2]uint32{e.Function, e.Index}
				if _, twice := entries[key]; twice {
					t.Fatalf("leaf %#x.%d appears twice", e.Function, e.Index)
				}
				entries[key] = e
			}
			f := entries[[2]uint32{leafFeatures, 0}]
			if int(f.Ebx>>24) != id || int(f.Ebx>>16&0xFF) != cpus || f.Ebx&0xFFFF != 0x0800 {
				t.Errorf("vCPU %d of %d: CPUID.1.EBX = %#x", id, cpus, f.Ebx)
			}
			if (f.Edx&edxHTT != 0) != (cpus > 1) || f.Ecx&ecxHypervisor == 0 || f.Ecx&ecxTSCDeadline == 0 {
				t.Errorf("vCPU %d of %d: CPUID.1.ECX,EDX = %#x, %#x", id, cpus, f.Ecx, f.Edx)
			}
			core := entries[[2]uint32{leafTopology, 1}]
			if smt := entries[[2]uint32{leafTopology, 0}]; smt.Ebx != 1 || smt.Eax != 0 || int(smt.Edx) != id {
				t.Errorf("vCPU %d of %d: thread level %+v", id, cpus, smt)
			}
			if int(core.Ebx) != cpus || int(core.Edx) != id || id>>core.Eax != 0 || 1<<core.Eax < cpus {
				t.Errorf("vCPU %d of %d: core level %+v", id, cpus, core)
			}
			if l1 := entries[[2]uint32{leafCaches, 0}]; l1.Eax>>14&0xFFF != 0 {
				t.Errorf("the first-level cache is shared by %d", l1.Eax>>14&0xFFF+1)
			}
			if l3 := entries[[2]uint32{leafCaches, 3}]; int(l3.Eax>>14&0xFFF) != cpus-1 {
				t.Errorf("the third-level cache is shared by %d of %d", l3.Eax>>14&0xFFF+1, cpus)
			}
			if s := entries[[2]uint32{leafSizes, 0}]; int(s.Ecx&0xFF) != cpus-1 {
				t.Errorf("CPUID.80000008.ECX = %#x for %d vCPUs", s.Ecx, cpus)
			}
			if a := entries[[2]uint32{leafAMDTopology, 0}]; int(a.Eax) != id || int(a.Ebx) != id {
				t.Errorf("CPUID.8000001E = %+v for vCPU %d", a, id)
			}
		}
	}
	if got := physicalBits(supported); got != 48 {
		t.Errorf("physicalBits = %d, want 48", got)
	}
}

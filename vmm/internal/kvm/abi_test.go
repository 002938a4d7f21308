package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"
)

// TestABI asks the kernel's own header, by way of the C compiler, for every
// size, offset and number that this package states.
func TestABI(t *testing.T) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("no C compiler")
	}
	if _, err := os.Stat("/usr/include/linux/kvm.h"); err != nil {
		t.Skip("linux/kvm.h is not installed")
	}
	checks := []struct {
		c    string
		have uintptr
	}{
		{"KVM_GET_API_VERSION", kvmGetAPIVersion},
		{"KVM_CREATE_VM", kvmCreateVM},
		{"KVM_CHECK_EXTENSION", kvmCheckExtension},
		{"KVM_GET_VCPU_MMAP_SIZE", kvmGetVCPUMmapSize},
		{"KVM_GET_SUPPORTED_CPUID", kvmGetSupportedCPUID},
		{"KVM_CREATE_VCPU", kvmCreateVCPU},
		{"KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion},
		{"KVM_SET_TSS_ADDR", kvmSetTSSAddr},
		{"KVM_SET_IDENTITY_MAP_ADDR", kvmSetIdentityMapAddr},
		{"KVM_CREATE_IRQCHIP", kvmCreateIRQChip},
		{"KVM_IRQ_LINE", kvmIRQLine},
		{"KVM_REGISTER_COALESCED_MMIO", kvmRegisterCoalesced},
		{"KVM_SET_GSI_ROUTING", kvmSetGSIRouting},
		{"KVM_IRQFD", kvmIRQFD},
		{"KVM_CREATE_PIT2", kvmCreatePIT2},
		{"KVM_IOEVENTFD", kvmIOEventFD},
		{"KVM_RUN", kvmRun},
		{"KVM_GET_REGS", kvmGetRegs},
		{"KVM_SET_REGS", kvmSetRegs},
		{"KVM_GET_SREGS", kvmGetSregs},
		{"KVM_SET_SREGS", kvmSetSregs},
		{"KVM_SET_MSRS", kvmSetMSRs},
		{"KVM_SET_CPUID2", kvmSetCPUID2},

		{"KVM_CAP_MAX_VCPUS", uintptr(CapMaxVCPUs)},
		{"KVM_CAP_TSC_DEADLINE_TIMER", uintptr(CapTSCDeadlineTimer)},
		{"KVM_CAP_COALESCED_PIO", uintptr(CapCoalescedPIO)},
		{"KVM_CAP_IOEVENTFD_NO_LENGTH", uintptr(CapIOEventFDNoLen)},
		{"KVM_CAP_IMMEDIATE_EXIT", uintptr(CapImmediateExit)},

		{"KVM_EXIT_IO", ExitIO},
		{"KVM_EXIT_HLT", ExitHLT},
		{"KVM_EXIT_MMIO", ExitMMIO},
		{"KVM_EXIT_SHUTDOWN", ExitShutdown},
		{"KVM_EXIT_FAIL_ENTRY", ExitFailEntry},
		{"KVM_EXIT_INTERNAL_ERROR", ExitInternalError},
		{"KVM_EXIT_IO_OUT", 1},

		{"KVM_PIT_SPEAKER_DUMMY", pitSpeakerDummy},
		{"KVM_IOEVENTFD_FLAG_DEASSIGN", ioEventFDDeassign},
		{"KVM_IRQFD_FLAG_DEASSIGN", irqFDDeassign},
		{"KVM_IRQ_ROUTING_IRQCHIP", routeIRQChip},
		{"KVM_IRQ_ROUTING_MSI", routeMSI},
		{"KVM_IRQCHIP_PIC_MASTER", PICMaster},
		{"KVM_IRQCHIP_PIC_SLAVE", PICSlave},
		{"KVM_IRQCHIP_IOAPIC", IOAPIC},
		{"KVM_COALESCED_MMIO_PAGE_OFFSET * 4096", coalescedRing},

		{"sizeof(struct kvm_userspace_memory_region)", unsafe.Sizeof(userspaceMemoryRegion{})},
		{"offsetof(struct kvm_userspace_memory_region, userspace_addr)", unsafe.Offsetof(userspaceMemoryRegion{}.UserspaceAddr)},
		{"sizeof(struct kvm_irq_level)", unsafe.Sizeof(irqLevel{})},
		{"sizeof(struct kvm_coalesced_mmio_zone)", unsafe.Sizeof(coalescedZone{})},
		{"offsetof(struct kvm_coalesced_mmio_zone, pio)", unsafe.Offsetof(coalescedZone{}.PIO)},
		{"sizeof(struct kvm_coalesced_mmio)", coalescedSize},
		{"offsetof(struct kvm_coalesced_mmio, data)", unsafe.Offsetof(coalescedEntry{}.Data)},
		{"offsetof(struct kvm_coalesced_mmio_ring, last)", coalescedLast - coalescedRing},
		{"offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio)", coalescedEntries - coalescedRing},
		{"sizeof(struct kvm_pit_config)", unsafe.Sizeof(pitConfig{})},
		{"sizeof(struct kvm_ioeventfd)", unsafe.Sizeof(ioEventFD{})},
		{"offsetof(struct kvm_ioeventfd, addr)", unsafe.Offsetof(ioEventFD{}.Addr)},
		{"offsetof(struct kvm_ioeventfd, len)", unsafe.Offsetof(ioEventFD{}.Len)},
		{"offsetof(struct kvm_ioeventfd, fd)", unsafe.Offsetof(ioEventFD{}.FD)},
		{"offsetof(struct kvm_ioeventfd, flags)", unsafe.Offsetof(ioEventFD{}.Flags)},
		{"sizeof(struct kvm_irqfd)", unsafe.Sizeof(irqFD{})},
		{"offsetof(struct kvm_irqfd, gsi)", unsafe.Offsetof(irqFD{}.GSI)},
		{"offsetof(struct kvm_irqfd, flags)", unsafe.Offsetof(irqFD{}.Flags)},
		{"sizeof(struct kvm_irq_routing_entry)", unsafe.Sizeof(Route{})},
		{"offsetof(struct kvm_irq_routing_entry, u)", unsafe.Offsetof(Route{}.Words)},
		{"offsetof(struct kvm_irq_routing, entries)", 8},
		{"sizeof(struct kvm_cpuid_entry2)", unsafe.Sizeof(CPUIDEntry{})},
		{"offsetof(struct kvm_cpuid_entry2, edx)", unsafe.Offsetof(CPUIDEntry{}.Edx)},
		{"offsetof(struct kvm_cpuid2, entries)", unsafe.Offsetof(cpuid2{}.Entries)},
		{"sizeof(struct kvm_msr_entry)", unsafe.Sizeof(MSREntry{})},
		{"offsetof(struct kvm_msrs, entries)", unsafe.Offsetof(msrs{}.Entries)},
		{"sizeof(struct kvm_regs)", unsafe.Sizeof(Regs{})},
		{"offsetof(struct kvm_regs, rip)", unsafe.Offsetof(Regs{}.RIP)},
		{"sizeof(struct kvm_sregs)", unsafe.Sizeof(Sregs{})},
		{"offsetof(struct kvm_sregs, efer)", unsafe.Offsetof(Sregs{}.EFER)},
		{"offsetof(struct kvm_sregs, gdt)", unsafe.Offsetof(Sregs{}.GDT)},
		{"sizeof(struct kvm_segment)", unsafe.Sizeof(Segment{})},

		{"offsetof(struct kvm_run, immediate_exit)", runImmediateExit},
		{"offsetof(struct kvm_run, exit_reason)", runExitReason},
		{"offsetof(struct kvm_run, io.direction)", ioDirection},
		{"offsetof(struct kvm_run, io.size)", ioSize},
		{"offsetof(struct kvm_run, io.port)", ioPort},
		{"offsetof(struct kvm_run, io.count)", ioCount},
		{"offsetof(struct kvm_run, io.data_offset)", ioDataOffset},
		{"offsetof(struct kvm_run, mmio.phys_addr)", mmioPhysAddr},
		{"offsetof(struct kvm_run, mmio.data)", mmioData},
		{"offsetof(struct kvm_run, mmio.len)", mmioLen},
		{"offsetof(struct kvm_run, mmio.is_write)", mmioIsWrite},
		{"offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason)", failReason},
		{"offsetof(struct kvm_run, internal.suberror)", internalError},
	}
	var src strings.Builder
	src.WriteString("#include <stdio.h>\n#include <stddef.h>\n#include <linux/kvm.h>\nint main(void) {\n")
	for _, c := range checks {
		fmt.Fprintf(&src, "printf(\"%%lu\\n\", (unsigned long)(%s));\n", c.c)
	}
	src.WriteString("return 0; }\n")
	dir := t.TempDir()
	file, bin := filepath.Join(dir, "abi.c"), filepath.Join(dir, "abi")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", bin, file).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != len(checks) {
		t.Fatalf("%d answers to %d questions", len(lines), len(checks))
	}
	for i, c := range checks {
		if got := fmt.Sprint(uint32(c.have)); got != lines[i] {
			t.Errorf("%s is %s, this package says %s", c.c, lines[i], got)
		}
	}
}

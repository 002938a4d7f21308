package vmm

import "github.com/calfvm/calf/vmm/internal/kvm"

// Capability is something of KVM that calf uses.
type Capability struct {
	Name  string // as in linux/kvm.h
	Since string // the first Linux that has it on x86
	// Required means that there is no guest without it.
	Required bool
	Present  bool

	number kvm.Capability
}

// capabilities are all that calf asks KVM for, but for the number of vCPUs.
func capabilities() []Capability {
	return []Capability{
		{Name: "KVM_CAP_IMMEDIATE_EXIT", Since: "4.13", Required: true, number: kvm.CapImmediateExit},
		{Name: "KVM_CAP_IOEVENTFD_NO_LENGTH", Since: "4.0", Required: true, number: kvm.CapIOEventFDNoLen},
		{Name: "KVM_CAP_IRQFD", Since: "2.6.32", Required: true, number: kvm.CapIRQFD},
		{Name: "KVM_CAP_COALESCED_PIO", Since: "4.20", number: kvm.CapCoalescedPIO},
		{Name: "KVM_CAP_TSC_DEADLINE_TIMER", Since: "3.1", number: kvm.CapTSCDeadlineTimer},
	}
}

// Capabilities says what KVM of this host has of what calf uses, and how many
// vCPUs a guest may have.
func Capabilities() (all []Capability, maxCPUs int, err error) {
	s, err := kvm.Open()
	if err != nil {
		return nil, 0, explainOpen(err)
	}
	all = capabilities()
	for i := range all {
		all[i].Present = s.Extension(all[i].number) != 0
	}
	return all, min(s.Extension(kvm.CapMaxVCPUs), MaxCPUs), s.Close()
}

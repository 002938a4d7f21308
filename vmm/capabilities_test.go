package vmm

import (
	"slices"
	"testing"
)

// A host whose KVM calf accepts has what calf says that it needs.
func TestCapabilities(t *testing.T) {
	s, err := openKVM(true)
	if err != nil {
		t.Skip(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	all, cpus, err := Capabilities()
	if err != nil || cpus < 1 || cpus > MaxCPUs {
		t.Errorf("%d vCPUs, %v", cpus, err)
	}
	lacks := func(c Capability) bool { return c.Required && !c.Present }
	if len(all) == 0 || slices.ContainsFunc(all, lacks) {
		t.Errorf("KVM has %+v", all)
	}
}

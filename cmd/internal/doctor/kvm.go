package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/vmm"
)

// kvm checks what runs the guests. What depends on a check that found nothing is
// left out.
func (h Host) kvm() []Check {
	processor := h.processor()
	err := h.OpenKVM()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return []Check{processor, missing("kvm", "/dev/kvm is missing", h.mendKVM())}
	case errors.Is(err, fs.ErrPermission):
		return []Check{processor, ok("kvm", "/dev/kvm is there"), missing("kvm access", "this user may not open /dev/kvm", h.mendAccess())}
	case err != nil:
		return []Check{processor, missing("kvm", "/dev/kvm does not open: "+err.Error(), h.mendKVM())}
	}
	checks := []Check{processor, ok("kvm", "/dev/kvm is there"), ok("kvm access", "this user may open it"), h.hardware()}
	return append(checks, h.capabilities()...)
}

func (h Host) mendAccess() string {
	const join = `sudo usermod -aG kvm "$USER", then log in again.`
	const group = 0o060 // reads and writes
	if info, err := fs.Stat(h.Root, "dev/kvm"); err == nil && info.Mode().Perm()&group != group {
		return "Its group may not open it either. Let one do so: sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm. Join it: " + join
	}
	return "Join its group: " + join
}

func (h Host) mendKVM() string {
	switch flags := h.processorFlags(); {
	case slices.Contains(flags, "vmx"):
		return "Load its module (sudo modprobe kvm_intel), or pass the device into this container."
	case slices.Contains(flags, "svm"):
		return "Load its module (sudo modprobe kvm_amd), or pass the device into this container."
	case slices.Contains(flags, "hypervisor"):
		return mendNested
	}
	return "Turn on virtualization (VT-x or AMD-V) in the firmware and load kvm_intel or kvm_amd, or use a host that has it."
}

const mendNested = "Turn on nested virtualization for this virtual machine where it is run, or use a host that is none."

func (h Host) processorFlags() []string { return strings.Fields(h.field("proc/cpuinfo", "flags")) }

// processor is a hint only: what counts is how KVM runs, which hardware says.
func (h Host) processor() Check {
	const name = "processor"
	flags := h.processorFlags()
	inside := ""
	if slices.Contains(flags, "hypervisor") {
		inside = ", nested: this host is a virtual machine"
	}
	switch {
	case slices.Contains(flags, "vmx"):
		return ok(name, "VT-x%s", inside)
	case slices.Contains(flags, "svm"):
		return ok(name, "AMD-V%s", inside)
	case inside != "":
		return warning(name, "it shows neither VT-x nor AMD-V: this host is a virtual machine without nested virtualization", mendNested)
	}
	return warning(name, "it shows neither VT-x nor AMD-V", "Turn on virtualization in the firmware, or use a host that has it.")
}

func (h Host) hardware() Check {
	const name = "kvm hardware"
	switch err := h.Probe(); {
	case err == nil:
		return ok(name, "guests run on the processor")
	case errors.Is(err, vmm.ErrEmulated):
		return missing(name, "KVM emulates every instruction, too slowly for Linux",
			"Use a host with VT-x or AMD-V, or turn on nested virtualization for this one.")
	default:
		return missing(name, err.Error(), "End other hypervisors on this host, or use a newer host kernel.")
	}
}

func (h Host) capabilities() []Check {
	const name = "kvm capabilities"
	all, cpus, err := h.Capabilities()
	if err != nil {
		return []Check{missing(name, err.Error(), "Use a newer host kernel.")}
	}
	var there, absent []string
	state := Warning
	for _, c := range all {
		if c.Present {
			there = append(there, strings.TrimPrefix(c.Name, "KVM_CAP_"))
			continue
		}
		absent = append(absent, fmt.Sprintf("%s (Linux %s)", c.Name, c.Since))
		if c.Required {
			state = Missing
		}
	}
	caps := ok(name, "%s", strings.Join(there, ", "))
	if len(absent) > 0 {
		caps = Check{name, state, "KVM lacks " + strings.Join(absent, ", "), "Use a newer host kernel."}
	}
	return []Check{caps, vcpus(cpus)}
}

func vcpus(limit int) Check {
	const name = "vcpus"
	switch {
	case limit < 1:
		return missing(name, "KVM allows no vCPU", "Use a newer host kernel.")
	case limit < vmm.MaxCPUs:
		return warning(name, fmt.Sprintf("at most %d in a guest; calf could give %d", limit, vmm.MaxCPUs),
			"Ask for no more, or use a host whose KVM allows more.")
	}
	return ok(name, "at most %d in a guest", limit)
}

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// The memory of a guest is taken as it is touched and can reach beyond 4 GiB.
func TestLargeMemory(t *testing.T) {
	const mib = 4608
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	vm := guest{kernel: newestKernel(t), cpus: 2, memory: fmt.Sprint(mib, "MiB"), disks: []string{root}, script: `
		echo kib=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)
		grep 'System RAM' /proc/iomem
		echo waiting
		sleep 1000`}.start(t)
	vm.waitFor("waiting")
	kib, err := strconv.Atoi(vm.value("kib"))
	if err != nil || kib < mib<<10*9/10 || kib > mib<<10 {
		t.Errorf("the guest has %d KiB (%v), want nearly %d", kib, err, mib<<10)
	}
	if !strings.Contains(vm.console(), "100000000-") {
		t.Error("the guest has no memory at 4 GiB")
	}
	// The guest's kernel describes its memory in a sixty-fourth of it.
	if m := vm.resident(mib); m.total > 700<<10 {
		t.Errorf("calf has %d KiB resident after the boot of a guest with %d MiB", m.total, mib)
	}
	vm.kill()
}

// What calf needs beside the guest's memory is little, whatever the guest has
// read.
func TestOwnMemory(t *testing.T) {
	const mib = 256
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	vm := guest{kernel: newestKernel(t), cpus: 2, memory: fmt.Sprint(mib, "MiB"), disks: []string{root}, script: `
		dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null
		echo waiting
		sleep 1000`}.start(t)
	vm.waitFor("waiting")
	m := vm.resident(mib)
	t.Logf("resident: %d KiB, of which the guest's memory %d KiB", m.total, m.guest)
	if m.guest == 0 {
		t.Errorf("calf has no mapping of %d MiB", mib)
	}
	if own := m.total - m.guest; own > 30<<10 {
		t.Errorf("calf has %d KiB resident outside the guest's memory, want at most 30 MiB", own)
	}
	vm.kill()
}

// resident is memory of calf in KiB.
type resident struct {
	total int // all of it
	guest int // the mapping that is the guest's memory
}

// resident looks up what calf has in memory; guestMiB tells which mapping is
// the guest's.
func (v *vm) resident(guestMiB int) resident {
	v.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", v.cmd.Process.Pid))
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	var (
		sum  resident
		size int
	)
	for s := bufio.NewScanner(f); s.Scan(); {
		key, rest, _ := strings.Cut(s.Text(), ":")
		value, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
		switch key {
		case "Size":
			size = value
		case "Rss":
			sum.total += value
			// Memory beyond the PCI hole may be a mapping of its own.
			if size == guestMiB<<10 {
				sum.guest += value
			}
		}
	}
	return sum
}

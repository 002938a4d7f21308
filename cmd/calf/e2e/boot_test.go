package e2e

import (
	"fmt"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// touchQueues reads from vda on each CPU in turn and prints queueN=COUNT, the
// interrupts of each queue.
const touchQueues = `
touch_queues() {
	cpu=0
	while [ $cpu -lt $(nproc) ]; do
		taskset $(printf %x $((1 << cpu))) \
			dd if=/dev/vda of=/dev/null bs=4k count=50 iflag=direct 2>/dev/null
		cpu=$((cpu + 1))
	done
	awk '/virtio.*-req/ {
		for (i = 2; i < NF && $i ~ /^[0-9]+$/; i++) n += $i
		sub(/.*req\./, "queue", $NF); print $NF "=" n; n = 0
	}' /proc/interrupts
}
`

// Stock kernels boot from an overlay with as many queues as vCPUs, and what
// they write is in the overlay and nowhere else.
func TestBoot(t *testing.T) {
	eachKernel(t, func(t *testing.T, k lab.Kernel) {
		for _, cpus := range []int{1, 2, 4} {
			t.Run(fmt.Sprintf("cpus=%d", cpus), func(t *testing.T) { testBoot(t, k, cpus) })
		}
	})
}

func testBoot(t *testing.T, k lab.Kernel, cpus int) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	vm := guest{kernel: k, cpus: cpus, disks: []string{root}, script: touchQueues + `
		echo release=$(uname -r)
		echo cpus=$(nproc)
		touch_queues
		echo queues=$(ls /sys/block/vda/mq | wc -l)
		echo hello from $(uname -r) >/hello
		sync
		poweroff -f`}.start(t)
	vm.exits(0)
	if got := vm.value("release"); got != k.Release {
		t.Errorf("the guest runs %s, want %s", got, k.Release)
	}
	for _, name := range []string{"cpus", "queues"} {
		if got := vm.value(name); got != strconv.Itoa(cpus) {
			t.Errorf("the guest sees %s=%s, want %d", name, got, cpus)
		}
	}
	for q := range cpus {
		if n, err := strconv.Atoi(vm.value(fmt.Sprintf("queue%d", q))); err != nil || n == 0 {
			t.Errorf("queue %d raised %d interrupts (%v)", q, n, err)
		}
	}
	im.check(root, checkClean)
	if got, want := im.fileInside(root, "/hello"), "hello from "+k.Release+"\n"; got != want {
		t.Errorf("/hello in the overlay holds %q, want %q", got, want)
	}
}

// A raw base below the overlay, and raw and version 2 images by themselves,
// serve as well.
func TestRootFormats(t *testing.T) {
	k := newestKernel(t)
	tests := []struct {
		name string
		root func(im *images) (file, disk string)
	}{
		{"overlay-on-raw", func(im *images) (file, disk string) {
			file = im.overlay(im.base())
			return file, file
		}},
		{"raw", func(im *images) (file, disk string) {
			file = im.path("root.raw")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", im.base(), file)
			return file, file + ",format=raw"
		}},
		{"qcow2-version-2", func(im *images) (file, disk string) {
			file = im.path("root.qcow2")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2",
				"-o", "compat=0.10,cluster_size=4096", im.base(), file)
			return file, file
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			im := newImages(t)
			file, disk := test.root(im)
			vm := guest{kernel: k, cpus: 2, disks: []string{disk}, script: `
				echo written >/file
				sync
				poweroff -f`}.start(t)
			vm.exits(0)
			if filepath.Ext(file) == ".raw" {
				if got := run(t, "debugfs", "-R", "cat /file", file); got != "written\n" {
					t.Errorf("/file holds %q", got)
				}
				return
			}
			im.check(file, checkClean)
			if got := im.fileInside(file, "/file"); got != "written\n" {
				t.Errorf("/file holds %q", got)
			}
		})
	}
}

// Guests see their disks in order, each with its size, queues and serial
// number, and a read-only one refuses writes.
func TestDiskProperties(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	data := im.create("data.qcow2", "100M")
	fixed := im.create("fixed.qcow2", "10M")
	before := checksum(t, fixed)
	vm := guest{kernel: newestKernel(t), cpus: 2, disks: []string{
		root, data + ",queues=1,serial=second", fixed + ",readonly=true",
	}, script: `
		echo sectors=$(cat /sys/block/vdb/size)
		echo queues=$(ls /sys/block/vdb/mq | wc -l)
		echo serial=$(cat /sys/block/vdb/serial)
		echo ro=$(cat /sys/block/vda/ro)$(cat /sys/block/vdb/ro)$(cat /sys/block/vdc/ro)
		if dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct 2>/dev/null; then
			echo write=done
		else
			echo write=refused
		fi
		poweroff -f`}.start(t)
	vm.exits(0)
	for name, want := range map[string]string{
		"sectors": strconv.Itoa(100 << 20 / 512), "queues": "1", "serial": "second", "ro": "001", "write": "refused",
	} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest sees %s=%s, want %s", name, got, want)
		}
	}
	if checksum(t, fixed) != before {
		t.Error("the read-only image was changed")
	}
}

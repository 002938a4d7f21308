package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/cmd/internal/lab"
	"github.com/calfvm/calf/vmm"
)

// chroot makes a script for a guest booted with noroot: it loads the extra
// modules, which only the initramfs has, and goes on in the root.
const chroot = `
while read -r m; do insmod /modules/extra/$m.ko; done </modules/extra/order
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 /dev/vda /mnt
for dir in dev proc sys; do mount -o move /$dir /mnt/$dir; done
cat >/mnt/run/rest <<'REST'
` + prelude + `
%s
REST
exec chroot /mnt /bin/sh /run/rest
`

// TestDevice does to one device after the other what the block layer of a stock
// guest can do to it, in one boot with 24 disks, and reboots in the middle of it.
func TestDevice(t *testing.T) {
	const disks = 24
	im := newImages(t)
	root := im.path("root.raw")
	lab.Need(t)
	if err := lab.GuestRoot(root, 256, nil, "fio", "mkfs.xfs", "mke2fs"); err != nil {
		t.Fatal(err)
	}
	all := []string{root + ",format=raw,cache=unsafe"}
	// vdb to vde are worked on, vdb and vdc past the host's page cache.
	work := []string{im.create("fio.qcow2", "256M"), im.path("direct.raw"), im.create("xfs.qcow2", "512M"), im.create("loose.qcow2", "64M")}
	sparse(t, work[1], 256<<20)
	all = append(all, work[0]+",cache=none", work[1]+",format=raw,cache=none", work[2], work[3]+",cache=writethrough")
	for i := len(all); i < disks; i++ {
		small := im.path(fmt.Sprintf("small%d.raw", i))
		sparse(t, small, int64(i)<<20)
		all = append(all, fmt.Sprintf("%s,format=raw,queues=2,serial=disk-%d", small, i))
	}
	script := fmt.Sprintf(chroot, `
		fs() { # DISK MKFS...: fill a file system, empty it, give its space back
			disk=$1; shift
			"$@" $disk >/tmp/fs 2>&1 || { cat /tmp/fs; false; }
			mkdir -p /fs
			mount $disk /fs
			dd if=/dev/urandom of=/fs/a bs=64k count=300 2>/dev/null
			cp /fs/a /fs/b
			sync; echo 3 >/proc/sys/vm/drop_caches
			cmp /fs/a /fs/b
			rm /fs/a /fs/b; sync
			fstrim /fs
			umount /fs
		}
		verify() { # DISK SIZE: every queue at once, each its own part of SIZE
			fio --name=v --thread --filename=$1 --direct=1 --ioengine=libaio --iodepth=8 \
				--rw=randwrite --bsrange=512-64k --ba=512 --size=$2 --offset_increment=$2 --numjobs=4 \
				--cpus_allowed=0-3 --cpus_allowed_policy=split \
				--verify=crc32c --verify_fatal=1 --do_verify=1 >/tmp/fio 2>&1 || { cat /tmp/fio; false; }
		}
		busy() { # DISK: reads and writes until the file is gone
			touch /tmp/busy
			while [ -e /tmp/busy ]; do
				dd if=/dev/urandom of=$1 bs=16k count=64 oflag=direct 2>/dev/null
				dd if=$1 of=/dev/null bs=4k count=256 iflag=direct 2>/dev/null
			done &
		}
		trap 'dmesg | tail -30' EXIT
		if [ -e /second ]; then
			dd if=/dev/vde bs=64k count=16 iflag=direct 2>/dev/null | cmp - /second
			echo second=ok
			poweroff -f
		fi
		echo disks=$(ls -d /sys/block/vd* | wc -l)
		echo queues=$(ls /sys/block/vdb/mq | wc -l)
		echo last=$(cat /sys/block/vdx/serial),$(cat /sys/block/vdx/size)
		grep -q virtio_rng /sys/class/misc/hw_random/rng_current
		dd if=/dev/hwrng bs=1k count=100 iflag=fullblock 2>/dev/null | gzip >/tmp/random
		[ $(wc -c </tmp/random) -gt 102400 ]; echo entropy=ok
		verify /dev/vdb 4m; echo fio-qcow2=ok
		verify /dev/vdc 4m; echo fio-raw=ok
		blkdiscard /dev/vdb; echo blkdiscard=ok
		fs /dev/vdc /bin/mke2fs -F -t ext4 -O has_journal,extent; # not busybox's
		echo ext4=ok
		fs /dev/vdd mkfs.xfs -f; echo xfs=ok

		busy /dev/vdb
		for s in $(sed 's/[][]//g' /sys/block/vdb/queue/scheduler) none; do
			echo $s >/sys/block/vdb/queue/scheduler; sleep 0.3
		done
		for mode in "write through" "write back" "write through" "write back"; do
			echo "$mode" >/sys/block/vdb/cache_type; sleep 0.2
			[ "$(cat /sys/block/vdb/cache_type)" = "$mode" ]
		done
		rm /tmp/busy; wait
		echo switches=ok
		echo through=$(cat /sys/block/vde/cache_type)

		virtio=$(basename $(readlink -f /sys/block/vde/device))
		for round in 1 2 3; do
			busy /dev/vde
			sleep 0.5
			echo $virtio >/sys/bus/virtio/drivers/virtio_blk/unbind
			rm /tmp/busy; wait
			rm -f /dev/vde # a file, if the driver was gone before dd began
			echo $virtio >/sys/bus/virtio/drivers/virtio_blk/bind
			until [ -b /dev/vde ]; do sleep 0.1; done
		done
		verify /dev/vde 512k; echo unbind=ok

		dd if=/dev/urandom of=/second bs=64k count=16 2>/dev/null
		dd if=/second of=/dev/vde bs=64k oflag=direct 2>/dev/null
		blkdiscard /dev/vdb
		sync
		busy /dev/vdf
		sleep 0.5
		reboot -f`)
	vm := guest{kernel: newestKernel(t), cpus: 4, memory: "512MiB", disks: all, cmdline: "noroot", script: script}.start(t)
	for _, line := range []string{
		"disks=24", "queues=4", "last=disk-23," + fmt.Sprint(23<<11), "entropy=ok", "fio-qcow2=ok", "fio-raw=ok", "blkdiscard=ok",
		"ext4=ok", "xfs=ok", "switches=ok", "through=write through", "unbind=ok", "second=ok",
	} {
		vm.waitFor(line + "\n")
	}
	vm.exits(0)
	for i, most := range []int64{4 << 20, 40 << 20, 40 << 20} {
		if got := allocated(t, work[i]); got > most {
			t.Errorf("%s takes %d bytes of the host, want at most %d: what was discarded did not come back", work[i], got, most)
		}
	}
	for _, image := range []string{work[0], work[2], work[3]} {
		im.check(image, checkClean)
	}
}

// TestResize lets a disk grow while a stock guest uses it, which calf's command
// line has no word for: a program does it by way of package vmm.
func TestResize(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	k := newestKernel(t)
	initrd, data := im.path("initrd"), im.path("data.raw")
	sparse(t, data, 8<<20)
	err := k.WithScript(initrd, prelude+`
		dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
		echo before=$(cat /sys/block/vda/size)
		until [ $(cat /sys/block/vda/size) = 32768 ]; do sleep 0.1; done
		dd if=/tmp/data of=/dev/vda bs=64k seek=240 oflag=direct 2>/dev/null
		dd if=/dev/vda bs=64k skip=240 iflag=direct 2>/dev/null | cmp - /tmp/data
		echo after=ok
		poweroff -f`)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := blk.OpenRaw(data, blk.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	out := &screen{}
	m, err := vmm.New(vmm.Config{
		CPUs: 2, Memory: 256 << 20, Kernel: k.Image, Initrd: initrd, Cmdline: "quiet noroot", Console: vmm.Console{Out: out},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AddDisk(vmm.Disk{Name: "data", Disk: disk}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	go func() {
		for !out.shows("before=16384") && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		if err := errors.Join(disk.Grow(16<<20), m.ResizeDisk(0, 16<<20)); err != nil {
			t.Error(err)
		}
	}()
	outcome, err := m.Run(ctx)
	if err := errors.Join(err, m.Close(), disk.Close()); err != nil || outcome != vmm.PowerOff || !out.shows("after=ok") {
		t.Errorf("the guest ended with %v, %v, console %q", outcome, err, out.b.String())
	}
}

// screen is a console to look at.
type screen struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *screen) shows(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.b.String(), text)
}

// TestNoMSI boots a guest that has to do without MSI-X: its disks interrupt it by
// their pins, three of them by the same one.
func TestNoMSI(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	disks := []string{root}
	for i := 1; i < 18; i++ {
		small := im.path(fmt.Sprintf("small%d.raw", i))
		sparse(t, small, 4<<20)
		disks = append(disks, small+",format=raw")
	}
	vm := guest{kernel: newestKernel(t), cpus: 2, disks: disks, cmdline: "pci=nomsi", script: `
		dd if=/dev/urandom of=/data bs=64k count=32 2>/dev/null
		for disk in b i j q r; do # of which b, j and r share a line, as do i and q
			dd if=/data of=/dev/vd$disk bs=16k oflag=direct 2>/dev/null &
		done
		wait
		for disk in b i j q r; do
			dd if=/dev/vd$disk bs=64k count=32 iflag=direct 2>/dev/null | cmp - /data
		done
		echo lines=$(grep -c IO-APIC.*virtio /proc/interrupts)
		echo messages=$(grep -c MSI.*virtio /proc/interrupts || true)
		sync
		poweroff -f`}.start(t)
	vm.exits(0)
	if lines, messages := vm.value("lines"), vm.value("messages"); lines == "0" || messages != "0" {
		t.Errorf("%s lines and %s messages interrupt for disks, want some and none", lines, messages)
	}
	if strings.Contains(vm.console(), "nobody cared") {
		t.Error("an interrupt was not let go")
	}
	im.check(root, checkClean)
}

// sparse makes a raw image of n zero bytes.
func sparse(t *testing.T, file string, n int64) {
	t.Helper()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, n); err != nil {
		t.Fatal(err)
	}
}

// allocated is how many bytes of the host a file takes.
func allocated(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// partitionMiB is the size of a partition of distribution.
const partitionMiB = 64

// withKernels adds the kernels with their initial RAM disks to files, by their names
// in the directory /boot or where that is a file system of its own.
func withKernels(t *testing.T, files map[string]string, dir string, kernels []lab.Kernel) map[string]string {
	t.Helper()
	for _, k := range kernels {
		for name, host := range map[string]string{"/vmlinuz-": k.Image, "/initrd.img-": k.Initrd} {
			b, err := os.ReadFile(host)
			if err != nil {
				t.Fatal(err)
			}
			files[dir+name+k.Release] = string(b)
		}
	}
	return files
}

// distribution makes a disk as a distribution would: a GPT, and in each partition a
// file system with files.
func (im *images) distribution(partitions ...map[string]string) string {
	im.t.Helper()
	disk := im.path("disk.raw")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		im.t.Fatal(err)
	}
	if err := os.Truncate(disk, int64(len(partitions)*partitionMiB+2)<<20); err != nil {
		im.t.Fatal(err)
	}
	table := "label: gpt\n"
	for i := range partitions {
		table += fmt.Sprintf("start=%dMiB, size=%dMiB\n", 1+i*partitionMiB, partitionMiB)
	}
	sfdisk := exec.Command("/usr/sbin/sfdisk", "-q", disk)
	if lab.Inside() {
		sfdisk = exec.Command("sfdisk", "-q", disk)
	}
	sfdisk.Stdin = strings.NewReader(table)
	if out, err := sfdisk.CombinedOutput(); err != nil {
		im.t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for i, files := range partitions {
		part := im.path(fmt.Sprint("part", i))
		if err := lab.GuestRoot(part, partitionMiB, files); err != nil {
			im.t.Fatal(err)
		}
		run(im.t, "dd", "if="+part, "of="+disk, "bs=1M", fmt.Sprint("seek=", 1+i*partitionMiB), "conv=notrunc")
	}
	image := im.path("disk.qcow2")
	run(im.t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
	return image
}

// An image boots by itself: its own kernel, the initial RAM disk that goes with it,
// and its root, which calf finds by what is in it. The agent has the image's init take
// over, with what the kernel has been told for it.
func TestKernelOfImage(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	k := newestKernel(t)
	image := im.distribution(withKernels(t, map[string]string{"/sbin/init": "#!/bin/sh\n" + prelude + `
		echo release=$(uname -r)
		echo cmdline=$(cat /proc/cmdline)
		echo init="$$ $0 $* $WORD"
		echo hostname=$(hostname)
		echo year=$(date +%Y)
		echo written >/file
		sync
		poweroff -f`}, "/boot", []lab.Kernel{k}))
	before := checksum(t, image)
	config := filepath.Join(t.TempDir(), "calf.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "[vm]\nname = 'own'\nmemory = '256MiB'\nboot_timeout = '2m'\n[boot]\ncmdline = 'quiet single WORD=w'\n[[disk]]\npath = '%s'\nsnapshot = true\n", image), 0o600); err != nil {
		t.Fatal(err)
	}
	vm := startCalf(t, "run", config)
	vm.exits(0)
	if got := vm.value("release"); got != k.Release {
		t.Errorf("the guest runs %s, want %s", got, k.Release)
	}
	if got, want := vm.value("cmdline"), "console=ttyS0 panic=-1 reboot=panic_warm rdinit=/.calf/init calf.init calf.root=/dev/vda1 calf.rootfstype=ext4 root=UUID="; !strings.HasPrefix(got, want) || !strings.HasSuffix(got, " quiet single WORD=w") {
		t.Errorf("the guest's command line is %q, want %s… quiet single WORD=w", got, want)
	}
	for name, want := range map[string]string{"init": "1 /sbin/init single w", "hostname": "own", "year": fmt.Sprint(time.Now().Year())} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest's init says %s=%s, want %s", name, got, want)
		}
	}
	if checksum(t, image) != before {
		t.Errorf("%s has changed", filepath.Base(image))
	}
}

// GRUB's configuration says what is booted, and a reboot boots what it says then.
func TestKernelByGRUB(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	list := kernels(t)
	old, latest := list[0], list[len(list)-1]
	config := `
		load_env
		set default="${saved_entry}"
		for kernel in ` + latest.Release + " " + old.Release + `; do
			menuentry "Linux $kernel" "$kernel" {
				linux /vmlinuz-$2 root=/dev/sda2 ro console=tty0 panic=30 marker=$2
				initrd /initrd.img-$2
			}
		done`
	boot := map[string]string{"/grub/grub.cfg": config, "/grub/grubenv": "saved_entry=Linux " + old.Release + "\n"}
	image := im.distribution(withKernels(t, boot, "", list), map[string]string{"/sbin/init": "#!/bin/sh\n" + prelude + `
		mount -t ext4 /dev/vda1 /mnt
		if [ "$(cat /mnt/second 2>/dev/null)" ]; then
			echo second=$(uname -r) $(grep -o 'marker=[^ ]*' /proc/cmdline)
			poweroff -f
		fi
		echo first=$(uname -r) $(grep -o 'marker=[^ ]*' /proc/cmdline)
		echo console=$(grep -c 'console=tty0\|panic=30' /proc/cmdline)
		echo saved_entry=0 >/mnt/grub/grubenv
		echo yes >/mnt/second
		umount /mnt
		sync
		reboot -f`})
	vm := startCalf(t, "run", "--disk", image, "--memory", "256MiB", "--cmdline", "quiet")
	vm.exits(0)
	for name, want := range map[string]string{
		"first": old.Release + " marker=" + old.Release, "second": latest.Release + " marker=" + latest.Release, "console": "0",
	} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest says %s=%s, want %s", name, got, want)
		}
	}
	im.check(image, checkClean)
}

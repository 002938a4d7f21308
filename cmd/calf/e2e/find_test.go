package e2e

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"

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
		run(im.t, "debugfs", "-w", "-R", fmt.Sprintf("set_super_value volume_name part%d", i+1), part)
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

// modulesOf returns the modules of a kernel as a distribution has them, compressed in all
// ways that there are, by their paths.
func modulesOf(t *testing.T, k lab.Kernel) map[string]string {
	t.Helper()
	initrd, err := os.Open(k.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer initrd.Close()
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(initrd))
	if err != nil {
		t.Fatal(err)
	}
	home := "/lib/modules/" + k.Release + "/"
	files, list := make(map[string]string), ""
	var renamed []string
	for i, r := range records {
		b, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(r.Name)
		switch {
		case name == "modules.dep":
			list = string(b)
		case strings.HasPrefix(r.Name, "modules/") && strings.HasSuffix(name, ".ko"):
			suffix := []string{"", ".gz", ".xz", ".zst"}[i%4]
			files[home+name+suffix] = packed(t, b, suffix)
			renamed = append(renamed, name, name+suffix)
		}
	}
	if list == "" || len(renamed) < 8 {
		t.Fatalf("%s has the modules %q", k.Initrd, renamed)
	}
	files[home+"modules.dep"] = strings.NewReplacer(renamed...).Replace(list)
	return files
}

func packed(t *testing.T, b []byte, suffix string) string {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch suffix {
	case ".gz":
		w = gzip.NewWriter(&out)
	case ".xz":
		w, err = xz.NewWriter(&out)
	case ".zst":
		w, err = zstd.NewWriter(&out)
	default:
		return string(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(b)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// A command runs in an image without an initial RAM disk, whose drivers are modules on
// its root; with the other file systems that belong to it, and all that a login has. What
// is kept of it is clean.
func TestCommandInImage(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	k := newestKernel(t)
	kernel, err := os.ReadFile(k.Image)
	if err != nil {
		t.Fatal(err)
	}
	root := modulesOf(t, k)
	root["/vmlinuz"], root["/data dir/empty"], root["/gone/empty"] = string(kernel), "", ""
	root["/etc/hostname"], root["/etc/passwd"] = "of-image\n", "root:x:0:0::/root:/bin/ash\n"
	root["/etc/fstab"] = "LABEL=part1 / ext4 defaults 0 1\n/dev/sda2 /data\\040dir auto noatime,x-systemd.automount 0 2\nUUID=no-such /gone ext4 defaults\nLABEL=part2 /none ext4 nofail\n"
	root["/boot/grub/grub.cfg"] = "menuentry x {\nlinux /vmlinuz root=LABEL=part1 ro\n}\n"
	image := im.distribution(root, map[string]string{"/two": "data"})
	kept := filepath.Join(filepath.Dir(image), "kept.qcow2")
	vm := startCalf(t, "run", image, "--memory", "256MiB", "--cmdline", "quiet", "--keep", kept, "--console", "file:"+im.path("console"), "--", "sh", "-c", `
		echo host=$(hostname)
		echo two=$(cat '/data dir/two')
		echo options=$(grep '/data\\040dir' /proc/mounts)
		echo gone=$(ls /gone)
		echo files=$(ulimit -Sn):$(ulimit -Hn)
		echo signals=$(grep -E 'SigBlk|SigIgn' /proc/self/status)
		echo login=$(umask):$HOME:$SHELL:$PATH
		echo lock=$(stat -c %a /run/lock /dev/shm)
		for dir in /dev/pts /sys/fs/cgroup /sys/kernel/debug /sys/kernel/tracing /sys/fs/bpf; do
			echo $dir=$(grep -c " $dir " /proc/mounts)
		done
		while :; do echo more; done >>'/data dir/growing' &
		while :; do echo more; done >>/growing &
		sleep 1
		exit 3`)
	vm.exits(3)
	for name, want := range map[string]string{
		"host": "of-image", "two": "data", "gone": "empty", "files": "1024:524288", "login": "0022:/root:/bin/ash:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"signals": "SigBlk: 0000000000000000 SigIgn: 0000000000000000", "lock": "1777 1777",
		"/dev/pts": "1", "/sys/fs/cgroup": "1", "/sys/kernel/debug": "1", "/sys/kernel/tracing": "1", "/sys/fs/bpf": "1",
	} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest says %s=%s, want %s", name, got, want)
		}
	}
	if got := vm.value("options"); !strings.Contains(got, "/dev/vda2") || !strings.Contains(got, "noatime") {
		t.Errorf("what fstab names is mounted as %q", got)
	}
	im.check(kept, checkClean)
	disk := im.path("kept.raw")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", kept, disk)
	for i := range 2 {
		part := im.path("part")
		run(t, "dd", "if="+disk, "of="+part, "bs=1M", fmt.Sprint("skip=", 1+i*partitionMiB), fmt.Sprint("count=", partitionMiB))
		if out := run(t, "e2fsck", "-f", "-n", part); strings.Contains(out, "journal") {
			t.Errorf("partition %d is not clean: %s", i+1, out)
		}
		if out := run(t, "debugfs", "-R", "stat growing", part); !strings.Contains(out, "Blockcount:") || strings.Contains(out, "Blockcount: 0") {
			t.Errorf("partition %d has not been written to: %s", i+1, out)
		}
	}
}

// legacyLZ4 packs an initial RAM disk as distributions did, in a format that does not
// say where it ends: nothing can follow it.
func legacyLZ4(s string) string {
	const chunk = 8 << 20
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 0x184C2102)
	for len(s) > 0 {
		part := s[:min(chunk, len(s))]
		s = s[len(part):]
		literals := []byte{0xF0} // and no match: what is packed is not at issue
		n := len(part) - 15
		for ; n >= 255; n -= 255 {
			literals = append(literals, 255)
		}
		literals = append(append(literals, byte(n)), part...)
		b = append(le.AppendUint32(b, uint32(len(literals))), literals...)
	}
	return string(b)
}

// The root is an XFS on another disk, which the agent knows by what is on it, with the
// drivers of the image's initial RAM disk; the kernel is on a file system for /boot.
func TestCommandOnXFS(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	k := newestKernel(t)
	files := withKernels(t, map[string]string{
		"/grub/grub.cfg": "menuentry x {\nlinux /vmlinuz-" + k.Release + " root=LABEL=the-root ro rootflags=noatime\ninitrd /initrd.img-" + k.Release + "\n}\n",
	}, "", []lab.Kernel{k})
	files["/initrd.img-"+k.Release] = legacyLZ4(files["/initrd.img-"+k.Release])
	boot := im.distribution(files)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	proto := "/\n0 0\nd--755 0 0\nbin d--755 0 0\nbusybox ---755 0 0 " + busybox + "\nsh l--777 0 0 busybox\ngrep l--777 0 0 busybox\n$\n"
	for _, dir := range []string{"dev", "proc", "sys", "run"} {
		proto += dir + " d--755 0 0\n$\n"
	}
	root, list := im.path("root.raw"), im.path("proto")
	if err := errors.Join(os.WriteFile(list, []byte(proto+"$\n"), 0o600), os.WriteFile(root, nil, 0o600), os.Truncate(root, 320<<20)); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", "-L", "the-root", "-p", list, root)
	vm := startCalf(t, "run", "--disk", boot, "--disk", root+",format=raw", "--memory", "256MiB", "--cmdline", "quiet", "--console", "file:"+im.path("console"), "--", "grep", " / ", "/proc/mounts")
	vm.exits(0)
	if got := vm.console(); !strings.HasPrefix(got, "/dev/vdb / xfs rw,noatime,") {
		t.Errorf("the root is %q", got)
	}
}

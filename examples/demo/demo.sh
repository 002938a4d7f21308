#!/bin/sh
# Runs a command in a fresh guest of a distribution's own image. Then boots a
# stock Linux kernel with calf from a QCOW2 overlay, lets the guest write to its
# root, and shows on the host what became of the images.
#
# `make demo` runs this where KVM is real. It needs calf, qemu-img, mke2fs,
# debugfs and a static busybox on the PATH, an image of a distribution, and a
# kernel with an initramfs that mounts /dev/vda and runs its /sbin/init.
set -eu
PATH=$PATH:/usr/sbin:/sbin

kernel=${CALF_LAB_KERNEL:?set it to a bzImage}
initrd=${CALF_LAB_INITRD:?set it to an initramfs}
disk=${CALF_LAB_DISK:?set it to a QCOW2 image of a distribution}

step() { printf '\n## %s\n' "$*"; }
# Shows a command, then runs it.
show() {
	printf '$ %s\n' "$*"
	"$@"
}
die() {
	printf 'demo: %s\n' "$*" >&2
	exit 1
}

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

step "A command in a fresh guest: the image needs nothing for it, and stays as it is"
ln -s "$disk" disk.qcow2
before=$(sha256sum disk.qcow2)
# shellcheck disable=SC2016 # the guest's variables
command='uname -a; . /etc/os-release; echo "$PRETTY_NAME"; echo precious >/file; exit 42'
printf "$ calf run disk.qcow2 -- sh -c '%s'; echo \$?\n" "$command"
status=0
calf run disk.qcow2 -- sh -c "$command" || status=$?
echo $status
[ $status = 42 ] || die "calf ended with another status than the command's"
[ "$(sha256sum disk.qcow2)" = "$before" ] || die "the image was changed"

step "A base image with an ext4 root, and an overlay on it"
mkdir -p root/bin root/sbin root/dev root/proc root/sys root/run
cp "$(command -v busybox)" root/bin/busybox
for applet in $(busybox --list); do
	[ "$applet" = busybox ] || ln -s busybox "root/bin/$applet"
done
cat >root/sbin/init <<'INIT'
#!/bin/sh
export PATH=/bin
dmesg -n 1
echo
echo "guest: $(uname -sr), $(nproc) CPUs, root on $(awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
# Every CPU reads from the disk through the queue that is its own.
for cpu in $(seq 0 $(($(nproc) - 1))); do
	taskset $(printf %x $((1 << cpu))) dd if=/dev/vda of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null
done
echo "guest: interrupts of each queue of vda, by CPU:"
grep 'virtio.*-req' /proc/interrupts
echo "written by Linux $(uname -r)" >/hello
sync
echo "guest: wrote $(wc -c </hello) bytes to /hello, powering off"
poweroff -f
INIT
chmod +x root/sbin/init
mke2fs -q -t ext4 -d root base.raw 64M >/dev/null
show qemu-img convert -O qcow2 base.raw base.qcow2
show qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
rm base.raw
before=$(sha256sum base.qcow2)

step "A machine, described in vm.toml"
ln -s "$kernel" vmlinuz
ln -s "$initrd" initrd.img
cat >vm.toml <<'TOML'
[vm]
cpus = 2
memory = "256MiB"
timeout = "2m"

[boot]
kernel = "vmlinuz"        # a stock Debian cloud kernel
initrd = "initrd.img"
cmdline = "quiet"

[[disk]]
path = "overlay.qcow2"
format = "qcow2"
queues = 2
TOML
cat vm.toml

step "Boot it"
show calf run vm.toml
echo "calf exited with status 0"

step "What the host sees"
qemu-img convert -O raw overlay.qcow2 overlay.raw
show debugfs -R 'cat /hello' overlay.raw 2>/dev/null
debugfs -R 'cat /hello' overlay.raw 2>/dev/null | grep -q '^written by Linux' ||
	die "the file that the guest wrote is not in the overlay"
show qemu-img check overlay.qcow2
[ "$(sha256sum base.qcow2)" = "$before" ] || die "the base image was changed"
echo "base.qcow2 is unchanged: sha256 $(echo "$before" | cut -c1-16)…"

#!/bin/busybox sh
# The first process of a guest, as a distribution's initramfs would have it:
# loads the drivers and hands over to the root file system that root= names, on
# the first virtio disk if nothing does, mounted read-write. What runs there is /script of this initramfs where
# it has one, else /sbin/init of the root. With noroot on the command line the
# script runs right here. If it ends, the kernel panics.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
	insmod "/modules/$module.ko" || exit 1
done </modules/order
if grep -qw noroot /proc/cmdline; then
	exec sh /script
fi
root=/dev/vda
for arg in $(cat /proc/cmdline); do
	case $arg in
	root=*) root=${arg#root=} ;;
	esac
done
i=0
until [ -b "$(findfs "$root" 2>/dev/null)" ] || [ $((i += 1)) -gt 100 ]; do
	sleep 0.1
done
mount -t ext4 "$(findfs "$root")" /mnt || exit 1
for dir in dev proc sys; do
	mount -o move "/$dir" "/mnt/$dir"
done
if [ -f /script ]; then
	mount -t tmpfs run /mnt/run
	cp /script /mnt/run/script
	exec switch_root /mnt /bin/sh /run/script
fi
exec switch_root /mnt /sbin/init

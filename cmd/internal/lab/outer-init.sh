#!/bin/busybox sh
# The first process of the outer machine: loads the drivers, mounts the root
# disk and the scratch disk, and hands over to the agent. If it fails, it ends,
# the kernel panics, and the machine stops.
set -e
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
	insmod "/modules/$module.ko"
done </modules/order
# A processor that waits for an interrupt must not spin: it is the only one.
echo 0 >/sys/module/kvm/parameters/halt_poll_ns
mount -t ext4 -o noatime /dev/vda /mnt
mount -t ext4 -o noatime /dev/vdb /mnt/lab
for dir in dev proc sys; do
	mount -o move "/$dir" "/mnt/$dir"
done
mount -t tmpfs tmp /mnt/tmp
mkdir /mnt/dev/shm
mount -t tmpfs shm /mnt/dev/shm
mkdir -p /mnt/dev/pts
mount -t devpts -o ptmxmode=666 pts /mnt/dev/pts
[ -e /mnt/dev/ptmx ] || ln -s pts/ptmx /mnt/dev/ptmx
ip link set lo up
CALF_LAB=init LD_LIBRARY_PATH=/lab/lib exec switch_root /mnt /lab/bin/lab

#!/bin/sh
# Runs in the guest: puts some load on the kernel, and fails if it complains meanwhile.
#
# The kernel's own tests run the same way: install them with
#	make -C linux/tools/testing/selftests TARGETS=timers install
# and run them with
#	calf run kernel.toml --copy linux/tools/testing/selftests/kselftest_install:/kselftest \
#		-- /kselftest/run_kselftest.sh
set -eu

echo "Linux $(uname -r), $(nproc) CPUs"
echo "the test begins" >/dev/kmsg

# Memory and the scheduler: each CPU packs its own noise.
mkdir /selftest
mount -t tmpfs tmpfs /selftest
for cpu in $(seq "$(nproc)"); do
	dd if=/dev/urandom bs=64k count=4 2>/dev/null | gzip >"/selftest/$cpu" &
done
wait
for file in /selftest/*; do
	gzip -t "$file"
done
umount /selftest

# The disk: what is written is read back, not from memory.
dd if=/dev/urandom of=/selftest/noise bs=64k count=16 2>/dev/null
sum=$(md5sum </selftest/noise)
sync
echo 3 >/proc/sys/vm/drop_caches
[ "$(md5sum </selftest/noise)" = "$sum" ]

if dmesg | sed '1,/the test begins/d' | grep -E '(WARNING|BUG|KASAN|UBSAN): |Oops: |INFO: .* detected'; then
	echo "the kernel has complained"
	exit 1
fi
echo "all is well"

#!/bin/sh
# Finds the commit that broke a kernel. In its tree:
#
#	git bisect start BAD GOOD
#	git bisect run .../examples/kernel/bisect.sh
#
# Each kernel is built, booted and tested in a fresh VM. One that cannot be built is
# left out. What is given to this script goes to calf run.
config=$(dirname "$0")/kernel.toml

make -s -j"$(nproc)" olddefconfig bzImage || exit 125
calf run "$config" --kernel arch/x86/boot/bzImage "$@"
code=$?
case $code in
125) exit 255 ;;                # calf could not run it, which the next commit will not mend: stop
129 | 130 | 143) exit "$code" ;; # somebody has ended the run: stop
esac
# Bad is what bisect takes from 1 to 127; a panic is 255, a test that died is above 128.
[ "$code" -lt 128 ] || code=1
exit "$code"

#!/bin/sh
# Fetches Debian's cloud image, verifies it by the sums that Debian publishes, and puts
# it beside this file as debian-12.qcow2. One that is there stays.
#
# MIRROR names another place that has the same files.
set -eu

mirror=${MIRROR:-https://cloud.debian.org/images/cloud/bookworm/latest}
name=debian-12-genericcloud-amd64.qcow2
image=debian-12.qcow2

die() {
	printf 'fetch.sh: %s\n' "$1" >&2
	exit 1
}

cd "$(dirname "$0")"
if [ -e "$image" ]; then
	echo "$image is there already; remove it to get a new one"
	exit
fi
sum=$(curl -fsSL "$mirror/SHA512SUMS" | awk -v name="$name" '$2 == name { print $1 }')
[ -n "$sum" ] || die "$mirror/SHA512SUMS has no sum of $name"

new=$(mktemp ".$image.XXXXXX")
trap 'rm -f "$new"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
curl -fL -o "$new" "$mirror/$name"
echo "$sum  $new" | sha512sum -c --status || die "$name is not what $mirror/SHA512SUMS says"
chmod 444 "$new" # a base that nobody should write
mv "$new" "$image"

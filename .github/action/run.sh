#!/bin/sh
# What the action of action.yml does: lets the runner's user open /dev/kvm, gets
# calf, and runs it.
#
# Inputs come as INPUT_NAME in the environment. They become arguments of calf, one
# for each line of those that are lists, and are never read as shell code here; the
# input run is, in the guest.
set -eu

die() {
	printf '::error title=calf::%s\n' "$1"
	exit 125
}

# Lets this user open /dev/kvm, on runners of GitHub by the rule that GitHub documents
# for them. Other machines are left as they are.
open_kvm() {
	[ "${RUNNER_ENVIRONMENT:-}" = github-hosted ] && [ -e /dev/kvm ] || return 0
	[ ! -r /dev/kvm ] || [ ! -w /dev/kvm ] || return 0
	echo 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' |
		sudo tee /etc/udev/rules.d/99-kvm4all.rules >/dev/null
	sudo udevadm control --reload-rules
	sudo udevadm trigger --name-match=kvm
	sudo udevadm settle
}

# Builds calf from the sources that the action came with, for the steps that follow
# as well. There are no releases to download yet.
build() {
	mkdir -p "$RUNNER_TEMP/calf-bin"
	(cd "$GITHUB_ACTION_PATH" && CGO_ENABLED=0 go build -trimpath -o "$RUNNER_TEMP/calf-bin/calf" ./cmd/calf)
	echo "$RUNNER_TEMP/calf-bin" >>"$GITHUB_PATH"
}

# Prints PREFIX and the line for each line of a text that has something in it.
lines() {
	printf '%s\n' "$2" | while read -r line; do
		[ -z "$line" ] || printf '%s%s\n' "$1" "$line"
	done
}

# Prints the flags that the inputs ask for, one a line.
flags() {
	lines --cpus= "$INPUT_CPUS"
	lines --memory= "$INPUT_MEMORY"
	lines --timeout= "$INPUT_TIMEOUT"
	lines --boot-timeout= "$INPUT_BOOT_TIMEOUT"
	lines --workdir= "$INPUT_WORKDIR"
	lines --user= "$INPUT_USER"
	lines --env= "$INPUT_ENV"
	lines --copy= "$INPUT_COPY"
	lines --artifact= "$INPUT_ARTIFACTS"
	lines '' "$INPUT_FLAGS"
}

case ${INPUT_IMAGE:+image}${INPUT_CONFIG:+config} in
image) [ -n "$INPUT_RUN" ] || die 'the input run is missing: what is to run in the image?' ;;
config) ;;
*) die 'give one of the inputs image and config' ;;
esac
what=$INPUT_IMAGE$INPUT_CONFIG
case $what in
-*) what=./$what ;;
esac

open_kvm
if [ -n "$INPUT_CALF" ]; then
	calf=$INPUT_CALF
else
	echo '::group::Build calf'
	build
	echo '::endgroup::'
	calf=$RUNNER_TEMP/calf-bin/calf
fi

result=$(mktemp -d "$RUNNER_TEMP/calf.XXXXXX")/result.json
set -- run "$what" "--json=$result"
while read -r flag; do
	[ -z "$flag" ] || set -- "$@" "$flag"
done <<END
$(flags)
END
[ -z "$INPUT_RUN" ] || set -- "$@" -- sh -e -c "$INPUT_RUN"

code=0
"$calf" "$@" || code=$?
{
	echo "exit-code=$code"
	echo "result=$result"
} >>"$GITHUB_OUTPUT"
# Of its own errors this is the one for which the runner may be at fault.
[ "$code" != 125 ] || "$calf" doctor || true
exit "$code"

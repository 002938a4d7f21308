#!/bin/sh
# Runs the tests of this project in a fresh VM, as root there and as nobody in
# particular here, and says what they cover. What is given goes to calf run.
set -eu
cd "$(dirname "$0")"

CGO_ENABLED=0 go test -c -cover -o build/ramdir.test
calf run vm.toml "$@"
go tool cover -func=build/cover.out

package e2e

import (
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// distributionDisks returns disks with a distribution, which all tests share. None
// may change: whole is checked at the end of the test.
func distributionDisks(t *testing.T) (whole, boot string) {
	t.Helper()
	lab.Need(t)
	disks, err := lab.Distribution()
	if err != nil {
		t.Fatal(err)
	}
	im := newImages(t)
	whole, boot = im.path("whole.qcow2"), im.path("boot.qcow2")
	for name, disk := range map[string]string{whole: disks.Whole, boot: disks.Boot} {
		if err := os.Symlink(disk, name); err != nil {
			t.Fatal(err)
		}
	}
	im.sums[whole] = checksum(t, whole)
	return whole, boot
}

// A distribution's image runs a command by nothing but its name. What it needs is in
// it: kernel, drivers and root; its clock is right, and randomness is there.
func TestDistribution(t *testing.T) {
	image, _ := distributionDisks(t)
	cmd := exec.Command(lab.Calf(), "run", image, "--", "sh", "-c", `
		echo "kernels=$(echo /boot/vmlinuz-*)"
		echo "release=$(uname -r)"
		echo "systemd=$(systemctl --version | head -n 1)"
		echo "root=$(findmnt -n -o SOURCE,FSTYPE /)"
		echo "random=$(head -c 100000 /dev/random | wc -c)"
		echo "waited=$(dmesg | grep -c 'uninitialized urandom read\|waiting for random')"
		echo written >/file && sync
		while read -r line; do
			echo "clock=$(date +%s.%N)"
		done
		exit 7`)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	vm := startCommand(t, cmd)
	vm.waitFor("waited=")
	before := time.Now()
	if _, err := io.WriteString(stdin, "what time is it?\n"); err != nil {
		t.Fatal(err)
	}
	vm.waitFor("clock=")
	after := time.Now()
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	vm.exits(7)
	release := vm.value("release")
	for name, want := range map[string]string{
		"kernels": "/boot/vmlinuz-" + release,
		"root":    "/dev/vda1 ext4",
		"random":  "100000",
		"waited":  "0",
	} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest says %s=%s, want %s", name, got, want)
		}
	}
	if got := vm.value("systemd"); !strings.HasPrefix(got, "systemd ") {
		t.Errorf("the guest's systemd is %q", got)
	}
	const off = 2 // seconds
	seconds := func(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
	clock, err := strconv.ParseFloat(vm.value("clock"), 64)
	if err != nil || clock < seconds(before)-off || clock > seconds(after)+off {
		t.Errorf("the guest's clock says %f between %f and %f", clock, seconds(before), seconds(after))
	}
}

// Without a command a distribution boots as it does elsewhere, until somebody can log
// in, and its own way of ending is what a signal begins.
func TestDistributionInit(t *testing.T) {
	image, _ := distributionDisks(t)
	vm := startCalf(t, "run", image, "--cmdline", "quiet")
	vm.waitFor("calf login: ")
	vm.signal(syscall.SIGTERM)
	vm.exits(0)
	console := vm.console()
	if !strings.Contains(console, "reboot: Power down") {
		t.Error("the guest ended without a power-off")
	}
	if strings.Contains(console, "FAILED") {
		t.Error("units have failed")
	}
}

// The kernel is found where it is a distribution's habit to have it: on a file system
// for /boot, behind an EFI system partition. The command finds it mounted.
func TestDistributionBoot(t *testing.T) {
	_, image := distributionDisks(t)
	vm := startCalf(t, "run", image, "--cmdline", "quiet", "--", "sh", "-c", `
		echo "root=$(findmnt -n -o SOURCE,FSTYPE /)"
		echo "boot=$(findmnt -n -o SOURCE,FSTYPE /boot)"
		echo "kernels=$(echo /boot/vmlinuz-*)"
		echo "release=$(uname -r)"
		kill -USR1 $$`)
	vm.exits(128 + int(syscall.SIGUSR1))
	for name, want := range map[string]string{
		"root":    "/dev/vda3 ext4",
		"boot":    "/dev/vda2 ext4",
		"kernels": "/boot/vmlinuz-" + vm.value("release"),
	} {
		if got := vm.value(name); got != want {
			t.Errorf("the guest says %s=%s, want %s", name, got, want)
		}
	}
}

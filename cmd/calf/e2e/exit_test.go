package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// How a guest ends decides the status of calf (contract: exit codes).
func TestExitStatus(t *testing.T) {
	tests := []struct {
		name   string
		script string
		flags  []string
		want   int
		stderr string // what calf's message holds
	}{
		{name: "power-off", script: `poweroff -f`, flags: []string{"--boot-timeout", "2m"}, want: 0},
		{name: "panic", script: `echo c >/proc/sysrq-trigger`, want: 255, stderr: "panic"},
		{name: "init-ends", script: `exit 3`, want: 255, stderr: "panic"},
		{name: "no-reboot", script: `reboot -f`, flags: []string{"--no-reboot"}, want: 0},
		{name: "timeout", script: `sleep 1000`, flags: []string{"--timeout", "20s"}, want: 124, stderr: "timeout: the run"},
		// No kernel comes up that fast.
		{name: "boot-timeout", script: `poweroff -f`, flags: []string{"--boot-timeout", "10ms"}, want: 124, stderr: "boot timeout"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			im := newImages(t)
			root := im.overlay(im.baseQCOW2())
			vm := guest{kernel: newestKernel(t), disks: []string{root}, script: test.script, flags: test.flags}.start(t)
			vm.exits(test.want)
			if !strings.Contains(vm.stderr(), test.stderr) {
				t.Errorf("calf says %q, which does not hold %q", vm.stderr(), test.stderr)
			}
			im.check(root, checkClean)
		})
	}
}

// A reboot starts the guest again over the same disks.
func TestReboot(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	vm := guest{kernel: newestKernel(t), cpus: 2, disks: []string{root}, script: `
		echo boot >>/boots
		sync
		echo boots=$(wc -l </boots)
		[ $(wc -l </boots) = 3 ] || reboot -f
		poweroff -f`}.start(t)
	vm.exits(0)
	for _, line := range []string{"boots=1\n", "boots=2\n", "boots=3\n"} {
		if strings.Count(vm.console(), line) != 1 {
			t.Errorf("the console does not show %q once", line)
		}
	}
	im.check(root, checkClean)
}

// SIGTERM presses the power button; a guest that listens ends cleanly, and a
// second one ends a guest that does not.
func TestSIGTERM(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	k := newestKernel(t)
	t.Run("listening", func(t *testing.T) {
		vm := guest{kernel: k, disks: []string{root}, script: `
			until [ -e /dev/input/event0 ]; do sleep 0.2; done
			exec 3</dev/input/event0 # from here on no event is missed
			echo listening
			head -c 24 <&3 >/dev/null
			echo bye >/bye
			sync
			poweroff -f`}.start(t)
		vm.waitFor("listening")
		vm.signal(syscall.SIGTERM)
		vm.exits(0)
		if got := im.fileInside(root, "/bye"); got != "bye\n" {
			t.Errorf("/bye holds %q", got)
		}
	})
	t.Run("deaf", func(t *testing.T) {
		vm := guest{kernel: k, disks: []string{root}, script: `
			echo deaf
			sleep 1000`}.start(t)
		vm.waitFor("deaf")
		vm.signal(syscall.SIGTERM)
		vm.waitForMessage("asked to power off")
		vm.signal(syscall.SIGTERM)
		vm.exits(128 + int(syscall.SIGTERM))
	})
	im.check(root, checkClean, checkLeaks)
}

// The JSON result tells apart what an exit status cannot.
func TestResultFile(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	result := im.path("result.json")
	vm := guest{
		kernel: newestKernel(t), disks: []string{root}, script: `echo c >/proc/sysrq-trigger`,
		flags: []string{"--json", result},
	}.start(t)
	vm.exits(255)
	text, err := os.ReadFile(result)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if !strings.Contains(string(text), "panic") {
		t.Errorf("the result does not say that the guest panicked: %s", text)
	}
}

// The guest's console goes where --console says and nowhere else.
func TestConsoleToFile(t *testing.T) {
	lab.Need(t)
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	file := im.path("console.log")
	vm := guest{
		kernel: newestKernel(t), disks: []string{root}, script: `echo into the file; poweroff -f`,
		flags: []string{"--console", "file:" + file},
	}.start(t)
	vm.exits(0)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "into the file") {
		t.Errorf("the file holds %q", text)
	}
	if vm.console() != "" {
		t.Errorf("standard output holds %q", vm.console())
	}
}

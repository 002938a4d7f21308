package launch

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/vmm"
	"golang.org/x/sys/unix"
)

// How the guest ended decides the outcome and the code; what went wrong besides
// is never lost, and everything is said in one line.
func TestResult(t *testing.T) {
	lost := errors.New("close root.qcow2: no space left\nclose console: broken")
	killed := &killedError{signal: unix.SIGTERM, why: "ended by a signal"}
	tests := []struct {
		name    string
		end     end
		outcome string
		code    int
		says    string
	}{
		{"power-off", end{outcome: vmm.PowerOff, ran: true}, "poweroff", 0, ""},
		{"power-off, image not closed", end{outcome: vmm.PowerOff, ran: true, closing: lost}, "poweroff", 125, "no space left; close console"},
		{"command", end{ran: true, err: errCommandDone, command: &command{result: &agent.Result{Ran: true, Code: 7}}}, "exited", 7, ""},
		{"command, image not closed", end{ran: true, command: &command{result: &agent.Result{Ran: true}}, closing: lost}, "exited", 125, "may be in place; close root.qcow2: no space left"},
		{"command, disk full", end{ran: true, command: &command{result: &agent.Result{Ran: true}}, unwritten: lost}, "exited", 125, "no space left"},
		{"command failed, disk full", end{ran: true, command: &command{result: &agent.Result{Ran: true, Code: 7}}, unwritten: lost}, "exited", 7, "no space left"},
		{"command, output lost", end{ran: true, command: &command{result: &agent.Result{Ran: true, Unwritten: lost}}}, "exited", 125, "no space left"},
		{"command failed, output lost", end{ran: true, command: &command{result: &agent.Result{Ran: true, Code: 141, Unwritten: lost}}}, "exited", 141, "no space left"},
		{"power-off, disk full", end{outcome: vmm.PowerOff, ran: true, unwritten: lost}, "poweroff", 0, "no space left"},
		{"panic, disk full", end{outcome: vmm.Panic, ran: true, unwritten: lost}, "panic", 255, "no space left"},
		{"command failed, image not closed", end{ran: true, command: &command{result: &agent.Result{Ran: true, Code: 7}}, closing: lost}, "exited", 7, "close root.qcow2: no space left"},
		{"command not run", end{ran: true, command: &command{result: &agent.Result{Code: 127, Problem: "x: no such command"}}}, "not-run", 127, "no such command"},
		{"command without a status", end{ran: true, outcome: vmm.PowerOff, command: &command{err: agent.ErrNoStatus}}, "poweroff", 255, "without a status"},
		{"command without memory", end{ran: true, command: &command{result: &agent.Result{Ran: true, Code: 2}, tail: tail{b: []byte("[9.9] Out of memory: Killed process 42 (cc1)\n[9.9] oom_reaper: reaped\n")}}}, "exited", 2, "more with --memory"},
		{"command well without memory", end{ran: true, command: &command{result: &agent.Result{Ran: true}, tail: tail{b: []byte("Out of memory: Killed process 42 (cc1)\n")}}}, "exited", 0, ""},
		{"panic without memory", end{ran: true, outcome: vmm.Panic, command: &command{err: errGuestEnded, tail: tail{b: []byte(panicMark + ": System is deadlocked on memory\n")}}}, "panic", 255, "says why; the guest ran out of memory"},
		{"power-off, output dropped", end{outcome: vmm.PowerOff, ran: true, lost: true}, "poweroff", 0, "output of its console that nobody read was dropped"},
		{"panic, output dropped", end{outcome: vmm.Panic, ran: true, lost: true}, "panic", 255, "says why; output of its console"},
		{"panic", end{outcome: vmm.Panic, ran: true}, "panic", 255, "panicked"},
		{"panic, console gone", end{outcome: vmm.Panic, ran: true, closing: lost}, "panic", 255, "no space left"},
		{"triple fault", end{outcome: vmm.TripleFault, ran: true}, "triple-fault", 255, "triple fault"},
		{"boot timeout", end{outcome: vmm.BootTimeout, ran: true, closing: lost}, "boot-timeout", 124, "no space left"},
		{"timeout", end{outcome: vmm.Canceled, ran: true, err: errTimeout, closing: lost}, "timeout", 124, "no space left"},
		{"signal", end{outcome: vmm.Canceled, ran: true, err: killed, closing: lost}, "killed", 143, "no space left"},
		{"error while it ran", end{ran: true, err: errors.New("KVM internal error")}, "error", 255, "KVM internal error"},
		{"error before it ran", end{err: errors.New("no such kernel")}, "error", 125, "no such kernel"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := result(&config.Config{}, tt.end)
			if r.Outcome != tt.outcome || r.ExitCode != tt.code || !strings.Contains(r.Message, tt.says) || strings.Contains(r.Message, "\n") {
				t.Errorf("result = %+v; want %s, %d, one line with %q", r, tt.outcome, tt.code, tt.says)
			}
		})
	}
	gaveUp := end{ran: true, outcome: vmm.PowerOff, command: &command{err: errGuestEnded, tail: tail{b: []byte(agent.GivesUp + "why\n")}}}
	if r := result(&config.Config{}, gaveUp); r.Message != "the command could not be run: why" {
		t.Errorf("an agent that gives up: %+v", r)
	}
}

// A console file that is a disk of the guest is refused before it is emptied.
func TestConsoleOverDisk(t *testing.T) {
	dir := t.TempDir()
	disk, link := filepath.Join(dir, "root.img"), filepath.Join(dir, "link")
	if err := os.WriteFile(disk, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(disk, link); err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{Disks: []config.Disk{{Path: disk}}}
	for path, refused := range map[string]bool{disk: true, link: true, filepath.Join(dir, "log"): false} {
		err := checkConsole(console.Spec{Kind: console.File, Path: path}, cfg)
		if (err != nil) != refused {
			t.Errorf("a console at %s: %v", path, err)
		}
	}
}

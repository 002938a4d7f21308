package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// asSpeedGuest in the environment makes the test binary the command of TestSpeed. Its
// value is a number of MiB and of rounds.
const asSpeedGuest = "CALF_TEST_AS_SPEED_GUEST"

// measureSpeed in the environment has TestSpeed measure. It is for a machine that does
// nothing else.
const measureSpeed = "CALF_SPEED"

// TestSpeed measures what a command in a guest costs, beside the same without calf:
// its streams, and the agent's part of the boot. On hardware it holds calf to its
// bounds; in an emulated machine its figures are ratios and no more.
func TestSpeed(t *testing.T) {
	if os.Getenv(measureSpeed) == "" {
		t.Skipf("measures; set %s=1 for that", measureSpeed)
	}
	base := speedImage(t)
	t.Run("streams", func(t *testing.T) { speedOfStreams(t, base) })
	t.Run("echo", func(t *testing.T) { speedOfEcho(t, base) })
	t.Run("boot", func(t *testing.T) { speedOfBoot(t, base) })
}

// speedImage makes an image with the test binary in it, and returns the arguments that
// run a command in it.
func speedImage(t *testing.T) (args []string) {
	t.Helper()
	image, args := commandImage(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.GuestRoot(image, 256, nil, self); err != nil {
		t.Fatal(err)
	}
	return args
}

const (
	maxStreamRatio = 2                      // of a stream to /dev/null in the guest
	maxAgentTime   = 100 * time.Millisecond // more than a boot without the agent
)

// speedOfStreams moves zeros in the guest, out of it, and into it.
func speedOfStreams(t *testing.T, base []string) {
	mib, rounds := 1024, 5
	if lab.Inside() {
		mib = 32
	}
	zeros, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zeros.Close()
	null, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(lab.Calf(), append(base, "-e", fmt.Sprintf("%s=%d %d", asSpeedGuest, mib, rounds), "--", "/bin/"+filepath.Base(self))...)
	cmd.Stdin, cmd.Stdout = zeros, null
	vm := startCommand(t, cmd)
	exits := exitsByPhase(vm)
	vm.exits(0)
	took := map[string][]float64{}
	for _, m := range regexp.MustCompile(`(?m)^end (\w+) (\d+)$`).FindAllStringSubmatch(vm.stderr(), -1) {
		ns, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		took[m[1]] = append(took[m[1]], ns/1e9)
	}
	for _, p := range speedPhases(mib) {
		if len(took[p.name]) != rounds {
			t.Fatalf("%d figures for %s, want %d", len(took[p.name]), p.name, rounds)
		}
		n := float64(p.size * p.count)
		t.Logf("%-6s %8.1f MiB/s, %6.2f of the time of null, %9.1f ns and %.4f exits a write", p.name, n/(1<<20)/median(took[p.name]),
			median(took[p.name])/n*float64(mib<<20)/median(took["null"]), median(took[p.name])*1e9/float64(p.count), median(exits[p.name])/float64(p.count))
	}
	if ratio := median(took["stdout"]) / median(took["null"]); ratio > maxStreamRatio && !lab.Inside() {
		t.Errorf("a stream out of the guest takes %.2f times what it takes to /dev/null", ratio)
	}
}

// speedPhase is something that speedGuest does: as much as count times size bytes, from
// one file to the other.
type speedPhase struct {
	name, from, to string
	size, count    int
}

func speedPhases(mib int) []speedPhase {
	return []speedPhase{
		{"null", "/dev/zero", "/dev/null", 1 << 20, mib},
		{"pipe", "/dev/zero", "| cat", 1 << 20, mib},
		{"stdout", "/dev/zero", "/dev/stdout", 1 << 20, mib},
		{"stdin", "/dev/stdin", "/dev/null", 1 << 20, mib},
		{"lines", "/dev/zero", "/dev/stdout", 80, 2000},
	}
}

// speedGuest is what runs in the guest: it copies as speedPhases says, and tells how
// long that took.
func speedGuest() {
	var mib, rounds int
	_, err := fmt.Sscan(os.Getenv(asSpeedGuest), &mib, &rounds)
	if err == nil {
		err = speedRounds(mib, rounds)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func speedRounds(mib, rounds int) error {
	for range rounds {
		for _, p := range speedPhases(mib) {
			from, err := os.Open(p.from)
			if err != nil {
				return err
			}
			to, done, err := p.open()
			if err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "begin %s\n", p.name)
			time.Sleep(100 * time.Millisecond) // for the host to count
			took, err := p.run(from, to)
			if err = errors.Join(err, from.Close(), to.Close(), done()); err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "end %s %d\n", p.name, took)
		}
	}
	fmt.Fprintln(os.Stderr, "begin nothing")
	return nil
}

// open opens what p writes to. done is to be called when that has been closed.
func (p speedPhase) open() (to *os.File, done func() error, err error) {
	name, isCommand := strings.CutPrefix(p.to, "| ")
	if !isCommand {
		to, err = os.OpenFile(p.to, os.O_WRONLY, 0)
		return to, func() error { return nil }, err
	}
	from, to, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(name)
	cmd.Stdin = from
	if err := cmd.Start(); err != nil { // its output goes to /dev/null
		return nil, nil, err
	}
	return to, cmd.Wait, from.Close()
}

func (p speedPhase) run(from, to *os.File) (took time.Duration, err error) {
	buf := make([]byte, p.size)
	began := time.Now()
	for range p.count {
		if _, err := io.ReadFull(from, buf); err != nil {
			return 0, err
		}
		if _, err := to.Write(buf); err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}

// exitsByPhase returns how often the guest of vm has left its processor in each phase
// that its command has announced, where this machine counts that. It returns at the
// end of the last phase.
func exitsByPhase(vm *vm) map[string][]float64 {
	exits := map[string][]float64{}
	phase, before, seen := "", 0.0, 0
	begin := regexp.MustCompile(`(?m)^begin (\w+)$`)
	for phase != "nothing" {
		vm.mu.Lock()
		more, text := vm.more, vm.errs.String()
		vm.mu.Unlock()
		if all := begin.FindAllStringSubmatch(text, -1); len(all) > seen {
			now := kvmExits()
			if phase != "" && len(all) == seen+1 {
				exits[phase] = append(exits[phase], now-before)
			}
			phase, before, seen = all[len(all)-1][1], now, len(all)
			continue
		}
		select {
		case <-more:
		case <-vm.done:
			return exits
		}
	}
	return exits
}

// kvmExits is how often guests have left the processor on this machine, 0 if that is
// not known.
func kvmExits() float64 {
	const debugfs = "/sys/kernel/debug"
	text, err := os.ReadFile(debugfs + "/kvm/exits")
	if err != nil && lab.Inside() {
		if unix.Mount("debugfs", debugfs, "debugfs", 0, "") == nil {
			text, _ = os.ReadFile(debugfs + "/kvm/exits")
		}
	}
	n, _ := strconv.ParseFloat(strings.TrimSpace(string(text)), 64) // 0 without a text
	return n
}

// speedOfEcho sends single bytes through a command and waits for each.
func speedOfEcho(t *testing.T, base []string) {
	const trips = 200
	guest := exec.Command(lab.Calf(), append(base, "--", "cat")...)
	guest.Stderr = io.Discard
	here, there := roundTrips(t, exec.Command("cat"), trips), roundTrips(t, guest, trips)
	t.Logf("echo %v, %.1f of a local cat's %v", there, float64(there)/float64(here), here)
}

// roundTrips returns the median time that a byte takes through cmd, which is cat.
func roundTrips(t *testing.T, cmd *exec.Cmd, n int) time.Duration {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	var took []float64
	for range n {
		before := time.Now()
		if _, err := in.Write([]byte{'x'}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadByte(); err != nil {
			t.Fatal(err)
		}
		took = append(took, float64(time.Since(before)))
	}
	t.Logf("%s holds %.1f MiB of its own, without a guest's", filepath.Base(cmd.Path), float64(ownMemory(t, cmd.Process.Pid))/(1<<20))
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return time.Duration(median(took))
}

// ownMemory is how much memory a process shares with nobody, but for the RAM of a guest,
// which is its one mapping of as much as that.
func ownMemory(t *testing.T, pid int) int64 {
	t.Helper()
	const guestRAM = 256 << 10 // KiB
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	var sum, size int64
	for line := range strings.Lines(string(maps)) {
		name, value, _ := strings.Cut(line, ":")
		var n int64
		_, _ = fmt.Sscan(value, &n) // 0 in lines that say something else
		switch name {
		case "Size":
			size = n
		case "Anonymous":
			if size != guestRAM {
				sum += n << 10
			}
		}
	}
	return sum
}

// speedOfBoot boots guests that do nothing by turns: one whose initramfs ends it before
// it has loaded a driver, and one with the agent and a command that does nothing.
func speedOfBoot(t *testing.T, base []string) {
	initrd := filepath.Join(t.TempDir(), "off")
	if err := newestKernel(t).WithScript(initrd, "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"); err != nil {
		t.Fatal(err)
	}
	plain := slices.Clone(base)
	plain[slices.Index(plain, "--initrd")+1] = initrd
	plain[slices.Index(plain, "--cmdline")+1] += " rdinit=/script"
	ready := regexp.MustCompile(`msg="the agent was ready for the command" kernel=(\S+) agent=(\S+)`)
	const rounds = 5
	var with, without, kernel, agent []float64
	for range rounds {
		without = append(without, runTime(startCalf(t, plain...)))
		vm := startCalf(t, append(base, "--", "true")...)
		with = append(with, runTime(vm))
		m := ready.FindStringSubmatch(vm.stderr())
		if m == nil {
			t.Fatal("calf does not say how long the agent took")
		}
		for i, times := range []*[]float64{&kernel, &agent} {
			d, err := time.ParseDuration(m[i+1])
			if err != nil {
				t.Fatal(err)
			}
			*times = append(*times, d.Seconds())
		}
	}
	more := time.Duration((median(with) - median(without)) * float64(time.Second)).Round(time.Millisecond)
	t.Logf("with the agent %.2f s, without %.2f s: %v more, %.2f of it; %.2f s until the agent began, %.2f s until it was ready",
		median(with), median(without), more, median(with)/median(without), median(kernel), median(agent))
	if more > maxAgentTime && !lab.Inside() {
		t.Errorf("the agent adds %v to a boot, more than %v", more, maxAgentTime)
	}
}

// runTime is how long vm, which has just been started, runs, in seconds.
func runTime(vm *vm) float64 {
	vm.t.Helper()
	began := time.Now()
	vm.exits(0)
	return time.Since(began).Seconds()
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}

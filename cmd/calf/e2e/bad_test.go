package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// TestBadCommand runs commands that cannot be run, and one whose arguments are any
// bytes.
func TestBadCommand(t *testing.T) {
	_, base := commandImage(t)
	var all []byte
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	args := []string{string(all), "", "\xff\xfe", strings.Repeat("x", 100<<10)}
	want := sha256.New()
	for _, arg := range append(args, "=a=\x80") {
		fmt.Fprintf(want, "<%s>", arg)
	}
	t.Run("any bytes", func(t *testing.T) {
		script := `printf '<%s>' "$@" "$X" | sha256sum; printf '#!/no/such/loader\n' >/tmp/x; chmod 755 /tmp/x; exec /tmp/x`
		// Busybox's shell tries what cannot be executed as a script, and then says 127.
		flags := []string{"-e", "X==a=\x80", "--", "sh", "-c", script, "sh"}
		vm := startCalf(t, slices.Concat(base, flags, args)...)
		vm.exits(127)
		if got := vm.console(); got != fmt.Sprintf("%x  -\n", want.Sum(nil)) {
			t.Errorf("the arguments have the sum %q, want %x", got, want.Sum(nil))
		}
	})
	t.Run("no shell", func(t *testing.T) {
		dir, image := t.TempDir(), filepath.Join(t.TempDir(), "bare.raw")
		for _, name := range []string{"bin", "dev", "proc", "sys", "tmp", "run"} {
			if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "bin", "script"), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "mke2fs", "-q", "-t", "ext4", "-d", dir, image, "32M")
		bare := slices.Clone(base)
		bare[slices.Index(bare, "--disk")+1] = image + ",format=raw"
		for command, want := range map[string]struct {
			code int
			says string
		}{
			"sh":     {127, `"sh": there is no such command in the guest`},
			"script": {126, "/bin/script cannot be executed: the guest does not have \"/bin/sh\""},
		} {
			vm := startCalf(t, append(bare, "--", command, "-c", "true")...)
			vm.exits(want.code)
			if !strings.Contains(vm.stderr(), want.says) {
				t.Errorf("it said %q, want %q", vm.stderr(), want.says)
			}
		}
	})
}

// TestNoRoom has no room for what the guest writes, and for what its command says.
func TestNoRoom(t *testing.T) {
	_, base := commandImage(t)
	t.Run("overlay", func(t *testing.T) {
		small := t.TempDir()
		if err := syscall.Mount("small", small, "tmpfs", 0, "size=8m"); err != nil {
			t.Skipf("cannot make a small file system: %v", err)
		}
		defer func() {
			if err := syscall.Unmount(small, 0); err != nil { // which is busy if anything is left
				t.Error(err)
			}
		}()
		cmd := exec.Command(lab.Calf(), append(base, "--", "sh", "-c", "dd if=/dev/urandom of=/file bs=1M count=40; sync; true")...)
		cmd.Env = append(os.Environ(), "TMPDIR="+small)
		vm := startCommand(t, cmd)
		vm.exits(125)
		for _, want := range []string{"no room left in " + small, "throw-away overlay", "TMPDIR", "no space left on device"} {
			if !strings.Contains(vm.stderr(), want) {
				t.Errorf("it said %q, want %q", vm.stderr(), want)
			}
		}
		if entries, err := os.ReadDir(small); err != nil || len(entries) > 0 {
			t.Errorf("%v are left, %v", entries, err)
		}
	})
	t.Run("output", func(t *testing.T) {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer full.Close()
		cmd := exec.Command(lab.Calf(), append(base, "--", "echo", "hello")...)
		cmd.Stdout = full
		vm := startCommand(t, cmd)
		vm.exits(125)
		if !strings.Contains(vm.stderr(), "output of the command is lost: write /dev/stdout: no space left on device") {
			t.Errorf("it said %q", vm.stderr())
		}
	})
}

// TestEndlessOutput takes some of an output that never stops, and then no more.
func TestEndlessOutput(t *testing.T) {
	_, base := commandImage(t)
	start := func(t *testing.T, script string) (*vm, *os.File) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close() })
		cmd := exec.Command(lab.Calf(), append(base, "--", "sh", "-c", script)...)
		cmd.Stdout = w
		vm := startCommand(t, cmd)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return vm, r
	}
	t.Run("reader leaves", func(t *testing.T) {
		vm, r := start(t, "exec yes")
		const some = 8 << 20
		if n, err := io.CopyN(io.Discard, r, some); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		time.Sleep(time.Second) // for what would pile up
		const most = 256<<10 + 128<<10
		if kib := peakKiB(t, vm); kib > most {
			t.Errorf("calf takes %d KiB with its guest of 256 MiB", kib)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		vm.exits(141)
	})
	t.Run("nobody reads, nobody listens", func(t *testing.T) {
		vm, r := start(t, "trap '' INT TERM HUP; while :; do echo y; done")
		if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		vm.signal(syscall.SIGINT)
		vm.waitForMessage("a second signal ends the guest")
		vm.signal(syscall.SIGINT)
		began := time.Now()
		vm.exits(130)
		if took := time.Since(began); took > 20*time.Second { // of an emulated processor
			t.Errorf("the end took %v", took)
		}
	})
}

// peakKiB is the most memory that calf has had.
func peakKiB(t *testing.T, v *vm) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// TestKilled kills calf at any moment: nothing is left that runs or that the next run
// minds, and after that one nothing but what was asked for.
func TestKilled(t *testing.T) {
	_, base := commandImage(t)
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir, tmp := t.TempDir(), t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	// The artifact takes a while.
	const script = "mkdir /o; for i in 1 2 3 4 5 6 7 8; do head -c 3000000 /dev/urandom >/o/$i; done; echo made"
	start := func() *vm {
		t.Helper()
		flags := []string{
			"--vsock", path("sock"), "--keep", path("kept.qcow2"), "--json", path("result.json"), "--console", "file:" + path("console"),
			"--artifact", "/o=" + path("out"), "--", "sh", "-c", script,
		}
		cmd := exec.Command(lab.Calf(), append(base, flags...)...)
		cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
		return startCommand(t, cmd)
	}
	moments := []func(vm *vm){
		func(*vm) { time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond) },
		func(*vm) { time.Sleep(time.Duration(random.IntN(10_000)) * time.Millisecond) },
		func(vm *vm) { vm.waitFor("made") },
		func(*vm) {
			for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if entries, _ := os.ReadDir(path("out")); len(entries) > 0 {
					return
				}
			}
			t.Error("no artifact comes")
		},
	}
	for i, moment := range moments {
		if err := os.Remove(path("kept.qcow2")); err != nil && !os.IsNotExist(err) { // which is the user's
			t.Fatal(err)
		}
		vm := start()
		moment(vm)
		vm.kill()
		if entries, err := os.ReadDir(tmp); err != nil || len(entries) > 0 {
			t.Errorf("kill %d leaves %v, %v", i, entries, err)
		}
		if left := processes(t); len(left) > 0 {
			t.Errorf("kill %d leaves %q running", i, left)
		}
		entries, err := os.ReadDir(path("out"))
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		for _, e := range entries {
			if info, err := e.Info(); err != nil || info.Size() != 3_000_000 {
				t.Errorf("kill %d leaves a part of %s: %v, %v", i, e.Name(), info, err)
			}
		}
	}
	if err := os.Remove(path("kept.qcow2")); err != nil {
		t.Fatal(err)
	}
	start().exits(0)
	var names []string
	for _, d := range []string{dir, path("out")} {
		entries, err := os.ReadDir(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	if want := strings.Fields("console kept.qcow2 out result.json 1 2 3 4 5 6 7 8"); !slices.Equal(names, want) {
		t.Errorf("there are %q, want %q", names, want)
	}
	run(t, "qemu-img", "check", "-q", path("kept.qcow2"))
}

// processes are the command lines of calf's processes.
func processes(t *testing.T) []string {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, path := range lines {
		if line, err := os.ReadFile(path); err == nil && bytes.HasPrefix(line, []byte(lab.Calf()+"\x00")) {
			found = append(found, string(line))
		}
	}
	return found
}

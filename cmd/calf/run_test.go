package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/qcow2"
)

// setUp makes a directory with a kernel file that is none, an image and a
// configuration.
func setUp(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range map[string]string{"vmlinuz": string(new(guesttest.Program).ELF()), "data.img": strings.Repeat("x", 4096), "ci.toml": goodConfig} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newQCOW2(t, filepath.Join(dir, "root.qcow2"), qcow2.CreateOptions{})
	return dir
}

func newQCOW2(t *testing.T, path string, opts qcow2.CreateOptions) {
	t.Helper()
	opts.Size = 1 << 20
	if err := qcow2.Create(path, opts); err != nil {
		t.Fatal(err)
	}
}

// contents returns the bytes of every file under dir.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			files[path] = string(b)
			return err
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestFlagsOverrideTheFile(t *testing.T) {
	dir := setUp(t)
	file, image, data := filepath.Join(dir, "ci.toml"), filepath.Join(dir, "root.qcow2"), filepath.Join(dir, "data.img")
	kernel, other := filepath.Join(dir, "vmlinuz"), new(guesttest.Program).Kernel(t)
	for _, tt := range []struct {
		name  string
		args  []string
		check func(c *config.Config) (got, want any)
	}{
		{"the file", []string{file}, func(c *config.Config) (any, any) { return c.VM.CPUs, 2 }},
		{"cpus", []string{file, "--cpus", "3"}, func(c *config.Config) (any, any) { return c.VM.CPUs, 3 }},
		{"queues follow cpus", []string{file, "--cpus", "3"}, func(c *config.Config) (any, any) { return c.Disks[1].Queues, 3 }},
		{"memory", []string{file, "--memory=64M"}, func(c *config.Config) (any, any) { return c.VM.Memory, config.Size(64 << 20) }},
		{"kernel", []string{file, "--kernel", other}, func(c *config.Config) (any, any) { return c.Boot.Kernel, other }},
		{"initrd", []string{file, "--initrd", data}, func(c *config.Config) (any, any) { return c.Boot.Initrd, data }},
		{"cmdline", []string{file, "--cmdline", "a b"}, func(c *config.Config) (any, any) { return c.Boot.Cmdline, "a b" }},
		{"vsock", []string{file, "--vsock", data}, func(c *config.Config) (any, any) { return c.Vsock.Path, data }},
		{"timeout", []string{file, "--timeout", "9s"}, func(c *config.Config) (any, any) { return c.VM.Timeout, 9 * time.Second }},
		{"boot timeout", []string{file, "--boot-timeout", "8s"}, func(c *config.Config) (any, any) { return c.VM.BootTimeout, 8 * time.Second }},
		{"disk added", []string{"--kernel", kernel, "--disk", data + ",format=raw"}, func(c *config.Config) (any, any) { return c.Disks[0].Path, data }},
		{"disk changed", []string{file, "--disk", data + ",serial=s"}, func(c *config.Config) (any, any) {
			return []any{len(c.Disks), c.Disks[1].Serial, c.Disks[1].ReadOnly}, []any{2, "s", true}
		}},
		{"no snapshot for a file", []string{file}, func(c *config.Config) (any, any) { return c.Disks[0].Snapshot, false }},
		{"snapshot", []string{file, "--snapshot"}, func(c *config.Config) (any, any) { return c.Disks[0].Snapshot, true }},
		{"snapshot for an image", []string{image, "--kernel", kernel, "--disk", data + ",format=raw"}, func(c *config.Config) (any, any) {
			return []bool{c.Disks[0].Snapshot, c.Disks[1].Snapshot}, []bool{true, true}
		}},
		{"one disk excepted", []string{image, "--kernel", kernel, "--disk", data + ",format=raw,snapshot=false"}, func(c *config.Config) (any, any) {
			return []bool{c.Disks[0].Snapshot, c.Disks[1].Snapshot}, []bool{true, false}
		}},
		{"no snapshot", []string{image, "--kernel", kernel, "--no-snapshot"}, func(c *config.Config) (any, any) { return c.Disks[0].Snapshot, false }},
		{"no snapshot for a disk alone", []string{"--kernel", kernel, "--disk", image}, func(c *config.Config) (any, any) { return c.Disks[0].Snapshot, false }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := mustCalf(t, append([]string{"run", "--dry-run"}, tt.args...)...)
			c, err := config.Parse("dry-run", "/", []byte(out))
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got, want := tt.check(c); !cmp.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestBadInput(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, dir string) []string // the arguments of run
		lines   int                                     // of the message
		says    []string
	}{
		{"no kernel", func(_ *testing.T, dir string) []string { return []string{dir + "/root.qcow2"} }, 1, []string{"--kernel"}},
		{"file missing", func(*testing.T, string) []string { return []string{"none.toml"} }, 1, []string{"none.toml", "no such file"}},
		{"neither file nor image", func(_ *testing.T, dir string) []string { return []string{dir + "/data.img"} }, 1, []string{"data.img", "format=raw"}},
		{"two arguments", func(*testing.T, string) []string { return []string{"a.qcow2", "b.qcow2"} }, 1, []string{"--disk"}},
		{"no command", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", "--"} }, 1, []string{"no command follows the --"}},
		{"empty command", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", "--", ""} }, 1, []string{"is an empty string"}},
		{"flag of a command", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", "--copy", ".:/src"} }, 1, []string{"--copy . is for a command in the guest: add -- COMMAND"}},
		{"console of a command", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--console", "stdio", "--", "true"}
		}, 1, []string{"standard output is that of the command"}},
		{"copy to nowhere", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--copy", ".", "--", "true"}
		}, 1, []string{"the path in the guest is missing"}},
		{"copy of nothing", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--copy", "no-such-file:/src", "--", "true"}
		}, 1, []string{"no-such-file: no such file"}},
		{"target of no copy", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", ":/src", "--", "true"} }, 1, []string{"belongs to no --copy"}},
		{"artifact from nowhere", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--artifact", "x=y", "--", "true"}
		}, 1, []string{"FROM is a path in the guest"}},
		{"unset variable", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "-e", "NO_SUCH_VARIABLE", "--", "true"}
		}, 1, []string{"there is no such variable here"}},
		{"variable without a name", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--env", "=x", "--", "true"}
		}, 1, []string{"the name of the variable is missing"}},
		{"unknown flag", func(*testing.T, string) []string { return []string{"--cpu", "2"} }, 1, []string{"--cpu"}},
		{"bad flags", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--cpus", "many", "--memory", "0", "--disk", "x.qcow2,quees=1"}
		}, 3, []string{"--cpus must be", "--memory must be", `did you mean "queues"`}},
		{"bad console", func(*testing.T, string) []string { return []string{"--console", "vga"} }, 1, []string{"vga", "pty"}},
		{"bad log level", func(*testing.T, string) []string { return []string{"--log-level", "loud"} }, 1, []string{"loud", "debug"}},
		{"both snapshots", func(*testing.T, string) []string { return []string{"--snapshot", "--no-snapshot"} }, 1, []string{"no-snapshot"}},
		{"result nowhere", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--json", dir + "/no/such/dir"}
		}, 1, []string{"--json", "no such file"}},
		{"kernel missing", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", "--kernel", dir + "/none"} }, 1, []string{"kernel", "none", "no such file"}},
		{"kernel is a directory", func(_ *testing.T, dir string) []string { return []string{dir + "/ci.toml", "--kernel", dir} }, 1, []string{"kernel", "regular file"}},
		{"kernel is none", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--kernel", dir + "/data.img"}
		}, 1, []string{"data.img", "neither a bzImage"}},
		{"image missing", func(_ *testing.T, dir string) []string {
			return []string{dir + "/ci.toml", "--disk", dir + "/none.qcow2"}
		}, 1, []string{"none.qcow2", "no such file"}},
		{"image without a format", func(_ *testing.T, dir string) []string {
			return []string{"--kernel", dir + "/vmlinuz", "--disk", dir + "/data.img"}
		}, 1, []string{"data.img", "format"}},
		{"image is no QCOW2", func(_ *testing.T, dir string) []string {
			return []string{"--kernel", dir + "/vmlinuz", "--disk", dir + "/data.img,format=qcow2"}
		}, 1, []string{"data.img", "QCOW2"}},
		{"image is corrupt", func(t *testing.T, dir string) []string {
			patch(t, dir+"/root.qcow2", 40, 0x30001) // the L1 table begins inside a cluster
			return []string{dir + "/ci.toml"}
		}, 1, []string{"root.qcow2", "L1"}},
		{"image is locked", func(t *testing.T, dir string) []string {
			img, err := qcow2.Open(dir+"/root.qcow2", qcow2.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = img.Close() })
			return []string{dir + "/ci.toml"}
		}, 1, []string{"root.qcow2", "in use"}},
		{"backing file elsewhere", func(t *testing.T, dir string) []string {
			elsewhere := setUp(t)
			newQCOW2(t, dir+"/over.qcow2", qcow2.CreateOptions{BackingFile: elsewhere + "/data.img", BackingFormat: "raw"})
			return []string{dir + "/over.qcow2", "--kernel", dir + "/vmlinuz"}
		}, 1, []string{"over.qcow2", "data.img", "backing_dirs"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := setUp(t)
			args := append([]string{"run"}, tt.prepare(t, dir)...)
			before := contents(t, dir)
			code, stdout, stderr := calf(t, args...)
			refused(t, tt.lines, code, stdout, stderr, tt.says...)
			if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
				t.Errorf("a file has changed:\n%s", diff)
			}
		})
	}
}

// patch overwrites 8 bytes of a file.
func patch(t *testing.T, path string, off int64, v uint64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(binary.BigEndian.AppendUint64(nil, v), off)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// needKVM skips a test where /dev/kvm cannot be opened.
func needKVM(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// guest returns a kernel that says hello and does what build adds.
func guest(t *testing.T, build func(p *guesttest.Program)) (kernel string) {
	t.Helper()
	needKVM(t)
	var p guesttest.Program
	p.Print("hello\r\n")
	build(&p)
	return p.Kernel(t)
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		build   func(p *guesttest.Program)
		flags   []string
		code    int
		outcome string
		says    string
	}{
		{"power-off", (*guesttest.Program).PowerOff, nil, 0, "poweroff", ""},
		{"reboot", (*guesttest.Program).Reset, []string{"--no-reboot"}, 0, "reboot", ""},
		{"panic", func(p *guesttest.Program) { p.Out8(0x505, 1); p.Halt() }, nil, 255, "panic", "panicked"},
		{"triple fault", func(p *guesttest.Program) {
			p.Write64(guesttest.Scratch, 0)
			p.Raw(0x0F, 0x01, 0x1D, 0x00, 0x00, 0x00, 0x02) // lidt [Scratch], an empty table
			p.Raw(0x31, 0xC0, 0xF7, 0xF0)                   // xor eax, eax; div eax
		}, nil, 255, "triple-fault", "triple fault"},
		{"timeout", (*guesttest.Program).Spin, []string{"--timeout", "2s"}, 124, "timeout", "timeout: the run had not ended after 2s"},
		{"boot timeout", (*guesttest.Program).Spin, []string{"--boot-timeout", "1s"}, 124, "boot-timeout", "boot timeout"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := setUp(t)
			result := filepath.Join(dir, "result.json")
			args := []string{"run", dir + "/root.qcow2", "--memory", "64M", "--kernel", guest(t, tt.build), "--json", result}
			code, stdout, stderr := calfProcess(t, append(args, tt.flags...)...)
			if code != tt.code || stdout != "hello\r\n" || !strings.Contains(stderr, tt.says) || tt.says == "" && stderr != "" {
				t.Errorf("exit code %d, output %q, message %q; want %d, %q, %q", code, stdout, stderr, tt.code, "hello\r\n", tt.says)
			}
			got := readResult(t, result)
			if got.Outcome != tt.outcome || got.ExitCode != tt.code || !strings.Contains(stderr, got.Message) || got.Seconds <= 0 {
				t.Errorf("result = %+v, want %s, %d", got, tt.outcome, tt.code)
			}
		})
	}
}

func readResult(t *testing.T, path string) (r launch.Result) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%v: %q", err, b)
	}
	return r
}

func TestResultOfARunThatNeverBegan(t *testing.T) {
	dir := setUp(t)
	result := filepath.Join(dir, "result.json")
	code, stdout, stderr := calf(t, "run", dir+"/ci.toml", "--cpus", "0", "--json", result)
	refused(t, 1, code, stdout, stderr, "--cpus")
	if got := readResult(t, result); got.Outcome != "error" || got.ExitCode != 125 || !strings.Contains(got.Message, "--cpus") {
		t.Errorf("result = %+v", got)
	}
	for name, bad := range map[string][]string{
		"a flag that does not exist": {"--bogus", "--json", result},
		"after the result":           {"--json=" + result, "--bogus=x"},
		"flags against each other":   {"--json", result, "--snapshot", "--no-snapshot"},
		"an older result":            {"--json", result, "--disk"},
	} {
		code, stdout, stderr := calf(t, append([]string{"run", dir + "/ci.toml"}, bad...)...)
		refused(t, 1, code, stdout, stderr, "")
		if got := readResult(t, result); got.ExitCode != 125 || !strings.Contains(stderr, got.Message) || strings.Contains(got.Message, "--cpus") {
			t.Errorf("%s: result = %+v, messages %q", name, got, stderr)
		}
	}
	// The value of another flag is not a place for the result.
	before := contents(t, dir)
	calf(t, "run", dir+"/ci.toml", "--cmdline", "--json", dir+"/data.img", "--bogus")
	if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
		t.Errorf("misread flags changed files:\n%s", diff)
	}
	files, err := filepath.Glob(dir + "/.result*")
	if err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

// start runs calf until its guest has said hello.
func start(t *testing.T, args ...string) (cmd *exec.Cmd, messages *bytes.Buffer) {
	t.Helper()
	cmd, messages = command(args...), &bytes.Buffer{}
	cmd.Stderr = messages
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	hello := make([]byte, len("hello"))
	if _, err := io.ReadFull(out, hello); err != nil {
		t.Fatalf("the guest says %q: %v; calf says %q", hello, err, messages)
	}
	return cmd, messages
}

func TestSignals(t *testing.T) {
	deaf := func(p *guesttest.Program) { p.Print("."); p.Spin() }
	listening := func(p *guesttest.Program) {
		p.Out16(0x602, 1<<8) // enable the power button
		p.Print(".")
		p.PollPort(0x600, 1<<8, 1<<8)
		p.PowerOff()
	}
	for _, tt := range []struct {
		name  string
		build func(p *guesttest.Program)
		send  []unix.Signal
		code  int
	}{
		{"power button", listening, []unix.Signal{unix.SIGTERM}, 0},
		{"second signal", deaf, []unix.Signal{unix.SIGINT, unix.SIGTERM}, 128 + int(unix.SIGTERM)},
		{"quit", deaf, []unix.Signal{unix.SIGQUIT}, 128 + int(unix.SIGQUIT)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := setUp(t)
			cmd, messages := start(t, "run", "--memory", "64M", "--kernel", guest(t, tt.build), "--json", dir+"/result.json")
			for _, sig := range tt.send {
				time.Sleep(50 * time.Millisecond) // signals of one moment may arrive in any order
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
			}
			_ = cmd.Wait() // the exit code says more
			if got := cmd.ProcessState.ExitCode(); got != tt.code {
				t.Errorf("exit code %d, want %d; calf says %q", got, tt.code, messages)
			}
			if r := readResult(t, dir+"/result.json"); r.ExitCode != tt.code || (r.Outcome == "killed") != (tt.code != 0) {
				t.Errorf("result = %+v", r)
			}
		})
	}
}

// TestIgnoredSignalsStayIgnored starts calf as nohup does.
func TestIgnoredSignalsStayIgnored(t *testing.T) {
	kernel := guest(t, (*guesttest.Program).Spin)
	cmd := command("run", "--memory", "64M", "--kernel", kernel, "--timeout", "3s")
	cmd.Args = append([]string{"sh", "-c", `trap "" HUP; exec "$@"`, "sh"}, cmd.Args...)
	cmd.Path = "/bin/sh"
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("hello"))); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	_ = cmd.Wait() // the exit code says more
	if got := cmd.ProcessState.ExitCode(); got != launch.ExitTimeout {
		t.Errorf("exit code %d, want that of the timeout, %d", got, launch.ExitTimeout)
	}
}

func TestConsoleOnAPTY(t *testing.T) {
	kernel := guest(t, (*guesttest.Program).PowerOff)
	code, stdout, stderr := calf(t, "run", "--memory", "64M", "--kernel", kernel, "--console", "pty")
	if code != 0 || stdout != "" || !strings.HasPrefix(stderr, "calf: the guest's console is /dev/pts/") {
		t.Errorf("exit code %d, output %q, message %q", code, stdout, stderr)
	}
}

func TestKilledRunLeavesNothing(t *testing.T) {
	dir, tmp := setUp(t), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	before := contents(t, dir)
	cmd, _ := start(t, "run", dir+"/root.qcow2", "--memory", "64M", "--kernel", guest(t, (*guesttest.Program).Spin))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
		t.Errorf("a file has changed:\n%s", diff)
	}
}

// What a guest without a command writes can be kept, too.
func TestKeep(t *testing.T) {
	dir := setUp(t)
	before := contents(t, dir)
	image, kept := dir+"/root.qcow2", dir+"/kept.qcow2"
	args := []string{"run", image, "--memory", "64M", "--kernel", guest(t, (*guesttest.Program).PowerOff), "--keep", kept}
	mustCalf(t, args...)
	info, err := qcow2.Inspect(kept)
	if err != nil || info.BackingFile != "root.qcow2" || info.Size != 1<<20 {
		t.Errorf("the overlay is %+v, %v", info, err)
	}
	if code, stdout, stderr := calf(t, args...); code != launch.ExitError {
		t.Errorf("an overlay that is there: exit code %d, %q, %q", code, stdout, stderr)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
		t.Errorf("a file has changed:\n%s", diff)
	}
}

func TestConsoleToAFile(t *testing.T) {
	log := filepath.Join(t.TempDir(), "console.log")
	kernel := guest(t, (*guesttest.Program).PowerOff)
	if out := mustCalf(t, "run", "--memory", "64M", "--kernel", kernel, "--console", "file:"+log); out != "" {
		t.Errorf("standard output holds %q", out)
	}
	if b, err := os.ReadFile(log); err != nil || string(b) != "hello\r\n" {
		t.Errorf("the file holds %q, %v", b, err)
	}
}

func TestTerminal(t *testing.T) {
	kernel := guest(t, (*guesttest.Program).Spin)
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer slave.Close()
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	cmd := command("run", "--memory", "64M", "--kernel", kernel)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	var seen []byte
	for buf := make([]byte, 256); !bytes.Contains(seen, []byte("hello\r\n")); {
		n, err := master.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, seen)
		}
		seen = append(seen, buf[:n]...)
	}
	if !bytes.Contains(seen, []byte("Ctrl-A x ends the guest")) {
		t.Errorf("calf does not tell of the escape: %q", seen)
	}
	if _, err := master.WriteString("\x03\x01x"); err != nil { // Ctrl-C is the guest's
		t.Fatal(err)
	}
	_ = cmd.Wait() // the exit code says more
	if got := cmd.ProcessState.ExitCode(); got != 130 {
		t.Errorf("exit code %d, want 130", got)
	}
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal is %+v, %v; it was %+v", after, err, before)
	}
}

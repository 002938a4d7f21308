package launch

import (
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/guesttest"
)

// bootable makes an image with an ext4 file system of files.
func bootable(t *testing.T, format string, files map[string]string) config.Disk {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		host := filepath.Join(dir, "files", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(host), 0o755), os.WriteFile(host, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	d := config.Disk{Path: filepath.Join(dir, "disk."+format), Format: format}
	raw := filepath.Join(dir, "made")
	for _, cmd := range [][]string{
		{"/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-U", "11111111-2222-4333-8444-555555555555", "-d", filepath.Join(dir, "files"), raw, "8M"},
		{"qemu-img", "convert", "-f", "raw", "-O", format, raw, d.Path},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", cmd, err, out)
		}
	}
	return d
}

// kernelThat returns a kernel that prints something and powers off.
func kernelThat(prints string) string {
	var p guesttest.Program
	p.Print(prints)
	p.PowerOff()
	return string(p.ELF())
}

// TestKernelOnTheDisk boots images without being given a kernel.
func TestKernelOnTheDisk(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	files := map[string]string{
		"boot/vmlinuz-5": kernelThat("five"), "boot/vmlinuz-6": kernelThat("six"), "etc/os-release": "x",
		"boot/grub/grub.cfg": "menuentry six {\nlinux /boot/vmlinuz-6 root=/dev/sda\n}\nmenuentry five {\nlinux /boot/vmlinuz-5 root=/dev/sda\n}\n",
	}
	for _, tt := range []struct {
		name, format, want string
		snapshot           bool
		change             func(files map[string]string, c *config.Config)
	}{
		{"qcow2", config.FormatQCOW2, "six", false, func(map[string]string, *config.Config) {}},
		{"qcow2, snapshot", config.FormatQCOW2, "six", true, func(map[string]string, *config.Config) {}},
		{"raw, another default", config.FormatRaw, "five", false, func(files map[string]string, _ *config.Config) { files["boot/grub/grub.cfg"] += "set default=1\n" }},
		{"a kernel is given", config.FormatQCOW2, "given", false, func(_ map[string]string, c *config.Config) {
			c.Boot.Kernel = filepath.Join(t.TempDir(), "kernel")
			if err := os.WriteFile(c.Boot.Kernel, []byte(kernelThat("given")), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			changed := make(map[string]string)
			maps.Copy(changed, files)
			cfg := &config.Config{VM: config.VM{Memory: 64 << 20, Timeout: 20 * time.Second}}
			tt.change(changed, cfg)
			disk := bootable(t, tt.format, changed)
			disk.Snapshot = tt.snapshot
			cfg.Disks = []config.Disk{disk}
			if err := cfg.Validate(); err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(t.TempDir(), "console")
			r := Run(cfg, Options{
				Console: console.Spec{Kind: console.File, Path: out}, Streams: console.Streams{In: os.Stdin, Out: os.Stdout, Messages: console.NewMessages(os.Stderr)},
				Logger: slog.New(slog.DiscardHandler), AllowEmulation: true,
			})
			if got := read(t, out); r.ExitCode != ExitPowerOff || string(got) != tt.want {
				t.Errorf("%+v, console %q, want %q", r, got, tt.want)
			}
		})
	}
}

// TestKernelNotFound says what is missing, before a guest runs.
func TestKernelNotFound(t *testing.T) {
	kernel := kernelThat("")
	for _, tt := range []struct {
		name    string
		files   map[string]string
		cmdline string
		want    []string // none: nothing is wrong
	}{
		{"a kernel and a root", map[string]string{"boot/vmlinuz": kernel, "etc/os-release": "x"}, "", nil},
		{"no kernel", map[string]string{"etc/os-release": "x"}, "", []string{"no kernel was found on the disk: the disk (ext4) has none", "--kernel", "--initrd", "root="}},
		{"no root", map[string]string{"vmlinuz": kernel}, "quiet", []string{"nothing says where its root is", "--cmdline root=/dev/vda1"}},
		{"a root by the user", map[string]string{"vmlinuz": kernel}, "quiet root=/dev/vdb", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := &config.Config{Boot: config.Boot{Cmdline: tt.cmdline}, Disks: []config.Disk{bootable(t, config.FormatQCOW2, tt.files)}}
			err := Check(cfg)
			if (err == nil) != (tt.want == nil) {
				t.Fatalf("Check = %v", err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), cfg.Disks[0].Path) || strings.Contains(err.Error(), "\n") {
					t.Errorf("Check = %v, want one line with the disk and %q", err, want)
				}
			}
		})
	}
}

// TestPayload: the arguments of the image come with its kernel, but for a root that
// the user gives; so does its initial RAM disk.
func TestPayload(t *testing.T) {
	disk := bootable(t, config.FormatQCOW2, map[string]string{
		"vmlinuz": kernelThat(""), "initrd": "abc",
		"boot/grub/grub.cfg": "menuentry a {\nlinux /vmlinuz root=UUID=11111111-2222-4333-8444-555555555555 ro console=tty0 net.ifnames=0\ninitrd /initrd\n}\n",
	})
	for cmdline, want := range map[string]string{
		"quiet":          "root=UUID=11111111-2222-4333-8444-555555555555 ro net.ifnames=0",
		"root=/dev/vdb1": "ro net.ifnames=0",
	} {
		cfg := (&config.Config{Boot: config.Boot{Cmdline: cmdline}, Disks: []config.Disk{disk}}).Effective()
		k, err := newDiskKernel(cfg, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		p, err := k.payload()
		if err != nil {
			t.Fatal(err)
		}
		initrd, err := io.ReadAll(io.NewSectionReader(p.Initrd, 0, p.Initrd.Size))
		if err != nil || string(initrd) != "abc\x00" || p.Cmdline != want || p.Name != "the disk: /vmlinuz" {
			t.Errorf("%s: initrd %q, %v; %q of %q, want %q", cmdline, initrd, err, p.Cmdline, p.Name, want)
		}
		if err := k.close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRootOfGiven: a kernel that is given finds the root of the image, unless the user
// names one.
func TestRootOfGiven(t *testing.T) {
	system := bootable(t, config.FormatQCOW2, map[string]string{"etc/os-release": "x"})
	blank := config.Disk{Path: filepath.Join(t.TempDir(), "blank"), Format: config.FormatRaw}
	if err := os.WriteFile(blank.Path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		kernel, cmdline string
		disk            config.Disk
		want            string
	}{
		{"k", "quiet", system, "calf.root=/dev/vda calf.rootfstype=ext4"},
		{"k", "quiet root=/dev/vdb", system, ""},
		{"k", "", blank, ""},
		{"", "", system, ""}, // which the one that is found brings along
	} {
		cfg := (&config.Config{Boot: config.Boot{Kernel: tt.kernel, Cmdline: tt.cmdline}, Disks: []config.Disk{tt.disk}}).Effective()
		if got, err := rootOfGiven(cfg); err != nil || got != tt.want {
			t.Errorf("kernel %q, cmdline %q: %q, %v, want %q", tt.kernel, tt.cmdline, got, err, tt.want)
		}
	}
}

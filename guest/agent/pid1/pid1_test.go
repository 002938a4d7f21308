package pid1

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

func TestParseArgs(t *testing.T) {
	for line, want := range map[string]args{
		"":                             {},
		"console=ttyS0 quiet\n":        {},
		"root=/dev/sda1 rootflags=a,b": {device: "/dev/sda1", flags: "a,b"},
		"root=UUID=x rootfstype=xfs calf.root=/dev/vda2 calf.rootfstype=ext4": {device: "/dev/vda2", kind: "ext4"},
		"calf.root=/dev/vda2 root=UUID=x":                                     {device: "/dev/vda2"},
		"root=a root=PARTUUID=b=c":                                            {device: "PARTUUID=b=c"},
		"calf.ro root=/dev/vda":                                               {device: "/dev/vda", readOnly: true},
		"xroot=/dev/vda calf.root":                                            {},
		"calf.init init=/bin/a init=/bin/b ro":                                {handOver: true, init: "/bin/b", mountReadOnly: true},
		"ro quiet rw":                                                         {},
	} {
		if got := parseArgs(line); got != want {
			t.Errorf("%q gives %+v, want %+v", line, got, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	who := &identity{name: "me", home: "/home/me", shell: "/bin/sh"}
	env := environment(who, &wire.Start{Env: []string{"PATH=/opt", "X=a=b", "X=c", "EMPTY="}})
	for name, want := range map[string]string{"PATH": "/opt", "HOME": "/home/me", "USER": "me", "LOGNAME": "me", "X": "c", "EMPTY": ""} {
		if got := valueOf(env, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	names := map[string]bool{}
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		if names[name] {
			t.Errorf("%s is set twice in %q", name, env)
		}
		names[name] = true
	}
	if names["TERM"] || !slices.Contains(environment(who, &wire.Start{Terminal: &wire.Size{}}), "TERM=xterm") {
		t.Error("TERM is set without a terminal, or not with one")
	}
}

func TestParseOptions(t *testing.T) {
	for options, want := range map[string]struct {
		flags uintptr
		data  string
	}{
		"":                                     {},
		"defaults,nofail,x-systemd.automount":  {},
		"rw,relatime,errors=remount-ro":        {unix.MS_RELATIME, "errors=remount-ro"},
		"ro,noatime,subvol=@home,compress=no,": {unix.MS_RDONLY | unix.MS_NOATIME, "subvol=@home,compress=no"},
		"ro,nosuid,noexec,rw,exec":             {unix.MS_NOSUID, ""},
		"umask=0077,comment=cloudconfig":       {0, "umask=0077"},
	} {
		if flags, data := parseOptions(options); flags != want.flags || data != want.data {
			t.Errorf("%q gives %#x, %q; want %#x, %q", options, flags, data, want.flags, want.data)
		}
	}
	for option, flag := range opposites {
		if mountFlags[flag] == 0 {
			t.Errorf("%s takes away %s, which there is not", option, flag)
		}
	}
}

func TestParseFstab(t *testing.T) {
	got := parseFstab(`# a comment
UUID=11 / ext4 defaults 0 1
LABEL=my\040data	/mnt/a\011b/  auto	ro,noautomatic	0 2
/dev/sda1 /boot/ ext4
PARTUUID=x none swap sw 0 0
/dev/sda3 swap swap sw 0 0
LABEL=later /later ext4 rw,noauto
host:/export /nfs nfs defaults
tmpfs /tmp tmpfs nosuid
//server/share /smb cifs x
/dev/sda2 relative ext4 defaults
UUID=22 /home btrfs subvol=/@home,\9,noatime 0 0
short line
`)
	want := []entry{
		{"LABEL=my data", "/mnt/a\tb", "auto", "ro,noautomatic"},
		{"/dev/sda1", "/boot", "ext4", ""},
		{"UUID=22", "/home", "btrfs", `subvol=/@home,\9,noatime`},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

// FuzzFstab reads what an image says: what is to be mounted lies on a device, below the
// root, and its flags are flags.
func FuzzFstab(f *testing.F) {
	f.Add("# /etc/fstab\nUUID=1 /boot ext4 ro,x-systemd.automount 0 2\n/dev/vda3 /a\\040b auto noauto\nLABEL=x /../etc xfs nodev,sub=\\054\n")
	f.Fuzz(func(t *testing.T, text string) {
		var known uintptr
		for _, flag := range mountFlags {
			known |= flag
		}
		for _, e := range parseFstab(text) {
			if e.device == "" || !filepath.IsAbs(e.at) || e.at == "/" || e.at != filepath.Clean(e.at) {
				t.Errorf("%q", e)
			}
			if flags, _ := parseOptions(e.options); flags&^known != 0 {
				t.Errorf("%q has the flags %#x", e, flags)
			}
		}
	})
}

func TestPartitionPath(t *testing.T) {
	for want, of := range map[string]struct {
		disk   string
		number int
	}{
		"/dev/vda": {"/dev/vda", 0}, "/dev/vda12": {"/dev/vda", 12}, "/dev/nvme0n1p2": {"/dev/nvme0n1", 2}, "/dev/sr0": {"/dev/sr0", 0},
	} {
		if got := partitionPath(of.disk, of.number); got != want {
			t.Errorf("%v is %s, want %s", of, got, want)
		}
	}
}

// TestInterpreter names what a program that does not start is in need of.
func TestInterpreter(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	for text, want := range map[string]string{
		"": "", "text": "", "#!": "", "#!\n": "", "#! /no/such  -x\nmore": "/no/such", "#!/bin/sh": "/bin/sh", "\x7fELF": "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := interpreter(file); got != want {
			t.Errorf("%q is run by %q, want %q", text, got, want)
		}
	}
	if got := interpreter("/usr/bin/qemu-img"); !strings.Contains(got, "/ld-linux") {
		t.Errorf("the loader of a program is %q", got)
	}
}

// TestDrivers: the host adds what the guest loads.
func TestDrivers(t *testing.T) {
	for kind, want := range map[string]string{"ext2": "ext4", "xfs": "xfs", "fat": "vfat"} {
		if got := Drivers(kind); !slices.Contains(got, want) || !slices.Contains(got, socketDriver) {
			t.Errorf("%s needs %q", kind, got)
		}
	}
}

func TestLookUp(t *testing.T) {
	for spec, want := range map[string][2]uint32{
		"": {0, 0}, "root": {0, 0}, "0": {0, 0}, "54321": {54321, 54321}, "54321:7": {54321, 7}, "root:12345": {0, 12345},
	} {
		who, err := lookUp(spec)
		if err != nil {
			t.Errorf("%q: %v", spec, err)
			continue
		}
		if got := [2]uint32{who.credential.Uid, who.credential.Gid}; got != want {
			t.Errorf("%q is %v, want %v", spec, got, want)
		}
	}
	for _, spec := range []string{"no such user", "root:no such group", "-1", "99999999999"} {
		if who, err := lookUp(spec); err == nil {
			t.Errorf("%q is %+v", spec, who)
		}
	}
}

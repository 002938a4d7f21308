package find

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/guest/guesttest"
)

const (
	debianUUID = "11111111-2222-4333-8444-555555555555"
	bootUUID   = "22222222-2222-4333-8444-555555555555"
	rootUUID   = "33333333-2222-4333-8444-555555555555"
	partUUID   = "aaaaaaaa-1111-4222-8333-444444444444"
)

// tree is what a volume of a test holds: paths, and contents. What is empty is a
// kernel.
type tree map[string]string

func (tr tree) volume(number int, uuid string) *volume {
	files := make(fstest.MapFS)
	for name, content := range tr {
		if content == "" {
			content = string(new(guesttest.Program).ELF())
		}
		files[name] = &fstest.MapFile{Data: []byte(content)}
	}
	return &volume{Partition: Partition{Number: number, Kind: "ext4", UUID: uuid}, device: fmt.Sprint("hd0,gpt", number), files: files}
}

// with returns the tree with another file.
func (tr tree) with(name, content string) tree {
	more := tree{name: content}
	for name, content := range tr {
		if _, ok := more[name]; !ok {
			more[name] = content
		}
	}
	return more
}

func testdata(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// found is what a test compares.
type found struct {
	title, config, kernel, initrds, cmdline string
	root                                    int // -1: none
}

func summary(f *Found) found {
	s := found{title: f.Title, kernel: f.Kernel.String(), cmdline: f.Cmdline(), root: -1}
	if f.Config != nil {
		s.config = f.Config.String()
	}
	for _, r := range f.Initrds {
		s.initrds += r.Path + " "
	}
	if f.RootPartition != nil {
		s.root = f.RootPartition.Number
	}
	return s
}

// checkFound compares what is found on volumes.
func checkFound(t *testing.T, want found, parts ...*volume) {
	t.Helper()
	e, err := search(parts)
	if err != nil {
		t.Fatal(err)
	}
	f := &Found{Title: e.title, Config: e.config, Kernel: e.kernel, Initrds: e.initrds}
	f.setArgs(parts, e.args)
	if diff := cmp.Diff(want, summary(f), cmp.AllowUnexported(found{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDebian(t *testing.T) {
	disk := tree{
		"boot/vmlinuz-6.1.0-9-amd64": "", "boot/initrd.img-6.1.0-9-amd64": "nine",
		"boot/vmlinuz-6.1.0-13-amd64": "", "boot/initrd.img-6.1.0-13-amd64": "thirteen",
		"boot/grub/grub.cfg": testdata(t, "debian.cfg"), "etc/os-release": "ID=debian",
	}
	want := func(version, title, args string) found {
		return found{
			title: title, config: "partition 1: /boot/grub/grub.cfg", root: 1,
			kernel: "partition 1: /boot/vmlinuz-" + version, initrds: "/boot/initrd.img-" + version + " ",
			cmdline: "root=UUID=" + debianUUID + " ro" + args + " consoleblank=0",
		}
	}
	advanced := "gnulinux-advanced-" + debianUUID + ">gnulinux-"
	for _, tt := range []struct {
		name, env string
		want      found
	}{
		{"default", "", want("6.1.0-13-amd64", "Debian GNU/Linux", "")},
		{"saved by identifiers", "saved_entry=" + advanced + "6.1.0-9-amd64-advanced-" + debianUUID, want("6.1.0-9-amd64", "Debian GNU/Linux, with Linux 6.1.0-9-amd64", "")},
		{"saved by numbers", "saved_entry=1>3", want("6.1.0-9-amd64", "Debian GNU/Linux, with Linux 6.1.0-9-amd64 ()", " single")},
		{"saved by title", "saved_entry=Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-9-amd64", want("6.1.0-9-amd64", "Debian GNU/Linux, with Linux 6.1.0-9-amd64", "")},
		{"a menu", "saved_entry=1", want("6.1.0-13-amd64", "Debian GNU/Linux, with Linux 6.1.0-13-amd64", "")},
		{"saved and gone", "saved_entry=gnulinux-5.10", want("6.1.0-13-amd64", "Debian GNU/Linux", "")},
		{"a number that is too large", "saved_entry=7", want("6.1.0-13-amd64", "Debian GNU/Linux", "")},
		{"once only", "next_entry=1>3", want("6.1.0-13-amd64", "Debian GNU/Linux", "")},
		{"previous", "saved_entry=1>3\nprev_saved_entry=0", want("6.1.0-9-amd64", "Debian GNU/Linux, with Linux 6.1.0-9-amd64 ()", " single")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := "# GRUB Environment Block\n" + tt.env + "\n" + strings.Repeat("#", 100)
			checkFound(t, tt.want, disk.with("boot/grub/grubenv", env).volume(1, debianUUID))
		})
	}
	t.Run("the initial RAM disk is gone", func(t *testing.T) {
		delete(disk, "boot/initrd.img-6.1.0-13-amd64")
		checkFound(t, found{kernel: "partition 1: /boot/vmlinuz-6.1.0-13-amd64", cmdline: "root=/dev/vda1", root: 1}, disk.volume(1, debianUUID))
	})
}

// TestUbuntu: where Ubuntu would try without an initial RAM disk first, it is used.
func TestUbuntu(t *testing.T) {
	disk := tree{
		"boot/vmlinuz-6.8.0-31-generic": "", "boot/initrd.img-6.8.0-31-generic": "large", "boot/microcode.cpio": "odd",
		"boot/grub/grub.cfg": testdata(t, "ubuntu.cfg"), "boot/grub/grubenv": "initrdfail=\nrecordfail=1\nprev_entry=7\n",
	}
	v := disk.volume(1, debianUUID)
	v.PartUUID = partUUID
	checkFound(t, found{
		title: "Ubuntu", config: "partition 1: /boot/grub/grub.cfg", root: 1,
		kernel: "partition 1: /boot/vmlinuz-6.8.0-31-generic", initrds: "/boot/microcode.cpio /boot/initrd.img-6.8.0-31-generic ",
		cmdline: "root=PARTUUID=" + partUUID + " ro",
	}, v)
}

// TestFedora: a file system for /boot, entries of the specification, and a root
// that cannot be read.
func TestFedora(t *testing.T) {
	entryOf := func(version, options string) string {
		return "# from kernel-install\ntitle Fedora Linux (" + version + ")\nversion " + version + "\nlinux /vmlinuz-" + version +
			"\ninitrd  /initramfs-" + version + ".img $tuned_initrd\noptions\t" + options + " $tuned_params\ngrub_users $grub_users\n"
	}
	disk := tree{"grub2/grub.cfg": testdata(t, "fedora.cfg")}
	for _, version := range []string{"0-rescue", "6.5.6-300.fc39.x86_64", "6.11.4-301.fc39.x86_64"} {
		disk["vmlinuz-"+version], disk["initramfs-"+version+".img"] = "", "initrd"
		disk["loader/entries/4f2f2c-"+version+".conf"] = entryOf(version, "root=UUID="+rootUUID+" ro rootflags=subvol=root crashkernel=1G-4G:192M console=ttyS0")
	}
	root := &volume{Partition: Partition{Number: 4, Kind: "btrfs", UUID: rootUUID}, device: "hd0,gpt4", why: errors.New("holds btrfs")}
	want := func(version, rest string) found {
		return found{
			title: "Fedora Linux (" + version + ")", config: "partition 3: /loader/entries/4f2f2c-" + version + ".conf", root: 4,
			kernel: "partition 3: /vmlinuz-" + version, initrds: "/initramfs-" + version + ".img ", cmdline: "root=UUID=" + rootUUID + " ro" + rest,
		}
	}
	for _, tt := range []struct {
		name string
		disk tree
		want found
	}{
		{"newest", disk, want("6.11.4-301.fc39.x86_64", " rootflags=subvol=root")},
		{"saved", disk.with("grub2/grubenv", "saved_entry=4f2f2c-6.5.6-300.fc39.x86_64\n"), want("6.5.6-300.fc39.x86_64", " rootflags=subvol=root")},
		{"a boot has failed", disk.with("grub2/grubenv", "saved_entry=4f2f2c-0-rescue\nboot_success=0\nboot_counter=0\n"), want("0-rescue", " rootflags=subvol=root")},
		{"by number", disk.with("grub2/grubenv", "saved_entry=2\n"), want("0-rescue", " rootflags=subvol=root")},
		{
			"variables in the environment",
			disk.with("loader/entries/4f2f2c-6.11.4-301.fc39.x86_64.conf", entryOf("6.11.4-301.fc39.x86_64", "$kernelopts")).with("grub2/grubenv", "kernelopts=root=UUID="+rootUUID+" ro quiet\ntuned_params=nohz=full skew_tick=1\n"),
			want("6.11.4-301.fc39.x86_64", " quiet nohz=full skew_tick=1"),
		},
		{
			"variables in the configuration",
			disk.with("loader/entries/4f2f2c-6.11.4-301.fc39.x86_64.conf", entryOf("6.11.4-301.fc39.x86_64", "${kernelopts}")),
			want("6.11.4-301.fc39.x86_64", ""),
		},
		{"an entry whose kernel is gone", disk.with("loader/entries/4f2f2c-7.conf", entryOf("7", "")), want("6.11.4-301.fc39.x86_64", " rootflags=subvol=root")},
	} {
		t.Run(tt.name, func(t *testing.T) { checkFound(t, tt.want, tt.disk.volume(3, bootUUID), root) })
	}
	t.Run("no GRUB", func(t *testing.T) {
		disk := disk.with("loader/loader.conf", "timeout 3\ndefault *-6.5.6-*\n")
		delete(disk, "grub2/grub.cfg")
		checkFound(t, want("6.5.6-300.fc39.x86_64", " rootflags=subvol=root"), disk.volume(3, bootUUID), root)
	})
	t.Run("in the root", func(t *testing.T) {
		inRoot := make(tree)
		for name, content := range disk {
			inRoot["boot/"+name] = content
		}
		checkFound(t, found{
			title: "Fedora Linux (6.11.4-301.fc39.x86_64)", config: "partition 1: /boot/loader/entries/4f2f2c-6.11.4-301.fc39.x86_64.conf", root: -1,
			kernel: "partition 1: /boot/vmlinuz-6.11.4-301.fc39.x86_64", initrds: "/boot/initramfs-6.11.4-301.fc39.x86_64.img ",
			cmdline: "root=UUID=" + rootUUID + " ro rootflags=subvol=root",
		}, inRoot.volume(1, bootUUID))
	})
}

func TestSyslinux(t *testing.T) {
	alpine := `# Generated by update-extlinux
DEFAULT menu.c32
PROMPT 0
MENU TITLE Alpine/Linux Boot Menu
LABEL lts
  MENU LABEL Linux ^lts
  LINUX vmlinuz-lts
  INITRD initramfs-lts
  APPEND root=UUID=` + debianUUID + ` modules=ext4 quiet console=ttyS0,115200
LABEL virt
  MENU DEFAULT
  MENU LABEL Linux virt
  LINUX /boot/vmlinuz-virt
  INITRD ucode.img,initramfs-virt
  APPEND root=UUID=` + debianUUID + ` modules=ext4 rootfstype=ext4
`
	files := tree{"boot/vmlinuz-lts": "", "boot/initramfs-lts": "l", "boot/vmlinuz-virt": "", "boot/initramfs-virt": "v", "boot/ucode.img": "u"}
	virt := found{
		title: "Linux virt", config: "partition 1: /boot/extlinux.conf", kernel: "partition 1: /boot/vmlinuz-virt", initrds: "/boot/ucode.img /boot/initramfs-virt ",
		cmdline: "root=UUID=" + debianUUID + " modules=ext4 rootfstype=ext4", root: 1,
	}
	lts := found{
		title: "Linux lts", config: "partition 1: /boot/extlinux.conf", kernel: "partition 1: /boot/vmlinuz-lts", initrds: "/boot/initramfs-lts ",
		cmdline: "root=UUID=" + debianUUID + " modules=ext4 quiet", root: 1,
	}
	for _, tt := range []struct {
		name, config string
		want         found
	}{
		{"menu default", alpine, virt},
		{"default", strings.Replace(strings.Replace(alpine, "  MENU DEFAULT\n", "", 1), "menu.c32", "LTS", 1), lts},
		{"the first", strings.Replace(alpine, "  MENU DEFAULT\n", "", 1), lts},
		{"in append", "append root=/dev/sda1 ro\nlabel linux\n kernel vmlinuz-lts\nlabel other\n kernel x\n append -\n", found{
			title: "linux", config: "partition 1: /boot/extlinux.conf", kernel: "partition 1: /boot/vmlinuz-lts", cmdline: "root=/dev/vda1 ro", root: 1,
		}},
		{"initrd in append", "label linux\n kernel vmlinuz-lts\n append initrd=initramfs-lts root=/dev/nvme0n1p1\n", found{
			title: "linux", config: "partition 1: /boot/extlinux.conf", kernel: "partition 1: /boot/vmlinuz-lts", initrds: "/boot/initramfs-lts ", cmdline: "root=/dev/vda1", root: 1,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkFound(t, tt.want, files.with("boot/extlinux.conf", tt.config).volume(1, debianUUID))
		})
	}
}

// TestNewest: without a boot loader, the names decide.
func TestNewest(t *testing.T) {
	for _, tt := range []struct {
		name, kernel, initrd string
		others               []string
	}{
		{"Debian", "boot/vmlinuz-6.1.0-13-amd64", "boot/initrd.img-6.1.0-13-amd64", []string{"boot/vmlinuz-6.1.0-9-amd64", "boot/initrd.img-6.1.0-9-amd64", "boot/vmlinuz-6.1.0-40-amd64.old", "vmlinuz"}},
		{"Fedora", "boot/vmlinuz-6.11.4-301.fc39.x86_64", "boot/initramfs-6.11.4-301.fc39.x86_64.img", []string{"boot/vmlinuz-0-rescue-4f2f2c", "boot/vmlinuz-6.5.6-300.fc39.x86_64", "boot/.vmlinuz-6.11.4-301.fc39.x86_64.hmac"}},
		{"openSUSE", "boot/vmlinuz-6.4.0-150600.23.7-default", "boot/initrd-6.4.0-150600.23.7-default", []string{"boot/vmlinuz-6.4.0-150600.9-default", "boot/initrd-6.4.0-150600.23.7-default-kdump"}},
		{"Arch", "boot/vmlinuz-linux", "boot/initramfs-linux.img", []string{"boot/initramfs-linux-fallback.img"}},
		{"Alpine", "boot/vmlinuz-virt", "boot/initramfs-virt", nil},
		{"no version", "boot/vmlinuz", "boot/initrd.img", nil},
		{"a release and its candidate", "boot/vmlinuz-6.12", "", []string{"boot/vmlinuz-6.12~rc4", "boot/vmlinuz-6.9"}},
		{"a file system for /boot", "vmlinuz-6.10", "initrd.img-6.10", []string{"vmlinuz-6.9", "initrd.img-6.9"}},
		{"an ELF", "boot/vmlinux-6.10", "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := tree{tt.kernel: "", "etc/os-release": "x", "boot/kernel-dir/file": "x"}
			want := found{kernel: "partition 2: /" + tt.kernel, cmdline: "root=UUID=" + debianUUID, root: 2}
			if tt.initrd != "" {
				disk[tt.initrd], want.initrds = "initrd", "/"+tt.initrd+" "
			} else {
				want.cmdline = "root=/dev/vda2"
			}
			for _, other := range tt.others {
				disk[other] = ""
			}
			checkFound(t, want, disk.volume(2, debianUUID))
		})
	}
	t.Run("the newest is none", func(t *testing.T) {
		disk := tree{"boot/vmlinuz-2": "not a kernel", "boot/vmlinuz-1": "", "sbin/init": "x"}
		checkFound(t, found{kernel: "partition 1: /boot/vmlinuz-1", cmdline: "root=/dev/vda1", root: 1}, disk.volume(1, debianUUID))
	})
}

func TestVersions(t *testing.T) {
	sorted := []string{"", "5~rc1", "5", "5a", "5b", "5.4", "5.10", "5.10-rc2", "5.10.0-2", "5.10.0-12", "05.11", "5.12-3.fc9", "5.12-3.fc10", "6"}
	for i, a := range sorted {
		for j, b := range sorted {
			if got := compareVersions(a, b); (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("%q and %q: %d", a, b, got)
			}
		}
	}
}

func TestNothing(t *testing.T) {
	xfs := &volume{Partition: Partition{Number: 2, Kind: "xfs"}, device: "hd0,gpt2", why: errors.New("holds xfs, which calf cannot look into")}
	for _, tt := range []struct {
		name  string
		parts []*volume
		want  []string
	}{
		{"empty", []*volume{tree{}.volume(1, ""), xfs}, []string{"partition 1 (ext4) has none", "partition 2 holds xfs"}},
		{"no kernel", []*volume{tree{"boot/vmlinuz": "text"}.volume(1, "")}, []string{"partition 1: /boot/vmlinuz: not a kernel"}},
		{"kernels elsewhere", []*volume{tree{"boot/grub/grub.cfg": "menuentry a {\n search --fs-uuid --set=root " + bootUUID + "\n linux (hd0,gpt2)/vmlinuz\n}"}.volume(1, ""), xfs}, []string{"partition 1: /boot/grub/grub.cfg: entry \"a\": partition 2 holds xfs"}},
		{"no entries", []*volume{tree{"boot/grub/grub.cfg": "set default=0"}.volume(1, "")}, []string{"has no entries"}},
		{"no Linux", []*volume{tree{"boot/grub/grub.cfg": "menuentry 'Windows' {\nchainloader +1\n}"}.volume(1, "")}, []string{`entry "Windows" starts no Linux`}},
		{"no such device", []*volume{tree{"boot/grub/grub.cfg": "menuentry a {\nlinux (hd7)/vmlinuz\n}"}.volume(1, "")}, []string{`no device "hd7"`}},
		{"control characters", []*volume{tree{"boot/grub/grub.cfg": "menuentry a {\nlinux /x\x1b[2J\n}"}.volume(1, "")}, []string{`\x1b[2J`}},
		{"control characters in arguments", []*volume{tree{"boot/vmlinuz": "x", "v": "", "boot/grub/grub.cfg": "menuentry a {\nlinux /v x\x1b[2J\n}"}.volume(1, "")}, []string{"has control characters"}},
		{"too many", []*volume{tree{"boot/grub/grub.cfg": "menuentry a {\nlinux /v\ninitrd" + strings.Repeat(" /v", 17) + "\n}", "v": ""}.volume(1, "")}, []string{"17 initial RAM disks"}},
		{"a huge configuration", []*volume{tree{"boot/grub/grub.cfg": strings.Repeat("#\n", 1<<20)}.volume(1, "")}, []string{"too much"}},
		{"a broken extlinux.conf", []*volume{tree{"extlinux.conf": "DEFAULT x"}.volume(1, "")}, []string{"/extlinux.conf starts no Linux"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, err := search(tt.parts)
			if !errors.Is(err, ErrNotFound) {
				t.Fatalf("%+v, %v", e, err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v; want %q", err, want)
				}
			}
			if strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("control characters: %q", err)
			}
		})
	}
}

func TestRoot(t *testing.T) {
	parts := []*volume{
		tree{"vmlinuz": ""}.volume(1, bootUUID),
		{Partition: Partition{Number: 2, Kind: "xfs", UUID: rootUUID, Label: "Root", PartUUID: partUUID, PartLabel: "system"}, device: "hd0,gpt2", why: errors.New("xfs")},
	}
	for _, tt := range []struct {
		args, want, bare string // bare: without an initial RAM disk
		partition        int
	}{
		{"", "", "", -1},
		{"root=UUID=" + rootUUID, "root=UUID=" + rootUUID, "root=PARTUUID=" + partUUID, 2},
		{"root=UUID=" + strings.ToUpper(bootUUID), "root=UUID=" + strings.ToUpper(bootUUID), "root=/dev/vda1", 1},
		{"root=LABEL=Root rw", "root=LABEL=Root rw", "root=PARTUUID=" + partUUID + " rw", 2},
		{"root=PARTLABEL=system", "root=PARTLABEL=system", "root=PARTUUID=" + partUUID, 2},
		{"root=/dev/disk/by-uuid/" + rootUUID, "root=/dev/disk/by-uuid/" + rootUUID, "root=PARTUUID=" + partUUID, 2},
		{"root=/dev/sda2", "root=/dev/vda2", "root=PARTUUID=" + partUUID, 2},
		{"root=/dev/xvda1", "root=/dev/vda1", "root=/dev/vda1", 1},
		{"root=/dev/nvme0n1p2", "root=/dev/vda2", "root=PARTUUID=" + partUUID, 2},
		{"root=/dev/mapper/vg-root", "root=/dev/mapper/vg-root", "root=/dev/mapper/vg-root", -1},
		{"root=/dev/sdb1", "root=/dev/sdb1", "root=/dev/sdb1", -1},
		{"root=UUID=x root=LABEL=Root", "root=LABEL=Root", "root=PARTUUID=" + partUUID, 2},
		{"console=tty0 a=b panic=-1 reboot=k earlycon quiet crashkernel=1G BOOT_IMAGE=/x consoleblank=0 initrd=/x", "a=b quiet consoleblank=0", "a=b quiet consoleblank=0", -1},
	} {
		for _, initrds := range [][]*File{{{}}, nil} {
			f := &Found{Initrds: initrds}
			f.setArgs(parts, strings.Fields(tt.args))
			want, number := tt.want, -1
			if initrds == nil {
				want = tt.bare
			}
			if f.RootPartition != nil {
				number = f.RootPartition.Number
			}
			if f.Cmdline() != want || number != tt.partition {
				t.Errorf("%q with %d initial RAM disks: %q, partition %d; want %q, %d", tt.args, len(initrds), f.Cmdline(), number, want, tt.partition)
			}
		}
	}
}

// TestJoined reads the pieces of several initial RAM disks.
func TestJoined(t *testing.T) {
	var f Found
	if f.Initrd() != nil {
		t.Error("there is one where there is none")
	}
	var want []byte
	v := tree{"a": "12345", "b": "1234", "c": "1", "d": "1234567"}.volume(1, "")
	for _, name := range []string{"a", "b", "c", "d"} {
		file, err := v.openFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f.Initrds = append(f.Initrds, file)
		b, err := v.readFile(name, 100)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, b...)
		want = append(want, make([]byte, -len(b)&3)...)
	}
	all := f.Initrd()
	if all.Size != int64(len(want)) {
		t.Fatalf("%d bytes, want %d", all.Size, len(want))
	}
	for off := range len(want) + 1 {
		for n := range len(want) + 3 {
			n++
			got := slices.Repeat([]byte{0xFF}, n)
			read, err := all.ReadAt(got, int64(off))
			w := want[off:min(off+n, len(want))]
			if read != len(w) || string(got[:read]) != string(w) || (err != nil) != (read < n) {
				t.Fatalf("%d bytes at %d: %q, %v; want %q", n, off, got[:read], err, w)
			}
		}
	}
}

package find

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/guest/guesttest"
)

// tool runs a program that may be on the PATH of root only.
func tool(t testing.TB, stdin, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// part is a partition of a disk to be, of 8 MiB.
type part struct {
	kind  string // ext4, ext2, or of signatures
	uuid  string
	files tree
	links map[string]string
}

const (
	partSize = 8 << 20
	firstAt  = 1 << 20
)

// newDisk makes a disk. label is a kind of partition table, or empty for a disk that
// is one file system.
func newDisk(t testing.TB, label string, parts ...part) []byte {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	first, size := int64(firstAt), int64(len(parts)*partSize+2<<20)
	if label == "" {
		first, size = 0, partSize
	}
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	if label != "" {
		table := "label: " + label + "\nlabel-id: 0x1badcafe\n"
		if label == "gpt" {
			table = "label: gpt\n"
		}
		for i := range parts {
			table += fmt.Sprintf("start=%d, size=%d", (firstAt+i*partSize)/sectorSize, partSize/sectorSize)
			if label == "gpt" {
				table += fmt.Sprintf(", uuid=aaaaaaaa-1111-4222-8333-44444444444%d, name=part%d", i+1, i+1)
			}
			table += "\n"
		}
		tool(t, table, "sfdisk", "-q", image)
	}
	for i, p := range parts {
		p.write(t, image, first+int64(i*partSize))
	}
	disk, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return disk
}

// write makes the partition at an offset of an image.
func (p part) write(t testing.TB, image string, at int64) {
	t.Helper()
	for _, s := range signatures {
		if s.kind != p.kind {
			continue
		}
		f, err := os.OpenFile(image, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt([]byte(s.magic), at+s.at)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		return
	}
	dir := t.TempDir()
	for name, content := range p.files {
		if content == "" {
			content = string(new(guesttest.Program).ELF())
		}
		host := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(host), 0o755), os.WriteFile(host, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range p.links {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, "", "mke2fs", "-q", "-F", "-t", p.kind, "-U", p.uuid, "-d", dir, "-E", fmt.Sprintf("offset=%d", at), image, fmt.Sprintf("%dK", partSize>>10))
}

// TestLayouts finds the kernel on disks as distributions lay them out.
func TestLayouts(t *testing.T) {
	debian := part{kind: "ext4", uuid: debianUUID, files: tree{
		"boot/vmlinuz-6.1.0-9-amd64": "", "boot/initrd.img-6.1.0-9-amd64": "nine", "boot/vmlinuz-6.1.0-13-amd64": "", "boot/initrd.img-6.1.0-13-amd64": "thirteen",
		"boot/grub/grub.cfg": testdata(t, "debian.cfg"), "etc/os-release": "ID=debian",
	}, links: map[string]string{"vmlinuz": "boot/vmlinuz-6.1.0-13-amd64"}}
	esp := part{kind: "fat"}
	debianFound := found{
		title: "Debian GNU/Linux", config: "partition 1: /boot/grub/grub.cfg", kernel: "partition 1: /boot/vmlinuz-6.1.0-13-amd64",
		initrds: "/boot/initrd.img-6.1.0-13-amd64 ", cmdline: "root=UUID=" + debianUUID + " ro consoleblank=0", root: 1,
	}
	bare := part{kind: "ext4", uuid: debianUUID, files: tree{"boot/vmlinuz-1": "", "etc/os-release": "x"}, links: map[string]string{
		"boot/vmlinuz-3": "/nothing", "boot/vmlinuz-4": "vmlinuz-4", "boot/vmlinuz-2": "/boot/../boot/vmlinuz-1",
	}}
	for _, tt := range []struct {
		name, label string
		parts       []part
		want        found
	}{
		{"Debian", "gpt", []part{debian, esp}, debianFound},
		{"Debian, MBR", "dos", []part{debian}, debianFound},
		{"Fedora", "gpt", []part{esp, {kind: "ext4", uuid: bootUUID, files: tree{
			"grub2/grub.cfg": testdata(t, "fedora.cfg"), "loader/entries/m-6.conf": "title Fedora\nlinux /vmlinuz-6\ninitrd /initramfs-6.img\noptions root=UUID=" + rootUUID + " ro\n",
			"vmlinuz-6": "", "initramfs-6.img": "initrd",
		}}, {kind: "xfs"}, {kind: "ext4", uuid: rootUUID, files: tree{"etc/os-release": "ID=fedora"}}}, found{
			title: "Fedora", config: "partition 2: /loader/entries/m-6.conf", kernel: "partition 2: /vmlinuz-6", initrds: "/initramfs-6.img ", cmdline: "root=UUID=" + rootUUID + " ro", root: 4,
		}},
		{"Alpine", "dos", []part{{kind: "ext4", uuid: bootUUID, files: tree{
			"extlinux.conf": "DEFAULT virt\nLABEL virt\n LINUX vmlinuz-virt\n INITRD initramfs-virt\n APPEND root=UUID=" + rootUUID + " modules=ext4\n", "vmlinuz-virt": "", "initramfs-virt": "i",
		}}, {kind: "ext4", uuid: rootUUID, files: tree{"sbin/init": "x"}}}, found{
			title: "virt", config: "partition 1: /extlinux.conf", kernel: "partition 1: /vmlinuz-virt", initrds: "/initramfs-virt ", cmdline: "root=UUID=" + rootUUID + " modules=ext4", root: 2,
		}},
		{"no boot loader", "gpt", []part{bare}, found{kernel: "partition 1: /boot/vmlinuz-2", cmdline: "root=PARTUUID=aaaaaaaa-1111-4222-8333-444444444441", root: 1}},
		{"no boot loader, MBR", "dos", []part{esp, bare}, found{kernel: "partition 2: /boot/vmlinuz-2", cmdline: "root=PARTUUID=1badcafe-02", root: 2}},
		{"no partitions", "", []part{bare}, found{kernel: "the disk: /boot/vmlinuz-2", cmdline: "root=/dev/vda", root: 0}},
		{"ext2, no partitions, an initial RAM disk", "", []part{{kind: "ext2", uuid: debianUUID, files: tree{"boot/vmlinuz": "", "boot/initrd.img": "i", "sbin/init": "x"}}}, found{kernel: "the disk: /boot/vmlinuz", initrds: "/boot/initrd.img ", cmdline: "root=UUID=" + debianUUID, root: 0}},
		{"a root that is not known", "gpt", []part{{kind: "ext4", uuid: bootUUID, files: tree{"vmlinuz-1": ""}}, {kind: "an LVM physical volume"}}, found{kernel: "partition 1: /vmlinuz-1", root: -1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			disk := newDisk(t, tt.label, tt.parts...)
			f, err := Kernel(bytes.NewReader(disk), int64(len(disk)))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, summary(f), cmp.AllowUnexported(found{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(f.Partitions) != len(tt.parts) {
				t.Errorf("%d partitions: %v", len(f.Partitions), f.Partitions)
			}
			for i, p := range f.Partitions {
				if p.Kind != tt.parts[i].kind {
					t.Errorf("%v holds %q, want %q", p, p.Kind, tt.parts[i].kind)
				}
			}
			root, err := Root(bytes.NewReader(disk), int64(len(disk)))
			if diff := cmp.Diff(f.RootPartition, root); err != nil || diff != "" {
				t.Errorf("without the kernel the root is another one: %v (-with +without):\n%s", err, diff)
			}
			got, err := io.ReadAll(io.NewSectionReader(f.Kernel, 0, f.Kernel.Size))
			if err != nil || !bytes.Equal(got, new(guesttest.Program).ELF()) {
				t.Errorf("the kernel reads as %d bytes, %v", len(got), err)
			}
		})
	}
}

// TestRootAlone finds the root of disks without a kernel.
func TestRootAlone(t *testing.T) {
	system := part{kind: "ext4", uuid: rootUUID, files: tree{"etc/os-release": "x"}}
	empty := part{kind: "ext4", uuid: bootUUID, files: tree{"lost": ""}}
	for _, tt := range []struct {
		name, label string
		parts       []part
		want        int // -1: none
	}{
		{"no partitions", "", []part{system}, 0},
		{"behind others", "gpt", []part{{kind: "fat"}, empty, system}, 3},
		{"a boot loader without its kernel", "gpt", []part{system, {kind: "ext4", uuid: bootUUID, files: tree{"grub/grub.cfg": "menuentry a {\nlinux /gone root=/dev/vda2\n}\n"}}}, 1},
		{"the only one", "gpt", []part{{kind: "fat"}, {kind: "xfs"}}, 2},
		{"no system", "gpt", []part{empty, {kind: "xfs"}}, -1},
	} {
		disk := newDisk(t, tt.label, tt.parts...)
		p, err := Root(bytes.NewReader(disk), int64(len(disk)))
		if err != nil || (p == nil) != (tt.want < 0) || p != nil && p.Number != tt.want {
			t.Errorf("%s: %+v, %v, want %d", tt.name, p, err, tt.want)
		}
	}
}

// TestContents reads a kernel and two initial RAM disks of some size back.
func TestContents(t *testing.T) {
	random := rand.NewChaCha8([32]byte{2})
	content := func(n int) string {
		b := make([]byte, n)
		_, _ = random.Read(b) // never fails
		clear(b[n/2:][:n/4])  // which mke2fs leaves out
		return string(b)
	}
	kernel := string(new(guesttest.Program).ELF()) + content(1<<20)
	one, two := content(1<<20+3), content(12345)
	disk := newDisk(t, "gpt", part{kind: "ext4", uuid: debianUUID, files: tree{
		"v": kernel, "one": one, "two": two, "boot/grub/grub.cfg": "menuentry a {\nlinux /v\ninitrd /one /two\n}\n",
	}})
	f, err := Kernel(bytes.NewReader(disk), int64(len(disk)))
	if err != nil {
		t.Fatal(err)
	}
	sum := func(r io.ReaderAt, size int64) string {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(r, 0, size)); err != nil {
			t.Error(err)
		}
		return fmt.Sprintf("%d bytes: %x", size, h.Sum(nil))
	}
	want := one + "\x00" + two + "\x00\x00\x00"
	initrd := f.Initrd()
	if got, want := sum(initrd, initrd.Size), sum(strings.NewReader(want), int64(len(want))); got != want {
		t.Errorf("initial RAM disk: %s; want %s", got, want)
	}
	if got, want := sum(f.Kernel, f.Kernel.Size), sum(strings.NewReader(kernel), int64(len(kernel))); got != want {
		t.Errorf("kernel: %s; want %s", got, want)
	}
}

// TestSignatures tells apart what cannot be looked into.
func TestSignatures(t *testing.T) {
	for _, s := range signatures {
		disk := make([]byte, 1<<20)
		copy(disk[s.at:], s.magic)
		_, err := Kernel(bytes.NewReader(disk), int64(len(disk)))
		if want := "the disk holds " + s.kind + ", which calf cannot look into"; !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	for _, size := range []int{0, 1, 511, 512, 1024, 5000, 1 << 20} {
		if _, err := Kernel(bytes.NewReader(make([]byte, size)), int64(size)); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "is empty") {
			t.Errorf("%d zeros: %v", size, err)
		}
	}
}

// TestRealSignatures has the tools of the kinds that are likely make one, with a name.
func TestRealSignatures(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	for _, tt := range []struct {
		kind, id, label string
		size            int64
		cmd             []string
	}{
		{"ext4", rootUUID, "a label", 8 << 20, []string{"mke2fs", "-q", "-F", "-t", "ext4", "-U", rootUUID, "-L", "a label"}},
		{"xfs", rootUUID, "twelve chars", 320 << 20, []string{"mkfs.xfs", "-q", "-f", "-m", "uuid=" + rootUUID, "-L", "twelve chars"}},
		{"btrfs", rootUUID, "a label", 128 << 20, []string{"mkfs.btrfs", "-q", "-f", "-U", rootUUID, "-L", "a label"}},
		{"btrfs", rootUUID, "", 128 << 20, []string{"mkfs.btrfs", "-q", "-f", "-U", rootUUID}},
		{"fat", "12AB-00CD", "UEFI", 64 << 20, []string{"mkfs.vfat", "-F", "32", "-i", "12ab00cd", "-n", "UEFI"}},
		{"fat", "12AB-00CD", "", 16 << 20, []string{"mkfs.vfat", "-F", "16", "-i", "12ab00cd"}},
		{"swap", "", "", 1 << 20, []string{"mkswap", "-q", "-U", rootUUID}},
	} {
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, tt.size)); err != nil {
			t.Fatal(err)
		}
		tool(t, "", tt.cmd[0], append(tt.cmd[1:], image)...)
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		parts, err := Partitions(f, tt.size)
		want := []Partition{{Kind: tt.kind, UUID: tt.id, Label: tt.label, Size: tt.size}}
		if diff := cmp.Diff(want, parts); err != nil || diff != "" {
			t.Errorf("%s: %v, (-want +got):\n%s", tt.kind, err, diff)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestIs compares the names of a partition with what root= and fstab call it.
func TestIs(t *testing.T) {
	p := &Partition{UUID: "12AB-00CD", Label: "Root", PartUUID: partUUID, PartLabel: "sys tem"}
	for value, want := range map[string]bool{
		"UUID=12ab-00cd": true, `UUID="12AB-00CD"`: true, "/dev/disk/by-uuid/12AB-00CD": true, "uuid=12AB-00CD": true,
		"LABEL=Root": true, "LABEL=root": false, "/dev/disk/by-label/Root": true,
		"PARTUUID=" + strings.ToUpper(partUUID): true, "/dev/disk/by-partuuid/" + partUUID: true,
		"PARTLABEL=sys tem": true, "PARTLABEL=sys": false, "/dev/disk/by-partlabel/sys tem": true,
		"UUID=Root": false, "LABEL=": false, "": false, "/dev/vda1": false, "ID=x": false, "/dev/disk/by-id/x": false,
	} {
		if got := p.Is(value); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
	if (&Partition{}).Is("LABEL=") || (&Partition{}).Is("UUID=") || (&Partition{}).Is("/dev/disk/by-uuid/") {
		t.Error("no name is the name of a partition without one")
	}
}

// TestSetRoot: what the user names is looked for on the disk.
func TestSetRoot(t *testing.T) {
	f := &Found{}
	f.setArgs([]*volume{tree{}.volume(1, bootUUID), tree{}.volume(2, rootUUID)}, []string{"root=UUID=" + rootUUID, "ro"})
	for value, want := range map[string]int{"/dev/vda1": 1, "UUID=" + rootUUID: 2, "/dev/vdb1": 0} {
		f.SetRoot(value)
		if got := f.RootPartition; (got == nil) != (want == 0) || got != nil && got.Number != want || f.Cmdline() != "ro" {
			t.Errorf("%s: %+v, %q", value, got, f.Cmdline())
		}
	}
}

// TestModules reads modules from the root, in a /usr that /lib leads to.
func TestModules(t *testing.T) {
	kernel := make([]byte, 0x400)
	copy(kernel[0x202:], "HdrS")
	copy(kernel[0x20E:], "\x20\x00")
	copy(kernel[0x220:], "6.1.0-x (who@where) #1")
	disk := newDisk(t, "gpt", part{kind: "ext4", uuid: bootUUID, files: tree{"lib/modules/6.1.0-x/modules.dep": "a.ko:\n", "lib/modules/6.1.0-x/a.ko": "wrong"}}, part{
		kind: "ext4", uuid: rootUUID, links: map[string]string{"lib": "usr/lib"}, files: tree{
			"usr/lib/modules/6.1.0-x/modules.dep":        "kernel/a-b.ko.xz: kernel/c.ko kernel/gone.ko\nkernel/c.ko:\nkernel/d.ko:\nkernel/gone.ko:\n../out.ko:\n",
			"usr/lib/modules/6.1.0-x/kernel/a-b.ko.xz":   "module ab",
			"usr/lib/modules/6.1.0-x/kernel/c.ko":        "module c",
			"usr/lib/modules/6.1.0-x/kernel/d.ko":        "module d",
			"usr/lib/modules/6.1.0-x/kernel/gone.ko/dir": "no module",
			"usr/lib/modules/out.ko":                     "outside",
		},
	})
	parts, err := volumes(bytes.NewReader(disk), int64(len(disk)))
	if err != nil {
		t.Fatal(err)
	}
	f := &Found{Kernel: &File{ReaderAt: bytes.NewReader(kernel), Size: int64(len(kernel))}}
	f.setArgs(parts, []string{"root=UUID=" + rootUUID})
	for _, tt := range []struct {
		names []string
		want  map[string][]byte
	}{
		{[]string{"d", "none", "out"}, map[string][]byte{"kernel/d.ko": []byte("module d")}},
		{[]string{"c", "c", "c"}, map[string][]byte{"kernel/c.ko": []byte("module c")}},
		{nil, map[string][]byte{}},
	} {
		got, err := f.Modules(tt.names...)
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got):\n%s", tt.names, err, diff)
		}
	}
	if got, err := f.Modules("a_b"); err == nil || !strings.Contains(err.Error(), "gone.ko") {
		t.Errorf("a directory for a module: %q, %v", got, err)
	}
	copy(kernel[0x220:], "6.2")
	kernel[0x223] = 0
	if got, err := f.Modules("d"); err != nil || got != nil {
		t.Errorf("modules of another kernel: %q, %v", got, err)
	}
}

// failing is a disk that cannot be read from an offset on.
type failing struct {
	io.ReaderAt
	from int64
}

var errBroken = errors.New("the medium is broken")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.from {
		return 0, errBroken
	}
	return f.ReaderAt.ReadAt(p, off)
}

// TestDamage says what is wrong with disks that are damaged.
func TestDamage(t *testing.T) {
	good := newDisk(t, "gpt", part{kind: "ext4", uuid: debianUUID, files: tree{"boot/vmlinuz": "", "etc/os-release": "x"}})
	at := func(changes map[int]string) []byte {
		disk := bytes.Clone(good)
		for at, bytes := range changes {
			copy(disk[at:], bytes)
		}
		return disk
	}
	backup := len(good) - sectorSize
	for _, tt := range []struct {
		name string
		disk []byte
		want string // empty: it is found nevertheless
	}{
		{"the first table", at(map[int]string{512: "lost"}), ""},
		{"both tables", at(map[int]string{512: "lost", backup: "lost"}), "partition table is damaged"},
		{"a table without end", at(map[int]string{512 + 80: "\xFF\xFF\xFF\xFF"}), "partition table is damaged: 4294967295 entries of 128 bytes"},
		{"a backup without end", at(map[int]string{backup + 80: "\xFF\xFF\xFF\xFF"}), "partition table is damaged"},
		{"the superblock", at(map[int]string{firstAt + 1024 + 0x20: "\x00\x00\x00\x00"}), "partition 1 cannot be read: ext4: the file system is damaged: groups of 0 blocks"},
		{"a feature that is not known", at(map[int]string{firstAt + 1024 + 0x63: "\x80"}), "features that are not supported: incompat 0x80000000"},
		{"cut off", good[:firstAt+16<<10], "partition 1"},
	} {
		f, err := Kernel(bytes.NewReader(tt.disk), int64(len(tt.disk)))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, %v; want %q", tt.name, f, err, tt.want)
		}
	}
	for from := int64(0); from < firstAt+100<<10; from += 4096 {
		if f, err := Kernel(failing{bytes.NewReader(good), from}, int64(len(good))); err == nil || !errors.Is(err, errBroken) && !strings.Contains(err.Error(), errBroken.Error()) {
			t.Fatalf("a disk that cannot be read from %d on: %v, %v", from, f, err)
		}
	}
	unclean := at(map[int]string{firstAt + 1024 + 0x60: "\xC6"}) // needs_recovery
	copy(unclean[firstAt+1024+0x3FC:], "\x00\x00\x00\x00")
	if _, err := Kernel(bytes.NewReader(unclean), int64(len(unclean))); err != nil {
		t.Errorf("not unmounted: %v", err)
	}
}

// TestMeter: a disk cannot be made to be read without end.
func TestMeter(t *testing.T) {
	m := &meter{bytes.NewReader(make([]byte, 4096)), 5000}
	b := make([]byte, 4000)
	if _, err := m.ReadAt(b, 0); err != nil {
		t.Error(err)
	}
	if _, err := m.ReadAt(b[:1], 0); !errors.Is(err, errTooMuch) {
		t.Errorf("a small read counts as nothing: %v", err)
	}
}

// FuzzDisk looks for a kernel on disks whose tables and file systems have been
// changed: no panic, and an end.
func FuzzDisk(f *testing.F) {
	files := tree{
		"boot/vmlinuz-1": "", "boot/initrd.img-1": "i", "boot/grub/grub.cfg": "load_env\nsubmenu a {\nmenuentry b {\nsearch --set=root --file /boot/vmlinuz-1\nlinux /boot/vmlinuz-1 root=/dev/sda1\n}\n}\nblscfg",
		"boot/grub/grubenv": "a=b", "boot/loader/entries/a.conf": "linux /boot/vmlinuz-1\noptions $a",
	}
	var disks [][]byte
	for _, label := range []string{"gpt", "dos", ""} {
		disks = append(disks, newDisk(f, label, part{kind: "ext4", uuid: debianUUID, files: files, links: map[string]string{"v": "boot/vmlinuz-1"}}))
	}
	f.Add(uint8(0), []byte{})
	f.Add(uint8(0), []byte{0, 2, 0, 80, 0xFF, 0, 0, 2, 4, 3})
	f.Add(uint8(2), []byte{0, 0, 4, 88, 0xFF})
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		disk := bytes.Clone(disks[int(which)%len(disks)])
		for ; len(changes) >= 5; changes = changes[5:] {
			at := int(changes[0])<<24 | int(changes[1])<<16 | int(changes[2])<<8 | int(changes[3])
			disk[at%len(disk)] = changes[4]
		}
		found, err := Kernel(bytes.NewReader(disk), int64(len(disk)))
		if (found == nil) == (err == nil) {
			t.Errorf("%v, %v", found, err)
		}
		if err == nil {
			_, _ = io.Copy(io.Discard, io.NewSectionReader(found.Kernel, 0, min(found.Kernel.Size, 1<<20)))
		}
	})
}

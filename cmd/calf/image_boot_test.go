package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/guest/guesttest"
)

// TestInfoBoot prints what would be booted from an image with one file system, and
// from an overlay of it.
func TestInfoBoot(t *testing.T) {
	t.Chdir(t.TempDir())
	kernel := string(new(guesttest.Program).ELF())
	for name, content := range map[string]string{
		"root/boot/vmlinuz-6": kernel, "root/boot/initrd.img-6": "initrd", "root/etc/os-release": "ID=test",
		"root/boot/grub/grub.cfg": "menuentry 'A test' {\nlinux /boot/vmlinuz-6 root=/dev/sda ro quiet\ninitrd /boot/initrd.img-6\n}\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	mke2fs := exec.Command("/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-U", "11111111-2222-4333-8444-555555555555", "-L", "label", "-d", "root", "disk.img", "8M")
	if out, err := mke2fs.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	qemuImg(t, "convert", "-O", "qcow2", "disk.img", "base.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2")
	wantText := `image: FILE
boots: A test
configured by: /boot/grub/grub.cfg on the disk (94 B)
kernel: /boot/vmlinuz-6 on the disk (200 B)
initrd: /boot/initrd.img-6 on the disk (6 B)
command line: root=/dev/vda ro quiet
root: the disk
Partitions:
NUMBER         START        SIZE  TYPE    UUID
0                0 B       8 MiB  ext4    11111111-2222-4333-8444-555555555555
`
	wantJSON := `{
  "filename": "FILE",
  "format": "FORMAT",
  "title": "A test",
  "config": {
    "partition": 0,
    "path": "/boot/grub/grub.cfg",
    "size": 94
  },
  "kernel": {
    "partition": 0,
    "path": "/boot/vmlinuz-6",
    "size": 200
  },
  "initrd": [
    {
      "partition": 0,
      "path": "/boot/initrd.img-6",
      "size": 6
    }
  ],
  "cmdline": "root=/dev/vda ro quiet",
  "root": "root=/dev/vda",
  "root-partition": 0,
  "partitions": [
    {
      "number": 0,
      "start": 0,
      "size": 8388608,
      "type": "ext4",
      "uuid": "11111111-2222-4333-8444-555555555555",
      "label": "label"
    }
  ]
}
`
	for file, format := range map[string]string{"disk.img": "raw", "disk.qcow2": "qcow2"} {
		code, text, messages := calf(t, "image", "info", "--boot", file)
		if diff := cmp.Diff(strings.ReplaceAll(wantText, "FILE", file), text); code != 0 || diff != "" {
			t.Errorf("%s: exit code %d, %s (-want +got)\n%s", file, code, messages, diff)
		}
		code, text, messages = calf(t, "image", "info", "--boot", "--output=json", "-f", format, file)
		if diff := cmp.Diff(strings.NewReplacer("FILE", file, "FORMAT", format).Replace(wantJSON), text); code != 0 || diff != "" {
			t.Errorf("%s: exit code %d, %s (-want +got)\n%s", file, code, messages, diff)
		}
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "empty.qcow2", "1M")
	for want, args := range map[string][]string{
		"empty.qcow2: no kernel was found on the disk: the disk is empty": {"--boot", "empty.qcow2"},
		"leave out --backing-chain":                                       {"--boot", "--backing-chain", "disk.qcow2"},
	} {
		code, _, messages := calf(t, append([]string{"image", "info"}, args...)...)
		if code != exitImage || !strings.Contains(messages, want) {
			t.Errorf("%q: exit code %d, %s; want %q", args, code, messages, want)
		}
	}
}

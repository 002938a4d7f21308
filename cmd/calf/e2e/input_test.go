package e2e

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// What calf cannot run is refused in one sentence that names it, with status
// 125, and no image is touched.
func TestBadInput(t *testing.T) {
	// KVM is opened before the images; without it all messages are about it.
	lab.Need(t)
	k := newestKernel(t)
	tests := []struct {
		name string
		// prepare returns the flags beyond a kernel; it may damage images.
		prepare func(im *images) []string
		stderr  []string // what the message holds
	}{
		{
			name:    "kernel missing",
			prepare: func(im *images) []string { return []string{"--kernel", im.path("none")} },
			stderr:  []string{"none", "no such file"},
		},
		{
			name:    "kernel is a directory",
			prepare: func(im *images) []string { return []string{"--kernel", im.dir} },
			stderr:  []string{"kernel", "regular file"},
		},
		{
			name:    "kernel is no kernel",
			prepare: func(im *images) []string { return []string{"--kernel", im.base()} },
			stderr:  []string{"base.raw"},
		},
		{
			name:    "initrd missing",
			prepare: func(im *images) []string { return []string{"--initrd", im.path("none")} },
			stderr:  []string{"none", "no such file"},
		},
		{
			name:    "disk missing",
			prepare: func(im *images) []string { return []string{"--disk", im.path("none.qcow2")} },
			stderr:  []string{"none.qcow2", "no such file"},
		},
		{
			name:    "disk without a format",
			prepare: func(im *images) []string { return []string{"--disk", im.base()} },
			stderr:  []string{"base.raw", "format"},
		},
		{
			name: "disk is no QCOW2",
			prepare: func(im *images) []string {
				return []string{"--disk", im.base() + ",format=qcow2"}
			},
			stderr: []string{"base.raw"},
		},
		{
			name: "disk is locked",
			prepare: func(im *images) []string {
				file := im.create("locked.qcow2", "1M")
				im.serve(file)
				return []string{"--disk", file}
			},
			stderr: []string{"locked.qcow2"},
		},
		{
			name: "disk is corrupt",
			prepare: func(im *images) []string {
				file := im.create("corrupt.qcow2", "1M")
				// The offset of the L1 table, header bytes 40 to 47, lies
				// within a cluster.
				im.patch(file, 40, 0x30001)
				return []string{"--disk", file}
			},
			stderr: []string{"corrupt.qcow2"},
		},
		{
			name: "disk needs an unknown feature",
			prepare: func(im *images) []string {
				file := im.create("future.qcow2", "1M")
				im.patch(file, 72, 1<<40) // incompatible_features
				return []string{"--disk", file}
			},
			stderr: []string{"future.qcow2", "feature"},
		},
		{
			name: "backing file elsewhere",
			prepare: func(im *images) []string {
				base := im.base()
				dir := im.path("inner")
				if err := os.Mkdir(dir, 0o755); err != nil {
					im.t.Fatal(err)
				}
				file := filepath.Join(dir, "overlay.qcow2")
				run(im.t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", file)
				return []string{"--disk", file}
			},
			stderr: []string{"base.raw", "backing"},
		},
		{
			name:    "too many vCPUs",
			prepare: func(*images) []string { return []string{"--cpus", "100000"} },
			stderr:  []string{"cpus"},
		},
		{
			name:    "too much memory",
			prepare: func(*images) []string { return []string{"--memory", "4000000G"} },
			stderr:  []string{"memory"},
		},
		{
			name:    "unknown key of a disk",
			prepare: func(im *images) []string { return []string{"--disk", im.create("a.qcow2", "1M") + ",quees=2"} },
			stderr:  []string{"quees", "queues"},
		},
		{
			name:    "unknown flag",
			prepare: func(*images) []string { return []string{"--cpu", "2"} },
			stderr:  []string{"--cpu"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			im := newImages(t)
			flags := test.prepare(im)
			im.freeze()
			// Later flags win over earlier ones.
			args := append([]string{"run", "--kernel", k.Image, "--initrd", k.Initrd, "--timeout", "30s"}, flags...)
			vm := startCalf(t, args...)
			vm.exits(125)
			vm.refusedWith(test.stderr...)
		})
	}
}

// A /dev/kvm that is missing, or closed to the user, is said to be so, with
// what to do about it.
func TestNoKVM(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to take /dev/kvm away")
	}
	kernel, err := os.Open(newestKernel(t).Image)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	tests := []struct {
		name   string
		change func(cmd *exec.Cmd)
		stderr []string
	}{
		{"missing", func(cmd *exec.Cmd) {
			// A mount namespace with an empty /dev.
			cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
			script := `mount -t tmpfs none /dev && exec "$@"`
			cmd.Args = append([]string{"sh", "-c", script, "sh", cmd.Path}, cmd.Args[1:]...)
			cmd.Path = "/bin/sh"
		}, []string{"/dev/kvm", "missing"}},
		{"forbidden", func(cmd *exec.Cmd) {
			const nobody = 65534
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		}, []string{"/dev/kvm", "group"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			// The kernel may lie where only root may look.
			cmd := exec.Command(lab.Calf(), "run", "--kernel", "/proc/self/fd/3", "--timeout", "30s")
			cmd.ExtraFiles = []*os.File{kernel}
			test.change(cmd)
			vm := startCommand(t, cmd)
			vm.exits(125)
			vm.refusedWith(test.stderr...)
		})
	}
}

// refusedWith checks that calf said one sentence, with all of parts in it.
func (v *vm) refusedWith(parts ...string) {
	v.t.Helper()
	said := strings.TrimSpace(v.stderr())
	if said == "" || strings.Contains(said, "\n") {
		v.t.Errorf("calf said %q, want one line", said)
	}
	for _, part := range parts {
		if !strings.Contains(strings.ToLower(said), strings.ToLower(part)) {
			v.t.Errorf("calf said %q, which does not name %q", said, part)
		}
	}
	if out := v.console(); out != "" {
		v.t.Errorf("standard output holds %q", out)
	}
}

// freeze makes all images in the directory ones that must not change.
func (im *images) freeze() {
	im.t.Helper()
	files, err := filepath.Glob(im.path("*.qcow2"))
	if err != nil {
		im.t.Fatal(err)
	}
	inner, err := filepath.Glob(im.path("*/*.qcow2"))
	if err != nil {
		im.t.Fatal(err)
	}
	for _, file := range append(files, inner...) {
		im.sums[file] = checksum(im.t, file)
	}
}

// patch overwrites eight bytes of an image with a big-endian number.
func (im *images) patch(file string, offset int64, value uint64) {
	im.t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		im.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, value), offset); err != nil {
		im.t.Fatal(err)
	}
}

// serve has QEMU hold an image open for writing, and so locked, until the end
// of the test.
func (im *images) serve(file string) {
	im.t.Helper()
	socket := im.path("nbd")
	cmd := exec.Command("qemu-nbd", "-f", "qcow2", "-k", socket, "-t", file)
	if err := cmd.Start(); err != nil {
		im.t.Fatal(err)
	}
	im.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		if time.Now().After(deadline) {
			im.t.Fatal(fmt.Errorf("qemu-nbd does not serve %s", file))
		}
	}
}

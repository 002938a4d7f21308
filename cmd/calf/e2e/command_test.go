package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// commandImage makes an image with busybox alone, and returns the arguments that run
// a command in it with a stock kernel.
func commandImage(t *testing.T) (image string, args []string) {
	t.Helper()
	lab.Need(t)
	im := newImages(t)
	root := im.path("root.raw")
	if err := lab.GuestRoot(root, 128, map[string]string{"/etc/passwd": "root:x:0:0::/root:/bin/sh\nworker:x:1000:1000::/tmp:/bin/sh\n"}); err != nil {
		t.Fatal(err)
	}
	k := newestKernel(t)
	return root, []string{
		"run", "--kernel", k.Image, "--initrd", k.Initrd, "--cmdline", "quiet root=/dev/vda rootfstype=ext4",
		"--memory", "256MiB", "--disk", root + ",format=raw", "--log-level", "debug",
	}
}

// TestCommand runs commands in a guest, and looks at what a user sees of them.
func TestCommand(t *testing.T) {
	image, base := commandImage(t)
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		flags   []string
		command []string
		in      string
		out     string
		code    int
	}{
		{"output and status", nil, []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, "", "out\n", 7},
		{"input", nil, []string{"sort"}, "c\na\nb\n", "a\nb\nc\n", 0},
		{"environment", []string{"-e", "X=a b", "--workdir", "/tmp", "--user", "worker"}, []string{"sh", "-c", `echo "$X|$PWD|$USER|$HOME|$(id -u)|$(id -g)"`}, "", "a b|/tmp|worker|/tmp|1000|1000\n", 0},
		{"not found", nil, []string{"no-such-command"}, "", "", 127},
		{"not executable", nil, []string{"/etc/passwd"}, "", "", 126},
		{"killed", nil, []string{"sh", "-c", "kill -9 $$"}, "", "", 137},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append(append(append([]string{}, base...), tt.flags...), "--")
			cmd := exec.Command(lab.Calf(), append(args, tt.command...)...)
			cmd.Stdin = strings.NewReader(tt.in)
			vm := startCommand(t, cmd)
			vm.exits(tt.code)
			if got := vm.console(); got != tt.out {
				t.Errorf("output %q, want %q", got, tt.out)
			}
		})
	}
	after, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Errorf("the image %s has changed", filepath.Base(image))
	}
}

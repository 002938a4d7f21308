package e2e

import (
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// TestExamples runs the examples as their files say, and the one in Go by the script of
// the action for GitHub. The image is laid out like Debian's and has busybox.
func TestExamples(t *testing.T) {
	lab.Need(t)
	list := kernels(t)
	old, latest := list[0], list[len(list)-1]
	image := newImages(t).distribution(withKernels(t, map[string]string{"/etc/os-release": ""}, "/boot", []lab.Kernel{latest}))
	dir := t.TempDir()
	for _, name := range []string{"kernel", "matrix", "go"} {
		if err := os.CopyFS(filepath.Join(dir, name), os.DirFS(repository("examples/"+name))); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{
		"debian/debian-12.qcow2": image, "kernel/root.qcow2": image, "matrix/root.qcow2": image,
		"kernel/linux/arch/x86/boot/bzImage": latest.Image,
		"matrix/kernels/6.1/vmlinuz":         old.Image, "matrix/kernels/6.1/initrd.img": old.Initrd,
		"matrix/kernels/6.12/vmlinuz": latest.Image, "matrix/kernels/6.12/initrd.img": latest.Initrd,
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, link)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	start := func(t *testing.T, in string, env []string, args ...string) *vm {
		t.Helper()
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = filepath.Join(dir, in)
		cmd.Env = append(os.Environ(), env...)
		return startCommand(t, cmd)
	}
	t.Run("kernel", func(t *testing.T) {
		vm := start(t, "kernel", nil, lab.Calf(), "run", "kernel.toml", "--initrd", latest.Initrd)
		vm.exits(0)
		if got, want := vm.console(), "Linux "+latest.Release+", 2 CPUs\nall is well\n"; got != want {
			t.Errorf("output %q, want %q", got, want)
		}
	})
	t.Run("matrix", func(t *testing.T) {
		vm := start(t, "matrix", nil, lab.Calf(), "run", "matrix.toml", "-j2", "--junit", "report.xml")
		vm.exits(0)
		text, err := os.ReadFile(filepath.Join(dir, "matrix/report.xml"))
		if err != nil {
			t.Fatal(err)
		}
		var report struct {
			Cases []struct {
				Name string   `xml:"name,attr"`
				Out  string   `xml:"system-out"`
				Bad  []string `xml:"failure"`
			} `xml:"testsuite>testcase"`
		}
		if err := xml.Unmarshal(text, &report); err != nil || len(report.Cases) != 2 {
			t.Fatalf("%v in\n%s", err, text)
		}
		for i, want := range []string{"Linux " + old.Release + ", 1 CPUs\n", "Linux " + latest.Release + ", 2 CPUs\n"} {
			if c := report.Cases[i]; !strings.HasPrefix(c.Out, want) || len(c.Bad) > 0 {
				t.Errorf("%s: %q, %q, want %q", c.Name, c.Out, c.Bad, want)
			}
		}
	})
	t.Run("go", func(t *testing.T) {
		output := filepath.Join(dir, "output")
		script, err := filepath.Abs(repository(".github/action/run.sh"))
		if err != nil {
			t.Fatal(err)
		}
		env := []string{"INPUT_CONFIG=vm.toml", "INPUT_CALF=" + lab.Calf(), "RUNNER_TEMP=" + dir, "GITHUB_OUTPUT=" + output}
		for name := range strings.FieldsSeq("IMAGE RUN CPUS MEMORY TIMEOUT BOOT_TIMEOUT WORKDIR USER ENV COPY ARTIFACTS FLAGS") {
			env = append(env, "INPUT_"+name+"=")
		}
		vm := start(t, "go", env, script)
		vm.exits(0)
		for _, want := range []string{"--- PASS: TestNothing", "--- PASS: TestFull", "--- PASS: TestRemove"} {
			if !strings.Contains(vm.console(), want) {
				t.Errorf("no %q in %q", want, vm.console())
			}
		}
		if text, err := os.ReadFile(output); err != nil || !strings.HasPrefix(string(text), "exit-code=0\nresult=") {
			t.Errorf("the outputs are %q, %v", text, err)
		}
		if cover, err := os.ReadFile(filepath.Join(dir, "go/build/cover.out")); err != nil || !strings.HasPrefix(string(cover), "mode: set\nexample.com/ramdir/ramdir.go:") {
			t.Errorf("the profile is %q, %v", cover, err)
		}
	})
}

package lab

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	RunAgent() // in the machines of the tests below
	os.Exit(m.Run())
}

// runOuter runs a shell script in an outer machine and returns its status, its
// output, and the directory of its artifacts.
func runOuter(t *testing.T, timeout time.Duration, script string) (status int, stdout string, artifacts string, err error) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a machine")
	}
	if _, err := Kernels(); err != nil {
		t.Skip(err)
	}
	t.Setenv("TMPDIR", t.TempDir()) // what is kept after a failure
	out, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	artifacts = t.TempDir()
	real := os.Stdout
	os.Stdout = out
	status, err = Run(Config{Timeout: timeout, Calf: "/bin/true", Artifacts: artifacts}, []string{"sh", "-c", script})
	os.Stdout = real
	text, readErr := os.ReadFile(out.Name())
	if readErr != nil {
		t.Fatal(readErr)
	}
	return status, string(text), artifacts, err
}

func TestRun(t *testing.T) {
	status, stdout, artifacts, err := runOuter(t, time.Minute, `
		[ -c /dev/kvm ] && grep -qw svm /proc/cpuinfo && echo kvm
		qemu-img --version >/dev/null && echo tools
		ls $CALF_CACHE/kernels/*/vmlinuz $CALF_LAB_KERNEL $CALF_LAB_INITRD >/dev/null && echo kernels
		mkdir $CALF_LAB_ARTIFACTS/dir && echo kept >$CALF_LAB_ARTIFACTS/dir/log
		exit 7`)
	if err != nil || status != 7 {
		t.Errorf("status %d, error %v", status, err)
	}
	if want := "kvm\ntools\nkernels\n"; stdout != want {
		t.Errorf("standard output %q, want %q", stdout, want)
	}
	if got, err := os.ReadFile(filepath.Join(artifacts, "dir/log")); string(got) != "kept\n" {
		t.Errorf("the artifact holds %q (%v)", got, err)
	}
}

func TestRunPanic(t *testing.T) {
	_, _, _, err := runOuter(t, time.Minute, `echo c >/proc/sysrq-trigger; sleep 100`)
	if err == nil || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("the error does not show the panic: %v", err)
	}
}

func TestRunTimeout(t *testing.T) {
	status, stdout, _, err := runOuter(t, 2*time.Second, `trap 'echo leaving; exit 9' QUIT; while :; do sleep 1; done`)
	if err != nil || status != 9 || stdout != "leaving\n" {
		t.Errorf("status %d, output %q, error %v", status, stdout, err)
	}
}

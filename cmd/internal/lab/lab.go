// Package lab gives tests and demonstrations a machine whose /dev/kvm is real.
//
// Where the host has hardware virtualization that machine is the host itself.
// Elsewhere it is an outer machine: QEMU emulating an AMD processor with SVM,
// and a stock kernel with kvm-amd in it. Linux guests run there as they do on
// hardware, only slower, which makes it fit for correctness and unfit for
// absolute speeds.
//
// A test package enters the lab from its TestMain:
//
//	func TestMain(m *testing.M) { lab.Main(m, lab.Config{}) }
//
// On hardware the tests run at once. Elsewhere one outer machine is booted with
// the test executable in it and the tests run there, all of them: their output
// appears here as it is printed, and their exit status is the status of the
// test executable here. Command run beside this package does the same for any
// command.
//
// # Inside
//
// Whether on hardware or not, a test finds what it needs in the same way:
// Kernels lists the stock kernels, Calf is the calf executable, and t.TempDir
// is on an ext4 file system with a few free GiB. What a test writes below
// ArtifactDir is copied out of the outer machine at the end.
//
// # How the outer machine is made
//
// A root disk with busybox, QEMU's tools, e2fsprogs, xfsprogs, sfdisk, fio and
// the kernels is made once and cached; it is mounted at /. A scratch disk made
// for the run is mounted at /lab and holds the command, the files it was given
// and its temporary directory. The first process is the very executable that
// built the machine, in another role (see agent.go). It talks to the host over
// three virtio-console ports: standard output, standard error, and a tar stream
// that ends with the exit status, so nothing that the command prints can be
// mistaken for it.
package lab

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/vmm"
)

// Config describes the machine. The zero value is a good default.
type Config struct {
	// CPUs of the outer machine; 0 means 1, and more is for experiments. The
	// SVM that QEMU 7.2 emulates is unsound on several: of ten guests with
	// four vCPUs one or two crashed, hung, or took the outer kernel along, on
	// two CPUs and on four. On one there is no such loss, nor is it slower,
	// as the vCPUs seldom run at once anyway on hosts that need this.
	CPUs int
	// MemoryMiB of the outer machine; 0 means 4096. The host pays only for
	// what is touched.
	MemoryMiB int
	// Timeout of the whole run, after which the command is asked to quit and
	// then killed; 0 means 30 minutes. Main adds a margin to -test.timeout
	// instead, so that the test binary's own report comes first.
	Timeout time.Duration
	// Files are copied into the machine: path there to path here. A program is
	// copied together with its shared libraries.
	Files map[string]string
	// Prepare, if set, makes what of Files has to be made first. On hardware, where
	// nothing is copied, it is called all the same.
	Prepare func() error
	// Calf is the calf executable to use; empty means one is built from the
	// module of the working directory.
	Calf string
	// Artifacts is where the contents of ArtifactDir are copied to; empty
	// means beside the console log, which is kept when the command fails.
	Artifacts string
}

// Environment variables by which the parts of the lab find one another.
const (
	envRole      = "CALF_LAB"           // roleAgent or roleInside
	envCalf      = "CALF_BIN"           // path of the calf executable
	envArtifacts = "CALF_LAB_ARTIFACTS" // ArtifactDir
	envCache     = "CALF_CACHE"         // cacheDir

	envKernel = "CALF_LAB_KERNEL" // image of the newest kernel
	envInitrd = "CALF_LAB_INITRD" // its initramfs
	envDisk   = "CALF_LAB_DISK"   // a disk with a distribution, see Disks

	roleAgent  = "init"
	roleInside = "1"
)

// Inside reports whether this process runs in an outer machine.
func Inside() bool { return os.Getenv(envRole) == roleInside }

// Need skips the test when this process cannot boot guests, which happens only
// under -short.
func Need(tb testing.TB) {
	tb.Helper()
	if Inside() {
		return
	}
	if err := vmm.Probe(); err != nil {
		tb.Skipf("needs guests, and -short boots no outer machine: %v", err)
	}
}

// Calf is the path of the calf executable that tests run.
func Calf() string { return os.Getenv(envCalf) }

// ArtifactDir is a directory for logs worth keeping after a failure.
func ArtifactDir() string {
	if dir := os.Getenv(envArtifacts); dir != "" {
		return dir
	}
	return os.TempDir()
}

// Main runs the tests of m where /dev/kvm is real and exits with their status.
// Under -short they run here, whatever /dev/kvm is: see Need.
func Main(m *testing.M, cfg Config) {
	RunAgent()
	if Inside() {
		os.Exit(m.Run())
	}
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	reason := vmm.Probe()
	if reason == nil || testing.Short() {
		os.Exit(runHere(m, cfg))
	}
	self, err := os.Executable()
	if err != nil {
		fail(err)
	}
	cfg.Timeout = testTimeout() + time.Minute
	announce(reason)
	commands, err := deal(append([]string{self}, portableFlags(os.Args[1:])...), runtime.NumCPU())
	if err != nil {
		fail(err)
	}
	status, err := Run(cfg, commands...)
	if err != nil {
		fail(err)
	}
	os.Exit(status)
}

// Exec runs a command where /dev/kvm is real, with this process's standard
// output and error, and returns its exit status: here if the hardware allows,
// else as Run does.
//
// The command finds calf on its PATH and as $CALF_BIN, the newest stock kernel
// with its initramfs as $CALF_LAB_KERNEL and $CALF_LAB_INITRD, and a disk with a
// distribution, which it may not change, as $CALF_LAB_DISK.
func Exec(cfg Config, args []string) (status int, err error) {
	if reason := vmm.Probe(); reason != nil {
		announce(reason)
		return Run(cfg, args)
	}
	dir, err := os.MkdirTemp("", "calf-lab-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	calf, err := calfBinary(cfg, dir)
	if err != nil {
		return 0, err
	}
	kernels, err := Kernels()
	if err != nil {
		return 0, err
	}
	newest := kernels[len(kernels)-1]
	disks, err := Distribution()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(),
		"PATH="+filepath.Dir(calf)+":"+os.Getenv("PATH"),
		envCalf+"="+calf, envKernel+"="+newest.Image, envInitrd+"="+newest.Initrd, envDisk+"="+disks.Whole)
	if err := cmd.Run(); cmd.ProcessState == nil {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// announce says in a line that an outer machine is used, and why: the first
// clause of reason. The mend, which follows it, matters less here.
func announce(reason error) {
	why, _, _ := strings.Cut(reason.Error(), ";")
	fmt.Fprintf(os.Stderr, "lab: %s; running inside an emulated machine that has it\n", why)
}

// deal splits the run of a test executable into one for each of at most n
// machines, by the tests at the top level. A run that was narrowed down stays
// whole.
func deal(command []string, n int) ([][]string, error) {
	if flag.Lookup("test.run").Value.String() != "" {
		return [][]string{command}, nil
	}
	out, err := exec.Command(command[0], "-test.list=^Test").Output()
	if err != nil {
		return nil, fmt.Errorf("listing the tests: %w", err)
	}
	tests := strings.Fields(string(out))
	if n = min(n, len(tests)); n <= 1 {
		return [][]string{command}, nil
	}
	hands := make([][]string, n)
	for i, test := range tests {
		hands[i%n] = append(hands[i%n], test)
	}
	commands := make([][]string, n)
	for i, hand := range hands {
		commands[i] = append(slices.Clone(command), "-test.run=^("+strings.Join(hand, "|")+")$")
	}
	return commands, nil
}

func fail(err error) {
	fmt.Fprintf(os.Stderr, "lab: %v\n", err)
	os.Exit(1)
}

// runHere runs the tests on this host.
func runHere(m *testing.M, cfg Config) int {
	dir, err := os.MkdirTemp("", "calf-lab-")
	if err != nil {
		fail(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // tests run calf as other users, too
		fail(err)
	}
	calf, err := calfBinary(cfg, dir)
	if err != nil {
		fail(err)
	}
	if err := os.Setenv(envCalf, calf); err != nil {
		fail(err)
	}
	if cfg.Prepare != nil {
		if err := cfg.Prepare(); err != nil {
			fail(err)
		}
	}
	return m.Run()
}

// testTimeout is the limit given to the test binary, or the default of go test
// where it has none.
func testTimeout() time.Duration {
	d, err := time.ParseDuration(flag.Lookup("test.timeout").Value.String())
	if err != nil || d == 0 {
		return 30 * time.Minute
	}
	return d
}

// portableFlags returns args without the flags that name files of the host.
func portableFlags(args []string) []string {
	var kept []string
	for _, arg := range args {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		switch name {
		case "test.testlogfile", "test.gocoverdir", "test.outputdir", "test.trace":
			continue
		}
		if strings.HasSuffix(name, "profile") {
			continue
		}
		kept = append(kept, arg)
	}
	return kept
}

// cacheDir is where kernels and images that outlive a run are kept.
func cacheDir() (string, error) {
	if dir := os.Getenv(envCache); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for a cache; set %s: %w", envCache, err)
	}
	return filepath.Join(dir, "calf"), nil
}

// calfBinary returns the path of the calf executable that cfg or the
// environment names, or builds one into dir.
func calfBinary(cfg Config, dir string) (string, error) {
	if cfg.Calf != "" {
		return filepath.Abs(cfg.Calf)
	}
	if calf := os.Getenv(envCalf); calf != "" {
		return filepath.Abs(calf)
	}
	out := filepath.Join(dir, "calf")
	build := exec.Command("go", "build", "-o", out, "github.com/calfvm/calf/cmd/calf")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building calf: %w\n%s", err, msg)
	}
	return out, nil
}

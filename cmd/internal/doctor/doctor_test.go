package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/vmm"
)

// healthy is a host on which nothing is to be mended.
func healthy() Host {
	return Host{
		Root: fstest.MapFS{
			"proc/cpuinfo": file("processor\t: 0\nflags\t\t: fpu vmx sse\n"),
			"proc/meminfo": file("MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\nHugePages_Total:  0\n"),
			thp:            file("always [madvise] never\n"),
		},
		OpenKVM: func() error { return nil },
		Probe:   func() error { return nil },
		Capabilities: func() ([]vmm.Capability, int, error) {
			return []vmm.Capability{
				{Name: "KVM_CAP_NEEDED", Since: "4.13", Required: true, Present: true},
				{Name: "KVM_CAP_NICE", Since: "4.20", Present: true},
			}, vmm.MaxCPUs, nil
		},
		IOUring:  func() error { return nil },
		Landlock: func() (int, error) { return 7, nil },
	}
}

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

// with returns a change of one file, which is gone if there is no text.
func with(path, text string) func(*Host) {
	return func(h *Host) {
		files := h.Root.(fstest.MapFS)
		delete(files, path)
		if text != "" {
			files[path] = file(text)
		}
	}
}

func opening(err error) func(*Host) { return func(h *Host) { h.OpenKVM = func() error { return err } } }

// device puts /dev/kvm there with these permissions.
func device(mode fs.FileMode) func(*Host) {
	return func(h *Host) { h.Root.(fstest.MapFS)["dev/kvm"] = &fstest.MapFile{Mode: fs.ModeDevice | mode} }
}

func probing(err error) func(*Host) { return func(h *Host) { h.Probe = func() error { return err } } }

func uring(err error) func(*Host) { return func(h *Host) { h.IOUring = func() error { return err } } }

func landlocked(err error) func(*Host) {
	return func(h *Host) { h.Landlock = func() (int, error) { return 0, err } }
}

func lacking(required bool, cpus int, err error) func(*Host) {
	return func(h *Host) {
		h.Capabilities = func() ([]vmm.Capability, int, error) {
			return []vmm.Capability{{Name: "KVM_CAP_GONE", Since: "9.9", Required: required}}, cpus, err
		}
	}
}

func flags(f string) func(*Host) { return with("proc/cpuinfo", "flags : "+f+"\n") }

// Every check, in every state it has.
func TestChecks(t *testing.T) {
	const gone = "unnamed"
	for _, test := range []struct {
		name, check string
		state       State
		found, mend string // parts of them
		changes     []func(*Host)
	}{
		{"Intel", "processor", OK, "VT-x", "", nil},
		{"AMD", "processor", OK, "AMD-V", "", []func(*Host){flags("svm")}},
		{"nested", "processor", OK, "VT-x, nested", "", []func(*Host){flags("vmx hypervisor")}},
		{"not nested", "processor", Warning, "without nested", "nested virtualization", []func(*Host){flags("hypervisor")}},
		{"firmware", "processor", Warning, "neither", "firmware", []func(*Host){flags("fpu")}},
		{"no cpuinfo", "processor", Warning, "neither", "firmware", []func(*Host){with("proc/cpuinfo", "")}},

		{"there", "kvm", OK, "/dev/kvm is there", "", nil},
		{"absent on Intel", "kvm", Missing, "is missing", "modprobe kvm_intel", []func(*Host){opening(fs.ErrNotExist)}},
		{"absent on AMD", "kvm", Missing, "is missing", "modprobe kvm_amd", []func(*Host){opening(unix.ENXIO), flags("svm")}},
		{"absent in a VM", "kvm", Missing, "is missing", "nested", []func(*Host){opening(unix.ENODEV), flags("hypervisor")}},
		{"absent", "kvm", Missing, "is missing", "firmware", []func(*Host){opening(unix.ENOENT), flags("fpu")}},
		{"broken", "kvm", Missing, "input/output error", "modprobe", []func(*Host){opening(unix.EIO)}},

		{"permitted", "kvm access", OK, "may open", "", nil},
		{"not permitted", "kvm access", Missing, "may not open", "usermod", []func(*Host){opening(unix.EACCES)}},
		{"its group permitted", "kvm access", Missing, "may not open", "Join its group", []func(*Host){opening(unix.EACCES), device(0o660)}},
		{"its group not permitted", "kvm access", Missing, "may not open", "chmod 660", []func(*Host){opening(unix.EACCES), device(0o600)}},
		{"there, not permitted", "kvm", OK, "is there", "", []func(*Host){opening(unix.EACCES)}},
		{"unknown", "kvm access", gone, "", "", []func(*Host){opening(unix.ENOENT)}},

		{"real", "kvm hardware", OK, "on the processor", "", nil},
		{"emulated", "kvm hardware", Missing, "emulates", "VT-x", []func(*Host){probing(fmt.Errorf("x: %w", vmm.ErrEmulated))}},
		{"busy", "kvm hardware", Missing, "busy", "other hypervisors", []func(*Host){probing(fmt.Errorf("%w: %w", vmm.ErrNoKVM, unix.EBUSY))}},
		{"untried", "kvm hardware", gone, "", "", []func(*Host){opening(unix.EACCES)}},

		{"all", "kvm capabilities", OK, "NEEDED, NICE", "", nil},
		{"without a nice one", "kvm capabilities", Warning, "lacks KVM_CAP_GONE (Linux 9.9)", "newer", []func(*Host){lacking(false, vmm.MaxCPUs, nil)}},
		{"without a needed one", "kvm capabilities", Missing, "lacks KVM_CAP_GONE (Linux 9.9)", "newer", []func(*Host){lacking(true, vmm.MaxCPUs, nil)}},
		{"failing", "kvm capabilities", Missing, "too old", "newer", []func(*Host){lacking(true, 0, errors.New("too old"))}},

		{"many", "vcpus", OK, "254", "", nil},
		{"few", "vcpus", Warning, "at most 8", "no more", []func(*Host){lacking(false, 8, nil)}},
		{"none", "vcpus", Missing, "no vCPU", "newer", []func(*Host){lacking(false, 0, nil)}},

		{"much", "memory", OK, "4GiB of this host", "", nil},
		{"enough", "memory", OK, "512MiB of this host", "", []func(*Host){with(meminfo, "MemAvailable: 524288 kB\n")}},
		{"little", "memory", Warning, "512MiB of this host", "--memory", []func(*Host){with(meminfo, "MemAvailable: 524287 kB\n")}},
		{"container", "memory", Warning, "256MiB of this container", "--memory", []func(*Host){with(cgroup+"max", "536870912\n"), with(cgroup+"current", "268435456\n")}},
		{"full container", "memory", Warning, "0B of this container", "--memory", []func(*Host){with(cgroup+"max", "1\n"), with(cgroup+"current", "2\n")}},
		{"larger container", "memory", OK, "4GiB of this host", "", []func(*Host){with(cgroup+"max", "99999999999\n"), with(cgroup+"current", "0\n")}},
		{"container without bound", "memory", OK, "4GiB of this host", "", []func(*Host){with(cgroup+"max", "max\n"), with(cgroup+"current", "0\n")}},
		{"no meminfo", "memory", Warning, "does not say", "/proc", []func(*Host){with(meminfo, "")}},

		{"madvise", "huge pages", OK, "[madvise]", "", nil},
		{"always", "huge pages", OK, "[always]", "", []func(*Host){with(thp, "[always] madvise never\n")}},
		{"never", "huge pages", Warning, "are off", "echo madvise", []func(*Host){with(thp, "always madvise [never]\n")}},
		{"not built", "huge pages", Warning, "has no transparent", "CONFIG_TRANSPARENT_HUGEPAGE", []func(*Host){with(thp, "")}},

		{"none", "reserved huge pages", OK, "none", "", nil},
		{"some", "reserved huge pages", OK, "4 of 2048 kB, 3 of them free", "", []func(*Host){with(meminfo, "HugePages_Total: 4\nHugePages_Free: 3\nHugepagesize: 2048 kB\n")}},

		{"allowed", "io_uring", OK, "engine is sync", "", nil},
		{"not built", "io_uring", Warning, "has none", "CONFIG_IO_URING", []func(*Host){uring(unix.ENOSYS)}},
		{"off", "io_uring", Warning, "io_uring_disabled = 2", "sysctl", []func(*Host){uring(unix.EPERM), with("proc/sys/kernel/io_uring_disabled", "2\n")}},
		{"seccomp", "io_uring", Warning, "not permitted", "seccomp", []func(*Host){uring(unix.EPERM), with("proc/sys/kernel/io_uring_disabled", "0\n")}},

		{"there", "landlock", OK, "ABI 7", "", nil},
		{"off", "landlock", Warning, "turned off", "lsm=", []func(*Host){landlocked(unix.EOPNOTSUPP)}},
		{"not built", "landlock", Warning, "not implemented", "CONFIG_SECURITY_LANDLOCK", []func(*Host){landlocked(unix.ENOSYS)}},
	} {
		t.Run(test.check+"/"+test.name, func(t *testing.T) {
			h := healthy()
			for _, change := range test.changes {
				change(&h)
			}
			r, err := Examine(h, Options{})
			if err != nil {
				t.Fatal(err)
			}
			want := true
			c := Check{State: gone}
			for _, got := range r.Checks {
				want = want && got.State != Missing
				if got.Name == test.check {
					c = got
				}
				if (got.State == OK) != (got.Mend == "") || got.Found == "" {
					t.Errorf("a check that is not whole: %+v", got)
				}
			}
			if c.State != test.state || !strings.Contains(c.Found, test.found) || !strings.Contains(c.Mend, test.mend) {
				t.Errorf("got %+v, want it %s, with %q and %q", c, test.state, test.found, test.mend)
			}
			if r.OK != want {
				t.Errorf("the host is fit: %t, want %t", r.OK, want)
			}
		})
	}
}

func TestReport(t *testing.T) {
	r := Report{Checks: []Check{ok("a", "%s", "fine"), warning("long", "so so", "Mend it."), missing("b", "gone", "Get it.")}}
	var text strings.Builder
	if err := r.Text(&text); err != nil {
		t.Fatal(err)
	}
	want := `ok       a     fine
warning  long  so so
               → Mend it.
missing  b     gone
               → Get it.
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Error(diff)
	}
	got, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	want = `{"ok":false,"checks":[{"name":"a","state":"ok","found":"fine"},` +
		`{"name":"long","state":"warning","found":"so so","mend":"Mend it."},` +
		`{"name":"b","state":"missing","found":"gone","mend":"Get it."}]}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}

// On the host of this test the answers are those of calf itself.
func TestThisHost(t *testing.T) {
	h := ThisHost()
	r, err := Examine(h, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if works := vmm.Probe() == nil; r.OK != works {
		t.Errorf("fit: %t, but guests run: %t\n%+v", r.OK, works, r.Checks)
	}
	if h.field(meminfo, "MemAvailable") == "" || len(h.processorFlags()) == 0 {
		t.Error("nothing is read from /proc")
	}
}

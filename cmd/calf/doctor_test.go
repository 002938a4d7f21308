package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/doctor"
	"github.com/calfvm/calf/vmm"
)

// The exit code is that of what was found, in either form; warnings do not count.
func TestDoctor(t *testing.T) {
	fit := doctor.Host{
		Root:         fstest.MapFS{}, // which gives warnings
		OpenKVM:      func() error { return nil },
		Probe:        func() error { return nil },
		Capabilities: func() ([]vmm.Capability, int, error) { return nil, vmm.MaxCPUs, nil },
		IOUring:      func() error { return unix.ENOSYS },
		Landlock:     func() (int, error) { return 0, unix.ENOSYS },
	}
	unfit := fit
	unfit.OpenKVM = func() error { return unix.ENOENT }
	for _, test := range []struct {
		name string
		host doctor.Host
		code int
		said string
	}{{"fit", fit, 0, "warning  huge pages"}, {"unfit", unfit, exitUnfit, "missing  kvm"}} {
		t.Run(test.name, func(t *testing.T) {
			ask := func(args ...string) (code int, out []byte) {
				var b bytes.Buffer
				cmd := newDoctor(test.host)
				cmd.SilenceErrors, cmd.SilenceUsage = true, true
				cmd.SetOut(&b)
				cmd.SetArgs(args)
				var exit exitError
				if err := cmd.Execute(); errors.As(err, &exit) {
					code = exit.code
				} else if err != nil {
					t.Fatal(err)
				}
				return code, b.Bytes()
			}
			code, out := ask()
			if code != test.code || !strings.Contains(string(out), test.said) {
				t.Errorf("exit code %d, want %d; %q is to be in\n%s", code, test.code, test.said, out)
			}
			code, out = ask("--json")
			var r doctor.Report
			if err := json.Unmarshal(out, &r); err != nil || code != test.code || r.OK != (test.code == 0) || len(r.Checks) == 0 {
				t.Errorf("exit code %d, %v, %s", code, err, out)
			}
		})
	}
}

func TestDoctorOfThisHost(t *testing.T) {
	want := 0
	if vmm.Probe() != nil {
		want = exitUnfit
	}
	if code, out, messages := calf(t, "doctor"); code != want || !strings.Contains(out, "processor") || messages != "" {
		t.Errorf("exit code %d, want %d; %q, %q", code, want, out, messages)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, _ := calf(t, "doctor", "--kernel", text); code != exitUnfit || !strings.Contains(out, "missing  kernel ") {
		t.Errorf("exit code %d for what is no kernel: %q", code, out)
	}
	code, out, messages := calf(t, "doctor", "--kernel", text+".gone")
	refused(t, 1, code, out, messages, "no such file")
}

package e2e

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// TestMatrix runs one command under two kernels at once, of which one makes it fail.
func TestMatrix(t *testing.T) {
	image, _ := commandImage(t)
	list := kernels(t)
	dir := t.TempDir()
	text := fmt.Sprintf(`
vm.memory = "256MiB"
boot.cmdline = "quiet root=/dev/vda rootfstype=ext4"
disk = [{ path = %q, format = "raw" }]
artifact = [{ from = "/report", to = "out/{target}.txt" }]
run.command = ["sh", "-c", 'echo "$NAME on $(uname -r)"; echo "to err" >&2; echo "$NAME" >/report; cat; exit $CODE']
`, image)
	for name, k := range map[string]lab.Kernel{"old": list[0], "new": list[len(list)-1]} {
		code := map[string]int{"old": 7}[name]
		text += fmt.Sprintf("[[target]]\nname = %q\nboot = { kernel = %q, initrd = %q }\nrun.env = { NAME = %q, CODE = \"%d\" }\n", name, k.Image, k.Initrd, name, code)
	}
	file := filepath.Join(dir, "matrix.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	vm := startCalf(t, "run", file, "-j", "2", "--json", filepath.Join(dir, "r.json"), "--junit", filepath.Join(dir, "r.xml"))
	vm.exits(7)
	read := func(name string, decode func([]byte, any) error, v any) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = decode(b, v)
		}
		if err != nil {
			t.Fatalf("%s: %v", b, err)
		}
	}
	var result struct {
		Targets []struct {
			Name     string `json:"name"`
			ExitCode int    `json:"exit_code"`
			Command  struct {
				Kernel string `json:"kernel"`
			} `json:"command"`
		} `json:"targets"`
		ExitCode int `json:"exit_code"`
	}
	read("r.json", json.Unmarshal, &result)
	var report struct {
		Suite struct {
			Tests    int `xml:"tests,attr"`
			Failures int `xml:"failures,attr"`
			Cases    []struct {
				Name    string    `xml:"name,attr"`
				Out     string    `xml:"system-out"`
				Failure *struct{} `xml:"failure"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	read("r.xml", xml.Unmarshal, &report)
	if len(result.Targets) != 2 || result.ExitCode != 7 || report.Suite.Tests != 2 || report.Suite.Failures != 1 {
		t.Fatalf("reports %+v and %+v", result, report)
	}
	for i, r := range result.Targets {
		out := fmt.Sprintf("%s on %s\n", r.Name, r.Command.Kernel)
		if !strings.Contains(vm.console(), r.Name+" | "+out) || !strings.Contains(vm.stderr(), r.Name+" | to err\n") {
			t.Errorf("%s lacks its lines", r.Name)
		}
		c := report.Suite.Cases[i]
		if failed := r.Name == "old"; c.Name != r.Name || c.Out != out || (c.Failure != nil) != failed || (r.ExitCode == 7) != failed {
			t.Errorf("%s: %+v and %+v", r.Name, r, c)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "out", r.Name+".txt")); err != nil || string(b) != r.Name+"\n" {
			t.Errorf("the artifact of %s is %q, %v", r.Name, b, err)
		}
	}
	if got := vm.stderr(); !strings.Contains(got, "calf: old: failed with 7 in ") || !strings.HasSuffix(got, "calf: 2 targets: 1 passed, 1 failed\n") {
		t.Errorf("it said %q", got)
	}
}

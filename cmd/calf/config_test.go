package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/calfvm/calf/config"
)

// write makes a file in a directory of its own and returns its path.
func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const goodConfig = `
[vm]
cpus = 2
memory = "1G"
[boot]
kernel = "vmlinuz"
cmdline = "quiet"
[[disk]]
path = "root.qcow2"
[[disk]]
path = "data.img"
format = "raw"
readonly = true
`

const goodTargets = `
[run]
command = ["true"]
[[artifact]]
from = "/report"
to = "{target}/"
[[target]]
name = "a"
vm.cpus = 4
[[target]]
name = "b"
run.env.X = "1"
disk = []
`

func TestConfigCheck(t *testing.T) {
	good := write(t, "good.toml", goodConfig)
	if out := mustCalf(t, "config", "check", good); out != "" {
		t.Errorf("check of a good file prints %q", out)
	}
	bad := write(t, "bad.toml", "[vm]\ncpu = 2\nmemory = \"1X\"\n")
	code, stdout, stderr := calf(t, "config", "check", bad)
	refused(t, 2, code, stdout, stderr, bad+":2:1: ", `did you mean "cpus"?`, bad+":3:10: ")

	code, stdout, stderr = calf(t, "config", "check", "--json", bad)
	var report struct {
		Valid  bool
		Errors config.Errors
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil {
		t.Fatalf("%v: %q", err, stdout)
	}
	if code != 125 || stderr != "" || report.Valid || len(report.Errors) != 2 || report.Errors[1].Line != 3 || report.Errors[1].Column != 10 {
		t.Errorf("check --json exits %d, says %q and reports %+v", code, stderr, report)
	}
	if out := mustCalf(t, "config", "check", "--json", good); out != "{\n  \"valid\": true,\n  \"errors\": []\n}\n" {
		t.Errorf("check --json of a good file prints %q", out)
	}
	bad = write(t, "targets.toml", "[run]\nuser = \"u\"\n[vm]\ncpus = 0\n[[target]]\nname = \"a\"\n[[target]]\nname = \"a\"\n")
	code, stdout, stderr = calf(t, "config", "check", bad)
	refused(t, 2, code, stdout, stderr, bad+":4:8: vm.cpus", bad+":8:8: target.name")
	bad = write(t, "targets.toml", "boot.kernel = \"k\"\n"+goodTargets+"[run.env]\nA = \"1\"\n[[copy]]\nfrom = \"a\"\nto = \"/a\"\n[[target]]\nname = \"c\"\nrun.command = []\nartifact = []\n")
	code, stdout, stderr = calf(t, "config", "check", bad)
	refused(t, 2, code, stdout, stderr, bad+":22:15: run.command is empty, but copy is", bad+":22:15: run.command is empty, but run.env is")
	code, stdout, stderr = calf(t, "config", "check", "no/such/file.toml")
	refused(t, 1, code, stdout, stderr, "no/such/file.toml", "no such file")
	code, stdout, stderr = calf(t, "config", "check")
	refused(t, 1, code, stdout, stderr, "arg")
}

func TestConfigShowReadsBackToTheSame(t *testing.T) {
	for _, text := range []string{goodConfig, goodConfig + goodTargets} {
		path := write(t, "good.toml", text)
		want, err := config.Load(path)
		if err != nil {
			t.Fatal(err)
		}
		shown := mustCalf(t, "config", "show", path)
		got, err := config.Parse("show.toml", "/elsewhere", []byte(shown))
		if err != nil {
			t.Fatalf("%v\n%s", err, shown)
		}
		if diff := cmp.Diff(want.Effective().Expand(), got.Expand(), cmpopts.IgnoreUnexported(config.Config{}), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("show (-want +got):\n%s\n%s", diff, shown)
		}
		if again := mustCalf(t, "config", "show", write(t, "again.toml", shown)); again != shown {
			t.Errorf("show of what was shown differs:\n%s", again)
		}
	}
}

func TestConfigSchemaIsJSON(t *testing.T) {
	var schema struct{ Properties map[string]any }
	if err := json.Unmarshal([]byte(mustCalf(t, "config", "schema")), &schema); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"vm", "boot", "run", "vsock", "disk", "copy", "artifact", "target"} {
		if schema.Properties[table] == nil {
			t.Errorf("the schema lacks %s", table)
		}
	}
}

func TestVersion(t *testing.T) {
	var v version
	if err := json.Unmarshal([]byte(mustCalf(t, "version", "--json")), &v); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(v.Go, "go1.") || v.Version == "" {
		t.Errorf("version = %+v", v)
	}
	if out := mustCalf(t, "version"); !strings.HasPrefix(out, "calf ") || !strings.Contains(out, v.Go) {
		t.Errorf("version prints %q", out)
	}
	if got := (version{Version: "v1", Go: "go1"}).String(); got != "calf v1\ncommit unknown\ngo1" {
		t.Errorf("a version without a commit prints %q", got)
	}
}

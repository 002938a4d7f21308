package examples

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

const (
	actionFile   = "../action.yml"
	actionScript = "../.github/action/run.sh"
)

// action is what GitHub documents of the metadata of a composite action.
type action struct {
	Name, Author, Description string
	Branding                  struct{ Icon, Color string }
	Inputs                    map[string]struct {
		Description, Default string
		Required             bool
	}
	Outputs map[string]struct{ Description, Value string }
	Runs    struct {
		Using string
		Steps []step
	}
}

// step is a step of such an action.
type step struct {
	ID, Name, If, Uses, Run, Shell string
	WorkingDirectory               string `yaml:"working-directory"`
	ContinueOnError                bool   `yaml:"continue-on-error"`
	With, Env                      map[string]string
}

func readAction(t *testing.T) action {
	t.Helper()
	f, err := os.Open(actionFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	strict := yaml.NewDecoder(f)
	strict.KnownFields(true)
	var a action
	if err := strict.Decode(&a); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestActionMetadata looks at what GitHub asks of an action, and at what keeps inputs
// from being read as code.
func TestActionMetadata(t *testing.T) {
	a := readAction(t)
	if a.Name == "" || a.Description == "" || a.Runs.Using != "composite" {
		t.Errorf("name %q, description %q, using %q", a.Name, a.Description, a.Runs.Using)
	}
	if colors := []string{"white", "black", "yellow", "blue", "green", "orange", "red", "purple", "gray-dark"}; !slices.Contains(colors, a.Branding.Color) {
		t.Errorf("color %q", a.Branding.Color)
	}
	steps := map[string]bool{}
	for _, s := range a.Runs.Steps {
		steps[s.ID] = true
		switch {
		case (s.Uses == "") == (s.Run == ""):
			t.Errorf("a step has both uses and run, or neither: %+v", s)
		case s.Run != "" && s.Shell == "":
			t.Errorf("%s: no shell", s.Run)
		case strings.Contains(s.Run, "${{"):
			t.Errorf("%s: an expression becomes code", s.Run)
		case s.Uses != "" && !strings.Contains(s.Uses, "@v"):
			t.Errorf("%s: no version", s.Uses)
		}
	}
	script, err := os.ReadFile(actionScript)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for name, in := range a.Inputs {
		variable := "INPUT_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		want[variable] = "${{ inputs." + name + " }}"
		if in.Description == "" {
			t.Errorf("input %s: no description", name)
		}
		if !bytes.Contains(script, []byte("$"+variable)) {
			t.Errorf("nothing uses the input %s", name)
		}
	}
	last := a.Runs.Steps[len(a.Runs.Steps)-1]
	if diff := cmp.Diff(want, last.Env); diff != "" {
		t.Error(diff)
	}
	from := regexp.MustCompile(`^\$\{\{ steps\.([a-z]+)\.outputs\.([a-z-]+) }}$`)
	for name, out := range a.Outputs {
		m := from.FindStringSubmatch(out.Value)
		if m == nil || !steps[m[1]] || m[2] != name || !bytes.Contains(script, []byte(`"`+name+"=")) || out.Description == "" {
			t.Errorf("output %s: %+v", name, out)
		}
	}
}

// runner is a job on a runner of GitHub, as the script of the action sees it.
type runner struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

// newRunner prepares a run of the script with the inputs, where calf is a program that
// writes its arguments to the file args and then does what the rest of stub says.
func newRunner(t *testing.T, inputs map[string]string, stub string) *runner {
	t.Helper()
	r := &runner{t: t, dir: t.TempDir()}
	r.write("bin/calf", "#!/bin/sh\n[ $1 = doctor ] && echo examined && exit\nfor a; do printf '%s\\0' \"$a\"; done >args\n"+stub)
	script, err := filepath.Abs(actionScript)
	if err != nil {
		t.Fatal(err)
	}
	r.cmd = exec.Command("sh", script)
	r.cmd.Dir = r.dir
	r.cmd.Env = []string{
		"PATH=" + r.path("bin") + ":" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "RUNNER_TEMP=" + r.dir,
		"GITHUB_OUTPUT=" + r.path("output"), "GITHUB_PATH=" + r.path("paths"),
	}
	if _, given := inputs["calf"]; !given {
		r.cmd.Env = append(r.cmd.Env, "INPUT_CALF=calf")
	}
	for name, in := range readAction(t).Inputs {
		value, given := inputs[name]
		if !given {
			value = in.Default
		}
		if name != "calf" || given {
			r.cmd.Env = append(r.cmd.Env, "INPUT_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+value)
		}
	}
	return r
}

func (r *runner) path(name string) string { return filepath.Join(r.dir, name) }

// write writes a program.
func (r *runner) write(name, text string) {
	r.t.Helper()
	if err := os.MkdirAll(filepath.Dir(r.path(name)), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(r.path(name), []byte(text), 0o755); err != nil {
		r.t.Fatal(err)
	}
}

// run runs the script and returns what it says and its exit code.
func (r *runner) run() (out string, code int) {
	r.t.Helper()
	b, err := r.cmd.CombinedOutput()
	if r.cmd.ProcessState == nil {
		r.t.Fatal(err)
	}
	return string(b), r.cmd.ProcessState.ExitCode()
}

// outputs returns the outputs of the step.
func (r *runner) outputs() map[string]string {
	r.t.Helper()
	b, err := os.ReadFile(r.path("output"))
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		out[name] = value
	}
	return out
}

// TestActionScript runs the script with inputs, and looks at how it calls calf.
func TestActionScript(t *testing.T) {
	hostile := "$(touch pwned) `touch pwned` '; touch pwned; \"; touch pwned; \\"
	for _, tt := range []struct {
		name   string
		inputs map[string]string
		args   []string // after run and before the flag --json
		more   []string // after it
	}{
		{"image", map[string]string{"image": "a b.qcow2", "run": "make test\nexit 3"}, []string{"a b.qcow2"}, []string{"--", "sh", "-e", "-c", "make test\nexit 3"}},
		{"config", map[string]string{"config": "ci.toml"}, []string{"ci.toml"}, nil},
		{"config and run", map[string]string{"config": "ci.toml", "run": "true"}, []string{"ci.toml"}, []string{"--", "sh", "-e", "-c", "true"}},
		{"a name that looks like a flag", map[string]string{"config": "--ci.toml"}, []string{"./--ci.toml"}, nil},
		{
			"everything",
			map[string]string{
				"image": "x.qcow2", "run": "true", "cpus": "2", "memory": "1G", "timeout": "5m", "boot-timeout": "1m", "workdir": "/my src", "user": "1000:1000",
				"env": "A=1 2\n\n  B=\n", "copy": ".:/src\nb c:/d\n", "artifacts": "/src/x=out/\n/y", "flags": "--keep=k.qcow2\n--log-level\ninfo\n", "calf": "calf",
			},
			[]string{"x.qcow2"},
			[]string{
				"--cpus=2", "--memory=1G", "--timeout=5m", "--boot-timeout=1m", "--workdir=/my src", "--user=1000:1000", "--env=A=1 2", "--env=B=",
				"--copy=.:/src", "--copy=b c:/d", "--artifact=/src/x=out/", "--artifact=/y", "--keep=k.qcow2", "--log-level", "info", "--", "sh", "-e", "-c", "true",
			},
		},
		{
			"hostile",
			map[string]string{"image": hostile, "run": hostile, "memory": hostile, "env": "X=" + hostile + "\nEND", "copy": "*"},
			[]string{hostile},
			[]string{"--memory=" + hostile, "--env=X=" + hostile, "--env=END", "--copy=*", "--", "sh", "-e", "-c", hostile},
		},
		{"a flag in a value", map[string]string{"config": "ci.toml", "cpus": "1\n--keep=x"}, []string{"ci.toml"}, []string{"--cpus=1", "--cpus=--keep=x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRunner(t, tt.inputs, "exit 7")
			if out, code := r.run(); code != 7 || out != "" {
				t.Errorf("exit code %d, output %q", code, out)
			}
			out := r.outputs()
			b, err := os.ReadFile(r.path("args"))
			if err != nil {
				t.Fatal(err)
			}
			want := slices.Concat([]string{"run"}, tt.args, []string{"--json=" + out["result"]}, tt.more)
			if diff := cmp.Diff(want, strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")); diff != "" {
				t.Error(diff)
			}
			if out["exit-code"] != "7" || !strings.HasPrefix(out["result"], r.dir+"/") || len(out) != 2 {
				t.Errorf("outputs %v", out)
			}
			if _, err := os.Stat(r.path("pwned")); err == nil {
				t.Error("an input was read as code")
			}
		})
	}
}

// TestActionRefuses has inputs that do not go together.
func TestActionRefuses(t *testing.T) {
	for _, tt := range []struct {
		inputs map[string]string
		says   string
	}{
		{nil, "one of the inputs image and config"},
		{map[string]string{"image": "a.qcow2", "config": "a.toml"}, "one of the inputs image and config"},
		{map[string]string{"image": "a.qcow2"}, "the input run is missing"},
	} {
		r := newRunner(t, tt.inputs, "")
		if out, code := r.run(); code != 125 || !strings.HasPrefix(out, "::error ") || !strings.Contains(out, tt.says) {
			t.Errorf("%v: exit code %d, output %q", tt.inputs, code, out)
		}
		if _, err := os.Stat(r.path("args")); err == nil {
			t.Errorf("%v: calf was run", tt.inputs)
		}
	}
}

// TestActionBuilds builds calf as the action does by default. It has no image, which
// it says as a run does that cannot begin.
func TestActionBuilds(t *testing.T) {
	r := newRunner(t, map[string]string{"image": "missing.qcow2", "run": "true", "cpus": "2", "calf": ""}, "")
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Env = append(r.cmd.Env, "GITHUB_ACTION_PATH="+root, "GOFLAGS="+os.Getenv("GOFLAGS"))
	out, code := r.run()
	if code != 125 || !strings.Contains(out, "missing.qcow2") || !strings.Contains(out, "/dev/kvm") {
		t.Errorf("exit code %d, output %q", code, out)
	}
	path, err := os.ReadFile(r.path("paths"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath(filepath.Join(strings.TrimSpace(string(path)), "calf")); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(r.outputs()["result"])
	if err != nil {
		t.Fatal(err)
	}
	var result struct {
		ExitCode int `json:"exit_code"`
	}
	if err := json.Unmarshal(b, &result); err != nil || result.ExitCode != 125 {
		t.Errorf("the result is %s, %v", b, err)
	}
}

// TestActionOpensKVM has a device that the runner's user may not open.
func TestActionOpensKVM(t *testing.T) {
	for _, tt := range []struct {
		environment string
		mode        fs.FileMode
		sudo        string
	}{
		{"github-hosted", 0, "tee /etc/udev/rules.d/99-kvm4all.rules\nudevadm control --reload-rules\nudevadm trigger --name-match=kvm\nudevadm settle\n"},
		{"github-hosted", 0o666, ""},
		{"self-hosted", 0, ""},
	} {
		t.Run(fmt.Sprintf("%s %o", tt.environment, tt.mode), func(t *testing.T) {
			r := newRunner(t, map[string]string{"config": "ci.toml"}, "")
			script, err := os.ReadFile(actionScript)
			if err != nil {
				t.Fatal(err)
			}
			r.write("device", "")
			r.write("script", strings.ReplaceAll(string(script), "/dev/kvm", r.path("device")))
			r.write("bin/sudo", "#!/bin/sh\necho \"$@\" >>sudo\n[ \"$1\" != tee ] || cat >rule\n")
			for path, mode := range map[string]fs.FileMode{r.path("device"): tt.mode, r.dir: 0o777, filepath.Dir(r.dir): 0o755} {
				if err := os.Chmod(path, mode); err != nil {
					t.Fatal(err)
				}
			}
			r.cmd.Args[1] = r.path("script")
			r.cmd.Env = append(r.cmd.Env, "RUNNER_ENVIRONMENT="+tt.environment)
			if os.Geteuid() == 0 { // who may open anything
				r.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			if out, code := r.run(); code != 0 {
				t.Fatalf("exit code %d, output %q", code, out)
			}
			sudo, err := os.ReadFile(r.path("sudo"))
			if err != nil && tt.sudo != "" {
				t.Fatal(err)
			}
			if string(sudo) != tt.sudo {
				t.Errorf("sudo was asked for %q, want %q", sudo, tt.sudo)
			}
			rule, _ := os.ReadFile(r.path("rule"))
			if tt.sudo != "" && !strings.Contains(string(rule), `KERNEL=="kvm"`) {
				t.Errorf("the rule is %q", rule)
			}
		})
	}
}

// TestWorkflow holds the page to the file that it shows, and the file to the action.
func TestWorkflow(t *testing.T) {
	text, err := os.ReadFile("github/vm.yml")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../docs/github-actions.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(page, []byte("```yaml\n"+string(text)+"```\n")) {
		t.Error("docs/github-actions.md does not show examples/github/vm.yml as it is")
	}
	a := readAction(t)
	uses := 0
	blocks := strings.Split(string(page), "```yaml\n")[1:]
	for _, block := range blocks {
		block, _, _ = strings.Cut(block, "```\n")
		var steps []step
		if strings.HasPrefix(block, "- ") {
			err = yaml.Unmarshal([]byte(block), &steps)
		} else {
			var workflow struct {
				Jobs map[string]struct{ Steps []step }
			}
			err = yaml.Unmarshal([]byte(block), &workflow)
			for _, job := range workflow.Jobs {
				steps = append(steps, job.Steps...)
			}
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, block)
		}
		for _, s := range steps {
			if !strings.HasPrefix(s.Uses, "calfvm/calf@") {
				continue
			}
			uses++
			for name := range s.With {
				if _, ok := a.Inputs[name]; !ok {
					t.Errorf("the action has no input %s", name)
				}
			}
		}
	}
	if uses != len(blocks) {
		t.Errorf("%d of %d blocks use the action", uses, len(blocks))
	}
}

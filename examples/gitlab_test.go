package examples

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"go.yaml.in/yaml/v3"
)

// TestGitLab holds docs/gitlab.md to the files that it shows, and those to calf.
func TestGitLab(t *testing.T) {
	page, err := os.ReadFile("../docs/gitlab.md")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for name, lang := range map[string]string{"config.toml": "toml", "job.toml": "toml", "executor.yml": "yaml", "kvm.yml": "yaml"} {
		text, err := os.ReadFile("gitlab/" + name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = text
		if !bytes.Contains(page, []byte("```"+lang+"\n"+string(text)+"```\n")) {
			t.Errorf("docs/gitlab.md does not show examples/gitlab/%s as it is", name)
		}
	}
	calf := filepath.Join(t.TempDir(), "calf")
	build := exec.Command("go", "build", "-o", calf, "../cmd/calf")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Run("runner", func(t *testing.T) { gitlabRunner(t, calf, files) })
	t.Run("job", func(t *testing.T) { gitlabJob(t, calf, files) })
}

// gitlabRunner calls each verb as the runner would, but for a job.
func gitlabRunner(t *testing.T, calf string, files map[string][]byte) {
	if out, err := exec.Command(calf, "config", "show", "gitlab/job.toml").CombinedOutput(); !strings.Contains(string(out), "no kernel is given") {
		t.Errorf("job.toml: %v, %s", err, out) // which is all that it lacks
	}
	var conf struct {
		Runners []struct{ Custom map[string]any }
	}
	if _, err := toml.Decode(string(files["config.toml"]), &conf); err != nil {
		t.Fatal(err)
	}
	custom := conf.Runners[0].Custom
	for verb, want := range map[string]string{"config": "for a runner to call", "prepare": "for a runner to call", "run": "for a runner to call", "cleanup": ""} {
		var args []string
		for _, arg := range custom[verb+"_args"].([]any) {
			args = append(args, arg.(string))
		}
		if verb == "run" {
			args = append(args, "script", "step_script")
		}
		if args[len(args)-1] != verb && verb != "run" || custom[verb+"_exec"] != "/usr/local/bin/calf" {
			t.Errorf("%s_exec runs %q %q", verb, custom[verb+"_exec"], args)
		}
		cmd := exec.Command(calf, args...)
		cmd.Env = []string{"SYSTEM_FAILURE_EXIT_CODE=2"}
		out, err := cmd.CombinedOutput()
		if want == "" && (err != nil || len(out) > 0) || want != "" && (cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), want)) {
			t.Errorf("%s: %v, %s", verb, err, out)
		}
	}
}

// gitlabJob runs the script of the job, as far as the image that is not there.
func gitlabJob(t *testing.T, calf string, files map[string][]byte) {
	var jobs map[string]struct {
		Script    []string
		Variables map[string]string
	}
	for _, name := range []string{"executor.yml", "kvm.yml"} {
		if err := yaml.Unmarshal(files[name], &jobs); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	script := jobs["test"].Script
	if len(script) != 2 || script[0] != "calf doctor" {
		t.Fatalf("the script is %q", script)
	}
	cmd := exec.Command("bash", "-c", script[1])
	cmd.Env = []string{"PATH=" + filepath.Dir(calf) + ":" + os.Getenv("PATH"), "CI=true", "CI_PROJECT_DIR=" + t.TempDir()}
	image := filepath.Join(t.TempDir(), "none.qcow2")
	cmd.Env = append(cmd.Env, "IMAGE="+image)
	out, _ := cmd.CombinedOutput()
	if want := image + ": cannot open the image: no such file"; cmd.ProcessState.ExitCode() != 125 || !strings.Contains(string(out), want) {
		t.Errorf("exit code %d, %s", cmd.ProcessState.ExitCode(), out)
	}
}

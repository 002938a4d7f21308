// Package examples tests the examples: their configurations, their scripts, and the
// files for CI services. TestExamples of the package e2e runs those that boot guests.
package examples

import (
	"crypto/sha512"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/calfvm/calf/config"
)

// glob returns the files that match, of which there are at least n.
func glob(t *testing.T, pattern string, n int) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) < n {
		t.Fatalf("%s: %q, %v", pattern, files, err)
	}
	return files
}

func TestConfigs(t *testing.T) {
	for _, file := range glob(t, "*/*.toml", 4) {
		if strings.HasPrefix(file, "gitlab/") { // whose files are not whole, or not calf's
			continue
		}
		cfg, err := config.Load(file)
		if err == nil {
			err = cfg.Validate()
		}
		if err != nil {
			t.Error(err)
		}
	}
}

func TestScripts(t *testing.T) {
	shellcheck, missing := exec.LookPath("shellcheck")
	for _, file := range append(glob(t, "*/*.sh", 5), actionScript) {
		if info, err := os.Stat(file); err != nil || info.Mode()&0o111 == 0 {
			t.Errorf("%s cannot be executed: %v", file, err)
		}
		if out, err := exec.Command("sh", "-n", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", file, err, out)
		}
		if missing != nil {
			continue
		}
		if out, err := exec.Command(shellcheck, file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", file, err, out)
		}
	}
	if missing != nil {
		t.Skip("no shellcheck")
	}
}

// mirror makes a place that has an image as Debian's has, with the sum of want, and
// returns its address.
func mirror(t *testing.T, image, want string) string {
	t.Helper()
	dir := t.TempDir()
	const name = "debian-12-genericcloud-amd64.qcow2"
	sums := fmt.Sprintf("%0128x  other.qcow2\n", 1)
	if want != "" {
		sums += fmt.Sprintf("%x  %s\n", sha512.Sum512([]byte(want)), name)
	}
	for file, text := range map[string]string{name: image, "SHA512SUMS": sums} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return "file://" + dir
}

// clone copies an example, to where it can be run.
func clone(t *testing.T, name string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), name)
	if err := os.CopyFS(dir, os.DirFS(name)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// sh runs a script in dir with further variables and returns its output and exit code.
func sh(t *testing.T, dir string, env []string, args ...string) (out string, code int) {
	t.Helper()
	cmd := exec.Command("sh", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// TestFetch fetches images from mirrors, good and bad.
func TestFetch(t *testing.T) {
	for _, tt := range []struct{ name, image, sum, says string }{
		{"good", "image", "image", ""},
		{"changed", "image!", "image", "is not what"},
		{"empty", "", "image", "is not what"},
		{"no sum", "image", "", "has no sum of"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := clone(t, "debian")
			before := names(t, dir)
			out, code := sh(t, dir, []string{"MIRROR=" + mirror(t, tt.image, tt.sum)}, "fetch.sh")
			if tt.says != "" {
				if after := names(t, dir); code == 0 || !strings.Contains(out, tt.says) || after != before {
					t.Errorf("exit code %d, output %q, files %s", code, out, after)
				}
				return
			}
			got, err := os.ReadFile(filepath.Join(dir, "debian-12.qcow2"))
			if err != nil || string(got) != tt.image || code != 0 {
				t.Fatalf("exit code %d, output %q, image %q, %v", code, out, got, err)
			}
			if out, code := sh(t, dir, []string{"MIRROR=file:///nowhere"}, "fetch.sh"); code != 0 {
				t.Errorf("it was there already: exit code %d, output %q", code, out)
			}
		})
	}
}

// names are the names of what a directory has.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(entries)
}

// stubs makes programs and returns the PATH that has them first.
func stubs(t *testing.T, programs map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range programs {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return "PATH=" + dir + ":" + os.Getenv("PATH")
}

// TestBisect has git find the commit that breaks a kernel, in each way in which it can.
func TestBisect(t *testing.T) {
	script, err := filepath.Abs("kernel/bisect.sh")
	if err != nil {
		t.Fatal(err)
	}
	// The tree says what becomes of its kernel; one that cannot be built is in the way.
	path := stubs(t, map[string]string{"make": "! grep -q unbuilt kernel", "calf": "echo \"ended with $(cat kernel).\"; exit $(cat kernel)"})
	for _, tt := range []struct {
		code  int
		found bool
	}{{1, true}, {124, true}, {126, true}, {139, true}, {255, true}, {125, false}, {130, false}} {
		dir := t.TempDir()
		out, code := sh(t, dir, []string{
			path, "CODE=" + fmt.Sprint(tt.code), "SCRIPT=" + script, "GIT_CONFIG_GLOBAL=/dev/null",
			"GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x", "GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x",
		}, "-ec", `
			git init -q .
			for kernel in 0 0 0 unbuilt 0 "$CODE" "$CODE"; do
				echo $((n += 1)) >n
				echo $kernel >kernel
				git add . && git commit -qm "commit $n"
			done
			git bisect start HEAD HEAD~6
			git bisect run "$SCRIPT"`)
		if found := code == 0 && strings.Contains(out, "commit 6\n"); found != tt.found {
			t.Errorf("a kernel that ends calf with %d: found %v, exit code %d\n%s", tt.code, found, code, out)
		}
		if n := strings.Count(out, fmt.Sprintf("ended with %d.", tt.code)); !tt.found && n != 1 {
			t.Errorf("it did not stop: calf ended with %d %d times", tt.code, n)
		}
	}
}

// TestGo runs the script of the Go project where no VM is: calf is what runs the tests
// here, of which those that need one skip themselves.
func TestGo(t *testing.T) {
	dir := clone(t, "go")
	path := stubs(t, map[string]string{"calf": `echo "$*" && build/ramdir.test -test.v -test.coverprofile=build/cover.out`})
	if out, code := sh(t, dir, nil, "-c", "go vet ./..."); code != 0 {
		t.Error(out)
	}
	out, code := sh(t, dir, []string{path}, "test.sh", "--cpus", "4")
	for _, want := range []string{"run vm.toml --cpus 4\n", "--- PASS: TestNothing", "--- SKIP: TestFull", "ramdir.go:17:", "total:"} {
		if !strings.Contains(out, want) || code != 0 {
			t.Errorf("exit code %d, no %q in\n%s", code, want, out)
		}
	}
	path = stubs(t, map[string]string{"calf": "exit 9"})
	if out, code := sh(t, dir, []string{path}, "test.sh"); code != 9 || strings.Contains(out, "total:") {
		t.Errorf("tests that fail: exit code %d, output %q", code, out)
	}
}

// TestGitLabPipeline runs the script of the pipeline for GitLab as a runner would, but
// for calf.
func TestGitLabPipeline(t *testing.T) {
	text, err := os.ReadFile("gitlab/.gitlab-ci.yml")
	if err != nil {
		t.Fatal(err)
	}
	var pipeline struct {
		Build, VM struct {
			Before []string `yaml:"before_script"`
			Script []string
			After  []string `yaml:"after_script"`
		}
	}
	if err := yaml.Unmarshal(text, &pipeline); err != nil {
		t.Fatal(err)
	}
	vm := pipeline.VM
	script := "set -e\nexport PATH=$PATH:bin\n" + strings.Join(append(append(vm.Before, vm.Script...), vm.After...), "\n")
	dir := t.TempDir()
	env := []string{"IMAGES=" + mirror(t, "image", "image"), "IMAGE=debian-12-genericcloud-amd64.qcow2"}
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/calf"), []byte("#!/bin/sh\necho \"$*\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time the image comes from the cache
		out, code := sh(t, dir, env, "-c", script)
		if code != 0 || !strings.Contains(out, "run images/debian-12-genericcloud-amd64.qcow2 --cpus 2 ") || !strings.Contains(out, " --junit report.xml -- ./tests -test.v ") {
			t.Errorf("exit code %d, output %s", code, out)
		}
		env[0] = "IMAGES=file:///nowhere"
	}
	env[0] = "IMAGES=" + mirror(t, "image!", "image")
	if out, code := sh(t, t.TempDir(), env, "-c", script); code == 0 || strings.Contains(out, "run images") {
		t.Errorf("an image that is another: exit code %d, output %s", code, out)
	}
}

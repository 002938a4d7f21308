package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestGitLab calls the verbs of the executor as a runner does, and by hand.
func TestGitLab(t *testing.T) {
	dir := t.TempDir()
	response, script := filepath.Join(dir, "response.json"), filepath.Join(dir, "script")
	for path, text := range map[string]string{response: `{"id": 5, "job_info": {"project_id": 6}}`, script: "echo from the script; exit 8"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	executor := func(args ...string) (code int, out, messages string) {
		t.Helper()
		return calf(t, append([]string{"gitlab-executor", "--state", dir, "--images", dir, "--unconfined"}, args...)...)
	}
	t.Setenv("JOB_RESPONSE_FILE", "")
	if code, out, messages := executor("cleanup"); code != 0 || out+messages != "" {
		t.Errorf("cleanup: %d, %q, %q", code, out, messages)
	}
	if code, _, messages := executor("config"); code != 2 || !strings.Contains(messages, "for a runner to call") {
		t.Errorf("config without a job: %d, %q", code, messages)
	}
	t.Setenv("JOB_RESPONSE_FILE", response)
	t.Setenv("SYSTEM_FAILURE_EXIT_CODE", "77")
	t.Setenv("BUILD_FAILURE_EXIT_CODE", "78")
	if code, out, messages := executor("config"); code != 0 || !strings.Contains(out, fmt.Sprintf(`"builds_dir":"%s/jobs/5/builds"`, dir)) {
		t.Errorf("config: %d, %q, %q", code, out, messages)
	}
	if code, _, messages := executor("--image", "none", "prepare"); code != 77 || !strings.Contains(messages, `no image "none"`) {
		t.Errorf("prepare: %d, %q", code, messages)
	}
	if code, _, messages := executor("--max-memory", "much", "prepare"); code != 77 || !strings.Contains(messages, "--max-memory") {
		t.Errorf("prepare: %d, %q", code, messages)
	}
	for _, name := range []string{"builds", "home", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, "jobs/5", name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if code, out, messages := executor("run", script, "get_sources"); code != 78 || out != "from the script\n" || !strings.Contains(messages, "exit code 8") {
		t.Errorf("run: %d, %q, %q", code, out, messages)
	}
	if code, _, messages := executor("cleanup"); code != 0 || messages != "" {
		t.Errorf("cleanup: %d, %q", code, messages)
	}
	if _, err := os.Stat(filepath.Join(dir, "jobs/5")); !os.IsNotExist(err) {
		t.Errorf("cleanup leaves the job's directory: %v", err)
	}
	if code, _, _ := executor("run", script); code != 125 {
		t.Errorf("run without a stage: %d", code)
	}
}

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/calfvm/calf/cmd/internal/confine"
	"github.com/calfvm/calf/cmd/internal/lab"
)

// gitlabJob is a job of GitLab CI, whose runner the test plays.
type gitlabJob struct {
	t              *testing.T
	dir            string
	flags, environ []string
	project        string
}

// newGitLabJob makes a job whose guest has busybox alone and a stock kernel.
func newGitLabJob(t *testing.T) *gitlabJob {
	t.Helper()
	lab.Need(t)
	dir := t.TempDir()
	root, images, guest, response := filepath.Join(dir, "root.raw"), filepath.Join(dir, "images"), filepath.Join(dir, "guest.toml"), filepath.Join(dir, "response.json")
	k := newestKernel(t)
	boot := fmt.Sprintf("[vm]\nmemory = \"256MiB\"\n[boot]\nkernel = %q\ninitrd = %q\ncmdline = \"quiet root=/dev/vda rootfstype=ext4\"\n[run]\nenv = {FROM_FILE = \"yes\"}\n", k.Image, k.Initrd)
	for path, text := range map[string]string{guest: boot, response: `{"id": 11, "job_info": {"project_id": 12}}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(images, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := lab.GuestRoot(root, 128, map[string]string{"/etc/passwd": "root:x:0:0::/root:/bin/sh\n"}); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "convert", "-O", "qcow2", root, filepath.Join(images, "busybox.qcow2"))
	j := &gitlabJob{t: t, dir: dir, project: filepath.Join(dir, "state/jobs/11/builds/group/project")}
	j.flags = []string{"gitlab-executor", "--state", filepath.Join(dir, "state"), "--images", images, "--config", guest}
	if err := confine.Supported(); err != nil {
		t.Log(err)
		j.flags = append(j.flags, "--unconfined")
	}
	j.environ = append(os.Environ(), "JOB_RESPONSE_FILE="+response, "BUILD_EXIT_CODE_FILE="+j.codeFile(),
		"BUILD_FAILURE_EXIT_CODE=77", "SYSTEM_FAILURE_EXIT_CODE=78",
		"CUSTOM_ENV_CI_PROJECT_DIR="+j.project, "CUSTOM_ENV_CI_JOB_IMAGE=busybox")
	return j
}

func (j *gitlabJob) codeFile() string { return filepath.Join(j.dir, "exit_code") }

// start calls a verb of the executor.
func (j *gitlabJob) start(args ...string) *vm {
	j.t.Helper()
	cmd := exec.Command(lab.Calf(), append(j.flags, args...)...)
	cmd.Env = j.environ
	return startCommand(j.t, cmd)
}

// stage starts a script of the runner, which runs commands in the project.
func (j *gitlabJob) stage(name, commands string) *vm {
	j.t.Helper()
	script := filepath.Join(j.dir, "script."+name)
	text := "#!/usr/bin/env bash\n\ntrap exit 1 TERM\n\n" +
		"if set -o | grep pipefail > /dev/null; then set -o pipefail; fi; set -o errexit\nset +o noclobber\n" +
		": | eval '" + strings.ReplaceAll("mkdir -p "+j.project+"\ncd "+j.project+"\n"+commands, "'", `'\''`) + "'\nexit 0\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		j.t.Fatal(err)
	}
	return j.start("run", script, name)
}

// TestGitLab runs a job of GitLab CI: stages on the host and in the guest, one of which
// fails, and one of which is cancelled.
func TestGitLab(t *testing.T) {
	j := newGitLabJob(t)
	j.start("config").exits(0)
	prepare := j.start("prepare")
	prepare.exits(0)
	if !strings.Contains(prepare.console(), "guest of busybox.qcow2") {
		t.Errorf("prepare says %q", prepare.console())
	}
	j.stage("get_sources", "mkdir .git; echo mine > .git/config; echo first > file").exits(0)

	build := j.stage("build_script", `cat file .git/config; echo "$FROM_FILE $(hostname)"
		echo evil > .git/config; echo second > file; echo x > /installed; ln -s /etc/passwd leak; ln -s file link`)
	build.exits(0)
	if build.console() != "first\nmine\nyes job-11\n" || !strings.Contains(build.stderr(), "not taken to the host: leak") {
		t.Errorf("the guest says %q, calf %q", build.console(), build.stderr())
	}

	failing := j.stage("step_script", "cat /installed .git/config file; echo y > /installed2; echo third > file; exit 42")
	failing.exits(77)
	if code, err := os.ReadFile(j.codeFile()); failing.console() != "x\nevil\nsecond\n" || string(code) != "42" {
		t.Errorf("the guest says %q, the exit code is %q, %v", failing.console(), code, err)
	}

	cancelled := j.stage("after_script", "cat /installed2; trap 'echo cancelled >> file; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
	cancelled.waitFor("y\nready\n")
	cancelled.signal(syscall.SIGTERM)
	cancelled.exits(77)

	upload := j.stage("upload_artifacts_on_failure", "cat file link .git/config; ls")
	upload.exits(0)
	if want := "third\ncancelled\nthird\ncancelled\nmine\nfile\nlink\n"; upload.console() != want {
		t.Errorf("the host has %q, want %q", upload.console(), want)
	}
	j.start("cleanup").exits(0)
	if left, err := os.ReadDir(filepath.Join(j.dir, "state/jobs")); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

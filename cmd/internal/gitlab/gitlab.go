// Package gitlab is a custom executor for GitLab Runner: each job runs in a guest of
// its own. The runner calls it once for each of a job's stages, with scripts that it
// has written, and learns from the exit code how a stage ended.
//
// A guest has no network, and the runner's helper and git need one. So the stages that
// fetch and deliver run on the host, in a directory of the job, and the stages that run
// the job's own commands in the guest, with a copy of that directory at the same path.
// What the guest sends back is taken with care (see accept), because programs of the
// host read it next; what the host runs is confined (see package confine), because the
// job has a say in it: its variables, its hooks.
//
// A directory holds what a job needs and goes with it:
//
//	STATE/jobs/ID/builds      the runner's builds directory
//	             /home, /tmp  of the stages on the host
//	             /root.qcow2  what the guest has written to its disk
//	             /incoming    what it sends
//	STATE/cache/PROJECT       the runner's cache directory
//
// The numbers of jobs and projects are those of the server's response, which the
// variables of a job do not change.
package gitlab

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
)

// Settings are what the operator of a runner decides.
type Settings struct {
	State  string // the directory of all that the executor keeps
	Images string // the directory of the images that jobs may name
	Image  string // the name of the one for jobs that name none
	Guest  string // a file that describes guests but for their disk; may be empty
	// MaxCPUs and MaxMemory bound what jobs may ask for; 0: they may not.
	MaxCPUs   int
	MaxMemory config.Size
	// Unconfined lets the stages on the host do what the user of the runner may do.
	Unconfined bool
}

// Machine is what runs guests.
type Machine interface {
	// Check reports what keeps the guest of cfg from running on this host, and what
	// kernel it boots.
	Check(cfg *config.Config) (kernel string, err error)
	Run(cfg *config.Config, opts launch.Options) launch.Result
}

// Executor is one call of the runner.
type Executor struct {
	Settings
	Machine Machine
	Version string              // of calf
	Getenv  func(string) string // the variables that the runner sets
	Streams console.Streams     // of which In is not used
	Grace   time.Duration       // that a script which is told to end has for it; 0: 20 s
}

func (e *Executor) grace() time.Duration {
	return cmp.Or(e.Grace, 20*time.Second)
}

// BuildError says that it is the job that has failed.
type BuildError struct {
	Code int // of the script, 0 if there is none
	Err  error
}

func (e *BuildError) Error() string { return e.Err.Error() }
func (e *BuildError) Unwrap() error { return e.Err }

// ExitCode is the code by which the runner knows the end of a stage, whose script's own
// goes to the file that the runner names.
func (e *Executor) ExitCode(err error) (int, error) {
	build, isBuild := errors.AsType[*BuildError](err)
	switch {
	case err == nil:
		return 0, nil
	case !isBuild:
		return e.code("SYSTEM_FAILURE_EXIT_CODE", 2), nil
	}
	var failed error
	if file := e.Getenv("BUILD_EXIT_CODE_FILE"); file != "" && build.Code != 0 {
		failed = os.WriteFile(file, []byte(strconv.Itoa(build.Code)), 0o600)
	}
	return e.code("BUILD_FAILURE_EXIT_CODE", 1), failed
}

func (e *Executor) code(name string, otherwise int) int {
	if n, err := strconv.Atoi(e.Getenv(name)); err == nil && n > 0 && n < 256 {
		return n
	}
	return otherwise
}

// runnerConfig is what the runner reads of the stage config.
type runnerConfig struct {
	BuildsDir       string `json:"builds_dir"`
	CacheDir        string `json:"cache_dir"`
	BuildsDirShared bool   `json:"builds_dir_is_shared"`
	Hostname        string `json:"hostname,omitempty"`
	Driver          driver `json:"driver"`
}

type driver struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Config tells the runner where a job is at home.
func (e *Executor) Config() error {
	j, err := e.job()
	if err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	return json.NewEncoder(e.Streams.Out).Encode(runnerConfig{
		BuildsDir: j.builds(), CacheDir: j.cache, Hostname: name, Driver: driver{"calf", e.Version},
	})
}

// Prepare makes the directories of a job, in the place of what an earlier try may have
// left, and finds out whether its guest can run.
func (e *Executor) Prepare() error {
	j, err := e.job()
	if err != nil {
		return err
	}
	if !e.Unconfined {
		if err := confined(); err != nil {
			return err
		}
	}
	switch e.Getenv(jobVariable + "CI_JOB_SERVICES") {
	case "", "null", "[]":
	default:
		return errors.New("the job has services, which guests cannot have: they have no network")
	}
	cfg, err := e.guest(j)
	if err != nil {
		return err
	}
	kernel, err := e.Machine.Check(cfg)
	if err != nil {
		return err
	}
	if err := removeTree(j.dir); err != nil {
		return err
	}
	for _, dir := range j.dirs() {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	cfg = cfg.Effective()
	_, err = fmt.Fprintf(e.Streams.Out, "The commands of this job run in a fresh guest of %s: kernel %s, %d CPUs, %v of memory\n",
		filepath.Base(cfg.Disks[0].Path), kernel, cfg.VM.CPUs, cfg.VM.Memory)
	return err
}

// hostStages are the stages whose scripts the runner writes by itself, to fetch and to
// deliver. Any other has commands of the job.
var hostStages = map[string]bool{
	"prepare_script": true, "get_sources": true, "clear_worktree": true, "restore_cache": true, "download_artifacts": true,
	"archive_cache": true, "archive_cache_on_failure": true, "upload_artifacts_on_success": true,
	"upload_artifacts_on_failure": true, "cleanup_file_variables": true,
}

// Run runs the script of a stage.
func (e *Executor) Run(script, stage string) (err error) {
	j, err := e.job()
	if err != nil {
		return err
	}
	if info, err := os.Lstat(j.builds()); err != nil || !info.IsDir() {
		return errors.Join(fmt.Errorf("job %d has not been prepared: is prepare_exec set?", j.id), err)
	}
	f, err := os.Open(script)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // it was read only
	if hostStages[stage] {
		return e.onHost(j, f)
	}
	return e.inGuest(j, f)
}

// Cleanup removes what belongs to a job, if there is anything.
func (e *Executor) Cleanup() error {
	if e.Getenv(responseVariable) == "" {
		return nil // the runner gave up before there was a job
	}
	j, err := e.job()
	if err != nil {
		return err
	}
	return removeTree(j.dir)
}

package gitlab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/calfvm/calf/config"
)

// responseVariable names the file that has what the server says of a job.
const responseVariable = "JOB_RESPONSE_FILE"

// jobVariable begins the names of the variables of a job.
const jobVariable = "CUSTOM_ENV_"

// job is the job that the runner runs.
type job struct {
	id    int64
	dir   string // its own
	cache string // that of its project
}

// job finds out which job it is, by nothing that the job could say.
func (e *Executor) job() (*job, error) {
	if err := checkState(e.State); err != nil {
		return nil, err
	}
	file := e.Getenv(responseVariable)
	if file == "" {
		return nil, fmt.Errorf("%s is not set: this is for a runner to call, GitLab Runner 14 or later", responseVariable)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var response struct {
		ID  int64 `json:"id"`
		Job struct {
			Project int64 `json:"project_id"`
		} `json:"job_info"`
	}
	if err := json.Unmarshal(b, &response); err != nil {
		return nil, fmt.Errorf("%s: %w", responseVariable, err)
	}
	if response.ID <= 0 || response.Job.Project <= 0 {
		return nil, fmt.Errorf("%s says neither a job nor its project", responseVariable)
	}
	return &job{
		id:    response.ID,
		dir:   filepath.Join(e.State, "jobs", strconv.FormatInt(response.ID, 10)),
		cache: filepath.Join(e.State, "cache", strconv.FormatInt(response.Job.Project, 10)),
	}, nil
}

// volatile are directories that a guest makes anew when it boots.
var volatile = []string{"/dev", "/proc", "/run", "/sys"}

// checkState reports what is wrong with the state directory, whose path the guest has
// as well.
func checkState(dir string) error {
	if !filepath.IsAbs(dir) || dir != filepath.Clean(dir) {
		return fmt.Errorf("--state %q: give an absolute path, as the runner calls from anywhere", dir)
	}
	inside := func(top string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }
	if dir == "/" || slices.ContainsFunc(volatile, inside) {
		return fmt.Errorf("--state %s: jobs are at the same path in their guests, which lose what is there", dir)
	}
	return nil
}

func (j *job) builds() string   { return filepath.Join(j.dir, "builds") }
func (j *job) home() string     { return filepath.Join(j.dir, "home") }
func (j *job) tmp() string      { return filepath.Join(j.dir, "tmp") }
func (j *job) overlay() string  { return filepath.Join(j.dir, "root.qcow2") }
func (j *job) incoming() string { return filepath.Join(j.dir, "incoming") }

// dirs are the directories that a job starts with, the only ones in which the stages on
// the host may write.
func (j *job) dirs() []string { return []string{j.builds(), j.home(), j.tmp(), j.cache} }

// project is the directory of the job's project, below its own.
func (e *Executor) project(j *job) (string, error) {
	dir := e.Getenv(jobVariable + "CI_PROJECT_DIR")
	rel, err := filepath.Rel(j.builds(), dir)
	if err != nil || rel == "." || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("CI_PROJECT_DIR is %q, and not in the job's %s: is config_exec set?", dir, j.builds())
	}
	return rel, nil
}

// imageName is what may follow the name of a directory.
var imageName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.:+-]*$`)

// image is the path of the image that a job asks for.
func (e *Executor) image() (string, error) {
	name := e.Getenv(jobVariable + "CI_JOB_IMAGE")
	if name == "" {
		name = e.Image
	}
	switch {
	case !filepath.IsAbs(e.Images):
		return "", fmt.Errorf("--images %q: give the absolute path of the directory with the images", e.Images)
	case name == "":
		return "", errors.New("the job names no image, and the runner has none for such jobs: set image in .gitlab-ci.yml, or --image")
	case !imageName.MatchString(name):
		return "", fmt.Errorf("image %q: the name of an image has letters, digits and _.:+- only", name)
	}
	path := filepath.Join(e.Images, strings.TrimSuffix(name, ".qcow2")+".qcow2")
	if path, err := filepath.EvalSymlinks(path); err == nil {
		return filepath.Abs(path)
	}
	names, err := filepath.Glob(filepath.Join(e.Images, "*.qcow2"))
	if err != nil {
		return "", err
	}
	for i, path := range names {
		names[i] = strings.TrimSuffix(filepath.Base(path), ".qcow2")
	}
	return "", fmt.Errorf("this runner has no image %q; it has: %s", name, strings.Join(names, ", "))
}

// shell runs a script that comes as its input.
var shell = []string{"sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"}

// guest describes the guest of a job.
func (e *Executor) guest(j *job) (*config.Config, error) {
	cfg := &config.Config{}
	if e.Guest != "" {
		var err error
		if cfg, err = config.Load(e.Guest); err != nil {
			return nil, err
		}
		only := config.Config{VM: cfg.VM, Boot: cfg.Boot, Run: config.Run{Env: cfg.Run.Env}}
		if same, err := sameTOML(cfg, &only); err != nil || !same {
			return nil, errors.Join(err, fmt.Errorf("%s: for jobs it has [vm], [boot] and the env of [run]; the rest is the job's", e.Guest))
		}
	}
	image, err := e.image()
	if err != nil {
		return nil, err
	}
	if cfg.VM.Name == "" {
		cfg.VM.Name = fmt.Sprintf("job-%d", j.id)
	}
	cfg.Disks = []config.Disk{{Path: image, Format: config.FormatQCOW2}}
	cfg.Run.Command = shell
	if err := e.resize(cfg); err != nil {
		return nil, err
	}
	return cfg, cfg.Validate()
}

// sameTOML reports whether two configurations say the same.
func sameTOML(a, b *config.Config) (bool, error) {
	textA, errA := a.TOML()
	textB, errB := b.TOML()
	return bytes.Equal(textA, textB), errors.Join(errA, errB)
}

// resize gives a guest the processors and the memory that its job asks for.
func (e *Executor) resize(cfg *config.Config) error {
	for _, ask := range []struct {
		variable, key, flag string
		allowed             bool
		tooMuch             func() bool
	}{
		{"CALF_CPUS", "vm.cpus", "--max-cpus", e.MaxCPUs > 0, func() bool { return cfg.VM.CPUs > e.MaxCPUs }},
		{"CALF_MEMORY", "vm.memory", "--max-memory", e.MaxMemory > 0, func() bool { return cfg.VM.Memory > e.MaxMemory }},
	} {
		value := e.Getenv(jobVariable + ask.variable)
		if value == "" {
			continue
		}
		if !ask.allowed {
			return fmt.Errorf("%s: this runner does not let jobs choose; its operator can, with %s", ask.variable, ask.flag)
		}
		if err := cfg.Set(ask.variable, ask.key, value); err != nil {
			return err
		}
		if ask.tooMuch() {
			return fmt.Errorf("%s is %s, which is more than the %s of this runner", ask.variable, value, ask.flag)
		}
	}
	return nil
}

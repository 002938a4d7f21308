package gitlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/confine"
	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/cmd/internal/launch"
	"github.com/calfvm/calf/config"
)

func TestMain(m *testing.M) {
	if confine.IsRole() {
		confine.Main()
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// fakeMachine has a directory in the place of a guest's disk, and runs a job's scripts
// in it.
type fakeMachine struct {
	t      *testing.T
	disk   string // where the builds directory is in the guest
	host   string // where it is on the host
	runs   []*config.Config
	keeps  []string
	closed []string // what of the project nobody may touch when it comes
	// fails, if it has an outcome, is how the next run ends.
	fails launch.Result
}

func (m *fakeMachine) Check(cfg *config.Config) (string, error) {
	if strings.Contains(cfg.Disks[0].Path, "broken") {
		return "", errors.New("no kernel in this image")
	}
	return "/boot/vmlinuz-6.6", nil
}

func (m *fakeMachine) Run(cfg *config.Config, opts launch.Options) launch.Result {
	m.t.Helper()
	m.runs, m.keeps = append(m.runs, cfg), append(m.keeps, opts.Keep)
	if opts.Keep != "" {
		must(m.t, os.WriteFile(opts.Keep, []byte("an overlay"), 0o600))
	}
	if len(cfg.Copies) > 0 {
		must(m.t, os.RemoveAll(m.disk))
		must(m.t, exec.Command("cp", "-a", cfg.Copies[0].From, m.disk).Run())
		m.host = cfg.Copies[0].To
	}
	if r := m.fails; r.Outcome != "" {
		m.fails = launch.Result{}
		return r
	}
	script, err := os.ReadFile(opts.Streams.In.Name())
	must(m.t, err)
	cmd := exec.Command("bash")
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(string(script), m.host, m.disk))
	cmd.Stdout, cmd.Stderr = opts.Streams.Out, opts.Streams.Err
	if err := cmd.Run(); cmd.ProcessState == nil {
		m.t.Fatal(err)
	}
	r := launch.Result{Outcome: "exited", ExitCode: cmd.ProcessState.ExitCode(), Command: &launch.CommandResult{Status: cmd.ProcessState.ExitCode()}}
	from := strings.Replace(cfg.Artifacts[0].From, m.host, m.disk, 1)
	if out, err := exec.Command("cp", "-a", from, cfg.Artifacts[0].To).CombinedOutput(); err != nil {
		r.Command.Lost = []string{string(out)}
		r.Message = string(out)
	}
	for _, name := range m.closed {
		must(m.t, os.Chmod(filepath.Join(cfg.Artifacts[0].To, name), 0))
	}
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

// runner plays GitLab Runner.
type runner struct {
	t       *testing.T
	dir     string // its own
	env     map[string]string
	machine *fakeMachine
	set     Settings
	builds  string // as config says
}

// newRunner returns a runner of a job with a number. State is where all jobs are.
func newRunner(t *testing.T, state string, id int) *runner {
	t.Helper()
	dir := t.TempDir()
	r := &runner{t: t, dir: dir, machine: &fakeMachine{t: t, disk: filepath.Join(t.TempDir(), "disk")}}
	t.Cleanup(func() { _ = exec.Command("chmod", "-R", "u+rwx", r.machine.disk).Run() }) // for who may not remove it
	r.set = Settings{State: state, Images: filepath.Join(dir, "images"), Image: "debian"}
	write(t, filepath.Join(dir, "images", "debian.qcow2"), "")
	write(t, filepath.Join(dir, "images", "broken.qcow2"), "")
	write(t, filepath.Join(dir, "response.json"), fmt.Sprintf(`{"id": %d, "token": "secret", "job_info": {"name": "test", "project_id": 7}}`, id))
	r.env = map[string]string{
		"JOB_RESPONSE_FILE": filepath.Join(dir, "response.json"), "BUILD_EXIT_CODE_FILE": filepath.Join(dir, "exit_code"),
		"BUILD_FAILURE_EXIT_CODE": "3", "SYSTEM_FAILURE_EXIT_CODE": "4", "PATH": os.Getenv("PATH"),
		"TOKEN_OF_THE_RUNNER": "secret", "CUSTOM_ENV_CI_JOB_ID": "99", "CUSTOM_ENV_CI_PROJECT_ID": "98",
	}
	return r
}

// call calls the executor, and returns the exit code and all that it has said.
func (r *runner) call(verb func(e *Executor) error) (code int, said string) {
	r.t.Helper()
	out, err := os.CreateTemp(r.dir, "out")
	must(r.t, err)
	defer out.Close()
	e := &Executor{
		Settings: r.set, Machine: r.machine, Version: "v1", Grace: 100 * time.Millisecond,
		Getenv:  func(name string) string { return r.env[name] },
		Streams: console.Streams{Out: out, Err: out, Messages: console.MessagesTo(out)},
	}
	err = verb(e)
	code, failed := e.ExitCode(err)
	must(r.t, failed)
	said = read(r.t, out.Name())
	if err != nil {
		said += err.Error()
	}
	return code, said
}

// begin calls config and prepare.
func (r *runner) begin() {
	r.t.Helper()
	code, said := r.call((*Executor).Config)
	var conf struct {
		Builds string `json:"builds_dir"`
		Cache  string `json:"cache_dir"`
		Shared *bool  `json:"builds_dir_is_shared"`
		Driver struct{ Name, Version string }
	}
	if err := json.Unmarshal([]byte(said), &conf); code != 0 || err != nil {
		r.t.Fatalf("config: %d, %q, %v", code, said, err)
	}
	if conf.Shared == nil || *conf.Shared || conf.Driver.Name != "calf" || conf.Driver.Version != "v1" ||
		!strings.HasPrefix(conf.Builds, r.set.State+"/") || conf.Cache != r.set.State+"/cache/7" {
		r.t.Errorf("config says %s", said)
	}
	r.builds = conf.Builds
	r.env["CUSTOM_ENV_CI_PROJECT_DIR"] = r.project("")
	if code, said := r.call((*Executor).Prepare); code != 0 || !strings.Contains(said, "debian.qcow2: kernel /boot/vmlinuz-6.6, 1 CPUs, 512MiB") {
		r.t.Fatalf("prepare: %d, %q", code, said)
	}
}

// project is a path in the job's project.
func (r *runner) project(name string) string {
	return filepath.Join(r.builds, "group", "project", name)
}

// stage runs commands in the directory of the project, by a script as the runner makes
// them.
func (r *runner) stage(name, commands string) (code int, said string) {
	r.t.Helper()
	body := "mkdir -p " + r.project("") + "\ncd " + r.project("") + "\n" + commands
	script := "#!/usr/bin/env bash\n\ntrap 'exit 1' TERM\n\n" +
		"case \"$(set -o)\" in *\"pipefail\"*) set -o pipefail;; esac; set -o errexit\nset +o noclobber\n" +
		"(trap 'exit 1' TERM; eval $'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\n", `\n`).Replace(body) + "') < /dev/null\nexit 0\n"
	path := filepath.Join(r.dir, "script."+name)
	write(r.t, path, script)
	return r.call(func(e *Executor) error { return e.Run(path, name) })
}

func (r *runner) passes(name, commands string) (said string) {
	r.t.Helper()
	code, said := r.stage(name, commands)
	if code != 0 {
		r.t.Fatalf("%s: exit code %d, %s", name, code, said)
	}
	return said
}

func confinable(t *testing.T) {
	t.Helper()
	if err := confine.Supported(); err != nil {
		t.Skip(err)
	}
}

// TestJob runs all stages of a job, with files that go from each to the next.
func TestJob(t *testing.T) {
	confinable(t)
	state := t.TempDir()
	other := filepath.Join(state, "jobs", "43", "builds", "file")
	write(t, other, "of another job")
	r := newRunner(t, state, 42)
	r.begin()
	if said := r.passes("prepare_script", `echo "Running on $(hostname), home $HOME, $TOKEN_OF_THE_RUNNER."`); !strings.Contains(said, "home "+state+"/jobs/42/home, .\n") {
		t.Errorf("the host says %q", said)
	}
	r.passes("get_sources", "git config --global user.name me; git clone -q "+serveRepository(t)+" .; git checkout -q HEAD")
	r.passes("restore_cache", "mkdir -p "+state+"/cache/7/x && echo cached > old")
	r.passes("build_script", `grep -q main main.c && git log -1 --format=%s && cat old && echo 'a b' > "out put" && chmod 750 "out put" && mkdir deep && ln -s "../out put" deep/link && rm old && echo X=1 > ../project.tmp`)
	r.passes("step_release", "test -e deep/link && test -e ../project.tmp && echo more > more")
	code, said := r.stage("after_script", "cat more; exit 42")
	if code != 3 || !strings.HasPrefix(said, "more\n") || read(t, filepath.Join(r.dir, "exit_code")) != "42" {
		t.Errorf("exit code %d, %q", code, said)
	}
	if said := r.passes("archive_cache_on_failure", "git ls-files -o; cat deep/link; git log --format=%an; git config user.name; ls ..; stat -c %a 'out put'"); said != "deep/link\nmore\nout put\na b\nother\nme\nproject\n750\n" {
		t.Errorf("the host sees %q", said)
	}
	r.passes("upload_artifacts_on_failure", "echo > "+state+"/cache/7/x/cache.zip")
	r.passes("cleanup_file_variables", "true")
	if len(r.machine.runs) != 3 || len(r.machine.runs[1].Copies) != 0 || r.machine.keeps[0] == "" || r.machine.keeps[1] != "" {
		t.Fatalf("%d guests, overlays %q", len(r.machine.runs), r.machine.keeps)
	}
	first, second := r.machine.runs[0].Effective(), r.machine.runs[1].Effective()
	if !first.Disks[0].Snapshot || first.Disks[0].Path != r.set.Images+"/debian.qcow2" || first.VM.Name != "job-42" {
		t.Errorf("the first guest is %+v", first)
	}
	if second.Disks[0].Snapshot || second.Disks[0].Path != r.machine.keeps[0] || second.Disks[0].BackingDirs[0] != r.set.Images {
		t.Errorf("the second guest is %+v", second)
	}
	for range 2 {
		if code, said := r.call((*Executor).Cleanup); code != 0 || said != "" {
			t.Errorf("cleanup: %d, %q", code, said)
		}
	}
	if left, err := filepath.Glob(state + "/jobs/*"); err != nil || len(left) != 1 || read(t, other) != "of another job" {
		t.Errorf("left are %q, %v", left, err)
	}
}

// serveRepository serves a repository with a file main.c over HTTP, and returns its URL,
// with a name that has to be resolved.
func serveRepository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("bash", "-ec", `git init -q work; cd work; echo 'int main() {}' > main.c; git add .
		git -c user.name=other -c user.email=a@b commit -qm 1; git clone -q --bare . ../repo.git; git -C ../repo.git update-server-info`)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(server.Close)
	return strings.Replace(server.URL, "127.0.0.1", "localhost", 1) + "/repo.git"
}

// TestHostileGuest has the guest send what would lead programs of the host astray.
func TestHostileGuest(t *testing.T) {
	confinable(t)
	r := newRunner(t, t.TempDir(), 42)
	r.begin()
	r.passes("get_sources", `git init -q . && mkdir -p sub gone && echo gitdir: elsewhere > sub/.git && echo mine > gone/.git && touch file link-to-be`)
	r.machine.closed = []string{"closed", "file"}
	secret := filepath.Join(t.TempDir(), "secret")
	write(t, secret, "secret")
	code, said := r.stage("build_script", `
		git config core.fsmonitor 'touch PWNED; false'
		echo evil > .git/hooks/post-index-change
		echo gitdir: evil > sub/.git; mkdir -p new/.GiT; echo evil > new/.GiT/config; ln -s . new/deep; ln -s new/.GiT .Git
		rm -r gone; ln -s sub gone
		ln -s `+secret+` absolute; ln -s ../../../../../../../../../../etc relative
		ln -s . here; ln -s here/../../x chain; ln -s absolute second; ln -s loop loop
		ln -s sub inside; ln -s ../file new/inside; ln -s nothing dangling; ln -s nothing/../../x dangerous
		rm link-to-be; ln -s `+secret+` link-to-be
		ln -s .git/config config; ln -s new/.GiT/../deep "$(printf 'by\033[2J-git')"
		mkdir closed; echo deep > closed/file
		rm -rf ../project.tmp; ln -s /tmp ../project.tmp; echo PATH=. > ../env`)
	if code != 0 || !strings.Contains(said, "calf: 9 links that lead out of the project are not taken to the host: ") || !strings.Contains(said, "by-git") || strings.Contains(said, "\x1b") {
		t.Errorf("%d, %q", code, said)
	}
	said = r.passes("archive_cache", "git ls-files -o | sort; find . -name .git -prune -o -type l -print | sort; ls -a ..; cat closed/file")
	want := strings.Join([]string{
		"closed/file", "dangling", "file", "gone", "here", "inside", "new/deep", "new/inside",
		"./dangling", "./gone", "./here", "./inside", "./new/deep", "./new/inside", ".", "..", "project", "deep", "",
	}, "\n")
	if said != want {
		t.Errorf("the host has\n%s, want\n%s", said, want)
	}
	if got := read(t, r.project("sub/.git")); got != "gitdir: elsewhere\n" {
		t.Errorf("the host's .git is %q", got)
	}
	if b := read(t, r.project(".git/config")); strings.Contains(b, "PWNED") {
		t.Errorf("the host's configuration is\n%s", b)
	}
}

// TestGitOnHost has a guest that makes a bare repository of a project without a .git, and
// a job that configures git on the host.
func TestGitOnHost(t *testing.T) {
	confinable(t)
	r := newRunner(t, t.TempDir(), 42)
	r.begin()
	settings := "git config core.fsmonitor 'touch " + r.project("PWNED") + "; false'; git config core.hooksPath " + r.project("hooks") + "\n"
	r.passes("get_sources", "true")
	r.passes("build_script", "git init -q --bare .; "+strings.ReplaceAll(settings, r.project(""), ".")+"git config core.bare false; git config core.worktree .; echo > new")
	if code, said := r.stage("archive_cache", "git ls-files -o"); code != 3 || !strings.Contains(said, "bare repository") {
		t.Errorf("exit code %d, %s", code, said)
	}
	r.passes("get_sources", "git init -q .; git config user.name me; git config user.email a@b; "+settings+
		"mkdir -p hooks; echo 'touch "+r.project("PWNED")+"' > hooks/pre-commit; chmod +x hooks/*; git add HEAD; git status >/dev/null; git commit -qm 1")
	if there, err := exists(r.project("PWNED")); there || err != nil {
		t.Errorf("git has run what the project says: %v, %v", there, err)
	}
}

// TestOverProject has the guest send another thing than a directory, and nothing.
func TestOverProject(t *testing.T) {
	confinable(t)
	for name, script := range map[string]string{
		"nothing": "cd ..; rm -r project",
		"a file":  "cd ..; rm -r project; echo > project",
		"a link":  "cd ..; rm -r project; ln -s /etc project",
	} {
		t.Run(name, func(t *testing.T) {
			for end, want := range map[string]int{"": 4, "; exit 9": 3} {
				r := newRunner(t, t.TempDir(), 42)
				r.begin()
				r.passes("get_sources", "echo mine > file")
				if code, said := r.stage("build_script", script+end); code != want {
					t.Errorf("exit code %d, %s", code, said)
				}
				if got := read(t, r.project("file")); got != "mine\n" {
					t.Errorf("the host has %q", got)
				}
				if code, said := r.call((*Executor).Cleanup); code != 0 {
					t.Errorf("%d, %s", code, said)
				}
			}
		})
	}
}

// TestHostileJob has what a job can say to the stages on the host: a script with its
// variables and hooks.
func TestHostileJob(t *testing.T) {
	confinable(t)
	state, outside := t.TempDir(), t.TempDir()
	r := newRunner(t, state, 42)
	r.begin()
	write(t, filepath.Join(outside, "file"), "secret")
	write(t, filepath.Join(state, "jobs/43/builds/file"), "secret")
	write(t, filepath.Join(state, "cache/8/cache.zip"), "secret")
	for _, try := range []string{
		"cat " + outside + "/file", "echo > " + outside + "/new", "cat " + r.env["JOB_RESPONSE_FILE"],
		"cat ../../../../43/builds/file", "ls ../../../../43", "echo > " + state + "/jobs/42/root.qcow2", "echo > " + state + "/cache/8/cache.zip",
		"ln -s " + outside + " out && cat out/file", "rm -r ../../../../../cache/8",
	} {
		if code, said := r.stage("get_sources", try); code != 3 {
			t.Errorf("%s: exit code %d, %s", try, code, said)
		}
	}
	r.passes("get_sources", "(sleep 1000 & echo $! > pid) > /dev/null 2>&1; (trap '' HUP TERM; sleep 1000) > /dev/null 2>&1 &")
	for late := time.After(10 * time.Second); ; time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(read(t, r.project("pid"))) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		select {
		case <-late:
			t.Fatalf("a process of the stage has outlived it: %s", stat)
		default:
		}
	}

	// The directory of the project is where a link of the job's leads.
	r.passes("get_sources", "cd ../..; rm -r group; ln -s "+outside+" group")
	must(t, os.Mkdir(filepath.Join(outside, "project"), 0o700))
	if code, said := r.stage("build_script", "true"); code != 4 {
		t.Errorf("exit code %d, %s", code, said)
	}
	if _, err := os.Stat(filepath.Join(outside, "project")); err != nil {
		t.Error(err)
	}
	for _, dir := range []string{"", "/etc", r.builds, r.builds + "/..", r.builds + "/../home", "relative"} {
		r.env["CUSTOM_ENV_CI_PROJECT_DIR"] = dir
		if code, said := r.stage("build_script", "true"); code != 4 || !strings.Contains(said, "CI_PROJECT_DIR") {
			t.Errorf("%q: exit code %d, %s", dir, code, said)
		}
	}
	if code, said := r.call((*Executor).Cleanup); code != 0 || read(t, outside+"/file") != "secret" {
		t.Errorf("%d, %s", code, said)
	}
}

// TestUnconfined runs a stage on the host with all that its user may do.
func TestUnconfined(t *testing.T) {
	r := newRunner(t, t.TempDir(), 42)
	r.set.Unconfined = true
	r.begin()
	outside := filepath.Join(t.TempDir(), "new")
	r.passes("get_sources", "echo x > "+outside)
	if read(t, outside) != "x\n" {
		t.Error("it is confined")
	}
	if code, _ := r.stage("get_sources", "exit 5"); code != 3 || read(t, r.env["BUILD_EXIT_CODE_FILE"]) != "5" {
		t.Errorf("exit code %d", code)
	}
}

// TestEnds has guests that end in every way, and tells what the runner learns of it.
func TestEnds(t *testing.T) {
	ran := func(code int, lost ...string) launch.Result {
		return launch.Result{Outcome: "exited", ExitCode: code, Message: "why", Command: &launch.CommandResult{Status: code, Lost: lost}}
	}
	late := ran(0)
	late.ExitCode = launch.ExitError
	for name, tt := range map[string]struct {
		result launch.Result
		code   int
		file   string // of the exit code
		gone   bool   // the overlay
	}{
		"the script fails":        {ran(7, "no such directory"), 3, "7", false},
		"with a code of calf's":   {ran(125, "no such directory"), 3, "125", false},
		"the project is lost":     {ran(0, "no such directory"), 4, "", false},
		"a write is lost":         {late, 4, "", false},
		"no shell":                {launch.Result{Outcome: "not-run", ExitCode: 127, Message: "why", Command: &launch.CommandResult{Status: 127}}, 4, "", true},
		"a mistake of the host's": {launch.Failed(errors.New("why")), 4, "", true},
		"a panic":                 {launch.Result{Outcome: "panic", ExitCode: 255, Message: "why"}, 4, "", true},
		"the boot takes too long": {launch.Result{Outcome: "boot-timeout", ExitCode: 124, Message: "why"}, 4, "", true},
		"the run takes too long":  {launch.Result{Outcome: "timeout", ExitCode: 124, Message: "why"}, 3, "", true},
		"the job is cancelled":    {launch.Result{Outcome: "killed", ExitCode: 143, Message: "why"}, 3, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t, t.TempDir(), 42)
			r.set.Unconfined = true
			r.begin()
			r.passes("get_sources", "true")
			r.machine.fails = tt.result
			code, said := r.stage("step_script", "true")
			file, err := os.ReadFile(r.env["BUILD_EXIT_CODE_FILE"])
			if code != tt.code || string(file) != tt.file || (err == nil) != (tt.file != "") || !strings.Contains(said, "why") {
				t.Errorf("exit code %d, in the file %q, %q", code, file, said)
			}
			r.passes("after_script", "true")
			if again := r.machine.keeps[1] != ""; again != tt.gone {
				t.Errorf("a new guest: %v", again)
			}
		})
	}
}

// TestMistakes has what an operator or a job may get wrong.
func TestMistakes(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(r *runner)
		want   string // empty if nothing is wrong
	}{
		"all is well":           {func(*runner) {}, ""},
		"image by name":         {func(r *runner) { r.set.Image = ""; r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = "debian" }, ""},
		"image by file name":    {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = "debian.qcow2" }, ""},
		"no images":             {func(r *runner) { r.set.Images = "" }, "--images"},
		"relative images":       {func(r *runner) { r.set.Images = "images" }, "--images"},
		"no image":              {func(r *runner) { r.set.Image = "" }, "names no image"},
		"unknown image":         {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = "alpine" }, "it has: broken, debian"},
		"path as image":         {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = "../debian" }, "letters, digits"},
		"hidden image":          {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = ".debian" }, "letters, digits"},
		"image without kernel":  {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_IMAGE"] = "broken" }, "no kernel in this image"},
		"no runner":             {func(r *runner) { delete(r.env, "JOB_RESPONSE_FILE") }, "for a runner to call"},
		"response gone":         {func(r *runner) { r.env["JOB_RESPONSE_FILE"] += "x" }, "no such file"},
		"response broken":       {func(r *runner) { write(r.t, r.env["JOB_RESPONSE_FILE"], "{") }, "JOB_RESPONSE_FILE"},
		"response empty":        {func(r *runner) { write(r.t, r.env["JOB_RESPONSE_FILE"], "{}") }, "neither a job"},
		"number of a job":       {func(r *runner) { write(r.t, r.env["JOB_RESPONSE_FILE"], `{"id":-1,"job_info":{"project_id":1}}`) }, "neither a job"},
		"name of a job":         {func(r *runner) { write(r.t, r.env["JOB_RESPONSE_FILE"], `{"id":"../x","job_info":{"project_id":1}}`) }, "JOB_RESPONSE_FILE"},
		"relative state":        {func(r *runner) { r.set.State = "state" }, "absolute path"},
		"unclean state":         {func(r *runner) { r.set.State += "/../x" }, "absolute path"},
		"state in /run":         {func(r *runner) { r.set.State = "/run/calf" }, "lose what is there"},
		"state everywhere":      {func(r *runner) { r.set.State = "/" }, "lose what is there"},
		"no file":               {func(r *runner) { r.set.Guest = "/no/such.toml" }, "such.toml"},
		"file":                  {guestFile("[vm]\ncpus = 3\nmemory = \"1GiB\"\nboot_timeout = \"1m\"\n[run]\nenv = {A = \"b\"}\n"), ""},
		"file with a mistake":   {guestFile("[vm]\ncpu = 3\n"), "did you mean"},
		"file with a disk":      {guestFile("[[disk]]\npath = \"x.qcow2\"\n"), "the rest is the job's"},
		"file with a command":   {guestFile("[run]\ncommand = [\"ls\"]\n[boot]\nkernel=\"x\"\n"), "the rest is the job's"},
		"file with a target":    {guestFile("[[target]]\nname = \"a\"\nboot.kernel = \"k\"\n"), "the rest is the job's"},
		"no services":           {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_SERVICES"] = "[]" }, ""},
		"services":              {func(r *runner) { r.env["CUSTOM_ENV_CI_JOB_SERVICES"] = `[{"name":"redis"}]` }, "services"},
		"CPUs":                  {func(r *runner) { r.set.MaxCPUs = 4; r.env["CUSTOM_ENV_CALF_CPUS"] = "4" }, ""},
		"more CPUs":             {func(r *runner) { r.set.MaxCPUs = 4; r.env["CUSTOM_ENV_CALF_CPUS"] = "5" }, "more than"},
		"no CPUs":               {func(r *runner) { r.set.MaxCPUs = 4; r.env["CUSTOM_ENV_CALF_CPUS"] = "0" }, "CALF_CPUS"},
		"CPUs that nobody asks": {func(r *runner) { r.env["CUSTOM_ENV_CALF_CPUS"] = "1" }, "does not let jobs choose"},
		"memory":                {func(r *runner) { r.set.MaxMemory = 1 << 30; r.env["CUSTOM_ENV_CALF_MEMORY"] = "1G" }, ""},
		"more memory":           {func(r *runner) { r.set.MaxMemory = 1 << 30; r.env["CUSTOM_ENV_CALF_MEMORY"] = "1025M" }, "more than"},
		"strange memory":        {func(r *runner) { r.set.MaxMemory = 1 << 30; r.env["CUSTOM_ENV_CALF_MEMORY"] = "x" }, "CALF_MEMORY"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t, t.TempDir(), 42)
			r.set.Unconfined = true
			tt.change(r)
			code, said := r.call((*Executor).Prepare)
			switch {
			case tt.want == "" && code != 0:
				t.Errorf("%d, %s", code, said)
			case tt.want != "" && (code != 4 || !strings.Contains(said, tt.want)):
				t.Errorf("%d, %s; want 4 and %q", code, said, tt.want)
			}
		})
	}
}

func guestFile(text string) func(r *runner) {
	return func(r *runner) {
		r.set.Guest = filepath.Join(r.dir, "guest.toml")
		write(r.t, r.set.Guest, text)
	}
}

// TestNotPrepared calls what comes later first.
func TestNotPrepared(t *testing.T) {
	r := newRunner(t, t.TempDir(), 42)
	if code, said := r.stage("build_script", "true"); code != 4 || !strings.Contains(said, "prepare_exec") {
		t.Errorf("%d, %s", code, said)
	}
	env := r.env
	for _, change := range []map[string]string{{}, {"JOB_RESPONSE_FILE": ""}} {
		r.env = maps.Clone(env)
		maps.Copy(r.env, change)
		if code, said := r.call((*Executor).Cleanup); code != 0 || said != "" {
			t.Errorf("cleanup: %d, %s", code, said)
		}
	}
}

// TestAgain prepares a job anew that an earlier try has left something of, which nobody
// may change.
func TestAgain(t *testing.T) {
	r := newRunner(t, t.TempDir(), 42)
	r.set.Unconfined = true
	r.begin()
	r.passes("build_script", "mkdir -p go/mod; echo > go/mod/file; chmod 555 go/mod go")
	r.begin()
	if left, err := os.ReadDir(r.builds); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	if there, err := exists(filepath.Join(r.set.State, "jobs/42/root.qcow2")); there || err != nil {
		t.Errorf("the disk of the guest is there: %v", err)
	}
}

// TestCancel ends a stage on the host that the runner ends, gracefully and not.
func TestCancel(t *testing.T) {
	for name, tt := range map[string]struct{ script, code string }{
		"gracefully": {"trap 'touch done; exit 9' TERM; touch ready; while :; do sleep 0.01; done", "1"},
		"hard":       {"trap '' TERM; touch ready; while :; do sleep 0.01; done", "137"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t, t.TempDir(), 42)
			r.set.Unconfined = true
			r.begin()
			go func() {
				for range 1000 {
					if there, _ := exists(r.project("ready")); there {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				_ = unix.Kill(os.Getpid(), unix.SIGTERM)
			}()
			if code, said := r.stage("get_sources", tt.script); code != 3 || read(t, r.env["BUILD_EXIT_CODE_FILE"]) != tt.code {
				t.Errorf("exit code %d, %s", code, said)
			}
			if done, err := exists(r.project("done")); done != (name == "gracefully") || err != nil {
				t.Errorf("the script has had time to end: %v, %v", done, err)
			}
		})
	}
}

// TestInsist passes signals on, and says the one that ends a run again.
func TestInsist(t *testing.T) {
	signals, stop := insist(20 * time.Millisecond)
	defer stop()
	must(t, unix.Kill(os.Getpid(), unix.SIGINT))
	var got []os.Signal
	for range 2 {
		select {
		case sig := <-signals:
			got = append(got, sig)
		case <-time.After(10 * time.Second):
			t.Fatalf("only %v came", got)
		}
	}
	if got[0] != unix.SIGINT || got[1] != unix.SIGTERM {
		t.Errorf("got %v", got)
	}
}

// TestSideBySide runs jobs at the same time.
func TestSideBySide(t *testing.T) {
	confinable(t)
	state := t.TempDir()
	for i := range 4 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			r := newRunner(t, state, 100+i)
			r.begin()
			for n := range 3 {
				r.passes("get_sources", fmt.Sprintf("echo %d >> file", i))
				r.passes("build_script", fmt.Sprintf("echo %d >> guest", i))
				if got := read(t, r.project("guest")); got != strings.Repeat(fmt.Sprintln(i), n+1) {
					t.Errorf("the project has %q", got)
				}
			}
			if code, said := r.call((*Executor).Cleanup); code != 0 {
				t.Errorf("%d, %s", code, said)
			}
		})
	}
}

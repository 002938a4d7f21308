package gitlab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/confine"
)

// keptVariables are what a stage on the host sees of the runner's own variables.
var keptVariables = []string{
	"PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR",
	"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
}

// gitSettings keep git from running what lies in a project.
var gitSettings = [][2]string{
	{"safe.bareRepository", "explicit"},
	{"core.fsmonitor", "false"},
	{"core.hooksPath", os.DevNull},
	{"gc.auto", "0"},
}

// systemFiles are what the programs of a stage on the host may read beside what is in
// PATH: programs, libraries and certificates, and how names are resolved.
var systemFiles = []string{
	"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store",
	"/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types",
	"/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/gai.conf",
	"/etc/services", "/etc/protocols", "/etc/gitconfig",
}

// confined reports why the stages on the host cannot be confined.
func confined() error {
	if err := confine.Supported(); err != nil {
		return fmt.Errorf("%w; --unconfined does without, for jobs that are trusted", err)
	}
	return nil
}

// onHost runs a script of the runner on this host.
func (e *Executor) onHost(j *job, script *os.File) error {
	runtime.LockOSThread() // whose end would be that of the script
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)
	cmd, err := e.startOnHost(j, script)
	if err != nil {
		return fmt.Errorf("the script of the stage cannot be run on this host: %w", err)
	}
	group := -cmd.Process.Pid
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-signals:
		case <-ended:
			return
		}
		_ = unix.Kill(group, unix.SIGTERM) // it may be over
		select {
		case <-time.After(e.grace()):
			_ = unix.Kill(group, unix.SIGKILL)
		case <-ended:
		}
	}()
	// As long as nobody has asked for its status, the group's number is its own.
	err = waitid(cmd.Process.Pid)
	_ = unix.Kill(group, unix.SIGKILL) // whom it has left running
	return scriptError(errors.Join(cmd.Wait(), err))
}

// waitid returns when a child has ended, whose status stays for Wait.
func waitid(pid int) error {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// startOnHost starts a script in a process group of its own, which has the number of
// its first process.
func (e *Executor) startOnHost(j *job, script *os.File) (*exec.Cmd, error) {
	path, err := exec.LookPath("bash")
	if err != nil {
		path = "sh"
	}
	cmd := exec.Command(path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = script, e.Streams.Out, e.Streams.Err
	cmd.Dir, cmd.Env = j.builds(), e.hostEnvironment(j)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if e.Unconfined {
		return cmd, cmd.Start()
	}
	programs := slices.DeleteFunc(filepath.SplitList(e.Getenv("PATH")), func(dir string) bool { return !filepath.IsAbs(dir) })
	rules := confine.Rules{Read: append(programs, systemFiles...), Write: j.dirs()}
	return cmd, confine.Start(cmd, rules)
}

func (e *Executor) hostEnvironment(j *job) []string {
	env := []string{"HOME=" + j.home(), "TMPDIR=" + j.tmp(), "GIT_CONFIG_COUNT=" + strconv.Itoa(len(gitSettings))}
	for i, s := range gitSettings {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, s[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, s[1]))
	}
	for _, name := range keptVariables {
		if value := e.Getenv(name); value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// scriptError is how a script has ended, which is nil if it has ended well.
func scriptError(err error) error {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return scriptFailed(128 + int(status.Signal()))
	}
	return scriptFailed(exit.ExitCode())
}

func scriptFailed(code int) error {
	return &BuildError{Code: code, Err: fmt.Errorf("the script of the stage ended with exit code %d", code)}
}

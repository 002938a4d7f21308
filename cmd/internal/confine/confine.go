// Package confine runs programs that may do less than their user: read some files,
// write below some directories, and use the network, but not the services of this host
// that are reached by a path.
//
// A program is started by this one in another role, which gives up what it may
// do (Landlock, a filter of system calls, all capabilities) and becomes the program. What
// it has given up, its children do not get back either.
//
// The program and its children stay in one process group, which has their number: who
// kills that leaves none of them.
package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// role is the argument by which this program knows that it is to be another.
const role = "confined-program"

// reportFD is where the role says why the program could not be run. It is closed when
// the program runs.
const reportFD = 3

// Rules are what a program may touch.
type Rules struct {
	// Read are files, and directories with all below them, that may be read and
	// executed; those that are not there are passed over.
	Read []string
	// Write are directories below which anything may be done.
	Write []string
}

// devices may be read and written by every program.
var devices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}

// Supported reports why programs cannot be confined on this host.
func Supported() error {
	_, err := landlockABI()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return errors.New("Landlock is turned off on this host: add landlock to lsm= on its kernel's command line") //nolint:staticcheck // ST1005: a name
	}
	return fmt.Errorf("this host has no Landlock (%w): it needs Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK", err)
}

// Start starts cmd under the rules, and returns when the program runs or cannot. The
// caller waits for cmd.
func Start(cmd *exec.Cmd, rules Rules) error {
	if cmd.Err != nil {
		return cmd.Err
	}
	spec, err := json.Marshal(rules)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }() // it is only read
	cmd.Args = append([]string{"calf", role, string(spec), cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
	cmd.ExtraFiles = []*os.File{w}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := errors.Join(cmd.Start(), w.Close()); err != nil {
		return err
	}
	problem, err := io.ReadAll(r)
	if err == nil && len(problem) > 0 {
		err = errors.New(string(problem))
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // whose status says nothing of the program
	}
	return err
}

// IsRole reports whether this process is to become a confined program.
func IsRole() bool { return len(os.Args) > 4 && os.Args[1] == role }

// Main becomes the confined program. It returns only if that fails, and has told who
// has started it then.
func Main() {
	unix.CloseOnExec(reportFD)
	err := become(os.Args[2], os.Args[3], os.Args[4:])
	_, _ = io.WriteString(os.NewFile(reportFD, "report"), err.Error()) // there is nobody else to tell
}

// become gives up what the rules do not allow, and runs the program in place of this
// one.
func become(spec, path string, args []string) error {
	var rules Rules
	if err := json.Unmarshal([]byte(spec), &rules); err != nil {
		return err
	}
	runtime.LockOSThread() // what follows is for one thread, which becomes the program
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return fmt.Errorf("giving up capabilities: %w", err)
	}
	if err := restrictFiles(rules); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	if err := filterCalls(); err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	return fmt.Errorf("%s: %w", path, syscall.Exec(path, args, os.Environ()))
}

func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

// The rights of Landlock, by what they are good for.
const (
	readRights = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	fileRights = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	useRights  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE
)

// rightsOf are all rights on files that a version of Landlock knows. What it does not
// know, it allows.
func rightsOf(abi int) uint64 {
	rights := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1)
	if abi >= 2 {
		rights |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		rights |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 5 {
		rights |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	return rights
}

// restrictFiles gives up what the rules do not allow of files, and signals to others if
// this kernel can.
func restrictFiles(rules Rules) error {
	abi, err := landlockABI()
	if err != nil {
		return err
	}
	all := rightsOf(abi)
	attr := unix.LandlockRulesetAttr{Handled_access_fs: all}
	if abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	}
	ruleset, err := landlockCreate(&attr)
	if err != nil {
		return err
	}
	for _, path := range rules.Read {
		if err := allow(ruleset, path, readRights&all); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EACCES) {
			return err
		}
	}
	for _, path := range devices {
		if err := allow(ruleset, path, useRights&all); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	for _, path := range rules.Write {
		if err := allow(ruleset, path, all); err != nil {
			return err
		}
	}
	return errors.Join(landlockRestrict(ruleset), unix.Close(ruleset))
}

// allow gives rights on a file, or on a directory and all below it.
func allow(ruleset int, path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= fileRights
	}
	attr := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)} //nolint:gosec // G115: a descriptor is small
	if err := landlockAllow(ruleset, &attr); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", path, err), unix.Close(fd))
	}
	return unix.Close(fd)
}

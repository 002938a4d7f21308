package pid1

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Exit codes of a command that does not run, which are those of a shell.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// command is a command under way.
type command struct {
	host    *host
	start   *wire.Start
	who     *identity
	pid     int
	tty     *os.File       // the agent's side of the command's terminal, or nil
	ours    []*os.File     // the command's ends of its streams
	streams sync.WaitGroup // that carry what it says
}

// runCommand runs the command that start names, to its end and to that of all that
// it has left running.
func runCommand(h *host, r *bufio.Reader, start *wire.Start) wire.Exit {
	who, err := lookUp(start.User)
	if err != nil {
		h.problem(wire.Setup, err)
		return wire.Exit{Code: exitNotExecutable}
	}
	c := &command{host: h, start: start, who: who}
	if err := c.copyIn(); err != nil {
		h.problem(wire.Uncopied, err)
		return wire.Exit{Code: exitNotExecutable}
	}
	if kind, err := c.begin(); err != nil {
		h.problem(kind, err)
		c.streams.Wait()
		if kind == wire.NotFound {
			return wire.Exit{Code: exitNotFound}
		}
		return wire.Exit{Code: exitNotExecutable}
	}
	if err := h.send(wire.ToHost{Started: true}); err != nil {
		_ = unix.Kill(-1, unix.SIGKILL)
	}
	go c.listen(r)
	status := reapUntil(c.pid)
	_ = unix.Kill(-1, unix.SIGKILL) // whoever it has left, so that its streams end
	c.streams.Wait()
	_ = h.send(wire.ToHost{Ended: true}) // Exit tells the same
	exit := wire.Exit{Code: status.ExitStatus(), Artifacts: c.copyOut()}
	if status.Signaled() {
		exit.Signal = int(status.Signal())
		exit.Code = 128 + exit.Signal
	}
	return exit
}

// begin starts the command. The kind of an error is one of wire's.
func (c *command) begin() (kind string, err error) {
	env := environment(c.who, c.start)
	if err := os.Setenv("PATH", valueOf(env, "PATH")); err != nil { // for LookPath
		return wire.Setup, err
	}
	dir := string(c.start.Workdir)
	if dir == "" {
		dir = "/"
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return wire.Setup, fmt.Errorf("the working directory %s: %w", dir, errors.Join(err, onlyIf(err == nil, unix.ENOTDIR)))
	}
	if err := c.connect(); err != nil {
		return wire.Setup, err
	}
	defer func() {
		for _, f := range c.ours {
			_ = f.Close()
		}
	}()
	for _, f := range c.ours { // which opens them again as /dev/stdout, or by the name of its terminal
		if err := f.Chown(int(c.who.credential.Uid), -1); err != nil {
			return wire.Setup, err
		}
	}
	if err := os.Chdir(dir); err != nil { // which a path like ./a counts from
		return wire.Setup, err
	}
	// What systemd gives a service; a kernel that does not let it be runs it all the same.
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1024, Max: 512 << 10})
	path, err := exec.LookPath(c.start.Args[0])
	found := err == nil || errors.Is(err, exec.ErrDot)
	if found {
		attr := &os.ProcAttr{Dir: dir, Env: env, Files: c.ours[:3], Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: c.tty != nil, Ctty: 0, Credential: &c.who.credential,
		}}
		var p *os.Process
		if p, err = os.StartProcess(path, c.start.Args, attr); err == nil {
			c.pid = p.Pid
			return "", p.Release()
		}
	}
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case found && missing:
		return wire.NotExecutable, fmt.Errorf("%s cannot be executed: the guest does not have %.200q, by which it is run", path, interpreter(path))
	case missing || errors.Is(err, exec.ErrNotFound):
		return wire.NotFound, fmt.Errorf("%.200q: there is no such command in the guest", c.start.Args[0])
	}
	return wire.NotExecutable, fmt.Errorf("%.200q cannot be executed: %w", c.start.Args[0], err)
}

// interpreter is the path of the program that the kernel runs a script or a program
// with, its loader; empty if there is none.
func interpreter(file string) string {
	const maxLine = 256 // as the kernel has it
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }() // it was read only
	begin := make([]byte, maxLine)
	n, _ := f.ReadAt(begin, 0) // a short file ends early
	if line, ok := strings.CutPrefix(string(begin[:n]), "#!"); ok {
		line, _, _ = strings.Cut(line, "\n")
		for word := range strings.FieldsSeq(line) {
			return word
		}
		return ""
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < maxLine {
			loader, err := io.ReadAll(p.Open())
			if err == nil {
				return strings.TrimRight(string(loader), "\x00")
			}
		}
	}
	return ""
}

func onlyIf(yes bool, err error) error {
	if yes {
		return err
	}
	return nil
}

// connect makes the streams of the command: c.ours are its ends of the first three.
func (c *command) connect() error {
	if c.start.Terminal != nil {
		return c.connectTerminal()
	}
	in, err := dial(wire.Stdin, 0)
	if err != nil {
		return err
	}
	child, w, err := os.Pipe()
	if err != nil {
		return err
	}
	c.ours = append(c.ours, child)
	go func() { // nobody waits for it: the host may never end its side
		carry(w, in)
	}()
	for _, name := range []string{wire.Stdout, wire.Stderr} {
		out, err := dial(name, 0)
		if err != nil {
			return err
		}
		r, child, err := os.Pipe()
		if err != nil {
			return err
		}
		c.ours = append(c.ours, child)
		_, _ = unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, chunk) // a small pipe works, too
		c.streams.Go(func() { carry(out, r) })
	}
	return nil
}

// connectTerminal makes a terminal for the command.
func (c *command) connectTerminal() error {
	tty, child, err := pty.Open()
	if err != nil {
		return fmt.Errorf("the guest has no terminal to give: %w", err)
	}
	c.tty = tty
	c.ours = []*os.File{child, child, child}
	c.resize(c.start.Terminal)
	in, err := dial(wire.Stdin, 0)
	if err != nil {
		return err
	}
	out, err := dial(wire.Stdout, 0)
	if err != nil {
		return err
	}
	go func() { _, _ = io.CopyBuffer(onlyWriter{tty}, onlyReader{in}, make([]byte, 4096)) }()
	c.streams.Go(func() { carry(out, tty) })
	return nil
}

func (c *command) resize(s *wire.Size) {
	if c.tty != nil {
		_ = pty.Setsize(c.tty, &pty.Winsize{Rows: s.Rows, Cols: s.Cols}) // no harm but a wrong width
	}
}

// chunk is how much is carried at once.
const chunk = 256 << 10

// onlyReader and onlyWriter hide what else a file can do, which io.Copy would try.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// carry moves bytes from one file to the other until either ends, and closes both.
// Who writes to a stream that nobody reads any more is told so by that.
func carry(to, from *os.File) {
	_, _ = io.CopyBuffer(onlyWriter{to}, onlyReader{from}, make([]byte, chunk))
	_ = unix.Shutdown(int(to.Fd()), unix.SHUT_WR) // if it is a socket
	_, _ = to.Close(), from.Close()
}

// listen does what the host says meanwhile. If the host goes, so does the command.
func (c *command) listen(r *bufio.Reader) {
	for {
		var m wire.ToGuest
		if err := wire.Read(r, &m); err != nil {
			_ = unix.Kill(-1, unix.SIGKILL)
			return
		}
		switch {
		case m.Signal > 0:
			_ = unix.Kill(-c.pid, unix.Signal(m.Signal)) // it may be over
		case m.Size != nil:
			c.resize(m.Size)
		}
	}
}

// reapUntil waits for all processes that end, as the first process of a system has
// to, until the one with pid has.
func reapUntil(pid int) unix.WaitStatus {
	for {
		var status unix.WaitStatus
		if ended, err := unix.Wait4(-1, &status, 0, nil); ended == pid || errors.Is(err, unix.ECHILD) {
			return status
		}
	}
}

// identity is a user of the guest.
type identity struct {
	credential        syscall.Credential
	name, home, shell string
}

// lookUp finds a user by name or number, with a group after a colon if need be; no
// name means root.
func lookUp(spec string) (*identity, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	who := &identity{name: "root", home: "/root", shell: "/bin/sh"}
	if name == "" {
		name = "0"
	}
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	switch uid, bad := strconv.ParseUint(name, 10, 32); {
	case err == nil:
		if err := who.fill(u); err != nil {
			return nil, err
		}
	case bad == nil: // a number need not have a name
		who.credential.Uid, who.credential.Gid = uint32(uid), uint32(uid)
		if uid != 0 {
			who.name, who.home = name, "/"
		}
	default:
		return nil, fmt.Errorf("there is no user %q in the guest", name)
	}
	if !hasGroup {
		return who, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		g = &user.Group{Gid: group}
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("there is no group %q in the guest", group)
	}
	who.credential.Gid, who.credential.Groups = uint32(gid), nil
	return who, nil
}

// fill takes over what the guest knows of a user.
func (who *identity) fill(u *user.User) error {
	uid, errU := strconv.ParseUint(u.Uid, 10, 32)
	gid, errG := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(errU, errG); err != nil {
		return err
	}
	who.name, who.home = u.Username, u.HomeDir
	if shell := shellOf(u.Username); shell != "" {
		who.shell = shell
	}
	who.credential.Uid, who.credential.Gid = uint32(uid), uint32(gid)
	ids, err := u.GroupIds()
	if err != nil {
		return nil // no list of groups
	}
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 32); err == nil && n != gid {
			who.credential.Groups = append(who.credential.Groups, uint32(n))
		}
	}
	return nil
}

// shellOf is the shell of a user, or empty.
func shellOf(name string) string {
	list, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(list)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); f[0] == name && len(f) == 7 {
			return f[6]
		}
	}
	return ""
}

// environment is what a login sets, and what the host says.
func environment(who *identity, s *wire.Start) []string {
	env := []string{
		"PATH=" + defaultPath, "HOME=" + who.home, "USER=" + who.name, "LOGNAME=" + who.name, "SHELL=" + who.shell,
	}
	if s.Terminal != nil {
		env = append(env, "TERM=xterm")
	}
	for _, v := range s.Env {
		name, _, _ := strings.Cut(v, "=")
		env = slices.DeleteFunc(env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		env = append(env, v)
	}
	return env
}

// valueOf is the value of a variable.
func valueOf(env []string, name string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

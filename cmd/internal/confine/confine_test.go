package confine

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if IsRole() {
		Main()
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// TestConfined has programs try what they may and what they may not. Each attempt
// succeeds without rules, so that it is the rules that keep it from succeeding.
func TestConfined(t *testing.T) {
	if err := Supported(); err != nil {
		t.Skip(err)
	}
	type try struct {
		name, script string
		allowed      bool
	}
	tries := []try{
		{"read", "cat $R/file", true},
		{"list", "ls $R", true},
		{"write", "echo x >$W/a; mkdir $W/d; mv $W/a $W/d/b; ln -s b $W/d/c; rm -r $W/d", true},
		{"devices", "head -c 10 /dev/urandom >/dev/null", true},
		{"connected streams", `perl -e 'use Socket; socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die $!'`, true},
		{"network", `perl -e 'use Socket; socket(my $s, AF_INET, SOCK_STREAM, 0) or die $!; socket(my $t, AF_INET6, SOCK_DGRAM, 0) or die $!'`, true},
		{"signals among themselves", `sleep 100 & kill $!`, true},
		{"read elsewhere", "cat $O/file", false},
		{"read through a link", "cat $W/out/file", false},
		{"list elsewhere", "ls $O", false},
		{"write elsewhere", "echo x >$O/new", false},
		{"write what may be read", "echo x >$R/new", false},
		{"truncate elsewhere", ">$R/file", false},
		{"truncate by name", `perl -e 'truncate("$ENV{W}/file", 0) or die $!'`, false},
		{"truncate what is open", `perl -e 'open(my $f, "+<", "$ENV{W}/file") or die $!; truncate($f, 0) or die $!'`, true},
		{"move out", "echo x >$W/x && mv $W/x $O/x", false},
		{"remove elsewhere", "rm $O/victim", false},
		{"a Unix socket", `perl -e 'use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die $!; connect($s, sockaddr_un("$ENV{O}/socket")) or die $!'`, false},
		{"datagrams", `perl -e 'use Socket; socketpair(my $a, my $b, AF_UNIX, SOCK_DGRAM, 0) or die $!'`, false},
		{"another session", perlChild("POSIX::setsid() > 0"), false},
		{"another group", perlChild("setpgrp(0, 0)"), false},
		{"what /proc says", "cat /proc/self/environ", false},
	}
	if abi, err := landlockABI(); err == nil && abi >= 6 {
		tries = append(tries, try{"signals to others", "kill -0 $PPID", false})
	}
	if os.Getuid() == 0 {
		tries = append(tries, try{"what root may do", "chown 12345 $W/file", false})
	}
	for _, tt := range tries {
		t.Run(tt.name, func(t *testing.T) {
			for _, confined := range []bool{false, true} {
				cmd := attempt(t, tt.script)
				var err error
				if confined {
					if err = Start(cmd, Rules{Read: []string{"/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", env(cmd, "R"), "/no/such/file"}, Write: []string{env(cmd, "W")}}); err != nil {
						t.Fatal(err)
					}
				} else if err = cmd.Start(); err != nil {
					t.Fatal(err)
				}
				err = cmd.Wait()
				if want := tt.allowed || !confined; (err == nil) != want {
					t.Errorf("confined %v: %v\n%s", confined, err, cmd.Stderr)
				}
			}
		})
	}
}

// perlChild is a script with a child, which leads no group, and does what must be true.
func perlChild(what string) string {
	return "perl -e 'use POSIX (); if (!fork) { exit((" + what + ") ? 0 : 1) } wait; exit($? >> 8)'"
}

// attempt is a script, with directories to read (R), to write (W), and others (O).
func attempt(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Stderr = new(bytes.Buffer)
	cmd.Env = os.Environ()
	for _, name := range []string{"R", "W", "O"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, name+"="+dir)
	}
	other := env(cmd, "O")
	if err := errors.Join(os.WriteFile(filepath.Join(other, "victim"), nil, 0o600), os.Symlink(other, filepath.Join(env(cmd, "W"), "out"))); err != nil {
		t.Fatal(err)
	}
	listen(t, filepath.Join(other, "socket"))
	return cmd
}

func env(cmd *exec.Cmd, name string) string {
	for _, v := range cmd.Env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

func listen(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
}

// TestNotStarted names why a program cannot be run.
func TestNotStarted(t *testing.T) {
	if err := Supported(); err != nil {
		t.Skip(err)
	}
	for name, tt := range map[string]struct {
		path  string
		rules Rules
		want  string
	}{
		"no such program":     {"/no/such/program", Rules{Read: []string{"/usr"}}, "/no/such/program: no such file"},
		"not allowed":         {"/bin/true", Rules{}, "/bin/true: permission denied"},
		"no directory to use": {"/bin/true", Rules{Write: []string{"/no/such/dir"}}, "/no/such/dir"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Start(&exec.Cmd{Path: tt.path, Args: []string{"x"}}, tt.rules)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

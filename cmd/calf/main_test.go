package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/calfvm/calf/cmd/internal/console"
)

// asCalf in the environment makes the test binary calf itself, except that it
// accepts a KVM that only emulates: the guests of these tests are tiny.
const asCalf = "CALF_TEST_AS_CALF"

func TestMain(m *testing.M) {
	switch {
	case len(os.Args) == 2 && os.Args[1] == console.GuardCommand:
		main()
		os.Exit(0)
	case os.Getenv(asCalf) != "":
		p := program{
			streams:        console.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Messages: console.NewMessages(os.Stderr)},
			allowEmulation: true,
		}
		os.Exit(p.run(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// command returns calf with the given arguments as a process to be.
func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCalf+"=1")
	return cmd
}

// calf runs calf and returns its exit code and what it wrote.
func calf(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	open := func(name string) *os.File {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	dir := t.TempDir()
	in, out, messages := open(os.DevNull), open(dir+"/out"), open(dir+"/messages")
	p := program{
		streams:        console.Streams{In: in, Out: out, Err: messages, Messages: console.NewMessages(messages)},
		allowEmulation: true,
	}
	code = p.run(args)
	wrote := func(f *os.File) string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return code, wrote(out), wrote(messages)
}

// calfProcess does the same in a process of its own.
func calfProcess(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, messages bytes.Buffer
	cmd := command(args...)
	cmd.Stdout, cmd.Stderr = &out, &messages
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), messages.String()
}

// mustCalf runs calf, which must succeed without a message, and returns its
// output.
func mustCalf(t *testing.T, args ...string) string {
	t.Helper()
	code, stdout, stderr := calf(t, args...)
	if code != 0 || stderr != "" {
		t.Fatalf("calf %q exits %d and says %q", args, code, stderr)
	}
	return stdout
}

// refused checks that a run of calf ended with status 125, and said what parts
// holds in lines sentences and nothing else.
func refused(t *testing.T, lines, code int, stdout, stderr string, parts ...string) {
	t.Helper()
	if code != 125 || stdout != "" {
		t.Errorf("exit code %d, output %q; want 125 and none", code, stdout)
	}
	said := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	if len(said) != lines {
		t.Errorf("it says %q, want %d lines", stderr, lines)
	}
	for _, line := range said {
		if !strings.HasPrefix(line, "calf: ") {
			t.Errorf("it says %q without its name", line)
		}
	}
	for _, part := range parts {
		if !strings.Contains(stderr, part) {
			t.Errorf("it says %q, which lacks %q", stderr, part)
		}
	}
}

func TestHelpHasAnExampleForEachCommand(t *testing.T) {
	var walk func(cmd *cobra.Command, args []string)
	walk = func(cmd *cobra.Command, args []string) {
		for _, help := range []string{"-h", "--help"} {
			out := mustCalf(t, append(args, help)...)
			if !strings.Contains(out, "Examples:\n  ") || !strings.Contains(out, "calf "+strings.Join(args, " ")) {
				t.Errorf("calf %v %s has no example:\n%s", args, help, out)
			}
		}
		for _, sub := range cmd.Commands() {
			if !sub.Hidden {
				walk(sub, append(slices.Clone(args), sub.Name()))
			}
		}
	}
	walk(program{}.root(), nil)
	code, stdout, stderr := calf(t, "nurse")
	refused(t, 1, code, stdout, stderr, `unknown command "nurse"`)
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out := mustCalf(t, "completion", shell); !strings.Contains(out, "calf") {
			t.Errorf("completion for %s: %q", shell, out)
		}
	}
	for args, want := range map[string]string{
		"run --console ": "pty", "run --log-level ": "debug", "run ": "qcow2", "config ": "schema", "run --no-": "--no-reboot",
		"image ": "compare", "image info --output ": "json", "image check -f ": "qcow2",
	} {
		_, out, _ := calf(t, append([]string{"__complete"}, strings.Split(args, " ")...)...)
		if !strings.Contains(out, want) {
			t.Errorf("completing %q offers %q, which lacks %q", args, out, want)
		}
	}
}

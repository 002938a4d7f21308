package lab

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestKernelsByAge(t *testing.T) {
	cache := t.TempDir()
	t.Setenv(envCache, cache)
	t.Setenv(envRole, roleInside) // no initramfs is made
	for _, release := range []string{
		"6.12.117+deb12-cloud-amd64", "6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.8.0-31-generic",
	} {
		dir := filepath.Join(cache, "kernels", release)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "vmlinuz"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kernels, err := Kernels()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range kernels {
		got = append(got, k.Series()+" "+k.Release)
	}
	want := []string{"6.1 6.1.0-56-cloud-amd64", "6.8 6.8.0-31-generic", "6.12 6.12.117+deb12-cloud-amd64"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kernels (-want +got):\n%s", diff)
	}
}

func TestKernelsNoneSaysWhatToDo(t *testing.T) {
	t.Setenv(envCache, t.TempDir())
	if _, err := Kernels(); err == nil || !strings.Contains(err.Error(), ".ci/setup") {
		t.Errorf("error %v does not name .ci/setup", err)
	}
}

// sample is a tree with one node of each kind.
func sample(t *testing.T) tree {
	t.Helper()
	host := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(host, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := make(tree)
	s.dir("/empty")
	s.text("/a/b/text", "odd", 0o755)
	s.link("/a/link", "b/text")
	if err := s.file("/copied", host); err != nil {
		t.Fatal(err)
	}
	return s
}

// checkSample holds what was written of sample below dir against it.
func checkSample(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string]string{"a/b/text": "odd", "a/link": "odd", "copied": "from the host"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s holds %q (%v), want %q", name, got, err, want)
		}
	}
	if target, err := os.Readlink(filepath.Join(dir, "a/link")); err != nil || target != "b/text" {
		t.Errorf("a/link points to %q (%v)", target, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "a/b/text")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("a/b/text is %v (%v), want permissions 755", st, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "empty")); err != nil || !st.IsDir() {
		t.Errorf("empty is no directory (%v)", err)
	}
}

// An archive of ours is one that another implementation unpacks.
func TestInitramfs(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is not installed")
	}
	archive := filepath.Join(t.TempDir(), "archive")
	if err := sample(t).initramfs(archive); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(archive)
	if err != nil || st.Size()%4 != 0 {
		t.Errorf("the archive has %d bytes, which is no place for another after it", st.Size())
	}
	dir := t.TempDir()
	unpack := exec.Command(busybox, "cpio", "-id", "-F", archive)
	unpack.Dir = dir
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	checkSample(t, dir)
}

func TestMaterialize(t *testing.T) {
	dir := t.TempDir()
	if err := sample(t).materialize(dir); err != nil {
		t.Fatal(err)
	}
	checkSample(t, dir)
}

func TestExt4(t *testing.T) {
	debugfs, err := tool("debugfs")
	if err != nil {
		t.Skip(err)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := sample(t).ext4(image, 8); err != nil {
		t.Fatal(err)
	}
	got, err := exec.Command(debugfs, "-R", "cat /copied", image).Output()
	if err != nil || string(got) != "from the host" {
		t.Errorf("/copied holds %q (%v)", got, err)
	}
}

// A tree has another digest when anything of it changes, host files included.
func TestDigest(t *testing.T) {
	s := sample(t)
	seen := make(map[string]string)
	note := func(what string) {
		t.Helper()
		d, err := s.digest()
		if err != nil {
			t.Fatal(err)
		}
		if before, ok := seen[d]; ok {
			t.Errorf("%s: the digest is the one of %s", what, before)
		}
		seen[d] = what
	}
	note("the sample")
	s.text("/a/b/text", "other", 0o755)
	note("other text")
	s.text("/a/b/text", "other", 0o644)
	note("other permissions")
	if err := os.WriteFile(s["/copied"].host, []byte("from the host, later"), 0o600); err != nil {
		t.Fatal(err)
	}
	note("a changed host file")
}

func TestPortableFlags(t *testing.T) {
	got := portableFlags([]string{
		"-test.v=true", "-test.testlogfile=/tmp/x", "-test.coverprofile=/tmp/y", "--test.cpuprofile=z", "-test.run=^A$", "rest",
	})
	if diff := cmp.Diff([]string{"-test.v=true", "-test.run=^A$", "rest"}, got); diff != "" {
		t.Errorf("flags (-want +got):\n%s", diff)
	}
}

func TestJobStatus(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want int
	}{
		{"success", []string{"true"}, 0},
		{"failure", []string{"sh", "-c", "exit 7"}, 7},
		{"signal", []string{"sh", "-c", "kill -9 $$"}, 128 + 9},
		{"absent", []string{"/nonexistent/program"}, 127},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := (job{Args: test.args}).run(t.Context(), io.Discard, io.Discard); got != test.want {
				t.Errorf("status %d, want %d", got, test.want)
			}
		})
	}
}

func TestJobIsAskedToQuit(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	got := job{Args: []string{"sh", "-c", `trap 'echo leaving; exit 5' QUIT; echo ready; while :; do sleep 0.1; done`}}.
		run(ctx, writerFunc(func(p []byte) error {
			out.Write(p)
			cancel() // once it is ready
			return nil
		}), io.Discard)
	if got != 5 || out.String() != "ready\nleaving\n" {
		t.Errorf("status %d, output %q", got, out.String())
	}
}

// The host's side of the port, against an agent that says what it likes.
func TestConverse(t *testing.T) {
	host, port, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go func() {
		defer port.Close()
		agent := gob.NewEncoder(port)
		for _, m := range []message{
			{Ready: true},
			{Stdout: []byte("status 0\n")}, // what a command prints is no status
			{File: "dir/log", Data: []byte("one ")},
			{File: "dir/log", Data: []byte("two")},
			{Done: true, Status: 42},
		} {
			_ = agent.Encode(m)
		}
	}()
	m := &machine{dir: t.TempDir(), artifacts: t.TempDir()}
	status, err := m.converse(host, func(err error) { t.Error(err) })
	if err != nil || status != 42 {
		t.Errorf("status %d, error %v", status, err)
	}
	if got, err := os.ReadFile(filepath.Join(m.artifacts, "dir/log")); string(got) != "one two" {
		t.Errorf("the artifact holds %q (%v)", got, err)
	}
	if len(m.output.held) != 1 || string(m.output.held[0].data) != "status 0\n" {
		t.Errorf("held output: %q", m.output.held)
	}
}

func TestConverseWithADeadMachine(t *testing.T) {
	host, port, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	port.Close()
	if _, err := new(machine).converse(host, func(error) {}); !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want one about the end of the stream", err)
	}
}

func TestArtifactsStayInTheirDirectory(t *testing.T) {
	m := &machine{artifacts: t.TempDir()}
	for _, name := range []string{"../out", "/etc/out", "a/../../out"} {
		if err := m.saveArtifact(name, nil); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

func TestRelayHoldsOutput(t *testing.T) {
	var (
		r   relay
		out bytes.Buffer
	)
	for _, s := range []string{"a", "b"} {
		if err := r.write(&out, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	if out.Len() != 0 {
		t.Errorf("%q passed before the release", out.String())
	}
	r.release()
	if err := r.write(&out, []byte("c")); err != nil || out.String() != "abc" {
		t.Errorf("output %q (%v), want abc", out.String(), err)
	}
}

func TestCachedBuildsOnce(t *testing.T) {
	t.Setenv(envCache, t.TempDir())
	builds := 0
	build := func(file string) error {
		builds++
		return os.WriteFile(file, []byte("x"), 0o600)
	}
	var files []string
	for _, key := range []string{"one", "one", "two"} {
		file, err := cached("thing", key, build)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	if builds != 2 || files[0] != files[1] || files[0] == files[2] {
		t.Errorf("%d builds of %q", builds, files)
	}
	// What is young stays, what is old makes room for a successor.
	old := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(files[0], old, old); err != nil {
		t.Fatal(err)
	}
	last, err := cached("thing", "three", build)
	if err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(last), "thing.*"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{files[2], last}
	slices.Sort(want)
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("files in the cache (-want +got):\n%s", diff)
	}
}

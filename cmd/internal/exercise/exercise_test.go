package exercise

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// qemu runs one of QEMU's programs in dir and returns its exit code and output.
func qemu(t *testing.T, dir, program string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, messages bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &messages
	if err := cmd.Run(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			t.Fatal(err)
		}
	}
	return cmd.ProcessState.ExitCode(), out.String(), messages.String()
}

func mustQEMU(t *testing.T, dir, program string, args ...string) {
	t.Helper()
	if code, out, messages := qemu(t, dir, program, args...); code != 0 {
		t.Fatalf("%s %q: %d\n%s%s", program, args, code, out, messages)
	}
}

// sample is an image to exercise, called a.FORMAT, and what belongs to it.
type sample struct {
	name   string
	format string
	size   string
	create []string // options of qemu-img create
	base   bool     // it lies over base.qcow2, which is longer
	old    bool     // of version 2
}

var samples = []sample{
	{name: "default", format: "qcow2", size: "4M"},
	{name: "small clusters", format: "qcow2", size: "4M", create: []string{"-o", "cluster_size=4k,compression_type=zstd"}},
	{name: "large clusters", format: "qcow2", size: "5243392", create: []string{"-o", "cluster_size=2M"}},
	{name: "extended", format: "qcow2", size: "4M", create: []string{"-o", "extended_l2=on,cluster_size=128k"}},
	{name: "old", format: "qcow2", size: "4M", create: []string{"-o", "compat=0.10"}, old: true},
	{name: "overlay", format: "qcow2", size: "4M", base: true},
	{name: "overlay, extended", format: "qcow2", size: "4M", create: []string{"-o", "extended_l2=on"}, base: true},
	{name: "overlay, shorter", format: "qcow2", size: "2000384", create: []string{"-o", "cluster_size=16k"}, base: true},
	{name: "data file", format: "qcow2", size: "4M", create: []string{"-o", "data_file=data"}},
	{name: "data file, raw", format: "qcow2", size: "4M", create: []string{"-o", "data_file=data,data_file_raw=on"}},
	{name: "preallocated", format: "qcow2", size: "4M", create: []string{"-o", "preallocation=metadata"}},
	{name: "raw", format: "raw", size: "4M"},
}

// pair are two directories with the same image: the first is for QEMU.
type pair [2]string

func (s sample) pair(t *testing.T) pair {
	t.Helper()
	p := pair{t.TempDir(), t.TempDir()}
	for _, dir := range p {
		mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "raw", "empty", "8M")
		if err := os.WriteFile(filepath.Join(dir, "pattern"), []byte("the pattern of a file\x00\xff"), 0o600); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"create", "-q", "-f", s.format}, s.create...)
		if s.base {
			mustQEMU(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "32M")
			mustQEMU(t, dir, "qemu-io", "-c", "write -P 0x77 0 1M", "-c", "write -z 1M 256k", "-c", "write -P 0x78 2500k 572k", "base.qcow2")
			args = append(args, "-b", "base.qcow2", "-F", "qcow2")
		}
		mustQEMU(t, dir, "qemu-img", append(args, s.file(), s.size)...)
	}
	return p
}

func (s sample) file() string { return "a." + s.format }

var (
	timing  = regexp.MustCompile(`(\d+ ops; ).*sec\)`)
	machine = regexp.MustCompile(`(?m)^(\d+,\d+,)\d+:.*$`)
	program = regexp.MustCompile(`(?m)^(qemu-io|calf): .*\n`)
	hints   = regexp.MustCompile(`(?m)^Please use .*\n`)
)

// timeless is output without what differs between two runs.
func timeless(out string) string {
	return machine.ReplaceAllString(timing.ReplaceAllString(out, "${1}TIME"), "${1}TIME")
}

// remarks is what stderr has without the messages under the program's name, which
// have words of their own.
func remarks(stderr string) string {
	return hints.ReplaceAllString(program.ReplaceAllString(stderr, ""), "")
}

// result is what came of a session.
type result struct {
	OK              bool
	Output, Remarks string
	Complains       bool // there were other messages
}

func resultOf(code int, stdout, stderr string) result {
	return result{code == 0, timeless(stdout), remarks(stderr), program.MatchString(stderr)}
}

// theirs runs a script with qemu-io.
func theirs(t *testing.T, dir string, args []string, script []string) result {
	t.Helper()
	for _, line := range script {
		args = append(args, "-c", line)
	}
	return resultOf(qemu(t, dir, "qemu-io", args...))
}

// ours runs a script here, on the image that o describes.
func ours(t *testing.T, dir string, o Options, script []string) result {
	t.Helper()
	t.Chdir(dir)
	var out, messages bytes.Buffer
	s := New(Config{Out: &out, Messages: &messages, Name: "calf", Open: OpenImage})
	code := 0
	if o.Path != "" {
		if err := s.OpenFile(o); err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range script {
		if !s.Do(t.Context(), line) {
			break
		}
	}
	if !s.Close() {
		code = 1
	}
	return resultOf(code, out.String(), messages.String())
}

// both runs a script with both programs on the same image and compares what they
// print and what the image is then. Reports come in any order if sorted is set.
func both(t *testing.T, s sample, p pair, script []string, sorted bool) {
	t.Helper()
	want := theirs(t, p[0], []string{"-f", s.format, s.file()}, script)
	got := ours(t, p[1], Options{Path: s.file(), Format: s.format}, script)
	if sorted {
		for _, r := range []*result{&want, &got} {
			lines := strings.Split(r.Output, "\n")
			slices.Sort(lines)
			r.Output = strings.Join(lines, "\n")
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: (-qemu-io +calf)\n%s", s.name, diff)
	}
	same(t, s, p)
	if t.Failed() {
		t.Log(strings.Join(script, "\n"))
	}
}

// same compares the disks of two images, and checks ours.
func same(t *testing.T, s sample, p pair) {
	t.Helper()
	a, b := filepath.Join(p[0], s.file()), filepath.Join(p[1], s.file())
	if code, out, messages := qemu(t, p[1], "qemu-img", "compare", "-f", s.format, "-F", s.format, a, b); code != 0 {
		t.Errorf("%s: qemu-img compare: %d %s%s", s.name, code, out, messages)
	}
	if s.format == "qcow2" {
		if code, out, messages := qemu(t, p[1], "qemu-img", "check", b); code != 0 {
			t.Errorf("%s: qemu-img check: %d %s%s", s.name, code, out, messages)
		}
	}
}

// TestLikeQEMU runs every command in every form, and with every mistake, and
// compares what is printed with what qemu-io prints. That does several at once, of
// which all succeed or all fail here.
func TestLikeQEMU(t *testing.T) {
	s := sample{name: "table", format: "qcow2", size: "4M", create: []string{"-b", "empty", "-F", "raw"}}
	p := s.pair(t)
	var batch []string
	var got result
	compare := func() {
		if want := theirs(t, p[0], []string{"-f", s.format, s.file()}, batch); len(batch) > 0 && want != got {
			t.Errorf("%q: (-qemu-io +calf)\n%s", batch, cmp.Diff(want, got))
		}
		batch, got = nil, result{}
	}
	for i, line := range commandsToCompare {
		if testing.Short() && i%5 != 0 {
			continue
		}
		script := strings.Split(line, "; ")
		one := ours(t, p[1], Options{Path: s.file(), Format: s.format}, script)
		alone := slices.ContainsFunc(script, func(c string) bool {
			return c == "c" || c == "quit" || c[:min(2, len(c))] == "q " || strings.Contains(c, "close") || strings.Contains(c, "open")
		})
		if alone || one.OK != got.OK || len(batch) > 12 {
			compare()
		}
		batch = append(batch, script...)
		got = result{one.OK, got.Output + one.Output, got.Remarks + one.Remarks, got.Complains || one.Complains}
		if alone {
			compare()
		}
	}
	compare()
	same(t, s, p)
}

// TestCopyOnReadKeepsWrites reads and writes parts of the same clusters at once.
func TestCopyOnReadKeepsWrites(t *testing.T) {
	s := sample{name: "overlay", format: "qcow2", size: "32M", create: []string{"-o", "cluster_size=64k"}, base: true}
	script := []string{}
	for i := range 100 {
		script = append(script, fmt.Sprintf("aio_read -q %d 512", i<<16), fmt.Sprintf("aio_write -qP 9 %d 512", i<<16+4096), fmt.Sprintf("aio_read -q %d 512", i<<16+8192))
	}
	script = append(script, "aio_flush")
	for i := range 100 {
		script = append(script, fmt.Sprintf("read -qP 9 %d 512", i<<16+4096))
	}
	got := ours(t, s.pair(t)[1], Options{Path: s.file(), Format: s.format, CopyOnRead: true}, script)
	if want := (result{OK: true}); got != want {
		t.Error(cmp.Diff(want, got))
	}
}

func TestMain(m *testing.M) {
	signal.Ignore(syscall.SIGPIPE) // as calf does
	os.Exit(m.Run())
}

// TestSessions runs seeded random sessions on images of every kind.
func TestSessions(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv("CALF_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	lines := 60
	if testing.Short() {
		lines = 20
	}
	for i, s := range samples {
		t.Run(s.name, func(t *testing.T) {
			g := &generator{rand: rand.New(rand.NewPCG(seed, uint64(i))), sample: s}
			both(t, s, s.pair(t), g.session(lines), false)
			g.aio = true
			both(t, s, s.pair(t), g.session(lines), true)
			if t.Failed() {
				t.Logf("CALF_TEST_SEED=%d", seed)
			}
		})
	}
}

// TestRawSectors works on a file that does not end with a sector.
func TestRawSectors(t *testing.T) {
	s := sample{name: "raw", format: "raw", size: "1M"}
	p := s.pair(t)
	for _, dir := range p {
		if err := os.Truncate(filepath.Join(dir, s.file()), 1000); err != nil {
			t.Fatal(err)
		}
	}
	both(t, s, p, []string{
		"length", "map", "write -P 5 990 20", "read -v 980 44", "read 1020 8", "write -z 1000 24", "discard 0 1024", "truncate 3k", "length", "write -P 4 3000 72",
		"truncate -m falloc 4k", "read -P 4 3000 72", "truncate 1k", "length", "alloc 0 2k", "info", "write -c 0 512", "truncate 1000", "length", "read -P 0 512 512",
	}, false)
}

// TestCopyOnRead reads overlays with both programs, which keep what they read.
func TestCopyOnRead(t *testing.T) {
	for _, s := range samples {
		if !s.base {
			continue
		}
		p := s.pair(t)
		script := []string{
			"write -P 1 1100k 3k", "read -P 0x77 4097 1", "map", "read -P 0x77 0 300k", "map", "read 1000k 600k", "map", "discard 0 64k", "read -P 0 0 64k",
			"readv -q 1900000 5 50000 1", "map", "aio_read -qP 0x77 300k 500k", "aio_flush", "map", "read 1M 0", "write -z 1M 64k", "read 1024000 1M", "map", "length", "read 5M 1",
		}
		want := theirs(t, p[0], []string{"-C", "-f", s.format, s.file()}, script)
		got := ours(t, p[1], Options{Path: s.file(), Format: s.format, CopyOnRead: true}, script)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: (-qemu-io +calf)\n%s", s.name, diff)
		}
		same(t, s, p)
	}
}

// TestPieces moves more than a piece at once: from a file, and verified.
func TestPieces(t *testing.T) {
	s := samples[0]
	both(t, s, s.pair(t), []string{
		"truncate 64M", "write -s pattern 12345 40M", "read -v 16789540 40", "read -v 41955000 60",
		"write -c -s pattern 48M 1M", "read -v 48k 40", "read -P 0x74 41955000 1", "map",
		"write -P 6 1M 40M", "read -P 6 1M 40M", "readv -P 6 1M 15M 15M 10M", "write -P 7 20M 1", "read -P 6 1M 40M", "readv -P 6 1M 15M 15M 10M",
		"read -P 6 -l 19M 1M 40M", "read -P 6 -s 19M 1M 40M", "read -P 6 -s 19922945 1M 40M", "aio_write -P 8 2M 30M 5M", "aio_flush", "aio_read -P 8 2M 35M", "aio_flush",
	}, false)
}

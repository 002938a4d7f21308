package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/calfvm/calf/qcow2"
)

// newRand returns random numbers whose seed is printed if the test fails.
func newRand(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// must runs a program that has to succeed.
func must(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// scribble writes random stretches to a disk with qemu-io: data of one byte, noise,
// zeros, and discards.
func scribble(t *testing.T, r *rand.Rand, format, path string, size int64) {
	t.Helper()
	args := []string{"-f", format, "-d", "unmap"}
	for range 1 + r.IntN(12) {
		off := r.Int64N(size/512) * 512
		n := min(size-off, (1+r.Int64N(300))*512)
		switch r.IntN(8) {
		case 0:
			args = append(args, "-c", fmt.Sprintf("write -z %d %d", off, n))
		case 1:
			args = append(args, "-c", fmt.Sprintf("write -z -u %d %d", off, n))
		case 2:
			args = append(args, "-c", fmt.Sprintf("discard %d %d", off, n))
		case 3:
			args = append(args, "-c", fmt.Sprintf("write -P 0 %d %d", off, n))
		default:
			args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+r.IntN(255), off, n))
		}
	}
	must(t, "qemu-io", append(args, path)...)
}

// qcow2Options are options of qcow2 images that differ in how the disk is stored.
var qcow2Options = []string{
	"cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "cluster_size=2M", "compat=0.10",
	"extended_l2=on", "extended_l2=on,cluster_size=16k,compression_type=zstd", "compression_type=zstd,cluster_size=32k",
	"refcount_bits=64,lazy_refcounts=on",
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// source makes images in the working directory and returns the name of the uppermost
// and the flags to read it: an image of some kind, or what it was at a snapshot.
func (r *randomImages) source() (name string, flags []string) {
	r.t.Helper()
	name, format := r.chain("a")
	flags = []string{"-f", format}
	if format == "raw" || r.IntN(3) > 0 {
		return name, flags
	}
	if i, err := qcow2.Inspect(name); err != nil {
		r.t.Fatal(err)
	} else if len(i.Snapshots) > 0 {
		return name, append(flags, "-l", i.Snapshots[r.IntN(len(i.Snapshots))].Name)
	}
	must(r.t, "qemu-img", "convert", "-c", "-f", format, "-O", "qcow2", "-o", pick(r.Rand, qcow2Options), name, "packed")
	r.fill("packed")
	return "packed", flags
}

// target returns flags for a target of source, and its format.
func (r *randomImages) target(source string) (flags []string, format string) {
	flags = append(flags, "-S", r.one("4k", "0", "512", "1536", "64k", "1M"))
	if r.IntN(2) == 0 {
		flags = append(flags, "-m", fmt.Sprint(1+r.IntN(16)))
	}
	if r.IntN(4) == 0 {
		return append(flags, "-O", "raw"), "raw"
	}
	flags = append(flags, "-O", "qcow2", "-o", pick(r.Rand, qcow2Options))
	if source != "a0" && source != "packed" && r.IntN(3) > 0 {
		base := fmt.Sprint("a", r.IntN(int(source[1]-'0')))
		i, err := qcow2.Inspect(base)
		format := "qcow2"
		if errors.Is(err, qcow2.ErrNotQCOW2) {
			format = "raw"
		} else if err != nil {
			r.t.Fatal(err, i)
		}
		flags = append(flags, "-B", base, "-F", format)
	}
	if r.IntN(3) == 0 {
		flags = append(flags, "-c")
	} else if r.IntN(3) == 0 {
		flags = append(flags, "-W")
	}
	return flags, "qcow2"
}

// onDisk is the room that a file takes.
func onDisk(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// TestConvert converts images of every kind to every other and compares the disks
// with what qemu-img reads, and the images with what it makes.
func TestConvert(t *testing.T) {
	r := newRandomImages(t)
	for i := range rounds(t, 30) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Chdir(t.TempDir())
			r.t = t
			source, flags := r.source()
			more, format := r.target(source)
			must(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, flags...), source, "want")...)
			flags = append(flags, more...)
			mustCalf(t, append(append([]string{"image", "convert", "-q"}, flags...), source, "out")...)
			if code, out := qemuImg(t, "compare", "-f", format, "-F", "raw", "out", "want"); code != 0 {
				t.Fatalf("%q: %s", flags, out)
			}
			if format == "qcow2" {
				if code, out := qemuImg(t, "check", "-f", format, "out"); code != 0 {
					t.Fatalf("%q: %s", flags, out)
				}
			}
			if slices.Contains(flags, "-B") || !slices.Contains(flags, "4k") {
				return // qemu-img copies what is in the first layer only, and has a way of its own with a large -S
			}
			must(t, "qemu-img", append(append([]string{"convert"}, flags...), source, "theirs")...)
			if ours, theirs := onDisk(t, "out"), onDisk(t, "theirs"); ours > theirs+theirs/8+128<<10 {
				t.Errorf("%q: takes %d bytes, qemu-img's %d", flags, ours, theirs)
			}
		})
	}
}

// TestConvertStreams has standard input and output be raw disks of any length.
func TestConvertStreams(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	for _, n := range []int{0, 511, 70_000, 2<<20 + 7} {
		data := make([]byte, n)
		for i := range n {
			if i>>16&1 == 0 {
				data[i] = byte(r.Uint32())
			}
		}
		if err := os.WriteFile("in", data, 0o600); err != nil {
			t.Fatal(err)
		}
		must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "in", "want")
		want, err := os.ReadFile("want")
		if err != nil {
			t.Fatal(err)
		}
		for _, flags := range [][]string{{"-O", "raw"}, {"-O", "qcow2"}, {"-O", "qcow2", "-c"}, {"-O", "qcow2", "-o", "cluster_size=512"}} {
			cmd := command(append(append([]string{"image", "convert"}, flags...), "-", "out")...)
			cmd.Stdin = bytes.NewReader(data) // which comes through a pipe
			if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
				t.Fatalf("%q of %d bytes: %v, %s", flags, n, err, out)
			}
			code, out, _ := calf(t, "image", "convert", "-f", flags[1], "out", "-")
			if code != 0 || out != string(want) {
				t.Errorf("%q of %d bytes: code %d, %d bytes come back, want %d", flags, n, code, len(out), len(want))
			}
			if flags[1] == "qcow2" {
				must(t, "qemu-img", "check", "-f", "qcow2", "out")
			}
		}
	}
}

// entries are the names in the working directory.
func entries(t *testing.T) []string {
	t.Helper()
	all, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// TestConvertInterrupted ends converts at random moments. What had the name of the
// target is what it was, or the whole new image; a signal that can be caught leaves
// nothing else, and kill a file with a name of its own, until the next conversion.
func TestConvertInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	must(t, "qemu-img", "create", "-q", "-f", "raw", "in", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 8M", "in")
	for i := range rounds(t, 24) {
		before := i%2 == 0
		if err := os.Remove("out"); err != nil && i > 0 && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		if before {
			if err := os.WriteFile("out", []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s := []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL}[i%3]
		cmd := command("image", "convert", "-O", r.one("raw", "qcow2"), "-r", "60M", "in", "out")
		var messages bytes.Buffer
		cmd.Stderr = &messages
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.Int64N(int64(250 * time.Millisecond))))
		_ = cmd.Process.Signal(s)
		err := cmd.Wait()
		b, readErr := os.ReadFile("out")
		whole := len(b) >= 8<<20
		if !whole && (before != (readErr == nil) || before && string(b) != "precious") {
			t.Fatalf("%v left a target of %d bytes (%v), there was one: %t", s, len(b), readErr, before)
		}
		if whole && s == syscall.SIGKILL {
			must(t, "qemu-img", "compare", "in", "out")
		}
		// One that comes when all is done ends calf as it ends any program.
		late := whole && cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
		if s != syscall.SIGKILL && whole != (err == nil) && !late {
			t.Errorf("%v: %v, but the target is whole: %t; %s", s, err, whole, messages.String())
		}
		for _, name := range entries(t) {
			if name == "in" || name == "out" {
				continue
			}
			if s != syscall.SIGKILL || !strings.HasPrefix(name, ".out.calf-") {
				t.Errorf("%v left %s", s, name)
			}
		}
		if s == syscall.SIGKILL {
			if out, err := command("image", "convert", "-O", "raw", "in", "out").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if names := entries(t); len(names) != 2 {
				t.Errorf("the conversion after that left %q", names)
			}
		}
	}
}

// TestConvertNoRoom writes to a file that may not grow. Nothing of it is left.
func TestConvertNoRoom(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "in", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 6M 2M", "in")
	for _, format := range []string{"raw", "qcow2"} {
		cmd := command("image", "convert", "-O", format, "in", "out")
		cmd.Args = append([]string{"prlimit", "--fsize=1048576"}, cmd.Args...)
		var err error
		if cmd.Path, err = exec.LookPath("prlimit"); err != nil {
			t.Fatal(err)
		}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "file too large") || strings.Contains(string(out), "goroutine") {
			t.Errorf("%s: %v, %s", format, err, out)
		}
		if names := entries(t); len(names) != 1 {
			t.Errorf("%s left %v", format, names)
		}
	}
}

// TestConvertFullDisk fills a file system, says which image it was for, and leaves
// nothing there. A compact finds out before.
func TestConvertFullDisk(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "mkdir", "small")
	if err := syscall.Mount("none", "small", "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("a small file system cannot be mounted: %v", err)
	}
	defer func() {
		if err := syscall.Unmount("small", 0); err != nil {
			t.Error(err)
		}
	}()
	must(t, "qemu-img", "create", "-q", "-f", "raw", "in", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 8M", "in")
	empty := func(what string) {
		t.Helper()
		if left, err := os.ReadDir("small"); err != nil || len(left) > 0 {
			t.Errorf("%s leaves %v, %v", what, left, err)
		}
	}
	for _, flags := range []string{"-O raw", "-O qcow2", "-O raw -o preallocation=falloc"} {
		code, _, messages := calf(t, append(append([]string{"image", "convert"}, strings.Fields(flags)...), "in", "small/out")...)
		if code != 1 || !strings.Contains(messages, "small/out") || !strings.Contains(messages, "no space left") {
			t.Errorf("%s: code %d, %s", flags, code, messages)
		}
		empty(flags)
	}
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "small/fat.qcow2", "8M")
	must(t, "qemu-io", "-c", "write -P 5 0 2500k", "small/fat.qcow2")
	if code, _, messages := calf(t, "image", "compact", "small/fat.qcow2"); code != 1 || !strings.Contains(messages, "make room") {
		t.Errorf("code %d, %s", code, messages)
	}
	must(t, "rm", "small/fat.qcow2")
	empty("compact")
}

// TestConvertSalvage reads an image whose clusters are damaged, as qemu-img does.
func TestConvertSalvage(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	r.raw("raw")
	must(t, "truncate", "-s", "4M", "raw")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 64k 128k", "raw")
	must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "in.qcow2")
	b, err := os.ReadFile("in.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	l2 := be.Uint64(b[be.Uint64(b[40:]):]) & 0x00fffffffffffe00
	packed := be.Uint64(b[l2+8:]) & (1<<54 - 1)
	sound := slices.Clone(b[packed : packed+16])
	for i := range sound {
		b[packed+uint64(i)] = 0xff
	}
	damage := func() {
		t.Helper()
		if err := os.WriteFile("in.qcow2", b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(says ...string) {
		t.Helper()
		code, _, messages := calf(t, "image", "convert", "-O", "raw", "in.qcow2", "out")
		for _, s := range append(says, "in.qcow2") {
			if code != 1 || !strings.Contains(messages, s) {
				t.Errorf("code %d, %s, want %q in it", code, messages, s)
			}
		}
		if _, err := os.Stat("out"); err == nil {
			t.Error("the target is there")
		}
	}
	damage()
	refused("byte 65536 of the disk", fmt.Sprintf("%#x", packed))
	be.PutUint64(b[l2+16:], 0x8000000000012a00) // of the third cluster: unaligned
	copy(b[packed:], sound)
	damage()
	refused("131072", "0x12a00")
	for i := range sound {
		b[packed+uint64(i)] = 0xff
	}
	damage()
	for _, flags := range [][]string{{"--salvage"}, {"--salvage", "-q"}, {"--salvage", "-m", "1"}} {
		flags = append([]string{"convert", "-f", "qcow2", "-O", "raw"}, flags...)
		must(t, "qemu-img", append(flags, "in.qcow2", "theirs")...)
		code, _, messages := calf(t, append(append([]string{"image"}, flags...), "in.qcow2", "out")...)
		if said := strings.Contains(messages, "lost: 131072 bytes at 65536"); code != 0 || said == slices.Contains(flags, "-q") {
			t.Errorf("%q: code %d, %s", flags, code, messages)
		}
		must(t, "cmp", "out", "theirs")
	}
}

// TestConvertExisting writes into images that exist, with what they hold before.
func TestConvertExisting(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	r.raw("in")
	must(t, "truncate", "-s", "3M", "in")
	for _, format := range []string{"raw", "qcow2"} {
		for _, flags := range []string{"", "-S 0", "-W", "-t none", "-t writethrough"} {
			for _, size := range []string{"2M", "3M", "4M"} {
				for _, path := range []string{"ours", "theirs"} {
					must(t, "qemu-img", "create", "-q", "-f", format, path, size)
					must(t, "qemu-io", "-f", format, "-c", "write -P 7 0 "+size, path)
				}
				args := append([]string{"convert", "-n", "-f", "raw", "-O", format}, strings.Fields(flags)...)
				wantCode, _ := qemuImg(t, append(args, "in", "theirs")...)
				code, _, messages := calf(t, append(append([]string{"image"}, args...), "in", "ours")...)
				if code != wantCode {
					t.Errorf("%q: code %d, qemu-img's %d; %s", args, code, wantCode, messages)
				}
				if code, out := qemuImg(t, "compare", "-f", format, "-F", format, "ours", "theirs"); code != 0 {
					t.Errorf("%q: %s", args, out)
				}
				if format == "qcow2" {
					must(t, "qemu-img", "check", "-q", "ours")
				}
			}
		}
		must(t, "qemu-img", "create", "-q", "-f", format, "ours", "3M")
		if code, _, messages := calf(t, "image", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", format, "in", "ours"); code != 0 {
			t.Error(messages)
		}
		must(t, "qemu-img", "compare", "-f", "raw", "-F", format, "in", "ours")
	}
}

// TestConvertRefusals says what is wrong and makes nothing.
func TestConvertRefusals(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "raw", "huge.img", "200G")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "used.qcow2", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "over.qcow2")
	used, err := qcow2.Open("used.qcow2", qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = used.Close() }()
	before := entries(t)
	for _, c := range []struct{ says, args string }{
		{"image to read and one to make", "a.img"},
		{"none.img", "none.img new"},
		{"in use", "used.qcow2 new"},
		{"in use", "a.img used.qcow2"},
		{"source and the target", "a.qcow2 a.qcow2"},
		{"in use", "over.qcow2 a.qcow2"},
		{"too large", "-o cluster_size=512 huge.img new.qcow2"},
		{"cannot be compressed", "-c a.img new.img"},
		{"exclude each other", "-c -o preallocation=full a.img new.qcow2"},
		{"-W", "-c -W a.img new.qcow2"},
		{"requires -n", "--target-is-zero a.img new.img"},
		{"standard output", "-O qcow2 a.img -"},
		{"standard output", "-W a.img -"},
		{"only source", "- a.img new.img"},
		{"only source", "a.img - new.img"},
		{"more than one source", "-B a.qcow2 -F qcow2 a.img a.img new.qcow2"},
		{"-F", "-B a.qcow2 a.img new.qcow2"},
		{"none.qcow2", "-B none.qcow2 -F qcow2 a.img new.qcow2"},
		{"not supported for format raw", "-o cluster_size=4k a.img new.img"},
		{"-S", "-S 100 a.img new.img"},
		{"-S", "-S 32M a.img new.img"},
		{"-m", "-m 17 a.img new.img"},
		{"-r", "-r fast a.img new.img"},
		{"-o has no effect", "-n -o size=3M a.img a.qcow2"},
		{"no internal snapshot", "-l then a.qcow2 new.img"},
		{"size", "-o size=3M a.img new.qcow2"},
		{"--object", "--object secret,id=x a.img new.img"},
		{"cache mode", "-t sometimes a.img new.img"},
	} {
		code, out, messages := calf(t, append([]string{"image", "convert"}, strings.Fields(c.args)...)...)
		if code != 1 || out != "" || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, %s%s, want %q in it", c.args, code, out, messages, c.says)
		}
		if after := entries(t); !slices.Equal(before, after) {
			t.Fatalf("%q leaves %v", c.args, after)
		}
	}
}

// TestConvertCutOff reads an image whose end is missing, as after a download that
// broke off.
func TestConvertCutOff(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "in.qcow2", "4M")
	must(t, "qemu-io", "-c", "write -P 5 0 2M", "in.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "in.qcow2", "-F", "qcow2", "over.qcow2")
	fi, err := os.Stat("in.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	must(t, "truncate", "-s", fmt.Sprint(fi.Size()-1000), "in.qcow2") // of the last cluster
	must(t, "qemu-img", "convert", "-O", "raw", "in.qcow2", "want")
	mustCalf(t, "image", "convert", "-q", "in.qcow2", "out")
	must(t, "cmp", "out", "want")
	must(t, "truncate", "-s", fmt.Sprint(fi.Size()-1<<20), "in.qcow2")
	for _, in := range []string{"in.qcow2", "over.qcow2"} {
		if code, _, messages := calf(t, "image", "convert", in, "out"); code != 1 || !strings.Contains(messages, "in.qcow2 was cut off: byte 1048576") {
			t.Errorf("%s: code %d, %s", in, code, messages)
		}
		must(t, "cmp", "out", "want") // it is what it was
	}
	must(t, "qemu-img", "convert", "-O", "raw", "in.qcow2", "short")
	code, _, messages := calf(t, "image", "convert", "--salvage", "in.qcow2", "out")
	if code != 0 || strings.Count(messages, "lost: 1048576 bytes at 1048576") != 1 {
		t.Errorf("code %d, %s", code, messages)
	}
	must(t, "cmp", "out", "short")
}

// TestConvertBacking keeps backing files. What the target shows of one is not copied,
// be it a layer of the source or a copy of one.
func TestConvertBacking(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", "base.img")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "mid.qcow2")
	must(t, "qemu-io", "-c", "write -P 2 1M 1M", "-c", "write -z 3M 1M", "mid.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
	must(t, "qemu-io", "-c", "write -P 3 5M 64k", "top.qcow2")
	must(t, "cp", "base.img", "copy.img")
	must(t, "cp", "mid.qcow2", "midcopy.qcow2")
	for _, c := range []struct {
		flags string
		most  int64 // bytes of data
	}{
		{"-B mid.qcow2 -F qcow2", 64 << 10},
		{"-B midcopy.qcow2 -F qcow2", 64 << 10},
		{"-B base.img -F raw", 1<<20 + 64<<10},
		{"-B copy.img -F raw", 1<<20 + 64<<10},
		{"-o backing_file=copy.img,backing_fmt=raw", 1<<20 + 64<<10},
		{"-c -B copy.img -F raw", 1 << 20},
		{"-o cluster_size=2M -c -B base.img -F raw", 2 << 20}, // an L2 table
		{"-o compat=0.10 -B base.img -F raw", 2<<20 + 64<<10}, // zeros take room
		{"", 7 << 20},
	} {
		mustCalf(t, append(append([]string{"image", "convert", "-q"}, strings.Fields(c.flags)...), "top.qcow2", "out.qcow2")...)
		must(t, "qemu-img", "compare", "top.qcow2", "out.qcow2")
		must(t, "qemu-img", "check", "-q", "out.qcow2")
		if got := onDisk(t, "out.qcow2"); got > c.most+512<<10 || c.flags == "" && got < c.most {
			t.Errorf("%q takes %d bytes, want about %d", c.flags, got, c.most)
		}
	}
}

// marked is what the bitmaps of an image say.
func marked(t *testing.T, path string) string {
	t.Helper()
	m, err := qcow2.Open(path, qcow2.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	all, err := m.Bitmaps()
	if err != nil {
		t.Fatal(err)
	}
	var s strings.Builder
	for _, b := range all {
		fmt.Fprintf(&s, "%+v", b)
		for r, err := range m.DirtyRanges(b.Name) {
			fmt.Fprint(&s, r, err)
		}
	}
	return s.String()
}

// TestConvertBitmaps copies bitmaps that QEMU has set.
func TestConvertBitmaps(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "in.qcow2", "8M")
	must(t, "qemu-img", "bitmap", "--add", "-g", "4k", "in.qcow2", "fine")
	must(t, "qemu-io", "-c", "write 1M 100k", "-c", "write 7M 1M", "in.qcow2")
	must(t, "qemu-img", "bitmap", "--add", "--disable", "in.qcow2", "coarse")
	must(t, "qemu-img", "bitmap", "--merge", "fine", "in.qcow2", "coarse")
	want := marked(t, "in.qcow2")
	for _, options := range []string{"cluster_size=64k", "cluster_size=4k"} {
		mustCalf(t, "image", "convert", "-q", "--bitmaps", "-o", options, "in.qcow2", "out.qcow2")
		if got := marked(t, "out.qcow2"); got != want || !strings.Contains(got, "fine") {
			t.Errorf("%s: got %s, want %s", options, got, want)
		}
		must(t, "qemu-img", "check", "-q", "out.qcow2")
	}
	mustCalf(t, "image", "compact", "-q", "-c", "out.qcow2")
	if got := marked(t, "out.qcow2"); got != want {
		t.Errorf("compact: got %s, want %s", got, want)
	}
	must(t, "qemu-img", "compare", "in.qcow2", "out.qcow2")
	for _, args := range [][]string{
		{"in.qcow2", "in.qcow2", "new.qcow2"},
		{"-O", "raw", "in.qcow2", "new"},
		{"-o", "compat=0.10", "in.qcow2", "new.qcow2"},
		{"-", "new.qcow2"},
	} {
		if code, _, messages := calf(t, append([]string{"image", "convert", "--bitmaps"}, args...)...); code != 1 || !strings.Contains(messages, "bitmaps") {
			t.Errorf("%q: code %d, %s", args, code, messages)
		}
	}
	m, err := qcow2.Open("in.qcow2", qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = m.WriteAt([]byte{1}, 0); err != nil { // which leaves the one that follows the disk in use
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"convert", "--bitmaps", "in.qcow2", "new.qcow2"}, {"compact", "-c", "in.qcow2"}} {
		if code, _, messages := calf(t, append([]string{"image"}, args...)...); code != 1 || !strings.Contains(messages, `"fine" is in use`) {
			t.Errorf("%q: code %d, %s", args, code, messages)
		}
	}
	code, _, messages := calf(t, "image", "convert", "--bitmaps", "--skip-broken-bitmaps", "in.qcow2", "new.qcow2")
	if got := marked(t, "new.qcow2"); code != 0 || strings.Contains(got, "fine") || !strings.Contains(got, "coarse") || !strings.Contains(messages, `"fine"`) {
		t.Errorf("code %d, %s; %s", code, messages, got)
	}
}

// TestConvertOffload has the host copy what it can.
func TestConvertOffload(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	for _, size := range []string{"3M", "3000001"} {
		must(t, "rm", "-f", "in")
		must(t, "truncate", "-s", size, "in")
		must(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P 5 %d 1M", r.Int64N(1<<20)), "in")
		must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "in", "want")
		mustCalf(t, "image", "convert", "-q", "-C", "in", "out")
		must(t, "cmp", "out", "want")
		if got, want := onDisk(t, "out"), onDisk(t, "in"); got > want+16<<10 {
			t.Errorf("%d bytes on disk, want %d", got, want)
		}
		mustCalf(t, "image", "convert", "-q", "-C", "in", "out.qcow2")
		must(t, "qemu-img", "compare", "out.qcow2", "want")
	}
	for _, flags := range []string{"-C -c -O qcow2", "-C -S 4k"} {
		if code, _, messages := calf(t, append(append([]string{"image", "convert"}, strings.Fields(flags)...), "in", "new")...); code != 1 || !strings.Contains(messages, "-C") {
			t.Errorf("%q: code %d, %s", flags, code, messages)
		}
	}
}

// TestConvertMemory copies what takes most memory, with as many CPUs as a server has.
func TestConvertMemory(t *testing.T) {
	built, _ := debug.ReadBuildInfo()
	if testing.Short() || slices.Contains(built.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("it takes a while, and memory of its own under the race detector")
	}
	t.Chdir(t.TempDir())
	const options = "cluster_size=2M,compression_type=zstd"
	must(t, "qemu-img", "create", "-q", "-f", "raw", "raw", "160M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 0 160M", "raw")
	must(t, "qemu-img", "convert", "-c", "-o", options, "-f", "raw", "-O", "qcow2", "raw", "in.qcow2")
	cmd := command("image", "convert", "-q", "-m", "16", "-c", "-o", options, "in.qcow2", "out.qcow2")
	cmd.Env = append(cmd.Environ(), "GOMAXPROCS=16")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v, %s", err, out)
	}
	if most := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; most > 200<<10 {
		t.Errorf("it took %d KiB", most)
	}
}

package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
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

// disk is an image made by qemu-img, with flags to read it with.
type disk struct {
	path  string
	flags []string
	base  string // flags to keep its backing file with; empty if it has none
}

// randomDisk makes an image of some kind in the working directory.
func randomDisk(t *testing.T, r *rand.Rand) disk {
	t.Helper()
	size := (1 + r.Int64N(8000)) * 512
	length := fmt.Sprint(size)
	create := func(path, options string, more ...string) {
		must(t, "qemu-img", append([]string{"create", "-q", "-f", "qcow2", "-o", options}, append(more, path, length)...)...)
	}
	switch r.IntN(6) {
	case 0:
		must(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", length)
		scribble(t, r, "raw", "a.img", size)
		return disk{"a.img", []string{"-f", "raw"}, ""}
	case 1: // compressed
		must(t, "qemu-img", "create", "-q", "-f", "raw", "raw", length)
		scribble(t, r, "raw", "raw", size)
		must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", pick(r, qcow2Options), "raw", "a.qcow2")
		scribble(t, r, "qcow2", "a.qcow2", size)
	case 2: // an overlay of an overlay, each of a size of its own
		must(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", length)
		scribble(t, r, "raw", "base.img", size)
		size = (1 + r.Int64N(8000)) * 512
		length = fmt.Sprint(size)
		create("mid.qcow2", pick(r, qcow2Options), "-b", "base.img", "-F", "raw")
		scribble(t, r, "qcow2", "mid.qcow2", size)
		size = (1 + r.Int64N(8000)) * 512
		length = fmt.Sprint(size)
		create("a.qcow2", pick(r, qcow2Options), "-b", "mid.qcow2", "-F", "qcow2")
		scribble(t, r, "qcow2", "a.qcow2", size)
		return disk{"a.qcow2", []string{"-f", "qcow2"}, pick(r, []string{"-B mid.qcow2 -F qcow2", "-B base.img -F raw"})}
	case 3: // a snapshot
		options := pick(r, qcow2Options)
		if strings.Contains(options, "refcount_bits=1") {
			options = "cluster_size=64k"
		}
		create("a.qcow2", options)
		scribble(t, r, "qcow2", "a.qcow2", size)
		must(t, "qemu-img", "snapshot", "-c", "then", "a.qcow2")
		scribble(t, r, "qcow2", "a.qcow2", size)
		return disk{"a.qcow2", []string{"-f", "qcow2", "-l", "then"}, ""}
	case 4:
		create("a.qcow2", "preallocation="+pick(r, []string{"metadata", "falloc", "full"}))
		scribble(t, r, "qcow2", "a.qcow2", size)
	default:
		create("a.qcow2", pick(r, qcow2Options))
		scribble(t, r, "qcow2", "a.qcow2", size)
	}
	return disk{"a.qcow2", []string{"-f", "qcow2"}, ""}
}

// randomTarget returns flags for a target, and its format.
func randomTarget(r *rand.Rand, d disk) (flags []string, format string) {
	flags = append(flags, "-S", pick(r, []string{"4k", "0", "512", "1536", "64k", "1M"}))
	if r.IntN(2) == 0 {
		flags = append(flags, "-m", fmt.Sprint(1+r.IntN(16)))
	}
	if r.IntN(4) == 0 {
		return append(flags, "-O", "raw"), "raw"
	}
	flags = append(flags, "-O", "qcow2", "-o", pick(r, qcow2Options))
	if d.base != "" && r.IntN(3) > 0 {
		flags = append(flags, strings.Fields(d.base)...)
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
	r := newRand(t)
	cases := 40
	if testing.Short() {
		cases = 8
	}
	for i := range cases {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Chdir(t.TempDir())
			d := randomDisk(t, r)
			flags, format := randomTarget(r, d)
			flags = append(slices.Clone(d.flags), flags...)
			code, out, messages := calf(t, append(append([]string{"image", "convert", "-q"}, flags...), d.path, "out")...)
			if code != 0 || out != "" || messages != "" {
				t.Fatalf("%q: code %d, %s%s", flags, code, out, messages)
			}
			must(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, d.flags...), d.path, "want")...)
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
			must(t, "qemu-img", append(append([]string{"convert"}, flags...), d.path, "theirs")...)
			if ours, theirs := onDisk(t, "out"), onDisk(t, "theirs"); ours > theirs+theirs/8+128<<10 {
				t.Errorf("%q: takes %d bytes, qemu-img's %d", flags, ours, theirs)
			}
		})
	}
}

// TestConvertStreams has standard input and output be raw disks of any length.
func TestConvertStreams(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRand(t)
	for _, n := range []int{0, 1, 511, 512, 70_000, 3 << 20, 5<<20 + 7} {
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

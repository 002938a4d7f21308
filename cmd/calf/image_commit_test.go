package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/image"
)

// layer is an image of a chain.
type layer struct {
	path, format string
	size         int64
}

// randomChain makes top.qcow2 over mid.qcow2 over a base in the working directory,
// each of a kind and a size of its own, and returns them from the top.
func randomChain(t *testing.T, r *rand.Rand) [3]layer {
	t.Helper()
	randomSize := func() int64 { return (1 + r.Int64N(6000)) * 512 }
	base := layer{"base.img", "raw", randomSize()}
	must(t, "qemu-img", "create", "-q", "-f", "raw", base.path, fmt.Sprint(base.size))
	scribble(t, r, "raw", base.path, base.size)
	if r.IntN(3) > 0 {
		flags := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", pick(r, qcow2Options)}
		if r.IntN(3) == 0 {
			flags = append(flags, "-c")
		}
		must(t, "qemu-img", append(flags, base.path, "base.qcow2")...)
		base.path, base.format = "base.qcow2", "qcow2"
	}
	over := func(path string, under layer) layer {
		l := layer{path, "qcow2", randomSize()}
		if r.IntN(2) == 0 {
			l.size = under.size
		}
		options := pick(r, qcow2Options)
		must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", under.path, "-F", under.format, path, fmt.Sprint(l.size))
		scribble(t, r, "qcow2", path, l.size)
		if r.IntN(4) == 0 && !strings.Contains(options, "refcount_bits=1") {
			must(t, "qemu-img", "snapshot", "-c", "then", path)
			scribble(t, r, "qcow2", path, l.size)
		}
		return l
	}
	mid := over("mid.qcow2", base)
	return [3]layer{over("top.qcow2", mid), mid, base}
}

// diskOf is the disk in an image, as qemu-img reads it, length bytes of it.
func diskOf(t *testing.T, l layer, length int64) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	must(t, "qemu-img", "convert", "-f", l.format, "-O", "raw", l.path, raw)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, max(0, length-int64(len(b))))...)[:length]
}

// copyTo copies the files of the working directory to dir, with their holes.
func copyTo(t *testing.T, dir string) {
	t.Helper()
	files, err := filepath.Glob("*.*")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, "cp", append(append([]string{"--sparse=always"}, files...), dir)...)
}

// everything is what the files of the working directory hold, in short.
func everything(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob("*.*")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sha256sum", files...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// sound checks the qcow2 images among the layers.
func sound(t *testing.T, layers ...layer) {
	t.Helper()
	for _, l := range layers {
		if l.format != "qcow2" {
			continue
		}
		if code, out := qemuImg(t, "check", "-f", "qcow2", l.path); code != 0 {
			t.Errorf("%s: %s", l.path, out)
		}
	}
}

// TestCommit merges random overlays into one of the images under them, as qemu-img
// does to copies of them: the image has what the overlay showed, behind its end what
// it had, and the overlay shows the same as before.
func TestCommit(t *testing.T) {
	r := newRand(t)
	cases := 20
	if testing.Short() {
		cases = 8
	}
	for i := range cases {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Chdir(t.TempDir())
			chain := randomChain(t, r)
			top, to, flags := chain[0], chain[1], []string{"-f", "qcow2"}
			switch r.IntN(4) {
			case 0:
				flags = append(flags, "-d")
			case 1:
				to = chain[2]
				flags = append(flags, "-b", to.path)
			case 2:
				flags = append(flags, "-t", pick(r, []string{"none", "unsafe", "writethrough", "directsync"}), "-p", "-r", "1G")
			}
			flags = append(flags, top.path)
			want := diskOf(t, top, top.size)
			size := max(top.size, to.size)
			whole := append(slices.Clone(want), diskOf(t, to, size)[top.size:]...)
			mid, err := os.ReadFile("mid.qcow2")
			if err != nil {
				t.Fatal(err)
			}
			copyTo(t, "theirs")
			code, out, messages := calf(t, append([]string{"image", "commit"}, flags...)...)
			t.Chdir("theirs")
			theirs, err := exec.Command("qemu-img", append([]string{"commit"}, flags...)...).CombinedOutput()
			t.Chdir("..")
			// QEMU cannot make a disk of version 2 longer that lies over another.
			if (code == 0) != (err == nil) && (code != 0 || !strings.Contains(string(theirs), "not supported")) {
				t.Fatalf("%q: code %d, qemu-img's %v; %s\n%s", flags, code, err, messages, theirs)
			}
			if code == 0 && (out != "Image committed.\n" || messages != "") {
				t.Errorf("%q prints %q and says %q", flags, out, messages)
			}
			sound(t, chain[:]...)
			if to.path == "mid.qcow2" && !bytes.Equal(diskOf(t, top, top.size), want) {
				t.Errorf("%q: the overlay shows something else", flags)
			}
			if code != 0 {
				return
			}
			if !bytes.Equal(diskOf(t, to, size), whole) {
				t.Errorf("%q: %s has not what the overlay showed", flags, to.path)
			}
			if after, err := os.ReadFile("mid.qcow2"); err != nil || to.path != "mid.qcow2" && !bytes.Equal(after, mid) {
				t.Errorf("%q: the image between was changed (%v)", flags, err)
			}
			_, left := qemuImg(t, "map", "-f", "qcow2", "--output=json", top.path)
			if empty := !strings.Contains(left, `"depth": 0, "present": true`); empty == (len(flags) == 4 || to.path != "mid.qcow2") && !bytes.Equal(want, make([]byte, len(want))) {
				t.Errorf("%q: the overlay has\n%s", flags, left)
			}
		})
	}
}

// TestCommitRefused shows what is refused, in the words of what to do, with
// qemu-img's exit code and with nothing changed.
func TestCommitRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "over.qcow2")
	must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "top.qcow2")
	before := everything(t)
	for _, c := range []struct {
		says string
		args []string
	}{
		{"no backing file", []string{"base.qcow2"}},
		{"no backing file", []string{"a.img"}},
		{"no backing file", []string{"-b", "base.qcow2", "a.img"}},
		{"none.qcow2", []string{"none.qcow2"}},
		{"not among its backing files", []string{"-b", "a.img", "top.qcow2"}},
		{"not among its backing files", []string{"-b", "top.qcow2", "top.qcow2"}},
		{`"sometimes"`, []string{"-t", "sometimes", "top.qcow2"}},
		{"-r", []string{"-r", "much", "top.qcow2"}},
		{"vdi", []string{"-f", "vdi", "top.qcow2"}},
		{"arg", nil},
		{"arg", []string{"top.qcow2", "base.qcow2"}},
		{"in use", []string{"top.qcow2"}},
		{"in use", []string{"over.qcow2"}},
	} {
		if c.says == "in use" {
			reader, err := image.Open("top.qcow2", image.OpenOptions{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
		}
		args := append([]string{"commit"}, c.args...)
		code, out, messages := calf(t, append([]string{"image"}, args...)...)
		want, _ := qemuImg(t, args...)
		if code != want || code == 0 || out != "" || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, want %d; prints %q and says %q, want %q in it", c.args, code, want, out, messages, c.says)
		}
	}
	if after := everything(t); after != before {
		t.Errorf("the files were\n%s\nand are\n%s", before, after)
	}
}

// TestCommitKilled kills calf while it merges. The overlay shows what it did before,
// each time, and in the end the image under it has all of it.
func TestCommitKilled(t *testing.T) {
	r := newRand(t)
	t.Chdir(t.TempDir())
	const size = 24 << 20
	top := layer{"top.qcow2", "qcow2", size}
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "20M")
	must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 9 0 18M", "base.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.qcow2", "-F", "qcow2", top.path, "24M")
	for range 8 {
		scribble(t, r, "qcow2", top.path, size)
	}
	must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 10M 14M", top.path)
	want := diskOf(t, top, size)
	kills := 10
	if testing.Short() {
		kills = 3
	}
	for range kills {
		killIn(t, r, 400*time.Millisecond, "image", "commit", "-q", "-r", "40M", top.path)
		if !bytes.Equal(diskOf(t, top, size), want) {
			t.Fatal("the overlay shows something else")
		}
	}
	if code, _, messages := calf(t, "image", "commit", "-q", top.path); code != 0 {
		t.Fatal(messages)
	}
	sound(t, top)
	if !bytes.Equal(diskOf(t, layer{"base.qcow2", "qcow2", size}, size), want) {
		t.Error("the base has not what the overlay showed")
	}
}

// killIn runs calf and kills it some time within the time given.
func killIn(t *testing.T, r *rand.Rand, within time.Duration, args ...string) {
	t.Helper()
	cmd := command(args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(r.Int64N(int64(within))))
	_ = cmd.Process.Kill() // it may be done
	_ = cmd.Wait()
}

// TestCommitInterrupted stops calf as Ctrl-C does: it ends with a message.
func TestCommitInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", "64M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "top.qcow2")
	must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64M", "top.qcow2")
	cmd := command("image", "commit", "-r", "8M", "top.qcow2")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != 1 || said.Len() == 0 {
		t.Errorf("%v, says %q", cmd.ProcessState, said.String())
	}
	if code, out := qemuImg(t, "compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "base.img"); code != 1 {
		t.Errorf("%s", out)
	}
	sound(t, layer{"top.qcow2", "qcow2", 0})
}

// TestCommitNothing merges an overlay that has nothing: the image under it is not
// touched.
func TestCommitNothing(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "raw.img", "4M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 5 1M 2M", "raw.img")
	must(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "raw.img", "base.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
	before := everything(t)
	if code, _, messages := calf(t, "image", "commit", "-q", "-d", "top.qcow2"); code != 0 {
		t.Fatal(messages)
	}
	if after := everything(t); after != before {
		t.Errorf("the files were\n%s\nand are\n%s", before, after)
	}
}

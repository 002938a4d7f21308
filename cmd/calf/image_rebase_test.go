package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/cmd/internal/image"
)

// randomBase makes another base in the working directory, of a kind and a size of
// its own, which may have much in common with the disk in old.
func randomBase(t *testing.T, r *rand.Rand, old layer) layer {
	t.Helper()
	l := layer{"other.img", "raw", (1 + r.Int64N(6000)) * 512}
	if r.IntN(2) == 0 {
		must(t, "qemu-img", "convert", "-f", old.format, "-O", "raw", old.path, l.path)
		must(t, "qemu-img", "resize", "-q", "--shrink", "-f", "raw", l.path, fmt.Sprint(l.size))
	} else {
		must(t, "qemu-img", "create", "-q", "-f", "raw", l.path, fmt.Sprint(l.size))
	}
	scribble(t, r, "raw", l.path, l.size)
	if r.IntN(3) == 0 {
		return l
	}
	flags := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", pick(r, qcow2Options)}
	if r.IntN(3) == 0 {
		flags = append(flags, "-c")
	}
	must(t, "qemu-img", append(flags, l.path, "other.qcow2")...)
	return layer{"other.qcow2", "qcow2", l.size}
}

// ownClusters is how many clusters of the disk an image has in its file.
func ownClusters(t *testing.T, path string) (n int) {
	t.Helper()
	_, out := qemuImg(t, "check", "-f", "qcow2", "--output=json", path)
	var found struct {
		N int `json:"allocated-clusters"`
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		t.Fatal(err)
	}
	return found.N
}

// TestRebase puts random overlays over other backing files, as qemu-img does to
// copies of them: they show what they did, and have no more clusters
// than those, unless they are compressed.
func TestRebase(t *testing.T) {
	r := newRand(t)
	cases := 20
	if testing.Short() {
		cases = 8
	}
	for i := range cases {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Chdir(t.TempDir())
			chain := randomChain(t, r)
			top, to := chain[0], randomBase(t, r, chain[1])
			if code, out := qemuImg(t, "snapshot", "-l", top.path); code == 0 && out != "" {
				must(t, "qemu-img", "snapshot", "-d", "then", top.path)
			}
			flags := []string{"-f", "qcow2", "-F", to.format, "-b", to.path}
			switch r.IntN(6) {
			case 0:
				flags = []string{"-b", ""}
			case 1: // to what it lies over already, further down
				to = chain[2]
				flags = []string{"-b", to.path, "-F", to.format}
			case 2:
				flags = append(flags, "-p", "-T", "none", "-t", pick(r, []string{"none", "unsafe", "writethrough"}))
			}
			want := diskOf(t, top, top.size)
			copyTo(t, "theirs")
			ours := flags
			if r.IntN(4) == 0 {
				ours = append([]string{"-c"}, flags...)
			}
			code, out, messages := calf(t, append(append([]string{"image", "rebase"}, ours...), top.path)...)
			if code != 0 || out != "" || messages != "" {
				t.Fatalf("%q: code %d, %s%s", ours, code, out, messages)
			}
			t.Chdir("theirs")
			must(t, "qemu-img", append(append([]string{"rebase"}, flags...), top.path)...)
			info := func() string {
				_, out := qemuImg(t, "info", "-f", "qcow2", top.path)
				_, names, _ := strings.Cut(out, "backing file: ")
				names, _, _ = strings.Cut(names, "Format specific")
				return names
			}
			theirs, most := info(), ownClusters(t, top.path)
			t.Chdir("..")
			sound(t, top)
			if !bytes.Equal(diskOf(t, top, top.size), want) {
				t.Errorf("%q: the overlay shows something else", ours)
			}
			if got := info(); got != theirs {
				t.Errorf("%q: the backing file is %swant %s", ours, got, theirs)
			}
			if n := ownClusters(t, top.path); n > most && len(ours) == len(flags) {
				t.Errorf("%q: the overlay has %d clusters, qemu-img's %d", ours, n, most)
			}
		})
	}
}

// TestRebaseShared rebases an overlay from an image to the one under it: what both
// have from there is not copied, and not read.
func TestRebaseShared(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", "8M")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", "base.img")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "mid.qcow2")
	must(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -z 2M 64k", "mid.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
	if code, _, messages := calf(t, "image", "rebase", "-q", "-b", "base.img", "-F", "raw", "top.qcow2"); code != 0 {
		t.Fatal(messages)
	}
	_, out := qemuImg(t, "map", "-f", "qcow2", "--output=json", "top.qcow2")
	for _, own := range []string{
		`"start": 1048576, "length": 65536, "depth": 0, "present": true, "zero": false`,
		`"start": 2097152, "length": 65536, "depth": 0, "present": true, "zero": true`,
	} {
		if !strings.Contains(out, own) {
			t.Errorf("want %s in\n%s", own, out)
		}
	}
	if strings.Count(out, `"depth": 0`) != 2 {
		t.Errorf("the overlay has more than what differs:\n%s", out)
	}
}

// TestRebaseUnsafe changes names alone, of files that need not exist.
func TestRebaseUnsafe(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", "top.qcow2", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", "theirs.qcow2", "1M")
	for _, flags := range [][]string{
		{"-u", "-b", "elsewhere/base.img", "-F", "raw"},
		{"-u", "-b", strings.Repeat("long", 200), "-F", "qcow2"},
		{"-u", "-b", ""},
		{"-u", "-b", "gone.qcow2", "-F", "qcow2"},
		{"-u"},
	} {
		code, out, messages := calf(t, append(append([]string{"image", "rebase"}, flags...), "top.qcow2")...)
		if code != 0 || out != "" || messages != "" {
			t.Fatalf("%q: code %d, %s%s", flags, code, out, messages)
		}
		must(t, "qemu-img", append(append([]string{"rebase"}, flags...), "theirs.qcow2")...)
		var first [2][]byte
		for i, path := range []string{"top.qcow2", "theirs.qcow2"} {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			first[i] = b[:64<<10]
		}
		if !bytes.Equal(first[0], first[1]) {
			t.Errorf("%q: the header is not qemu-img's", flags)
		}
	}
}

// TestRebaseRefused shows what is refused, with qemu-img's exit code and with
// nothing changed.
func TestRebaseRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "raw", "a.img", "1M")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "over.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "kept.qcow2")
	must(t, "qemu-img", "snapshot", "-c", "then", "kept.qcow2")
	if err := os.Mkdir("else", 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "../../../../etc/passwd", "-F", "raw", "else/top.qcow2", "1M")
	before := everything(t)
	for _, c := range []struct {
		says  string
		args  []string
		alone bool // qemu-img does it
	}{
		{"-b", []string{"top.qcow2"}, false},
		{"-F", []string{"-b", "a.img", "top.qcow2"}, false},
		{"-F", []string{"-u", "-b", "a.img", "top.qcow2"}, false},
		{"vdi", []string{"-u", "-b", "a.img", "-F", "vdi", "top.qcow2"}, true},
		{"none.img", []string{"-b", "none.img", "-F", "raw", "top.qcow2"}, false},
		{"none.qcow2", []string{"-b", "a.img", "-F", "raw", "none.qcow2"}, false},
		{"raw image", []string{"-b", "base.qcow2", "-F", "qcow2", "-f", "raw", "a.img"}, false},
		{"itself", []string{"-b", "top.qcow2", "-F", "qcow2", "top.qcow2"}, false},
		{"itself", []string{"-u", "-b", "top.qcow2", "-F", "qcow2", "top.qcow2"}, true},
		{"lies over", []string{"-b", "over.qcow2", "-F", "qcow2", "top.qcow2"}, false},
		{"plain name", []string{"-u", "-b", "nbd://here/disk", "-F", "raw", "top.qcow2"}, true},
		{"outside", []string{"-b", "../a.img", "-F", "raw", "else/top.qcow2"}, true},
		{"snapshots", []string{"-b", "a.img", "-F", "raw", "kept.qcow2"}, true},
		{"-c", []string{"-u", "-c", "-b", "a.img", "-F", "raw", "top.qcow2"}, false},
		{"--force-share", []string{"-U", "-u", "-b", "a.img", "-F", "raw", "top.qcow2"}, true},
		{`"sometimes"`, []string{"-T", "sometimes", "-b", "a.img", "-F", "raw", "top.qcow2"}, false},
		{"arg", []string{"-b", "a.img"}, false},
		{"in use", []string{"-b", "a.img", "-F", "raw", "top.qcow2"}, false},
		{"in use", []string{"-u", "-b", "a.img", "-F", "raw", "top.qcow2"}, false},
	} {
		if c.says == "in use" {
			reader, err := image.Open("top.qcow2", image.OpenOptions{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
		}
		args := append([]string{"rebase"}, c.args...)
		code, out, messages := calf(t, append([]string{"image"}, args...)...)
		if code != 1 || out != "" || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, prints %q and says %q, want %q in it", c.args, code, out, messages, c.says)
		}
		if c.alone {
			continue
		}
		if err := exec.Command("qemu-img", args...).Run(); err == nil {
			t.Errorf("qemu-img does %q", args)
		}
	}
	if after := everything(t); after != before {
		t.Errorf("the files were\n%s\nand are\n%s", before, after)
	}
}

// TestRebaseKilled kills calf while it copies. The overlay shows what it did, over
// whichever backing file.
func TestRebaseKilled(t *testing.T) {
	r := newRand(t)
	t.Chdir(t.TempDir())
	const size = 48 << 20
	top := layer{"top.qcow2", "qcow2", size}
	must(t, "qemu-img", "create", "-q", "-f", "raw", "old.img", "40M")
	must(t, "qemu-img", "create", "-q", "-f", "raw", "new.img", "48M")
	for range 10 {
		scribble(t, r, "raw", "old.img", 40<<20)
		scribble(t, r, "raw", "new.img", size)
	}
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 3 1M 30M", "old.img")
	must(t, "qemu-io", "-f", "raw", "-c", "write -P 4 35M 12M", "new.img")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "old.img", "-F", "raw", top.path, "48M")
	scribble(t, r, "qcow2", top.path, size)
	want := diskOf(t, top, size)
	kills := 12
	if testing.Short() {
		kills = 4
	}
	names := [][]string{{"-b", "new.img", "-F", "raw"}, {"-b", ""}}
	for i := range kills {
		killIn(t, r, 300*time.Millisecond, append(append([]string{"image", "rebase", "-q"}, names[i%2]...), top.path)...)
		if !bytes.Equal(diskOf(t, top, size), want) {
			t.Fatal("the overlay shows something else")
		}
	}
}

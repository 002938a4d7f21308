package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/calfvm/calf/cmd/internal/image"
)

// qemuImg runs qemu-img and returns its exit code and output.
func qemuImg(t *testing.T, args ...string) (code int, stdout string) {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), string(out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, string(out)
}

// both runs calf image and qemu-img with the same arguments and compares exit
// codes, and what is printed: as JSON if it is, without the keys in ours alone.
func both(t *testing.T, args ...string) {
	t.Helper()
	wantCode, want := qemuImg(t, args...)
	code, got, messages := calf(t, append([]string{"image"}, args...)...)
	if code != wantCode {
		t.Errorf("%q: exit code %d, want %d; %s", args, code, wantCode, messages)
	}
	if !strings.HasPrefix(want, "{") {
		if got != want {
			t.Errorf("%q prints\n%s\nwant\n%s", args, got, want)
		}
		return
	}
	var w, g map[string]any
	if err := errors.Join(json.Unmarshal([]byte(want), &w), json.Unmarshal([]byte(got), &g)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(w, g); diff != "" {
		t.Errorf("%q (-qemu-img +calf)\n%s", args, diff)
	}
}

// TestImageLikeQEMU makes images with both programs, which print the same, and
// lets both print what they are and check them, sound and damaged.
func TestImageLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "raw", "base.img", "3M")
	for _, options := range [][]string{
		{"-f", "qcow2", "a.qcow2", "10M"},
		{"-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts=on", "-o", "refcount_bits=64", "a.qcow2", "1.5G"},
		{"-f", "qcow2", "-o", "extended_l2=on,compression_type=zstd,preallocation=metadata", "a.qcow2", "64M"},
		{"-f", "qcow2", "-o", "compat=0.10", "a.qcow2", "1048577"},
		{"-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2"},
		{"-f", "qcow2", "-o", "backing_file=base.img,backing_fmt=raw", "a.qcow2", "7M"},
		{"-f", "raw", "a.qcow2", "7M"},
		{"-q", "-f", "qcow2", "a.qcow2", "7M"},
	} {
		t.Run(strings.Join(options, " "), func(t *testing.T) {
			_, want := qemuImg(t, append([]string{"create"}, options...)...)
			if err := os.Rename("a.qcow2", "theirs.qcow2"); err != nil {
				t.Fatal(err)
			}
			code, got, messages := calf(t, append([]string{"image", "create"}, options...)...)
			if code != 0 || got != want {
				t.Fatalf("code %d, %s\nprints %s\nwant   %s", code, messages, got, want)
			}
			for _, path := range []string{"a.qcow2", "theirs.qcow2"} {
				format := options[1]
				if options[0] == "-q" {
					format = options[2]
				}
				both(t, "info", "-f", format, path)
				both(t, "info", "-f", format, "--output=json", path)
				if format == "qcow2" {
					both(t, "check", "-f", format, path)
					both(t, "check", "-f", format, "--output=json", path)
				}
			}
			if err := os.Remove("a.qcow2"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

var imageEnd = regexp.MustCompile(`Image end offset: [0-9]+|"image-end-offset": [0-9]+,`)

// TestImageCheckLikeQEMU checks and repairs images with both programs, which print
// the same and end with the same code, but for what they say of each finding.
func TestImageCheckLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "good.qcow2", "1M")
	good, err := os.ReadFile("good.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	const counts = 0x20000
	for _, c := range []struct {
		name    string
		counted map[int]byte // counts, of 16 bits, by cluster
	}{
		{"sound", nil},
		{"leak", map[int]byte{4: 1, 7: 1}},
		{"no count of the header", map[int]byte{0: 0}},
		{"both", map[int]byte{0: 0, 4: 1}},
	} {
		bad := append(append([]byte(nil), good...), make([]byte, 0x80000-len(good))...)
		for cluster, count := range c.counted {
			bad[counts+2*cluster+1] = count
		}
		for _, flags := range [][]string{nil, {"-r", "leaks"}, {"-r", "all"}, {"-q"}, {"-T", "none"}, {"-T", "writeback", "-r", "all"}} {
			for _, output := range []string{"human", "json"} {
				args := append([]string{"check", "--output=" + output, "bad.qcow2"}, flags...)
				if err := os.WriteFile("bad.qcow2", bad, 0o600); err != nil {
					t.Fatal(err)
				}
				wantCode, want := qemuImg(t, args...)
				if err := os.WriteFile("bad.qcow2", bad, 0o600); err != nil {
					t.Fatal(err)
				}
				code, got, messages := calf(t, append([]string{"image"}, args...)...)
				if wantCode == 1 && code == 2 && len(flags) > 0 && flags[0] == "-r" {
					continue // QEMU fails on the way; we say what the image is
				}
				if code == 0 && len(c.counted) > 0 {
					// QEMU moves the counts that it mends, we do not.
					got, want = imageEnd.ReplaceAllString(got, ""), imageEnd.ReplaceAllString(want, "")
				}
				if code != wantCode || !sameOutput(t, got, want) {
					t.Errorf("%s %q: code %d, prints\n%s\nwant %d, \n%s", c.name, args, code, got, wantCode, want)
				}
				if (messages == "") != (code == 0) || strings.Contains(messages, "ERROR") != (code == 2) {
					t.Errorf("%s %q: code %d, says %s", c.name, args, code, messages)
				}
			}
		}
	}
}

// sameOutput compares what two programs print, as JSON if it is.
func sameOutput(t *testing.T, got, want string) bool {
	t.Helper()
	if !strings.HasPrefix(want, "{") && !strings.HasPrefix(want, "[") {
		return got == want
	}
	var g, w any
	if err := errors.Join(json.Unmarshal([]byte(got), &g), json.Unmarshal([]byte(want), &w)); err != nil {
		t.Error(err)
	}
	return cmp.Equal(g, w)
}

// TestImageCheckImpossible checks what cannot be checked: the report is still JSON.
func TestImageCheckImpossible(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "raw", "a.raw", "1M")
	for _, c := range []struct {
		code         int
		path, format string
	}{{1, "none.qcow2", "qcow2"}, {1, "a.raw", "qcow2"}, {63, "a.raw", "raw"}} {
		if code, _ := qemuImg(t, "check", "-f", c.format, c.path); code != c.code {
			t.Errorf("qemu-img ends with %d", code)
		}
		args := []string{"image", "check", "-f", c.format, c.path}
		if code, out, messages := calf(t, args...); code != c.code || out != "" || messages == "" {
			t.Errorf("%q: code %d, %s%s", args, code, out, messages)
		}
		code, out, messages := calf(t, append(args, "--output=json")...)
		var r image.CheckReport
		err := json.Unmarshal([]byte(out), &r)
		if code != c.code || err != nil || r.Filename != c.path || r.Format != c.format || r.CheckErrors != 1 || messages == "" {
			t.Errorf("%q: code %d, %s%s (%v)", args, code, out, messages, err)
		}
	}
}

// TestImageResize changes sizes in every way that a size can be given.
func TestImageResize(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, format := range []string{"qcow2", "raw"} {
		for _, c := range []struct {
			to   []string
			size string
			code int
		}{
			{[]string{"2M"}, "2097152", 0},
			{[]string{"+1M"}, "2097152", 0},
			{[]string{"--shrink", "512k"}, "524288", 0},
			{[]string{"--shrink", "--", "-512k"}, "524288", 0},
			{[]string{"--shrink", "-512k"}, "524288", 0},
			{[]string{"-512k"}, "1048576", 1},
			{[]string{"512k"}, "1048576", 1},
			{[]string{"--preallocation=falloc", "2M"}, "2097152", 0},
			{[]string{"--preallocation=full", "2M"}, "2097152", 0},
			{[]string{"--preallocation=half", "2M"}, "1048576", 1},
			{[]string{"++1M"}, "1048576", 1},
			{[]string{"much"}, "1048576", 1},
		} {
			_ = os.Remove("a")
			qemuImg(t, "create", "-q", "-f", format, "a", "1M")
			args := []string{"image", "resize", "-f", format}
			if k := len(c.to) - 1; c.to[max(k-1, 0)] == "--" {
				args = append(append(args, c.to[:k]...), "a", c.to[k])
			} else {
				args = append(append(args, c.to[:k]...), "a", c.to[k])
			}
			code, out, messages := calf(t, args...)
			if code != c.code || code == 0 && out != "Image resized.\n" || code != 0 && messages == "" {
				t.Errorf("%s %q: code %d, %s %s", format, c.to, code, out, messages)
			}
			if _, info := qemuImg(t, "info", "-f", format, "a"); !strings.Contains(info, "("+c.size+" bytes)") {
				t.Errorf("%s %q: %s", format, c.to, info)
			}
		}
	}
}

// TestImageSnapshot keeps states of a disk with both programs by turns, and lists
// them with both.
func TestImageSnapshot(t *testing.T) {
	t.Chdir(t.TempDir())
	path := "a.qcow2"
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
	both(t, "snapshot", "-l", path)
	do := func(args ...string) {
		t.Helper()
		if code, out, messages := calf(t, append([]string{"image", "snapshot"}, append(args, path)...)...); code != 0 || out != "" {
			t.Errorf("%q: code %d, %s%s", args, code, out, messages)
		}
		both(t, "snapshot", "-l", path)
		both(t, "info", "--output=json", path)
		both(t, "check", path)
	}
	do("-c", "one")
	qemuImg(t, "bitmap", "--add", path, "b0")
	qemuImg(t, "bitmap", "--add", "--disable", "-g", "4k", path, "b1")
	both(t, "info", path)
	qemuImg(t, "snapshot", "-c", "two", path)
	do("-c", "three")
	do("-a", "two")
	do("-d", "one")
	qemuImg(t, "snapshot", "-d", "three", path)
	do("-d", "two")
	for _, args := range [][]string{{"-a", "four", path}, {"-c", "x", "-d", "y", path}, {"-f", "raw", path}} {
		if code, _, messages := calf(t, append([]string{"image", "snapshot"}, args...)...); code != 1 || messages == "" {
			t.Errorf("%q: code %d", args, code)
		}
	}
}

// TestImageRefusals names what is wrong, ends with qemu-img's code, and touches
// nothing.
func TestImageRefusals(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "there.qcow2", "1M")
	before, err := os.ReadFile("there.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		says string
		args []string
	}{
		{"there.qcow2", []string{"create", "there.qcow2", "1M"}},
		{"needs a size", []string{"create", "new.qcow2"}},
		{`"1X"`, []string{"create", "new.qcow2", "1X"}},
		{"-F", []string{"create", "-b", "there.qcow2", "new.qcow2"}},
		{"-u", []string{"create", "-b", "none.qcow2", "-F", "qcow2", "new.qcow2"}},
		{"wombat", []string{"create", "-o", "wombat=1", "new.qcow2", "1M"}},
		{"cluster_size", []string{"create", "-f", "raw", "-o", "cluster_size=1k", "new.raw", "1M"}},
		{"vdi", []string{"info", "-f", "vdi", "there.qcow2"}},
		{"none.qcow2", []string{"info", "none.qcow2"}},
		{"--output", []string{"info", "--output=xml", "there.qcow2"}},
		{"-r", []string{"check", "-r", "some", "there.qcow2"}},
		{"--wombat", []string{"check", "--wombat", "there.qcow2"}},
		{"arg", []string{"check"}},
	} {
		code, out, messages := calf(t, append([]string{"image"}, c.args...)...)
		if code != 1 || out != "" || !strings.Contains(messages, c.says) {
			t.Errorf("%q: code %d, prints %q and says %q, want %q in it", c.args, code, out, messages, c.says)
		}
	}
	after, err := os.ReadFile("there.qcow2")
	if err != nil || string(after) != string(before) {
		t.Errorf("an image has changed (%v)", err)
	}
	if names, err := filepath.Glob("new*"); err != nil || names != nil {
		t.Errorf("left behind: %v %v", names, err)
	}
}

// TestImageForceShare looks at an image that a process writes to, which all verbs
// that only look do with -U alone.
func TestImageForceShare(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, path := range []string{"a.qcow2", "a.raw"} {
		qemuImg(t, "create", "-q", "-f", path[2:], path, "1M")
		writer, err := image.Open(path, image.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range [][]string{{"info"}, {"info", "--backing-chain"}, {"check"}, {"snapshot"}} {
			if path == "a.raw" && c[0] != "info" {
				continue
			}
			args := append(append([]string{"image"}, c...), path)
			if code, out, messages := calf(t, args...); code != 1 || out != "" || !strings.Contains(messages, "use") {
				t.Errorf("%q beside a writer: code %d, %s%s", args, code, out, messages)
			}
			mustCalf(t, append(args, "-U")...)
		}
		if err := writer.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"check", "-U", "-r", "all", "a.qcow2"}, {"snapshot", "-U", "-c", "s", "a.qcow2"}} {
		if code, out, messages := calf(t, append([]string{"image"}, args...)...); code != 1 || out != "" || !strings.Contains(messages, "-U") {
			t.Errorf("%q: code %d, %s%s", args, code, out, messages)
		}
	}
}

// TestImageCheckRandom checks random images, all sound, with both programs.
func TestImageCheckRandom(t *testing.T) {
	r := newRandomImages(t)
	for range rounds(t, 8) {
		t.Chdir(t.TempDir())
		name, format := r.chain("layer")
		both(t, "check", "-f", format, name)
		if format == "qcow2" {
			both(t, "check", "-f", format, "-U", "--output=json", name)
		}
	}
}

// TestSizesLikeQEMU prints sizes around the ends of units.
func TestSizesLikeQEMU(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, size := range []string{"512", "999", "1000", "1023", "1024", "1000k", "1001k", "999424", "1000M", "1023M", "1024M", "1500M", "999G", "1000G", "3T"} {
		if err := os.WriteFile("disk.img", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := image.ParseSize(size)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate("disk.img", n&^511); err != nil {
			t.Fatal(err)
		}
		both(t, "info", "-f", "raw", "disk.img")
	}
}

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/image"
)

// TestImageInfo prints what random images say of themselves with both programs.
func TestImageInfo(t *testing.T) {
	r := newRandomImages(t)
	for range rounds(t, 10) {
		t.Chdir(t.TempDir())
		name, format := r.chain("layer")
		if r.IntN(2) == 0 {
			qemuImg(t, "bitmap", "--add", name, "b0")
			qemuImg(t, "bitmap", "--add", "--disable", "-g", "4k", name, "b1")
		}
		for _, flags := range [][]string{{}, {"-U"}, {"--output=json"}, {"--output", "json", "--force-share"}} {
			both(t, append(append([]string{"info", "-f", format}, flags...), name)...)
		}
		_, want := qemuImg(t, "info", "-f", format, "--backing-chain", "--output=json", name)
		code, got, messages := calf(t, "image", "info", "-f", format, "--backing-chain", "--output=json", name)
		if code != 0 || !sameOutput(t, got, want) {
			t.Errorf("the chain: code %d, %s%s, want\n%s", code, messages, got, want)
		}
	}
}

// opened watches the files at paths and returns a function that says which of them
// have been opened since.
func opened(t *testing.T, paths ...string) func() []string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	names := map[int32]string{}
	for _, path := range paths {
		watch, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN)
		if err != nil {
			t.Fatal(err)
		}
		names[int32(watch)] = path //nolint:gosec // G115: small
	}
	return func() []string {
		var seen []string
		b := make([]byte, 64<<10)
		n, err := unix.Read(fd, b)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		for b = b[:max(n, 0)]; len(b) > 0; {
			seen = append(seen, names[int32(binary.NativeEndian.Uint32(b))]) //nolint:gosec // G115: as it was
			b = b[unix.SizeofInotifyEvent+binary.NativeEndian.Uint32(b[12:]):]
		}
		slices.Sort(seen)
		return slices.Compact(seen)
	}
}

// TestImageInfoOpensNothingElse looks at an image that names other files.
func TestImageInfoOpensNothingElse(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "base.qcow2", "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", "data_file=data.raw", "over.qcow2")
	seen := opened(t, "base.qcow2", "data.raw")
	for _, args := range [][]string{
		{"info", "over.qcow2"},
		{"info", "--output=json", "over.qcow2"},
		{"info", "--untrusted", "over.qcow2"},
		{"snapshot", "-l", "over.qcow2"},
		{"check", "over.qcow2"},
	} {
		if code, _, messages := calf(t, append([]string{"image"}, args...)...); code != 0 && args[1] != "--untrusted" {
			t.Errorf("%q: code %d, %s", args, code, messages)
		}
		if got := seen(); got != nil {
			t.Errorf("%q has opened %v", args, got)
		}
	}
	mustCalf(t, "image", "info", "--backing-chain", "over.qcow2")
	if got := seen(); len(got) != 1 || got[0] != "base.qcow2" {
		t.Errorf("the chain is asked for, and %v opened", got)
	}
}

// TestImageInfoTree draws a chain.
func TestImageInfoTree(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "raw", "base.img", "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "-o", "data_file=middle.data", "middle.qcow2", "2M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "-o", "extended_l2=on,compression_type=zstd", "top.qcow2")
	qemuImg(t, "snapshot", "-c", "one", "top.qcow2")
	qemuImg(t, "bitmap", "--add", "top.qcow2", "b0")
	tree := mustCalf(t, "image", "info", "--backing-chain", "top.qcow2")
	want := []string{
		"top.qcow2: 2 MiB qcow2, * on disk, clusters of 64 KiB, subclusters, zstd, 1 snapshot, 1 bitmap",
		"└─ middle.qcow2: 2 MiB qcow2, * on disk, clusters of 64 KiB",
		"   ├─ data in middle.data: * on disk",
		"   └─ base.img: 1 MiB raw, * on disk",
	}
	lines := strings.Split(strings.TrimSuffix(tree, "\n"), "\n")
	for i, line := range lines {
		if ok, err := filepath.Match(want[min(i, 3)], line); !ok || err != nil {
			t.Errorf("line %d is %q, want %q", i, line, want[min(i, 3)])
		}
	}
	if len(lines) != len(want) {
		t.Errorf("it draws\n%s", tree)
	}
	// A chain that ends early is drawn as far as it goes.
	if err := os.Rename("base.img", "gone.img"); err != nil {
		t.Fatal(err)
	}
	code, out, messages := calf(t, "image", "info", "--backing-chain", "top.qcow2")
	if code != 1 || strings.Count(out, "\n") != 3 || !strings.Contains(messages, "base.img") {
		t.Errorf("code %d, %s%s", code, out, messages)
	}
	// Files outside the directory are not followed, unless they are allowed.
	if err := errors.Join(os.Mkdir("elsewhere", 0o700), os.Rename("gone.img", "elsewhere/base.img"), os.Symlink("elsewhere/base.img", "base.img")); err != nil {
		t.Fatal(err)
	}
	mustCalf(t, "image", "info", "--backing-chain", "top.qcow2")
	if err := os.Rename("top.qcow2", "elsewhere/top.qcow2"); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "rebase", "-u", "-b", "../middle.qcow2", "-F", "qcow2", "elsewhere/top.qcow2")
	if code, _, messages := calf(t, "image", "info", "--backing-chain", "elsewhere/top.qcow2"); code != 1 || !strings.Contains(messages, "outside") {
		t.Errorf("code %d, %s", code, messages)
	}
	mustCalf(t, "image", "info", "--backing-chain", "--backing-dir", ".", "elsewhere/top.qcow2")
}

// hostile is a change of an image of 1 MiB, and what has to be said of the result.
type hostile struct {
	name    string
	create  []string // arguments of qemu-img create instead of those for a plain image
	change  func(b []byte) []byte
	flags   []string
	reasons []string // their kinds
	notes   []string
}

func put(at, size int, value uint64) func([]byte) []byte {
	return func(b []byte) []byte {
		for i := range size {
			b[at+size-1-i] = byte(value >> (8 * i)) //nolint:gosec // G115: a byte
		}
		return b
	}
}

// extension puts a header extension before those that are there.
func extension(kind uint32, data string) func([]byte) []byte {
	return func(b []byte) []byte {
		const begin = 112
		ext := binary.BigEndian.AppendUint32(nil, kind)
		ext = binary.BigEndian.AppendUint32(ext, uint32(len(data))) //nolint:gosec // G115: short
		ext = append(ext, data...)
		ext = append(ext, make([]byte, -len(ext)&7)...)
		copy(b[begin+len(ext):1<<16], append([]byte(nil), b[begin:]...))
		copy(b[begin:], ext)
		return b
	}
}

var hostiles = []hostile{
	{name: "plain"},
	{name: "backing file", create: []string{"-u", "-b", "/etc/shadow", "-F", "raw", "a.qcow2", "1M"}, reasons: []string{"backing-file"}},
	{name: "backing json", create: []string{"-u", "-b", `json:{"driver":"null-co"}`, "-F", "raw", "a.qcow2", "1M"}, reasons: []string{"backing-file"}},
	{name: "data file", create: []string{"-o", "data_file=a.data", "a.qcow2", "1M"}, reasons: []string{"data-file"}},
	{name: "encrypted", change: put(32, 4, 2), reasons: []string{"encryption"}},
	{name: "unknown encryption", change: put(32, 4, 9), reasons: []string{"feature"}},
	{name: "dirty", change: put(79, 1, 1), reasons: []string{"dirty"}},
	{name: "corrupt", change: put(79, 1, 2), reasons: []string{"corrupt"}},
	{name: "unknown feature", change: put(72, 1, 0x80), reasons: []string{"feature"}},
	{name: "unknown compatible feature", change: put(80, 1, 0x80), notes: []string{"feature"}},
	{name: "unknown autoclear feature", change: put(88, 1, 0x80), notes: []string{"feature"}},
	{name: "unknown compression", change: put(104, 1, 7), reasons: []string{"fault", "feature"}},
	{name: "large disk", create: []string{"a.qcow2", "2T"}, reasons: []string{"size"}, notes: []string{"size"}},
	{name: "large disk allowed", create: []string{"a.qcow2", "2T"}, flags: []string{"--max-size=2T", "-f", "qcow2"}, notes: []string{"size"}},
	{name: "disk beyond its tables", change: put(24, 8, 1<<62), reasons: []string{"fault", "size"}, notes: []string{"size"}},
	{name: "impossible disk", change: put(24, 8, 1<<63), reasons: []string{"fault", "size"}, notes: []string{"size"}},
	{name: "large L1 table", change: put(36, 4, 4<<20), reasons: []string{"tables"}},
	{name: "impossible L1 table", change: put(36, 4, 1<<31), reasons: []string{"fault", "tables"}},
	{name: "L1 table elsewhere", change: put(40, 8, 1<<50), reasons: []string{"fault"}},
	{name: "counts elsewhere", change: put(48, 8, 1<<50), reasons: []string{"fault"}},
	{name: "no counts", change: put(56, 4, 0), reasons: []string{"fault"}},
	{name: "too many snapshots", change: put(60, 4, 1<<31), reasons: []string{"fault", "snapshots"}},
	{name: "many snapshots", change: func(b []byte) []byte { return put(60, 4, 60000)(put(64, 8, 0x30000)(b)) }, reasons: []string{"snapshots"}},
	{name: "clusters too large", change: put(20, 4, 60), reasons: []string{"fault"}},
	{name: "clusters too small", change: put(20, 4, 3), reasons: []string{"fault"}},
	{name: "wide counts", change: put(96, 4, 200), reasons: []string{"fault"}},
	{name: "long header", change: put(100, 4, 1<<30), reasons: []string{"fault", "header"}},
	{name: "backing file elsewhere", change: put(8, 8, 1<<63+5), reasons: []string{"fault"}},
	{name: "backing file too long", change: func(b []byte) []byte { return put(8, 8, 512)(put(16, 4, 1<<31)(b)) }, reasons: []string{"fault"}},
	{name: "no version", change: put(4, 4, 9), reasons: []string{"unreadable"}},
	{name: "no image", change: put(0, 4, 0), reasons: []string{"unreadable"}},
	{name: "short", change: func(b []byte) []byte { return b[:100] }, reasons: []string{"unreadable"}},
	{name: "half a cluster", change: func(b []byte) []byte { return b[:3000] }, reasons: []string{"fault"}},
	{name: "empty", change: func([]byte) []byte { return nil }, reasons: []string{"unreadable"}},
	{name: "unknown extension", change: extension(0x12345678, "?"), notes: []string{"feature"}},
	{name: "extension too long", change: put(116, 4, 1<<30), reasons: []string{"fault"}},
	{name: "extensions twice", change: func(b []byte) []byte { return extension(1, "a")(extension(1, "b")(b)) }, reasons: []string{"header"}, notes: []string{"feature"}},
	{name: "backing format alone", change: extension(0xe2792aca, "raw"), reasons: []string{"header"}},
	{name: "data file name alone", change: extension(0x44415441, "/etc/shadow"), reasons: []string{"header"}},
	{name: "encryption header alone", change: extension(0x0537be77, "0123456789abcdef"), reasons: []string{"header"}},
	{name: "half a feature name", change: extension(0x6803f857, "x"), reasons: []string{"header"}},
	{name: "bitmaps elsewhere", change: func(b []byte) []byte {
		return extension(0x23852875, "\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x7f\x00\x00\x00\x00\x00\x00\x00")(put(95, 1, 1)(b))
	}, reasons: []string{"fault"}},
	{name: "everything", change: func(b []byte) []byte {
		return put(32, 4, 2)(put(79, 1, 3)(put(72, 1, 1)(put(36, 4, 1<<31)(b))))
	}, reasons: []string{"corrupt", "dirty", "encryption", "fault", "feature", "tables"}},
	{name: "raw", create: []string{"-f", "raw", "a.qcow2", "1M"}, flags: []string{"-f", "raw"}},
	{name: "raw like qcow2", flags: []string{"-f", "raw"}, notes: []string{"content"}},
	{name: "format not given", flags: []string{}, notes: []string{"format"}},
}

// TestImageInfoUntrusted lists the reasons not to use images.
func TestImageInfoUntrusted(t *testing.T) {
	for _, h := range hostiles {
		t.Run(h.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			create := h.create
			if create == nil {
				create = []string{"a.qcow2", "1M"}
			}
			if code, _ := qemuImg(t, append([]string{"create", "-q", "-f", "qcow2"}, create...)...); code != 0 {
				t.Fatal("qemu-img fails")
			}
			if h.change != nil {
				b, err := os.ReadFile("a.qcow2")
				if err == nil {
					err = os.WriteFile("a.qcow2", h.change(b), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			args := []string{"image", "info", "--untrusted", "a.qcow2"}
			if args = append(args, h.flags...); h.flags == nil {
				args = append(args, "-f", "qcow2")
			}
			wantCode := 0
			if len(h.reasons) > 0 {
				wantCode = 2
			}
			code, text, messages := calf(t, args...)
			if code != wantCode || messages != "" {
				t.Errorf("code %d, want %d; %s", code, wantCode, messages)
			}
			code, out, _ := calf(t, append(args, "--output=json")...)
			var i image.Info
			if err := json.Unmarshal([]byte(out), &i); err != nil || code != wantCode {
				t.Fatalf("code %d, %v", code, err)
			}
			check := func(what string, doubts []image.Doubt, want []string) {
				kinds := []string{}
				for _, d := range doubts {
					kinds = append(kinds, d.Kind)
					if !strings.Contains(text, d.Kind+": ") || len(d.What) < 10 {
						t.Errorf("it does not print %+v:\n%s", d, text)
					}
				}
				slices.Sort(kinds)
				if kinds = slices.Compact(kinds); !slices.Equal(kinds, want) {
					t.Errorf("the %s are %+v, want %q", what, doubts, want)
				}
			}
			check("reasons", i.Trust.Reasons, h.reasons)
			check("notes", i.Trust.Notes, h.notes)
			// Without the flag what is broken is said, and what can be read, too.
			code, out, messages = calf(t, "image", "info", "-f", "qcow2", "a.qcow2")
			switch {
			case slices.Contains(h.reasons, "unreadable") || h.name == "raw":
				if code != 1 || out != "" || messages == "" {
					t.Errorf("info: code %d, %s%s", code, out, messages)
				}
			case slices.Contains(h.reasons, "fault") != (code == 1) || (messages != "") != (code == 1) || !strings.Contains(out, "compat: 1.1"):
				t.Errorf("info: code %d, %s%s", code, out, messages)
			}
		})
	}
}

// TestImageInfoLinks doubts what is not a file of its own.
func TestImageInfoLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	if err := errors.Join(os.Symlink("a.qcow2", "link.qcow2"), unix.Mkfifo("fifo.qcow2", 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"link.qcow2": "symbolic-link", "fifo.qcow2": "special-file"} {
		if code, out, _ := calf(t, "image", "info", "--untrusted", name); code != 2 || !strings.Contains(out, want+": ") {
			t.Errorf("%s: code %d, %s", name, code, out)
		}
	}
	if code, _, messages := calf(t, "image", "info", "--untrusted", "none.qcow2"); code != 1 || messages == "" {
		t.Errorf("nothing there: code %d", code)
	}
}

// TestImageInfoTerminal shows names from images so that no terminal obeys them.
func TestImageInfoTerminal(t *testing.T) {
	t.Chdir(t.TempDir())
	const evil = "\x1b]0;owned\x07"
	if err := os.WriteFile(evil, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", evil, "-F", "raw", "a.qcow2", "1M")
	qemuImg(t, "snapshot", "-c", evil, "a.qcow2")
	qemuImg(t, "bitmap", "--add", "a.qcow2", evil)
	for _, flags := range [][]string{{"info"}, {"info", "--untrusted"}, {"info", "--backing-chain"}, {"snapshot", "-l"}} {
		_, out, messages := calf(t, append(append([]string{"image"}, flags...), "a.qcow2")...)
		if strings.ContainsAny(out+messages, "\x1b\x07") || !strings.Contains(out+messages, "owned") {
			t.Errorf("%q prints %q %q", flags, out, messages)
		}
	}
}

// TestImageInfoRandomDamage damages headers at random: there is an answer, or a
// sentence, for each.
func TestImageInfoRandomDamage(t *testing.T) {
	t.Chdir(t.TempDir())
	r := newRandomImages(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "1M")
	qemuImg(t, "snapshot", "-c", "one", "a.qcow2")
	good, err := os.ReadFile("a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for range rounds(t, 100) {
		b := append([]byte(nil), good[:4+r.IntN(len(good)-4)]...)
		for range 1 + r.IntN(6) {
			b[4+r.IntN(min(len(b)-4, 300))] = byte(r.Uint32()) //nolint:gosec // G115: a byte
		}
		if err := os.WriteFile("b.qcow2", b, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, flags := range [][]string{{}, {"--untrusted"}} {
			args := append([]string{"image", "info", "--output=json", "b.qcow2"}, flags...)
			code, out, messages := calf(t, args...)
			var i image.Info
			if err := json.Unmarshal([]byte(out), &i); out != "" && err != nil {
				t.Fatal(err)
			}
			wrong := len(i.Faults) > 0 || out == "" || i.Trust != nil && len(i.Trust.Reasons) > 0
			if wrong != (code != 0) || len(flags) == 0 && (messages == "") != (code == 0) {
				t.Fatalf("%q: code %d, %s%s", args, code, out, messages)
			}
		}
	}
}

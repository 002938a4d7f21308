package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/image"
)

// TestImageCompare compares random images with copies of them that differ nowhere,
// or somewhere, with both programs.
func TestImageCompare(t *testing.T) {
	r := newRandomImages(t)
	for range rounds(t, 8) {
		t.Chdir(t.TempDir())
		name, format := r.chain("one")
		copied, o := "copy", []string{"-O", "raw"}
		if r.IntN(3) > 0 {
			o = []string{"-O", "qcow2", "-o", strings.Join(r.options("copy", false), ",")}
		}
		if code, _ := qemuImg(t, append(append([]string{"convert", "-f", format}, o...), name, copied)...); code != 0 {
			t.Fatalf("%q: exit code %d", o, code)
		}
		flags := []string{"compare", "-f", format, "-F", o[1]}
		both(t, append(flags, name, copied)...)
		both(t, "compare", "-F", format, "-f", o[1], "-U", copied, name)
		i, err := image.Inspect(copied, o[1])
		if err != nil {
			t.Fatal(err)
		}
		size := i.VirtualSize
		for range 1 + r.IntN(3) { // differences, of which the first counts
			at := r.Int64N(size)
			qemuIOFormat(t, o[1], copied, fmt.Sprintf("write -P %d %d %d", r.IntN(250), at, min(1+r.Int64N(1000), size-at)))
		}
		both(t, append(flags, name, copied)...)
		both(t, append(flags, name, copied, "-q", "-p")...)
		other, otherFormat := r.chain("two")
		both(t, "compare", "-f", format, "-F", otherFormat, name, other)
		if format == "qcow2" {
			both(t, "compare", "-f", format, "-F", format, "-T", "none", name, name)
		}
		resize := append([]string{"resize", "-q", "--shrink", "-f", o[1], copied}, fmt.Sprint(r.Int64N(2*size)))
		if code, _ := qemuImg(t, resize...); code == 0 {
			both(t, append(flags, name, copied)...)
			both(t, append(flags, copied, name)...)
		}
	}
}

// TestImageCompareStrict compares what is allocated, too.
func TestImageCompareStrict(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, commands := range map[string][]string{
		"empty": nil, "zero": {"write -z 0 64k"}, "data": {"write -P 0 64k 64k"}, "full": {"write -P 7 0 1M"}, "owned": {"write 0 64k", "write -z 0 64k"},
		"compressed": {"write -c -P 0 64k 64k"},
	} {
		qemuImg(t, "create", "-q", "-f", "qcow2", name+".qcow2", "1M")
		qemuIO(t, name+".qcow2", commands...)
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "longer.qcow2", "2M")
	qemuImg(t, "create", "-q", "-f", "raw", "empty.raw", "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "data.qcow2", "-F", "qcow2", "over.qcow2")
	images := []string{"empty.qcow2", "zero.qcow2", "data.qcow2", "owned.qcow2", "compressed.qcow2", "longer.qcow2", "empty.raw", "over.qcow2"}
	for _, a := range images {
		for _, b := range images {
			both(t, "compare", a, b)
			wantCode, want := qemuImg(t, "compare", "-s", a, b)
			code, got, _ := calf(t, "image", "compare", "-s", a, b)
			if strings.Contains(want, "block status") {
				// QEMU's offset is that of a range of which some part differs.
				want = strings.Replace(want, "Offset 0 ", "Offset 65536 ", 1)
				got = strings.Replace(got, "Offset 0 ", "Offset 65536 ", 1)
			}
			if code != wantCode || got != want {
				t.Errorf("%s and %s: code %d, %s; want %d, %s", a, b, code, got, wantCode, want)
			}
		}
	}
	// The same bytes of one file at different places are not the same.
	both(t, "compare", "-f", "raw", "-F", "qcow2", "longer.qcow2", "longer.qcow2")
	both(t, "compare", "-f", "raw", "-F", "qcow2", "full.qcow2", "full.qcow2")
	// The first part that differs, and not how long the parts are.
	qemuIO(t, "longer.qcow2", "write 1M 64k", "write 64k 64k", "write 128k 64k")
	qemuImg(t, "create", "-q", "-f", "qcow2", "other.qcow2", "2M")
	qemuIO(t, "other.qcow2", "write 64k 128k", "write 1M 64k")
	if out := mustCalf(t, "image", "compare", "-s", "longer.qcow2", "other.qcow2"); out != "Images are identical.\n" {
		t.Errorf("it prints %s", out)
	}
	qemuIO(t, "other.qcow2", "write -z 1536k 64k")
	if code, out, _ := calf(t, "image", "compare", "-s", "longer.qcow2", "other.qcow2"); code != 1 || out != "Strict mode: Offset 1572864 block status mismatch!\n" {
		t.Errorf("code %d, %s", code, out)
	}
}

// TestImageCompareErrors ends with qemu-img's codes where it cannot compare.
func TestImageCompareErrors(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "good.qcow2", "16M")
	qemuIO(t, "good.qcow2", "write -P 1 0 64k", "write -P 2 8M 64k", "write -c -P 3 9M 64k")
	b, err := os.ReadFile("good.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	const table = 0x40000 // the L2 table
	unmapped := append([]byte(nil), b...)
	unmapped[table+8*128+6] |= 0x02 // the entry of 8M points into a cluster
	unreadable := append([]byte(nil), b...)
	unreadable[table+8*144+6] ^= 0x40 // compressed data of 9M elsewhere
	for name, data := range map[string][]byte{"unmapped.qcow2": unmapped, "unreadable.qcow2": unreadable, "bad.qcow2": b[:10]} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "differs.qcow2", "16M")
	qemuIO(t, "differs.qcow2", "write -P 1 0 60k")
	for _, c := range []struct {
		code int
		args []string
	}{
		{0, []string{"good.qcow2", "good.qcow2"}},
		{2, []string{"good.qcow2", "none.qcow2"}},
		{2, []string{"none.qcow2", "good.qcow2"}},
		{2, []string{"good.qcow2", "bad.qcow2"}},
		{2, []string{"-f", "vdi", "good.qcow2", "good.qcow2"}},
		{2, []string{"-T", "some", "good.qcow2", "good.qcow2"}},
		{3, []string{"good.qcow2", "unmapped.qcow2"}},
		{3, []string{"unmapped.qcow2", "good.qcow2"}},
		{4, []string{"good.qcow2", "unreadable.qcow2"}},
		{4, []string{"unreadable.qcow2", "good.qcow2"}},
		{1, []string{"differs.qcow2", "unreadable.qcow2"}}, // before it comes there
		{1, []string{"differs.qcow2", "unmapped.qcow2"}},
	} {
		wantCode, want := qemuImg(t, append([]string{"compare"}, c.args...)...)
		code, out, messages := calf(t, append([]string{"image", "compare"}, c.args...)...)
		if code != wantCode || code != c.code || out != want || (messages == "") != (code == 0 || out != "") {
			t.Errorf("%q: code %d, %s%s; want %d, %s", c.args, code, out, messages, wantCode, want)
		}
	}
	// What was asked wrongly does not look like a difference, as it does with qemu-img.
	for _, args := range [][]string{{"good.qcow2"}, {"--such", "good.qcow2", "good.qcow2"}, {"-T", "", "good.qcow2", "good.qcow2"}} {
		if code, _, _ := calf(t, append([]string{"image", "compare"}, args...)...); code != 2 {
			t.Errorf("%q: code %d", args, code)
		}
	}
}

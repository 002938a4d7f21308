package main

import (
	"fmt"
	"strings"
	"testing"
)

// TestImageMeasure measures new images and copies with both programs, of random
// sizes, images and options.
func TestImageMeasure(t *testing.T) {
	r := newRandomImages(t)
	for range rounds(t, 6) {
		t.Chdir(t.TempDir())
		name, format := r.chain("source")
		sources := [][]string{{name}, {name, "-U"}, {"--size", fmt.Sprint(r.Int64N(1 << uint(r.IntN(44))))}}
		if format == "qcow2" && r.IntN(2) == 0 {
			qemuImg(t, "bitmap", "--add", name, "b")
			qemuImg(t, "bitmap", "--add", "--disable", "-g", "4k", name, "a longer name")
		}
		if code, _ := qemuImg(t, "snapshot", "-c", "last", name); code == 0 {
			sources = append(sources, []string{name, "-l", "last"}, []string{name, "-l", "snapshot.name=last"})
		}
		for _, source := range sources {
			if source[0] == name {
				source = append(source, "-f", format) // it is not guessed
			}
			for range 6 {
				to := []string{"-O", "qcow2", "-o", strings.Join(r.options("target", false), ",")}
				switch r.IntN(8) {
				case 0:
					to = []string{"-O", "raw"}
				case 1:
					to = nil
				case 2:
					to[3] += ",backing_file=base"
				}
				args := append(append([]string{"measure", "--output=" + r.one("json", "human")}, to...), source...)
				both(t, args...)
			}
		}
	}
}

// TestImageMeasureRefusals says what cannot be measured, as qemu-img refuses it.
func TestImageMeasureRefusals(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "raw", "a.raw", "1M")
	for _, args := range [][]string{
		{},
		{"--size", "1M", "a.raw"},
		{"--size", "1M", "-f", "raw"},
		{"--size", "1M", "-l", "s"},
		{"--size", "1P", "-O", "qcow2", "-o", "cluster_size=512"},
		{"--size", "1M", "-O", "qcow2", "-o", "cluster_size=4k,extended_l2=on"},
		{"--size", "1M", "-O", "vdi"},
		{"--size", "1M", "-o", "cluster_size=4k"},
		{"--size", "much"},
		{"-l", "s", "-f", "raw", "a.raw"},
		{"none"},
	} {
		wantCode, _ := qemuImg(t, append([]string{"measure"}, args...)...)
		code, out, messages := calf(t, append([]string{"image", "measure"}, args...)...)
		if code != wantCode || code != 1 || out != "" || messages == "" {
			t.Errorf("%q: code %d, want %d; %s%s", args, code, wantCode, out, messages)
		}
	}
}

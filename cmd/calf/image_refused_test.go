package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// unlisted are flags of qemu-img that its help does not show.
var unlisted = map[string]string{
	"check":    "--format=fmt --repair=all --force-share",
	"compare":  "--force-share",
	"convert":  "--force-share --skip-broken-bitmaps",
	"info":     "--format=fmt --force-share",
	"map":      "--format=fmt --force-share -s offset -l len",
	"measure":  "--force-share -U",
	"rebase":   "--force-share",
	"snapshot": "--force-share",
}

var (
	verbLine = regexp.MustCompile(`(?m)^  ([a-z]+) (.*)$`)
	flagWord = regexp.MustCompile(`(-[a-zA-Z]|--[a-z-]+)((?:=| \[?)[a-zA-Z_]+)?`)
)

// TestNoFlagOfQEMUIsMissing walks all flags of all verbs in qemu-img's help. Each
// verb that calf has too takes the flag, with a value or without as qemu-img's
// does, or refuses it by its name and says what to do instead.
func TestNoFlagOfQEMUIsMissing(t *testing.T) {
	_, help := qemuImg(t, "--help")
	syntax, _, _ := strings.Cut(help, "Command parameters:")
	image := newImage()
	seen := 0
	for _, line := range verbLine.FindAllStringSubmatch(syntax, -1) {
		name := line[1]
		verb, _, err := image.Find([]string{name})
		if err != nil || verb == image {
			continue
		}
		if otherVerbs[name] != "" {
			code, _, messages := calf(t, "image", name, "-o", "x", "y")
			if code != 1 || !strings.Contains(messages, otherVerbs[name]) {
				t.Errorf("%s: code %d, %s", name, code, messages)
			}
			continue
		}
		for _, f := range flagWord.FindAllStringSubmatch(line[2]+" "+unlisted[name]+" --trace=x --version -V", -1) {
			seen++
			word, takesValue := f[1], f[2] != ""
			flag := verb.Flags().Lookup(strings.TrimLeft(word, "-"))
			if len(word) == 2 {
				flag = verb.Flags().ShorthandLookup(word[1:])
			}
			if flag == nil {
				t.Errorf("%s %s is missing: make it work or put it into refusedFlags", name, word)
				continue
			}
			if (flag.NoOptDefVal == "") != takesValue {
				t.Errorf("%s %s: takes a value %t, that of qemu-img %t", name, word, !takesValue, takesValue)
			}
			r, refused := flag.Value.(refusedFlag)
			if !refused {
				continue
			}
			args := []string{"image", name, word}
			if takesValue {
				args = append(args, "x")
			}
			code, out, messages := calf(t, append(args, "a", "b")...)
			wantCode := 1
			if name == compareVerb {
				wantCode = 2 // for 1 is a difference
			}
			if want := "calf: --" + flag.Name + " is not supported: " + r.instead + "\n"; code != wantCode || out != "" || messages != want {
				t.Errorf("%q: code %d, %s%s, want %s", args, code, out, messages, want)
			}
		}
	}
	if seen < 40 {
		t.Errorf("the help of qemu-img has only %d flags", seen)
	}
}

// TestEmptyValues shows that a flag with an empty value, as where a variable of a script
// is not set, is not taken for one that is not given: both programs refuse it.
func TestEmptyValues(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
	qemuImg(t, "snapshot", "-c", "s", "a.qcow2")
	for _, args := range [][]string{
		{"check", "-r", "", "a.qcow2"},
		{"check", "-T", "", "a.qcow2"},
		{"convert", "-l", "", "-O", "raw", "a.qcow2", "b"},
		{"convert", "-O", "", "a.qcow2", "b"},
		{"create", "-f", "qcow2", "-b", "", "b", "1M"},
		{"create", "-f", "", "b", "1M"},
		{"map", "-l", "", "a.qcow2"},
		{"measure", "-l", "", "-O", "qcow2", "a.qcow2"},
		{"resize", "--preallocation=", "a.qcow2", "2M"},
		{"snapshot", "-d", "", "a.qcow2"},
	} {
		want, _ := qemuImg(t, args...)
		code, _, messages := calf(t, append([]string{"image"}, args...)...)
		if code != 1 || want != 1 || !strings.Contains(messages, " is empty") {
			t.Errorf("%q: code %d, that of qemu-img %d, %s", args, code, want, messages)
		}
		if _, err := os.Stat("b"); err == nil {
			t.Fatalf("%q makes a file", args)
		}
	}
}

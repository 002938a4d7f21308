package main

import (
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
			if want := "calf: --" + flag.Name + " is not supported: " + r.instead + "\n"; code != 1 || out != "" || messages != want {
				t.Errorf("%q: code %d, %s%s, want %s", args, code, out, messages, want)
			}
		}
	}
	if seen < 40 {
		t.Errorf("the help of qemu-img has only %d flags", seen)
	}
}

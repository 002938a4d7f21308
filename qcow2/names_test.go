package qcow2

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
)

// TestHostileName gives images backing files whose names do harm on a terminal or
// in a shell, and looks for them in the messages.
func TestHostileName(t *testing.T) {
	dir := t.TempDir()
	format := appendExtension(nil, extBackingFormat, []byte("raw"))
	unnamed := appendExtension(nil, 0x11111111, []byte("raw"))
	for name, word := range map[string]string{
		"base.raw":                 "base.raw",
		"my base.raw":              "'my base.raw'",
		"x; rm -rf ~ #":            "'x; rm -rf ~ #'",
		"it's $(id)":               `'it'\''s $(id)'`,
		"-help":                    "FILE",
		"a\x1b[2Jb":                "FILE",
		"a\nb: all is well":        "FILE",
		"a\u202eb":                 "FILE",
		"a\x9b2Jb":                 "FILE",
		"/somewhere/else\n/x\x1b[": "FILE",
	} {
		path := dir + "/overlay.qcow2"
		_ = os.Remove(path)
		if err := Create(path, CreateOptions{Size: 4096, BackingFile: name, BackingFormat: "raw"}); err != nil {
			t.Fatal(err)
		}
		check := func(err error) string {
			t.Helper()
			if err == nil {
				t.Fatalf("name %q: opened", name)
			}
			if s := err.Error(); strings.ContainsAny(s, "\n\x1b\u202e") || strings.Contains(s, "\x9b") {
				t.Errorf("name %q: the message has it raw: %q", name, s)
			}
			return err.Error()
		}
		_, err := Open(path, Options{})
		check(err)
		_, err = Open(path, Options{NoBacking: true})
		if s := check(err); !strings.Contains(s, "calf image convert -f qcow2 -O qcow2 "+path+" NEW") {
			t.Errorf("name %q: no mend in %s", name, s)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, bytes.Replace(b, format, unnamed, 1))
		_, err = Open(path, Options{})
		if s := check(err); !strings.Contains(s, "-b "+word+" "+path) {
			t.Errorf("name %q: want the word %s in %s", name, word, s)
		}
		var e *Error
		if !errors.As(err, &e) || e.Path != path {
			t.Errorf("name %q: the error has not the path itself", name)
		}
	}
}

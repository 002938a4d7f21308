package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/launch"
)

// A result goes where a link leads and leaves the link; an older one is gone
// as soon as the run begins.
func TestResultThroughLink(t *testing.T) {
	dir := t.TempDir()
	real, link := filepath.Join(dir, "real.json"), filepath.Join(dir, "link.json")
	if err := os.WriteFile(real, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	f, err := openResult(link)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(real); !os.IsNotExist(err) {
		t.Errorf("the older result is still there: %v", err)
	}
	if err := f.write(func(w io.Writer) error { return printJSON(w, launch.Result{Outcome: "poweroff"}) }); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(link); err != nil || target != real {
		t.Errorf("the link leads to %q, %v; want %q", target, err, real)
	}
	if b, err := os.ReadFile(real); err != nil || !strings.Contains(string(b), "poweroff") {
		t.Errorf("the result is %q, %v", b, err)
	}
}

// A device is written, not replaced, also where it is reached through a link.
func TestResultOnDevice(t *testing.T) {
	for _, path := range []string{os.DevNull, "/dev/stdout"} {
		before, err := os.Lstat(path)
		if err != nil {
			t.Skip(err)
		}
		f, err := openResult(path)
		if err != nil {
			t.Fatal(err)
		}
		if path == os.DevNull {
			if err := f.write(func(w io.Writer) error { return printJSON(w, launch.Result{}) }); err != nil {
				t.Error(err)
			}
		}
		after, err := os.Lstat(path)
		if err != nil || after.Mode() != before.Mode() || !f.place {
			t.Errorf("%s was %v and is %v, %v", path, before.Mode(), after.Mode(), err)
		}
	}
}

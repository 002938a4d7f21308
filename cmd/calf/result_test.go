package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// A result that cannot be written is an error, and leaves what was there otherwise.
func TestResultNoRoom(t *testing.T) {
	dir := t.TempDir()
	cause := errors.New("no room")
	f, err := openResult(filepath.Join(dir, "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	err = f.write(func(w io.Writer) error {
		_, err := io.WriteString(w, "half of it")
		return errors.Join(err, cause)
	})
	if !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%v are left, %v", entries, err)
	}
	if _, err := openResult(filepath.Join(dir, "none", "result.json")); err == nil || !strings.Contains(err.Error(), "no file can be made in "+filepath.Join(dir, "none")) {
		t.Errorf("got %v", err)
	}
	full, err := openResult("/dev/full")
	if err != nil {
		t.Skip(err)
	}
	if err := full.write(func(w io.Writer) error { _, err := io.WriteString(w, "x"); return err }); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

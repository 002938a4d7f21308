package qcow2

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestLock opens one image twice, in every combination of reader and writer.
func TestLock(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	for _, c := range []struct {
		name          string
		first, second bool // for reading only
		ok            bool
	}{
		{"two writers", false, false, false},
		{"a reader beside a writer", false, true, false},
		{"a writer beside a reader", true, false, false},
		{"two readers", true, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := open(t, path, Options{ReadOnly: c.first})
			second, err := Open(path, Options{ReadOnly: c.second})
			if err == nil {
				closeImage(t, second)
			}
			if (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
			if err != nil && (!errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path+": the image is in use by another process")) {
				t.Errorf("got %v", err)
			}
			closeImage(t, m)
			closeImage(t, open(t, path, Options{}))
		})
	}
}

// TestLockBacking shows that a backing file is shared by overlays and by readers
// and closed to writers.
func TestLockBacking(t *testing.T) {
	dir := t.TempDir()
	for name, opts := range map[string]CreateOptions{
		"base.qcow2": {Size: 1 << 20},
		"a.qcow2":    {Size: 1 << 20, BackingFile: "base.qcow2", BackingFormat: "qcow2"},
		"b.qcow2":    {Size: 1 << 20, BackingFile: "base.qcow2", BackingFormat: "qcow2"},
	} {
		if err := Create(dir+"/"+name, opts); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir+"/a.qcow2", Options{})
	open(t, dir+"/b.qcow2", Options{})
	if _, err := Open(dir+"/base.qcow2", Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("a writer of the backing file: %v", err)
	}
	out, err := exec.Command("qemu-io", "-c", "write 0 512", dir+"/base.qcow2").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("qemu-io as a writer of the backing file: %v\n%s", err, out)
	}
}

// TestLockQEMU shows that QEMU and we refuse each other's images, and what is
// refused is not changed.
func TestLockQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("qemu-io, the witness of this test, is not installed")
	}
	path := create(t, CreateOptions{Size: 1 << 20})

	m := open(t, path, Options{})
	for _, args := range [][]string{
		{"qemu-io", "-c", "write 0 512", path},
		{"qemu-io", "-r", "-c", "read 0 512", path},
		{"qemu-img", "info", path},
		{"qemu-img", "check", path},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err == nil || !strings.Contains(string(out), "lock") {
			t.Errorf("%q while we write: %v\n%s", args, err, out)
		}
	}
	closeImage(t, m)

	m = open(t, path, Options{ReadOnly: true})
	qemu(t, "qemu-img", "info", path)
	if out, err := exec.Command("qemu-io", "-c", "write 0 512", path).CombinedOutput(); err == nil {
		t.Errorf("qemu-io writes while we read\n%s", out)
	}
	closeImage(t, m)

	for _, readOnly := range []bool{false, true} {
		stop := startQEMU(t, path, readOnly)
		if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
			t.Errorf("a writer beside qemu-io, which reads only: %v: got %v", readOnly, err)
		}
		m, err := Open(path, Options{ReadOnly: true})
		if readOnly != (err == nil) || err != nil && !errors.Is(err, ErrLocked) {
			t.Errorf("a reader beside qemu-io, which reads only: %v: got %v", readOnly, err)
		}
		if err == nil {
			closeImage(t, m)
		}
		stop()
	}
	closeImage(t, open(t, path, Options{}))
}

// startQEMU starts a qemu-io that has path open, and returns what ends it.
func startQEMU(t *testing.T, path string, readOnly bool) (stop func()) {
	t.Helper()
	args := []string{"-f", "qcow2", path}
	if readOnly {
		args = append([]string{"-r"}, args...)
	}
	cmd := exec.Command("qemu-io", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "read 0 512\n"); err != nil {
		t.Fatal(err)
	}
	// Its answer shows that the image is open.
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "512/512") {
			break
		}
	}
	return func() {
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

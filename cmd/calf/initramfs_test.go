package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/guest/agent/pid1"
)

// TestInitramfs builds calf and looks at what guests get of it: a program that runs, in
// an archive that the cpio library understands, of a bounded size.
func TestInitramfs(t *testing.T) {
	if testing.Short() {
		t.Skip("builds calf")
	}
	const maxSize = 20 << 20
	dir := t.TempDir()
	calf := filepath.Join(dir, "calf")
	build := exec.Command("go", "build", "-o", calf, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	initramfs, err := agent.Initramfs(calf)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.Stat(calf)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.1f MiB, of a program of %.1f MiB", float64(initramfs.Size)/(1<<20), float64(whole.Size())/(1<<20))
	if initramfs.Size > maxSize {
		t.Errorf("the initramfs has %d bytes, more than %d", initramfs.Size, maxSize)
	}
	// With what only debuggers read, it would be half as large again.
	if initramfs.Size > whole.Size()*4/5 {
		t.Errorf("the initramfs has %d bytes of a program of %d", initramfs.Size, whole.Size())
	}

	archive := make([]byte, initramfs.Size)
	if _, err := initramfs.ReadAt(archive, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(archive)))
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != 2 || records[0].Name != pid1.Dir || records[0].Mode != cpio.S_IFDIR|0o700 ||
		records[1].Name != pid1.Program || records[1].Mode != cpio.S_IFREG|0o700 {
		t.Fatalf("the archive has %v", records)
	}
	program, err := io.ReadAll(io.NewSectionReader(records[1], 0, int64(records[1].FileSize)))
	if err != nil {
		t.Fatal(err)
	}
	init := filepath.Join(dir, "init")
	if err := os.WriteFile(init, program, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(init, "version").CombinedOutput(); err != nil || !bytes.HasPrefix(out, []byte("calf")) {
		t.Errorf("the program says %q, %v", out, err)
	}
}

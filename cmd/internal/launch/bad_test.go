package launch

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/cmd/internal/console"
	"github.com/calfvm/calf/config"
)

// TestNothingToBoot names what is on a disk from which nothing can be booted, and what
// to pass instead.
func TestNothingToBoot(t *testing.T) {
	for _, tt := range []struct {
		name  string
		at    int64
		magic string
		want  string
	}{
		{"nothing", 0, "", "the disk is empty"},
		{"garbage", 0, strings.Repeat("garbage", 1000), "the disk holds nothing that calf knows"},
		{"garbage with the end of a partition table", 510, "\x55\xaa", "the disk holds nothing that calf knows"},
		{"xfs", 0, "XFSB", "the disk holds xfs,"},
		{"btrfs", 0x10040, "_BHRfS_M", "the disk holds btrfs,"},
		{"fat", 0x52, "FAT32   ", "the disk holds fat,"},
		{"LVM", 512, "LABELONE", "LVM"},
		{"LUKS", 0, "LUKS\xBA\xBE", "LUKS"},
		{"a table with garbage", 512, "EFI PART\xff\xff\xff\xff" + strings.Repeat("\xff", 84), "its partition table is damaged"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt([]byte(tt.magic), tt.at)
			if err = errors.Join(err, f.Truncate(1<<20), f.Close()); err != nil {
				t.Fatal(err)
			}
			cfg := &config.Config{Disks: []config.Disk{{Path: path, Format: config.FormatRaw, Snapshot: true}}}
			r := Run(cfg, Options{Logger: slog.New(slog.DiscardHandler), AllowEmulation: true})
			if r.ExitCode != ExitError || r.Outcome != outcomeError || strings.Contains(r.Message, "\n") {
				t.Errorf("%+v", r)
			}
			for _, want := range []string{path, tt.want, "--kernel"} {
				if !strings.Contains(r.Message, want) {
					t.Errorf("%q does not say %q", r.Message, want)
				}
			}
		})
	}
}

// TestKeepNotRun: a guest that does not run leaves no file to keep, and changes none
// that is there.
func TestKeepNotRun(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	dir := t.TempDir()
	root, other, kernel := filepath.Join(dir, "root.qcow2"), filepath.Join(dir, "other.raw"), filepath.Join(dir, "kernel")
	newImage(t, root, config.FormatQCOW2, make([]byte, 512))
	newImage(t, other, config.FormatRaw, make([]byte, 512))
	if err := os.WriteFile(kernel, []byte(kernelThat("")), 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := blk.OpenRaw(other, blk.RawOptions{ReadOnly: true}) // so that nobody can write it
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	run := func(keep string) Result {
		return Run(&config.Config{
			VM: config.VM{Memory: 64 << 20, Timeout: 20 * time.Second}, Boot: config.Boot{Kernel: kernel},
			Disks: []config.Disk{{Path: root, Format: config.FormatQCOW2, Snapshot: true}, {Path: other, Format: config.FormatRaw}},
		}, Options{
			Keep: keep, Console: console.Spec{Kind: console.None}, Streams: console.Streams{Messages: console.NewMessages(os.Stderr)},
			Logger: slog.New(slog.DiscardHandler), AllowEmulation: true,
		})
	}
	kept := filepath.Join(dir, "kept.qcow2")
	if r := run(kept); r.ExitCode != ExitError || !strings.Contains(r.Message, other) {
		t.Errorf("%+v", r)
	}
	if _, err := os.Lstat(kept); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the overlay is left: %v", err)
	}
	if err := os.WriteFile(kept, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := run(kept); r.ExitCode != ExitError || !strings.Contains(r.Message, kept+" is there already") {
		t.Errorf("%+v", r)
	}
	if got := read(t, kept); string(got) != "precious" {
		t.Errorf("the file has become %q", got)
	}
}

// TestNoOverlayDir: it is said before a guest runs.
func TestNoOverlayDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	t.Setenv("TMPDIR", dir)
	path := filepath.Join(t.TempDir(), "disk.raw")
	newImage(t, path, config.FormatRaw, make([]byte, 512))
	for _, snapshot := range []bool{true, false} {
		err := Check(&config.Config{Disks: []config.Disk{{Path: path, Format: config.FormatRaw, Snapshot: snapshot}}})
		if says := err != nil && strings.Contains(err.Error(), "overlay can be made in "+dir) && strings.Contains(err.Error(), "TMPDIR"); says != snapshot {
			t.Errorf("with a throw-away overlay: %v: %v", snapshot, err)
		}
	}
}

// TestExplain says where there is no room, and what mends it.
func TestExplain(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	full, other := &os.PathError{Op: "pwritev", Path: "x", Err: unix.ENOSPC}, errors.New("the cable is out")
	for _, tt := range []struct {
		disk config.Disk
		err  error
		want []string
	}{
		{config.Disk{Path: "root.qcow2", Snapshot: true}, full, []string{dir, "root.qcow2", "TMPDIR", "no space left"}},
		{config.Disk{Path: "root.qcow2"}, full, []string{"root.qcow2", "make some", "no space left"}},
		{config.Disk{Path: "root.qcow2", Snapshot: true}, other, []string{other.Error()}},
	} {
		err := explain(tt.disk, tt.err)
		if !errors.Is(err, tt.err) {
			t.Errorf("%v is no longer %v", err, tt.err)
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
	}
}

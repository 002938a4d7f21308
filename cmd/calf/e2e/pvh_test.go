package e2e

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
	"github.com/klauspost/compress/zstd"
)

// vmlinux unpacks the ELF kernel inside a bzImage to a file (boot.rst:
// payload_offset, payload_length).
func vmlinux(t *testing.T, bzImage string) string {
	t.Helper()
	const (
		setupSects    = 0x1F1
		payloadOffset = 0x248
		payloadLength = 0x24C
		sector        = 512
		sizeTrailer   = 4 // the unpacked size, after the payload
	)
	b, err := os.ReadFile(bzImage)
	if err != nil {
		t.Fatal(err)
	}
	begin := (int(b[setupSects])+1)*sector + int(binary.LittleEndian.Uint32(b[payloadOffset:]))
	payload := b[begin : begin+int(binary.LittleEndian.Uint32(b[payloadLength:]))-sizeTrailer]
	if !bytes.HasPrefix(payload, []byte{0x28, 0xB5, 0x2F, 0xFD}) {
		t.Skipf("%s is not packed with zstd, which this test can unpack", bzImage)
	}
	r, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(1<<30))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	elf, err := r.DecodeAll(payload, nil)
	if err != nil {
		t.Fatalf("unpack %s: %v", bzImage, err)
	}
	file := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(file, elf, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// An unpacked ELF kernel boots by its PVH entry.
func TestPVH(t *testing.T) {
	lab.Need(t)
	k := newestKernel(t)
	k.Image = vmlinux(t, k.Image)
	im := newImages(t)
	vm := guest{kernel: k, cpus: 2, disks: []string{im.overlay(im.baseQCOW2())}, script: `
		echo release=$(uname -r)
		echo cpus=$(nproc)
		poweroff -f`}.start(t)
	vm.exits(0)
	if got := vm.value("release"); got != k.Release {
		t.Errorf("the guest runs %s, want %s", got, k.Release)
	}
	if got := vm.value("cpus"); got != "2" {
		t.Errorf("the guest has %s CPUs, want 2", got)
	}
}

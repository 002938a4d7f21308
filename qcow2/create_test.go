package qcow2

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// imageInfo is what qemu-img tells of the format of an image.
type imageInfo struct {
	VirtualSize   int64  `json:"virtual-size"`
	ClusterSize   int64  `json:"cluster-size"`
	Format        string `json:"format"`
	Backing       string `json:"backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Dirty         bool   `json:"dirty-flag"`
	Specific      struct {
		Data map[string]any `json:"data"`
	} `json:"format-specific"`
}

func qemuInfo(t testing.TB, path string) (info imageInfo) {
	t.Helper()
	if err := json.Unmarshal([]byte(qemu(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info
}

// TestCreateLikeQEMU makes the same images with Create and with qemu-img, which
// then sees no difference between them.
func TestCreateLikeQEMU(t *testing.T) {
	for _, c := range []struct {
		qemu string
		size int64
		opts CreateOptions
	}{
		{"extended_l2=on", 3 << 30, CreateOptions{ExtendedL2: true}},
		{"extended_l2=on,cluster_size=16k", 1 << 34, CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}},
		{"extended_l2=on,cluster_size=2M", 1 << 40, CreateOptions{ExtendedL2: true, ClusterSize: 2 << 20}},
	} {
		t.Run(c.qemu, func(t *testing.T) {
			dir := t.TempDir()
			ours, theirs := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
			c.opts.Size = c.size
			if err := Create(ours, c.opts); err != nil {
				t.Fatal(err)
			}
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.qemu, theirs, fmt.Sprint(c.size))
			if d := cmp.Diff(qemuInfo(t, theirs), qemuInfo(t, ours)); d != "" {
				t.Error(d)
			}
			qemu(t, "qemu-img", "check", "-q", ours)
			qemu(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write %d 4k", c.size-4096), ours)
			qemu(t, "qemu-img", "check", "-q", ours)
		})
	}
}

package qcow2

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestInspectLikeQEMU lets QEMU make images and compares what both say of them.
// The files that they name do not exist when they are inspected.
func TestInspectLikeQEMU(t *testing.T) {
	for _, options := range []string{
		"compat=0.10",
		"compat=1.1,cluster_size=512,refcount_bits=1",
		"compression_type=zstd,lazy_refcounts=on,extended_l2=on",
		"data_file=data.raw,data_file_raw=on",
		"data_file=data.raw",
		"backing_file=base.img,backing_fmt=raw",
	} {
		t.Run(strings.ReplaceAll(options, ",", " "), func(t *testing.T) {
			dir := t.TempDir()
			t.Chdir(dir)
			path := filepath.Join(dir, "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "raw", "base.img", "3M")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "3M")
			if !strings.Contains(options, "data_file") {
				qemu(t, "qemu-img", "snapshot", "-c", "one", path)
			}
			var said struct {
				Size          int64  `json:"virtual-size"`
				ClusterSize   int64  `json:"cluster-size"`
				BackingFile   string `json:"backing-filename"`
				BackingFormat string `json:"backing-filename-format"`
				Dirty         bool   `json:"dirty-flag"`
				Specific      struct {
					Data struct {
						Compat          string `json:"compat"`
						CompressionType string `json:"compression-type"`
						LazyRefcounts   bool   `json:"lazy-refcounts"`
						RefcountBits    int    `json:"refcount-bits"`
						Corrupt         bool   `json:"corrupt"`
						ExtendedL2      bool   `json:"extended-l2"`
						DataFile        string `json:"data-file"`
						DataFileRaw     bool   `json:"data-file-raw"`
					} `json:"data"`
				} `json:"format-specific"`
			}
			must(t, json.Unmarshal([]byte(qemu(t, "qemu-img", "info", "--output=json", path)), &said))
			d := said.Specific.Data
			want := &Info{
				Version: map[string]int{"0.10": 2, "1.1": 3}[d.Compat], Size: said.Size, ClusterSize: said.ClusterSize,
				RefcountBits: d.RefcountBits, CompressionType: d.CompressionType, LazyRefcounts: d.LazyRefcounts,
				ExtendedL2: d.ExtendedL2, Dirty: said.Dirty, Corrupt: d.Corrupt,
				BackingFile: said.BackingFile, BackingFormat: said.BackingFormat,
				ExternalData: d.DataFile != "", DataFile: d.DataFile, DataFileRaw: d.DataFileRaw,
				Snapshots: qemuSnapshots(t, path),
			}
			for i := range want.Snapshots {
				want.Snapshots[i].DiskSize = said.Size // which QEMU does not tell
			}
			for _, name := range []string{"base.img", "data.raw"} {
				qemu(t, "rm", "-f", name)
			}
			got, err := Inspect(path)
			must(t, err)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-qemu-img info +Inspect)\n%s", diff)
			}
		})
	}
}

// TestInspectRefused shows what Open refuses, and names it.
func TestInspectRefused(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	b := readFile(t, path)
	put(b, 32, 4, 2)
	put(b, offIncompatible, 8, 1<<incompatCorrupt|1<<40)
	writeFile(t, path, b)
	got, err := Inspect(path)
	must(t, err)
	if got.Encryption != "luks" || !got.Corrupt || len(got.UnknownFeatures) != 1 {
		t.Errorf("%+v", got)
	}
	put(b, 4, 4, 7)
	writeFile(t, path, b)
	if info, err := Inspect(path); err == nil || info != nil {
		t.Errorf("version 7: %+v, %v", info, err)
	}
}

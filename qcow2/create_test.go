package qcow2

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
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

// mapped is what qemu-img tells of a range of a disk, but for where it is.
type mapped struct {
	Start   int64 `json:"start"`
	Length  int64 `json:"length"`
	Depth   int   `json:"depth"`
	Present bool  `json:"present"`
	Zero    bool  `json:"zero"`
	Data    bool  `json:"data"`
}

// qemuMap joins what only differs in where it is, and in whether the host stores
// zeros.
func qemuMap(t testing.TB, path string) (joined []mapped) {
	t.Helper()
	var all []mapped
	if err := json.Unmarshal([]byte(qemu(t, "qemu-img", "map", "-f", "qcow2", "--output=json", path)), &all); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		m.Zero = m.Zero && !m.Data
		if k := len(joined) - 1; k >= 0 {
			next := joined[k]
			next.Start, next.Length = m.Start, m.Length
			if next == m {
				joined[k].Length += m.Length
				continue
			}
		}
		joined = append(joined, m)
	}
	return joined
}

// TestCreateLikeQEMU makes the same images with Create and with qemu-img. QEMU
// sees no difference between them, reads zeros, and can write both.
func TestCreateLikeQEMU(t *testing.T) {
	for _, c := range []struct {
		qemu string
		size int64
		opts CreateOptions
	}{
		{"compat=1.1", 1000001, CreateOptions{}},
		{"compat=0.10,cluster_size=4k", 1 << 40, CreateOptions{Version: 2, ClusterSize: 4096}},
		{"compat=0.10,preallocation=metadata", 5 << 20, CreateOptions{Version: 2, Preallocation: PreallocateMetadata}},
		{"extended_l2=on", 3 << 30, CreateOptions{ExtendedL2: true}},
		{"extended_l2=on,cluster_size=16k", 1 << 34, CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}},
		{"extended_l2=on,cluster_size=2M", 1 << 40, CreateOptions{ExtendedL2: true, ClusterSize: 2 << 20}},
		{"lazy_refcounts=on,refcount_bits=1", 1 << 30, CreateOptions{LazyRefcounts: true, RefcountBits: 1}},
		{"compression_type=zstd,cluster_size=2M", 1 << 30, CreateOptions{CompressionType: "zstd", ClusterSize: 2 << 20}},
		{"preallocation=metadata", 3<<20 + 512, CreateOptions{Preallocation: PreallocateMetadata}},
		{"preallocation=metadata,cluster_size=512,refcount_bits=64", 9<<20 + 100, CreateOptions{Preallocation: PreallocateMetadata, ClusterSize: 512, RefcountBits: 64}},
		{"preallocation=metadata,cluster_size=2M,refcount_bits=1", 1 << 34, CreateOptions{Preallocation: PreallocateMetadata, ClusterSize: 2 << 20, RefcountBits: 1}},
		{"preallocation=metadata,extended_l2=on", 1<<30 + 512, CreateOptions{Preallocation: PreallocateMetadata, ExtendedL2: true}},
		{"preallocation=falloc,lazy_refcounts=on", 5 << 20, CreateOptions{Preallocation: PreallocateFalloc, LazyRefcounts: true}},
		{"preallocation=falloc,extended_l2=on", 5 << 20, CreateOptions{Preallocation: PreallocateFalloc, ExtendedL2: true}},
		{"preallocation=full,cluster_size=4k", 5<<20 + 512, CreateOptions{Preallocation: PreallocateFull, ClusterSize: 4096}},
		{"preallocation=full", 0, CreateOptions{Preallocation: PreallocateFull}},
		{"data_file=DATA", 10 << 20, CreateOptions{DataFile: "DATA"}},
		{"data_file=DATA,preallocation=falloc", 10<<20 + 512, CreateOptions{DataFile: "DATA", Preallocation: PreallocateFalloc}},
		{"data_file=DATA,preallocation=full,extended_l2=on", 10 << 20, CreateOptions{DataFile: "DATA", Preallocation: PreallocateFull, ExtendedL2: true}},
		{"data_file=DATA,data_file_raw=on", 10<<20 + 512, CreateOptions{DataFile: "DATA", DataFileRaw: true}},
		{"data_file=DATA,data_file_raw=on,preallocation=full,cluster_size=512", 3 << 20, CreateOptions{DataFile: "DATA", DataFileRaw: true, Preallocation: PreallocateFull, ClusterSize: 512}},
		{"backing_file=BASE,backing_fmt=raw,extended_l2=on,preallocation=metadata", 3 << 20, CreateOptions{BackingFile: "BASE", BackingFormat: "raw", ExtendedL2: true, Preallocation: PreallocateMetadata}},
		{"backing_file=BASE,backing_fmt=raw,data_file=DATA,cluster_size=4k", 3 << 20, CreateOptions{BackingFile: "BASE", BackingFormat: "raw", DataFile: "DATA", ClusterSize: 4096}},
	} {
		t.Run(strings.ReplaceAll(c.qemu, ",", " "), func(t *testing.T) {
			dir := t.TempDir()
			base := make([]byte, 2<<20)
			fillRandom(newSeed(t), base)
			writeFile(t, filepath.Join(dir, "BASE"), base)
			path := filepath.Join(dir, "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", strings.NewReplacer("DATA", dir+"/DATA", "BASE", dir+"/BASE").Replace(c.qemu), path, fmt.Sprint(c.size))
			c.opts.Size = c.size
			for _, name := range []*string{&c.opts.DataFile, &c.opts.BackingFile} {
				if *name != "" {
					*name = filepath.Join(dir, *name)
				}
			}
			info, ranges, room := qemuInfo(t, path), qemuMap(t, path), blocksOf(t, dir)
			if c.opts.DataFile != "" {
				must(t, os.Remove(c.opts.DataFile))
			}
			must(t, os.Remove(path))
			must(t, Create(path, c.opts))
			if d := cmp.Diff(info, qemuInfo(t, path)); d != "" {
				t.Error(d)
			}
			if d := cmp.Diff(ranges, qemuMap(t, path)); d != "" {
				t.Error(d)
			}
			got, least := blocksOf(t, dir), int64(0)
			if c.opts.Preallocation >= PreallocateFalloc {
				least = c.size // qemu-img forgets a data file at times
			}
			if got > 2*max(room, least) || got < least {
				t.Errorf("the files take %d bytes of the host for a disk of %d bytes, those of qemu-img %d", got, c.size, room)
			}
			qemuRoundTrip(t, path, dir, info.VirtualSize, c.opts.BackingFile != "")
		})
	}
}

// blocksOf is the room on the host that the files in dir take, in bytes.
func blocksOf(t testing.TB, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(dir, e.Name()), &st))
		n += st.Blocks * 512
	}
	return n
}

// qemuRoundTrip checks a new image with both checkers, reads it, writes all over
// it with QEMU, and checks it again.
func qemuRoundTrip(t testing.TB, path, dir string, size int64, overlay bool) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-q", path)
	if size == 0 || size > 100<<20 {
		return
	}
	model := make([]byte, size)
	if overlay {
		base, err := os.ReadFile(filepath.Join(dir, "BASE"))
		must(t, err)
		copy(model, base)
	}
	compare(t, dir, path, model)
	qemuWrite(t, newSeed(t), path, model, 20)
	qemu(t, "qemu-img", "check", "-q", path)
	compare(t, dir, path, model)
}

// TestCreateKeepsFiles shows that Create changes no file that exists, whichever
// of its two it is, and then makes none.
func TestCreateKeepsFiles(t *testing.T) {
	for _, name := range []string{"disk.qcow2", "data"} {
		dir := t.TempDir()
		writeFile(t, filepath.Join(dir, name), []byte("precious"))
		err := Create(filepath.Join(dir, "disk.qcow2"), CreateOptions{Size: 1 << 20, DataFile: "data"})
		if !errors.Is(err, os.ErrExist) || !strings.HasPrefix(err.Error(), filepath.Join(dir, name)+": ") {
			t.Errorf("%s exists: %v", name, err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != "precious" {
			t.Errorf("%s was changed (%v)", name, err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
			t.Errorf("%s exists: left %v (%v)", name, left, err)
		}
	}
}

// TestCreateFaults fails every operation on the file of a new image: the error
// comes back, and what is in the file is a whole image or none.
func TestCreateFaults(t *testing.T) {
	for _, mode := range []Preallocation{PreallocateOff, PreallocateMetadata, PreallocateFalloc, PreallocateFull} {
		p, err := CreateOptions{Size: 100 << 10, ClusterSize: 512, Preallocation: mode}.plan()
		must(t, err)
		total := 1
		for at := 0; at <= total; at++ {
			f, n := &memFile{}, 0
			f.setFail(func(string) error {
				if n++; n == at {
					return syscall.EIO
				}
				return nil
			})
			if err := p.write(f); errors.Is(err, syscall.EIO) != (at > 0) {
				t.Fatalf("%v, operation %d fails: %v", mode, at, err)
			}
			total = max(total, n)
			f.setFail(nil)
			if len(f.data) < 4 || string(f.data[:4]) == "\x00\x00\x00\x00" {
				continue
			}
			if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > 0 {
				t.Errorf("%v, operation %d fails: %+v", mode, at, v)
			}
		}
		if total < 6 {
			t.Errorf("%v: only %d operations", mode, total)
		}
	}
}

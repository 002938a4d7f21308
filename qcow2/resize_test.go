package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestResizeLikeQEMU resizes images that QEMU made and wrote to, up and down, by
// turns with us and with QEMU, and lets QEMU compare every step with a model.
func TestResizeLikeQEMU(t *testing.T) {
	for _, c := range []struct {
		options string
		base    int64 // length of the backing file; 0: none
		sizes   []int64
	}{
		{"compat=1.1", 0, []int64{1 << 20, 3<<20 + 512, 70 << 20, 2<<20 + 512, 0, 5 << 20}},
		{"compat=0.10,cluster_size=4k", 0, []int64{1<<20 + 512, 9 << 20, 1 << 20}},
		{"compat=1.1,cluster_size=512", 0, []int64{1<<20 + 512, 20 << 20, 512, 12 << 20, 1 << 20}},
		{"compat=1.1,cluster_size=512,refcount_bits=64", 0, []int64{300 << 10, 8 << 20, 100 << 10, 30 << 20, 0}},
		{"compat=1.1,cluster_size=1k,refcount_bits=1,lazy_refcounts=on", 0, []int64{1 << 20, 40 << 20, 200 << 10}},
		{"compat=1.1,cluster_size=2M", 0, []int64{5<<20 + 512, 30 << 20, 3 << 20}},
		{"compat=1.1,cluster_size=4k", 512 << 10, []int64{1 << 20, 4 << 20, 300 << 10, 2 << 20}},
		{"compat=1.1,cluster_size=4k", 3<<20 + 512, []int64{1<<20 + 512, 2 << 20, 8 << 20, 1 << 20, 6 << 20}},
		{"compat=1.1,cluster_size=512", 3 << 20, []int64{1<<20 + 512, 8 << 20, 100 << 10, 2 << 20}},
		{"compat=0.10", 3 << 20, []int64{1<<20 + 512, 4 << 20, 512 << 10, 2 << 20}},
	} {
		t.Run(strings.ReplaceAll(c.options, ",", " ")+fmt.Sprint(c.base), func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			args := []string{"create", "-q", "-f", "qcow2", "-o", c.options}
			model := make([]byte, c.sizes[0])
			if c.base > 0 {
				copy(model, makeBase(t, r, dir, "raw", c.base))
				args = append(args, "-F", "raw", "-b", "base.raw")
			}
			qemu(t, "qemu-img", append(args, path, fmt.Sprint(c.sizes[0]))...)
			for i, size := range c.sizes[1:] {
				if len(model) > 10<<9 {
					qemuWrite(t, r, path, model, 10)
				}
				if i%3 == 1 {
					qemuResize(t, path, size, size < int64(len(model)))
				} else {
					m := open(t, path, Options{})
					must(t, m.Resize(t.Context(), size, ResizeOptions{Shrink: size < int64(len(model))}))
					if m.Size() != size {
						t.Errorf("size %d, want %d", m.Size(), size)
					}
					closeImage(t, m)
				}
				model = resized(model, size)
				checkClean(t, path)
				compare(t, dir, path, model)
				if size > 10<<9 {
					ourWrite(t, r, path, model, 30)
				}
			}
			checkClean(t, path)
			compare(t, dir, path, model)
		})
	}
}

func qemuResize(t testing.TB, path string, size int64, shrink bool) {
	t.Helper()
	args := []string{"resize", "-q", "-f", "qcow2"}
	if shrink {
		args = append(args, "--shrink")
	}
	qemu(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
}

// resized is model with its length changed, and zeros where it is longer.
func resized(model []byte, size int64) []byte {
	model = append([]byte(nil), model[:min(size, int64(len(model)))]...)
	return append(model, make([]byte, size-int64(len(model)))...)
}

// checkClean finds neither corruptions nor leaks, by QEMU and by us.
func checkClean(t testing.TB, path string) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-q", path)
	if r := check(t, path); !r.Clean() {
		t.Errorf("check: %+v", r)
	}
}

// TestResizePreallocated grows a disk by each preallocation and shrinks it again.
// QEMU sees the same as after its own resize, and no more allocation is needed to
// write to what was gained.
func TestResizePreallocated(t *testing.T) {
	for _, mode := range []Preallocation{PreallocateMetadata, PreallocateFalloc, PreallocateFull} {
		for _, options := range []string{"cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10"} {
			t.Run(mode.String()+" "+strings.ReplaceAll(options, ",", " "), func(t *testing.T) {
				r := newSeed(t)
				dir := t.TempDir()
				const old, size = 1<<20 + 512, 5<<20 + 1024
				ours, theirs := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
				model := make([]byte, old)
				qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, ours, fmt.Sprint(old))
				qemuWrite(t, r, ours, model, 20)
				b, err := os.ReadFile(ours)
				must(t, err)
				writeFile(t, theirs, b)
				qemu(t, "qemu-img", "resize", "-q", "-f", "qcow2", "--preallocation="+mode.String(), theirs, fmt.Sprint(size))
				m := open(t, ours, Options{})
				must(t, m.Resize(t.Context(), size, ResizeOptions{Preallocation: mode}))
				closeImage(t, m)
				checkClean(t, ours)
				model = resized(model, size)
				compare(t, dir, ours, model)
				if d := cmp.Diff(qemuMap(t, theirs), qemuMap(t, ours)); d != "" {
					t.Error(d)
				}
				if got := blocksOf(t, dir); mode != PreallocateMetadata && got < 2*(size-old) {
					t.Errorf("the files take only %d bytes of the host", got)
				}
				m = open(t, ours, Options{})
				before := m.Stats().Allocated
				at := int64(old+1<<16) &^ (1<<16 - 1)
				fillRandom(r, model[at:])
				if _, err := m.WriteAt(model[at:], at); err != nil {
					t.Fatal(err)
				}
				if n := m.Stats().Allocated - before; n > 0 {
					t.Errorf("a write to what was preallocated allocated %d clusters", n)
				}
				got := make([]byte, size)
				if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
					t.Errorf("wrong contents (%v)", err)
				}
				must(t, m.Resize(t.Context(), old, ResizeOptions{Shrink: true}))
				closeImage(t, m)
				checkClean(t, ours)
				compare(t, dir, ours, model[:old])
				if got, want := fileSize(t, ours), int64(len(b)); got > want+200<<10 {
					t.Errorf("after shrinking the file has %d bytes, before it grew %d", got, want)
				}
			})
		}
	}
}

func fileSize(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	must(t, err)
	return fi.Size()
}

// TestResizeRefused shows which resizes are refused, by which names, and that
// they change nothing.
func TestResizeRefused(t *testing.T) {
	const size = 1 << 20
	plain := func(t *testing.T) string { return create(t, CreateOptions{Size: size, ClusterSize: 512}) }
	for _, c := range []struct {
		says string
		kind error
		size int64
		opts ResizeOptions
		make func(t *testing.T) string
	}{
		{"no multiple of 512", ErrInvalidOption, size + 100, ResizeOptions{}, plain},
		{"no multiple of 512", ErrInvalidOption, -512, ResizeOptions{Shrink: true}, plain},
		{"preallocation 9", ErrInvalidOption, 2 * size, ResizeOptions{Preallocation: 9}, plain},
		{"loses what lies beyond", ErrInvalidOption, size - 512, ResizeOptions{}, plain},
		{"cannot be preallocated", ErrInvalidOption, size - 512, ResizeOptions{Shrink: true, Preallocation: PreallocateFull}, plain},
		{"too large", ErrUnsupported, 1<<37 + 512, ResizeOptions{}, plain},
		{"too large", ErrUnsupported, 1<<63 - 512, ResizeOptions{}, plain},
		{"has internal snapshots", ErrUnsupported, 2 * size, ResizeOptions{}, func(t *testing.T) string {
			path := create(t, CreateOptions{Size: size, Version: 2})
			qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			return path
		}},
		{"persistent bitmaps", ErrUnsupported, 512, ResizeOptions{Shrink: true}, func(t *testing.T) string {
			path := create(t, CreateOptions{Size: size})
			qemu(t, "qemu-img", "bitmap", "--add", path, "b")
			return path
		}},
	} {
		m := open(t, c.make(t), Options{})
		must(t, m.Flush())
		before, err := os.ReadFile(m.path)
		must(t, err)
		err = m.Resize(t.Context(), c.size, c.opts)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || !strings.HasPrefix(err.Error(), m.path+": ") {
			t.Errorf("%d, %+v: got %v, want %q", c.size, c.opts, err, c.says)
		}
		if after, err := os.ReadFile(m.path); err != nil || m.Size() != size || !bytes.Equal(after, before) {
			t.Errorf("%q: the image was changed (%v)", c.says, err)
		}
		closeImage(t, m)
	}
	m := open(t, plain(t), Options{ReadOnly: true})
	if err := m.Resize(t.Context(), 2*size, ResizeOptions{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	closeImage(t, m)
	if err := m.Resize(t.Context(), 2*size, ResizeOptions{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only and closed: %v", err)
	}
	m = open(t, plain(t), Options{})
	closeImage(t, m)
	if err := m.Resize(t.Context(), 2*size, ResizeOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

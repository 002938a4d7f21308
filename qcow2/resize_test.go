package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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
		garbage bool // the data file is longer than the disk
	}{
		{"compat=1.1", 0, []int64{1 << 20, 3<<20 + 512, 70 << 20, 2<<20 + 512, 0, 5 << 20}, false},
		{"compat=0.10,cluster_size=4k", 0, []int64{1<<20 + 512, 9 << 20, 1 << 20}, false},
		{"compat=1.1,cluster_size=512", 0, []int64{1<<20 + 512, 20 << 20, 512, 12 << 20, 1 << 20}, false},
		{"compat=1.1,cluster_size=512,refcount_bits=64", 0, []int64{300 << 10, 8 << 20, 100 << 10, 30 << 20, 0}, false},
		{"compat=1.1,cluster_size=1k,refcount_bits=1,lazy_refcounts=on", 0, []int64{1 << 20, 40 << 20, 200 << 10}, false},
		{"compat=1.1,cluster_size=2M", 0, []int64{5<<20 + 512, 30 << 20, 3 << 20}, false},
		{"compat=1.1,cluster_size=4k", 512 << 10, []int64{1 << 20, 4 << 20, 300 << 10, 2 << 20}, false},
		{"compat=1.1,cluster_size=4k", 3<<20 + 512, []int64{1<<20 + 512, 2 << 20, 8 << 20, 1 << 20, 6 << 20}, false},
		{"compat=1.1,cluster_size=512", 3 << 20, []int64{1<<20 + 512, 8 << 20, 100 << 10, 2 << 20}, false},
		{"compat=0.10", 3 << 20, []int64{1<<20 + 512, 4 << 20, 512 << 10, 2 << 20}, false},
		{"extended_l2=on,cluster_size=16k", 0, []int64{1<<20 + 512, 40 << 20, 512 << 10, 3 << 20}, false},
		{"extended_l2=on,cluster_size=64k", 3<<20 + 512, []int64{1<<20 + 512, 8 << 20, 1<<20 + 1024, 4 << 20}, false},
		{"data_file=DATA", 0, []int64{1<<20 + 512, 5 << 20, 512 << 10, 3 << 20}, false},
		{"data_file=DATA,cluster_size=4k", 3 << 20, []int64{1<<20 + 512, 5 << 20, 512 << 10, 2 << 20}, false},
		{"data_file=DATA,data_file_raw=on,cluster_size=512", 0, []int64{1<<20 + 512, 5 << 20, 512 << 10, 3 << 20}, false},
		{"data_file=DATA,data_file_raw=on,extended_l2=on", 0, []int64{1<<20 + 512, 5 << 20, 512 << 10, 3 << 20}, true},
	} {
		t.Run(strings.ReplaceAll(c.options, ",", " ")+fmt.Sprint(c.base), func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			data := filepath.Join(dir, "DATA")
			args := []string{"create", "-q", "-f", "qcow2", "-o", strings.ReplaceAll(c.options, "DATA", data)}
			model := make([]byte, c.sizes[0])
			if c.base > 0 {
				copy(model, makeBase(t, r, dir, "raw", c.base))
				args = append(args, "-F", "raw", "-b", "base.raw")
			}
			qemu(t, "qemu-img", append(args, path, fmt.Sprint(c.sizes[0]))...)
			if brief() {
				c.sizes = c.sizes[:3]
			}
			for i, size := range c.sizes[1:] {
				if len(model) > 10<<9 {
					qemuWrite(t, r, path, model, 10)
				}
				if c.garbage {
					appendGarbage(t, data)
				}
				if i%3 == 1 && !c.garbage {
					qemuResize(t, path, size, size < int64(len(model)))
				} else {
					m := open(t, path, Options{DataFile: true})
					must(t, m.Resize(t.Context(), size, ResizeOptions{Shrink: size < int64(len(model))}))
					if m.Size() != size {
						t.Errorf("size %d, want %d", m.Size(), size)
					}
					closeImage(t, m)
				}
				model = resized(model, size)
				checkClean(t, path)
				compare(t, dir, path, model)
				if strings.Contains(c.options, "data_file_raw") {
					if b, err := os.ReadFile(data); err != nil || !bytes.Equal(b, model) {
						t.Errorf("the raw data file differs from the disk (%v)", err)
					}
					if all := qemuMap(t, path); i == 0 && !all[len(all)-1].Data {
						t.Errorf("what the disk gained is not allocated: %+v", all[len(all)-1])
					}
				}
				if size > 10<<9 {
					ourWrite(t, r, path, model, 30)
				}
			}
			checkClean(t, path)
			compare(t, dir, path, model)
		})
	}
}

func appendGarbage(t testing.TB, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	writeFile(t, path, append(b, bytes.Repeat([]byte{0xdb}, 100000)...))
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
	// An image with a bitmap, in whose row a byte is changed.
	marked := func(at int64, to byte) func(t *testing.T) string {
		return func(t *testing.T) string {
			path := create(t, CreateOptions{Size: size})
			qemu(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "b")
			b := readFile(t, path)
			if at > 0 {
				b[field(b, int64(bytes.Index(b, []byte{0x23, 0x85, 0x28, 0x75}))+24)+at] = to
			}
			writeFile(t, path, b)
			return path
		}
	}
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
		{"persistent bitmaps", ErrUnsupported, 0, ResizeOptions{Shrink: true}, marked(0, 0)},
		{"more than 512 MiB", ErrUnsupported, 2<<40 + 512, ResizeOptions{}, marked(0, 0)},
		{"of an unknown kind", ErrUnsupported, 2 * size, ResizeOptions{}, marked(16, 2)},
		{"does not agree with the disk", ErrCorrupt, 2 * size, ResizeOptions{}, marked(11, 2)},
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

// TestResizeFailed lets growing fail when half is done: the disk has its old
// length, all that was taken is given back, and a later Resize succeeds.
func TestResizeFailed(t *testing.T) {
	for _, mode := range []Preallocation{PreallocateOff, PreallocateMetadata, PreallocateFalloc, PreallocateFull} {
		const old, size = 100 << 10, 600 << 10
		half := 1 << 30
		for range 2 {
			run := newRun(t, workload{opts: CreateOptions{Size: old, ClusterSize: 512}, under: 300 << 10})
			m := run.open(t, run.f, false)
			must(t, m.WritevAt([][]byte{stamps(0, 150, 2)}, 0))
			must(t, m.Flush())
			before, length, changes := allocatedIn(t, run), len(run.f.data), 0
			run.f.setFail(func(op string) error {
				if op == "write" || op == "allocate" {
					changes++
				}
				if changes == half {
					return syscall.ENOSPC
				}
				return nil
			})
			err := m.Resize(t.Context(), size, ResizeOptions{Preallocation: mode})
			run.f.setFail(nil)
			if half == 1<<30 {
				must(t, err)
				half = changes / 2
				closeImage(t, m)
				continue
			}
			if !errors.Is(err, syscall.ENOSPC) || m.Size() != old {
				t.Errorf("%v: size %d, %v", mode, m.Size(), err)
			}
			if after := allocatedIn(t, run); after != before || len(run.f.data) > length+100<<10 {
				t.Errorf("%v: %d clusters allocated, before %d; the file has %d bytes, before %d", mode, after, before, len(run.f.data), length)
			}
			must(t, m.Resize(t.Context(), size, ResizeOptions{Preallocation: mode}))
			closeImage(t, m)
			run.noLeaks(t)
		}
	}
}

// allocatedIn is how many clusters the tables of the run's image point to, beyond
// the end of its disk too.
func allocatedIn(t testing.TB, run *crashRun) int64 {
	t.Helper()
	r, err := checkIn(t.Context(), run.f, run.path, CheckOptions{})
	must(t, err)
	if r.Corruptions > 0 {
		t.Errorf("%+v", r.Findings)
	}
	return r.Allocated
}

// TestResizeAgain cancels a shrinking in the middle. The disk has its new length,
// and the same once more gives all room back.
func TestResizeAgain(t *testing.T) {
	run := newRun(t, workload{opts: CreateOptions{Size: 2 << 20, ClusterSize: 512}})
	m := run.open(t, run.f, false)
	model := stamps(0, 4096, 2)
	must(t, m.WritevAt([][]byte{model}, 0))
	must(t, m.Flush())
	ctx, cancel := context.WithCancel(t.Context())
	run.f.setFail(func(string) error { cancel(); return nil })
	if err := m.Resize(ctx, 1000<<10, ResizeOptions{Shrink: true}); !errors.Is(err, context.Canceled) || m.Size() != 1000<<10 {
		t.Errorf("size %d, %v", m.Size(), err)
	}
	run.f.setFail(nil)
	if n := len(run.f.data); n < 2<<20 {
		t.Errorf("the file was cut off at %d bytes nevertheless", n)
	}
	must(t, m.Resize(t.Context(), 1000<<10, ResizeOptions{Shrink: true}))
	if n := len(run.f.data); n > 1100<<10 {
		t.Errorf("the file still has %d bytes", n)
	}
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, model[:len(got)]) {
		t.Errorf("the rest of the disk differs (%v)", err)
	}
	closeImage(t, m)
	run.noLeaks(t)
}

// TestResizeCancelled shows that a Resize which is cancelled from the beginning
// changes nothing, and that one which grows ends soon.
func TestResizeCancelled(t *testing.T) {
	run := newRun(t, workload{opts: CreateOptions{Size: 1 << 20, ClusterSize: 512}})
	m := run.open(t, run.f, false)
	ctx, cancel := context.WithCancel(t.Context())
	run.f.setFail(func(op string) error {
		if op == "allocate" {
			cancel()
		}
		return nil
	})
	if err := m.Resize(ctx, 4<<20, ResizeOptions{Preallocation: PreallocateFalloc}); !errors.Is(err, context.Canceled) || m.Size() != 1<<20 {
		t.Errorf("grow: size %d, %v", m.Size(), err)
	}
	if n := allocatedIn(t, run); n != 0 {
		t.Errorf("grow: %d clusters are left", n)
	}
	before := len(run.f.log)
	if err := m.Resize(ctx, 1<<10, ResizeOptions{Shrink: true}); !errors.Is(err, context.Canceled) || m.Size() != 1<<20 || len(run.f.log) != before {
		t.Errorf("shrink: size %d, %v", m.Size(), err)
	}
	closeImage(t, m)
	run.noLeaks(t)
}

// TestResizeKeepsRequestsOut shows that a request which began before the disk
// shrank does not see what a growing one is preparing.
func TestResizeKeepsRequestsOut(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 1 << 20}), Options{})
	m.reach.Store(2 << 20)
	for name, err := range map[string]error{
		"read":    func() error { _, err := m.find(1<<20, 512, 0); return err }(),
		"write":   m.writeAll(newRequest([][]byte{make([]byte, 512)}), 1<<20, 512),
		"discard": m.eraseAll(1<<20, 1<<16, roomKept, 0),
	} {
		if !errors.Is(err, ErrRange) && (name != "discard" || err != nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := m.writeZeros(1<<20, 512, growShard); err != nil {
		t.Errorf("the Resize itself: %v", err)
	}
	closeImage(t, m)
}

// TestResizeFootprint grows, fills and shrinks a disk again and again in one
// opening: the file never gets longer than the first time.
func TestResizeFootprint(t *testing.T) {
	run := newRun(t, workload{opts: CreateOptions{Size: 100 << 10, ClusterSize: 512}})
	m := run.open(t, run.f, false)
	first := 0
	for i := range 6 {
		must(t, m.Resize(t.Context(), 900<<10, ResizeOptions{}))
		must(t, m.WritevAt([][]byte{stamps(0, 1800, uint64(i+2))}, 0))
		must(t, m.Flush())
		if i == 0 {
			first = len(run.f.data)
		}
		if n := len(run.f.data); n > first+first/20 {
			t.Errorf("time %d: the file has %d bytes, at first %d", i, n, first)
		}
		must(t, m.Resize(t.Context(), 100<<10, ResizeOptions{Shrink: true}))
		if n := len(run.f.data); n > 200<<10 {
			t.Errorf("time %d: after shrinking the file has %d bytes", i, n)
		}
	}
	closeImage(t, m)
	run.noLeaks(t)
}

// TestResizeToLimits grows disks as far as the L1 table goes, which then is more
// than fits between two refcount blocks, and writes to their ends.
func TestResizeToLimits(t *testing.T) {
	for _, c := range []struct {
		opts CreateOptions
		size int64
		file int64 // the greatest length of the file
	}{
		{CreateOptions{ClusterSize: 512, RefcountBits: 64}, 1 << 37, 64 << 20},
		{CreateOptions{ClusterSize: 4096}, 1 << 43, 5 << 30},
		{CreateOptions{ExtendedL2: true}, 1 << 50, 100 << 20},
	} {
		if brief() && c.opts.RefcountBits == 0 {
			continue
		}
		c.opts.Size = 1 << 20
		path := create(t, c.opts)
		m := open(t, path, Options{})
		must(t, m.WritevAt([][]byte{stamps(0, 2048, 2)}, 0))
		must(t, m.Resize(t.Context(), c.size, ResizeOptions{}))
		must(t, m.WritevAt([][]byte{stamps(1, 1, 3)}, c.size-sector))
		closeImage(t, m)
		checkClean(t, path)
		if n := fileSize(t, path); n > c.file {
			t.Errorf("%+v: the file has %d bytes", c.opts, n)
		}
		m = open(t, path, Options{})
		got := make([]byte, sector)
		if err := m.ReadvAt([][]byte{got}, c.size-sector); err != nil || !bytes.Equal(got, stamps(1, 1, 3)) {
			t.Errorf("%+v: the end differs (%v)", c.opts, err)
		}
		if err := m.Resize(t.Context(), c.size+512, ResizeOptions{}); !errors.Is(err, ErrUnsupported) || m.Size() != c.size {
			t.Errorf("%+v: beyond the limit: %v", c.opts, err)
		}
		must(t, m.Resize(t.Context(), 1<<20, ResizeOptions{Shrink: true}))
		got = make([]byte, 1<<20)
		if err := m.ReadvAt([][]byte{got}, 0); err != nil || !bytes.Equal(got, stamps(0, 2048, 2)) {
			t.Errorf("%+v: the beginning differs (%v)", c.opts, err)
		}
		closeImage(t, m)
		checkClean(t, path)
	}
}

// TestResizeCorrupt resizes images that iotest 060 breaks: those whose refcount
// table points nowhere cannot be opened for it, and keep their length. An L2 table
// beyond the new end that points to metadata ends the giving back of room, by name.
func TestResizeCorrupt(t *testing.T) {
	const size = 64 << 20
	for _, entries := range [][]uint64{{0x00ffffff00000000}, {0x1000000000}, {0, 0x200}} {
		path := create(t, CreateOptions{Size: size})
		b, err := os.ReadFile(path)
		must(t, err)
		for i, e := range entries {
			put(b, 0x10008+int64(i)*8, 8, e)
		}
		writeFile(t, path, b)
		if m, err := Open(path, Options{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%#x: %v, %v", entries, m, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
			t.Errorf("%#x: the image was changed (%v)", entries, err)
		}
	}
	b, l2 := hostileImage(t, CreateOptions{Size: size, ClusterSize: 512})
	put(b, l2+8, 8, 0x8000000000000200) // the refcount table
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	writeFile(t, path, b)
	m := open(t, path, Options{})
	if err := m.Resize(t.Context(), 0, ResizeOptions{Shrink: true}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "reference count table") {
		t.Errorf("an L2 entry to metadata: %v", err)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	after, err := os.ReadFile(path)
	if must(t, err); !bytes.Equal(after[512:], b[512:]) || after[offIncompatible+7]>>incompatCorrupt&1 == 0 {
		t.Error("more than the header was changed, or it has no corrupt bit")
	}
}

// TestResizeOverGarbage grows a disk whose file has free clusters that are not
// empty: none of their contents shows.
func TestResizeOverGarbage(t *testing.T) {
	for _, mode := range []Preallocation{PreallocateOff, PreallocateMetadata, PreallocateFalloc, PreallocateFull} {
		run := newRun(t, workload{opts: CreateOptions{Size: 10 << 10, ClusterSize: 512}})
		run.f.data = append(run.f.data, bytes.Repeat([]byte{0xdb}, 500<<10)...)
		m := run.open(t, run.f, false)
		must(t, m.Resize(t.Context(), 300<<10, ResizeOptions{Preallocation: mode}))
		got := make([]byte, 300<<10)
		if err := m.ReadvAt([][]byte{got}, 0); err != nil || !isZero(got) {
			t.Errorf("%v: not zero (%v)", mode, err)
		}
		closeImage(t, m)
		run.noLeaks(t)
	}
}

// TestResizeKeepsTables shrinks a disk whose L1 table, the last in the file, counts
// no reference: the file is not cut off before it.
func TestResizeKeepsTables(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	b, err := os.ReadFile(path)
	must(t, err)
	put(b, 1024+3*2, 2, 0) // behind the header, the refcount table and the block
	writeFile(t, path, b)
	m := open(t, path, Options{})
	must(t, m.Resize(t.Context(), 512<<10, ResizeOptions{Shrink: true}))
	closeImage(t, m)
	if n := fileSize(t, path); n < int64(len(b)) {
		t.Errorf("the file has %d bytes, the end of the L1 table is at %d", n, len(b))
	}
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The fuzzers start from small good images of every kind. What they make of them
// is opened and used, and then these hold:
//
//   - it ends, in bounded memory, and never panics (hostileRun.watch);
//   - every error is an *Error that names the file, and after a corruption a
//     writer has set the corrupt bit where the version has one (judge);
//   - guest data and holes never reach a cluster that holds metadata (guard);
//   - an image that nobody changed behaves as a disk, and ends without a
//     corruption or a leak; one that was changed and yet checks as good ends
//     without a corruption (finish).
//
// How to run them, and how long they have run, is in docs/testing.md.

// fuzzSize is the size of the disks, in bytes.
const fuzzSize = 256 << 10

// fuzzImage is an image to start from.
type fuzzImage struct {
	data   []byte
	under  []byte  // what lies under it; nil if nothing
	tables []int64 // offsets of its metadata but the header, each at least 512 bytes
}

// fuzzImages makes the images, always the same, for a corpus to stay good.
func fuzzImages(t testing.TB) []fuzzImage {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	under := make([]byte, fuzzSize/2+1000)
	fillRandom(r, under)
	var images []fuzzImage
	for _, c := range []struct {
		options                          string
		overlay, packed, snap, bitmapped bool
	}{
		{options: "compat=1.1,cluster_size=4k"},
		{options: "compat=0.10,cluster_size=512", overlay: true},
		{options: "compat=1.1,cluster_size=64k,refcount_bits=64"},
		{options: "compat=1.1,cluster_size=1k,refcount_bits=1", overlay: true},
		{options: "compat=1.1,cluster_size=4k", packed: true},
		{options: "compat=1.1,cluster_size=4k,compression_type=zstd", packed: true, snap: true},
		{options: "compat=1.1,cluster_size=4k", snap: true, bitmapped: true},
		{options: "compat=0.10,cluster_size=4k", snap: true},
		{options: "compat=1.1,cluster_size=16k,extended_l2=on", overlay: true},
		{options: "compat=1.1,cluster_size=16k,extended_l2=on", packed: true, snap: true},
	} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		if c.packed {
			b := make([]byte, fuzzSize)
			copy(b[fuzzSize/3:], bytes.Repeat(under[:700], 40))
			writeFile(t, path+".raw", b)
			qemu(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", c.options, path+".raw", path)
		} else {
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.options, path, "256k")
		}
		qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 40000", "-c", "write -P 2 100000 70000", path)
		if c.snap {
			qemu(t, "qemu-img", "snapshot", "-c", "first", path)
			qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 20000 30000", path)
			qemu(t, "qemu-img", "snapshot", "-c", "second", path)
		}
		if c.bitmapped {
			qemu(t, "qemu-img", "bitmap", "--add", "-g", "4096", path, "dirty")
			qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 4 8000 30000", path)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		i := fuzzImage{data: b}
		if c.overlay {
			i.under = under
		}
		metadata(b, func(off, n int64) bool {
			for ; n > 0 && off > 0; off, n = off+512, n-512 {
				i.tables = append(i.tables, off)
			}
			return true
		})
		images = append(images, i)
	}
	return images
}

// fuzzInput is the fuzzer's bytes, from which everything random is taken. Past
// its end there are zeros.
type fuzzInput []byte

func (in *fuzzInput) uint(width int) uint64 {
	var b [8]byte
	n := copy(b[8-width:], *in)
	*in = (*in)[n:]
	return binary.BigEndian.Uint64(b[:])
}

// patch changes metadata of the image b by what is left of the input, as a broken
// or a malicious program might: values of any kind, and pointers to anywhere in
// the file.
func (in *fuzzInput) patch(b []byte, tables []int64) {
	const most = 32
	bits := binary.BigEndian.Uint32(b[20:])
	for range most {
		if len(*in) == 0 {
			return
		}
		how := in.uint(1)
		off := min(tables[in.uint(1)%uint64(len(tables))]+int64(in.uint(2)%512), int64(len(b)-8))
		v := in.uint(4)
		switch how % 4 {
		case 0: // any value
			put(b, off&^7, 8, v<<32|in.uint(4))
		case 1: // a pointer with any flags
			put(b, off&^7, 8, v>>24<<56|v&0xffff%(uint64(len(b))>>bits+2)<<bits|v>>16&1)
		case 2: // a byte
			b[off] = byte(v)
		case 3: // the entry of another place
			from := min(tables[v>>16%uint64(len(tables))]+int64(v%64)*8, int64(len(b)-8))
			copy(b[off&^7:][:8], b[from:][:8])
		}
	}
}

// fuzzRun is one run of a fuzzer.
type fuzzRun struct {
	*hostileRun
	good  bool              // it checked without corruptions, and nothing failed since
	model []byte            // contents of the disk; nil if nobody knows them
	kept  map[string][]byte // contents of its snapshots
}

// fuzzDeadline is longer than any run takes on a busy machine.
const fuzzDeadline = time.Minute

// fuzzMemory bounds what a run may allocate in all, in bytes. The largest tables
// that a header may ask for take a quarter of it.
const fuzzMemory = 512 << 20

// fuzz uses the image b, which was made of base, as ops say.
func fuzz(t *testing.T, base *fuzzImage, b []byte, changed bool, ops fuzzInput) {
	defer watch(t)()
	r, err := checkIn(t.Context(), &memFile{data: b}, hostilePath, CheckOptions{MemoryBytes: 16 << 20})
	f := &fuzzRun{hostileRun: newHostileRun(t, b, base.under), good: err == nil && r.Corruptions == 0}
	_ = f.judge(inFile(hostilePath, err))
	start := append([]byte(nil), b...)
	if f.open(Options{ReadOnly: true}) == nil {
		f.read(0, min(f.m.Size(), 4*fuzzSize))
		f.readBitmaps()
		_ = f.judge(f.m.Close())
	}
	f.kept = f.snapshots()
	if !bytes.Equal(f.f.data, start) {
		t.Error("a reader changed the image")
	}
	if f.open(Options{}) != nil {
		return
	}
	if !changed {
		f.model = f.read(0, f.m.Size())
	}
	const most = 64
	for range most {
		if len(ops) == 0 || !f.operate(&ops) {
			break
		}
	}
	f.finish(changed)
}

// watch ends the program if the test hangs. What it returns ends the watch and
// measures the memory.
func watch(t *testing.T) func() {
	timer := time.AfterFunc(fuzzDeadline, func() { panic("the run does not end") })
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	before := sample[0].Value.Uint64()
	return func() {
		timer.Stop()
		metrics.Read(sample)
		if n := sample[0].Value.Uint64() - before; n > fuzzMemory {
			t.Errorf("%d bytes were allocated", n)
		}
	}
}

// note judges the result of an operation.
func (f *fuzzRun) note(err error) {
	if f.judge(err) != nil {
		f.good = false
		if f.model != nil {
			f.t.Errorf("a good image: %v", err)
		}
	}
}

func (f *fuzzRun) read(off, n int64) []byte {
	got := make([]byte, n)
	err := f.m.ReadvAt([][]byte{got[:n/3], got[n/3:]}, off)
	f.note(err)
	if err == nil && f.model != nil && !bytes.Equal(got, f.model[off:off+n]) {
		f.t.Errorf("%d bytes at %d differ", n, off)
	}
	return got
}

// operate takes one operation from the input and does it. It returns false if the
// image is no longer open.
func (f *fuzzRun) operate(in *fuzzInput) bool {
	size := f.m.Size()
	if size == 0 {
		return false
	}
	how := in.uint(1)
	off := int64(in.uint(3) % uint64(size))
	n := min(1+int64(in.uint(2))%int64(len(f.buf)), size-off)
	if how >= 0xe0 {
		f.bitmap(how%8, [...]string{"dirty", "one", "two", "three"}[n%4], int64(512)<<(off%8))
		return true
	}
	switch how % 13 {
	case 0, 1:
		_, err := f.m.WriteAt(f.buf[:n], off)
		f.note(err)
		if f.model != nil {
			copy(f.model[off:], f.buf[:n])
		}
	case 2, 3, 4:
		if f.model != nil {
			erase(f.t, f.m, f.model, int(how%13-2), off, n)
		} else {
			f.note(eraser(f.m, int(how%13-2))(off, n))
		}
	case 5:
		f.note(f.m.Flush())
	case 6:
		f.read(off, n)
		for _, err := range f.m.Map(off, n) {
			f.note(err)
		}
	case 7:
		f.note(f.m.Close())
		return f.open(Options{}) == nil
	case 8:
		off -= f.m.inCluster(off)
		b := f.buf[:min(f.m.clusterSize, size-off)]
		if !f.refused(f.m.WriteCompressed(b, off)) && f.model != nil {
			copy(f.model[off:], b)
		}
	case 9:
		f.resize(int(in.uint(3)%(2*fuzzSize)) &^ 511)
	default:
		f.snapshot(int(how%13-10), [...]string{"first", "second", "one", "two"}[n%4])
	}
	return true
}

// bitmap changes the bitmap with the name. Where it finds it broken it changes nothing.
func (f *fuzzRun) bitmap(how uint64, name string, grain int64) {
	ctx := f.t.Context()
	var err error
	switch how {
	case 0:
		err = f.m.AddBitmap(ctx, name, BitmapOptions{Granularity: grain})
	case 1:
		err = f.m.RemoveBitmap(ctx, name)
	case 2:
		err = f.m.ClearBitmap(ctx, name)
	case 3:
		err = f.m.EnableBitmap(ctx, name)
	case 4:
		err = f.m.DisableBitmap(ctx, name)
	case 5, 6:
		err = f.m.MergeBitmap(ctx, name, f.m, "dirty")
	default:
		f.readBitmaps()
	}
	if errors.Is(err, ErrCorrupt) && f.model == nil {
		f.good = f.typed(err) == nil
		return
	}
	f.refused(err)
}

// readBitmaps reads what the bitmaps say: ranges of the disk in order.
func (f *fuzzRun) readBitmaps() {
	list, err := f.m.Bitmaps()
	_ = f.typed(err)
	for _, b := range list[:min(len(list), 8)] {
		end := int64(-1)
		for r, err := range f.m.DirtyRanges(b.Name) {
			if f.typed(err) != nil {
				break
			}
			if r.Offset <= end || r.Length <= 0 || r.Length > f.m.Size()-r.Offset {
				f.t.Fatalf("bitmap %q: the range %v after %d", b.Name, r, end)
			}
			end = r.Offset + r.Length
		}
	}
}

// refused notes the result of an operation that may be refused, and reports
// whether it was or failed.
func (f *fuzzRun) refused(err error) bool {
	for _, kind := range []error{ErrUnsupported, ErrInvalidOption, ErrNoSnapshot, ErrNoBitmap, ErrBitmapInUse, unix.EFBIG} {
		if errors.Is(err, kind) {
			return f.typed(err) != nil
		}
	}
	f.note(err)
	return err != nil
}

func (f *fuzzRun) resize(size int) {
	opts := ResizeOptions{Shrink: int64(size) < f.m.Size()}
	if !opts.Shrink {
		opts.Preallocation = Preallocation(size >> 9 % 4)
	}
	if f.refused(f.m.Resize(f.t.Context(), int64(size), opts)) || f.model == nil {
		return
	}
	f.model = append(f.model[:min(size, len(f.model))], make([]byte, max(size-len(f.model), 0))...)
}

// snapshot makes, applies or deletes the snapshot with the name. It looks at all
// tables; where it finds one broken it changes nothing, and marks nothing either.
func (f *fuzzRun) snapshot(how int, name string) {
	ctx := f.t.Context()
	var err error
	switch how {
	case 0:
		_, err = f.m.CreateSnapshot(ctx, name)
	case 1:
		err = f.m.ApplySnapshot(ctx, name)
	case 2:
		err = f.m.DeleteSnapshot(ctx, name)
	}
	switch {
	case errors.Is(err, ErrCorrupt) && f.model == nil:
		f.good = f.typed(err) == nil
	case f.refused(err):
	case how == 0 && f.model != nil:
		f.kept[name] = bytes.Clone(f.model)
	case how == 1 && f.model != nil:
		f.model = bytes.Clone(f.kept[name])
	case how == 2:
		delete(f.kept, name)
	}
}

// snapshots returns the disks of the snapshots, of which it reads a few, by name.
func (f *fuzzRun) snapshots() map[string][]byte {
	disks := map[string][]byte{}
	if f.open(Options{ReadOnly: true}) != nil {
		return disks
	}
	list, err := f.m.Snapshots()
	f.note(err)
	f.note(f.m.Close())
	for _, s := range list[:min(len(list), 8)] {
		if f.open(Options{ReadOnly: true, Snapshot: s.ID}) != nil {
			continue
		}
		disks[s.Name] = f.read(0, min(f.m.Size(), 4*fuzzSize))
		f.note(f.m.Close())
	}
	return disks
}

// finish closes the image and checks what it has become.
func (f *fuzzRun) finish(changed bool) {
	if f.m.Size() == int64(len(f.model)) {
		f.read(0, f.m.Size())
	}
	f.note(f.m.Close())
	if !f.good {
		return
	}
	r, err := checkIn(f.t.Context(), &memFile{data: f.f.data}, hostilePath, CheckOptions{})
	f.model = nil
	if !changed && !maps.EqualFunc(f.snapshots(), f.kept, bytes.Equal) {
		f.t.Error("a snapshot differs")
	}
	if err != nil || r.Corruptions > 0 || !changed && r.Leaks > 0 {
		f.t.Errorf("at the end: %v %+v", err, r)
	}
}

// someOps is a seed: each kind of operation, over the first and the last clusters.
var someOps = []byte{
	0, 0, 0x10, 3, 0x90, 0, 5, 0, 0, 0, 0, 0, 2, 0, 0x20, 0, 0x40, 0, 3, 0, 0, 0, 0x40, 0,
	4, 1, 0, 0, 0x9c, 0, 0, 1, 0x90, 0, 0x9c, 0x3f, 7, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x9c, 0x3f,
	6, 0, 0, 0, 0x9c, 0x3f, 0, 3, 0xff, 0, 2, 0, 5, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0x9c, 0x3f, 5, 0, 0, 0, 0, 0,
	8, 0, 0x50, 0, 0, 0, 10, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x9c, 0x3f, 9, 0, 0, 0, 0, 0, 5, 0xfe, 1,
	12, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 2, 0, 0, 11, 0, 0, 0, 0, 1, 0, 0, 0x90, 0, 0x9c, 0x3f,
	0xe0, 0, 0, 1, 0, 0, 0xe4, 0, 0, 0, 0, 0, 0xe5, 0, 0, 0, 0, 0, 0xe7, 0, 0, 0, 0, 0, 0xe3, 0, 0, 0, 0, 0,
	0xe0, 0, 0, 2, 0, 1, 0xe5, 0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0, 3, 0, 0, 0xe2, 0, 0, 0, 0, 1, 0xe1, 0, 0, 0, 0, 0,
}

// FuzzHeader replaces the beginning of the first cluster: header, extensions and
// the name of the backing file.
func FuzzHeader(f *testing.F) {
	images := fuzzImages(f)
	for i := range images {
		f.Add(uint8(i), images[i].data[:512])
	}
	f.Fuzz(func(t *testing.T, i uint8, first []byte) {
		base := &images[int(i)%len(images)]
		b := append([]byte(nil), base.data...)
		changed := !bytes.HasPrefix(b, first)
		copy(b[:4096], first)
		fuzz(t, base, b, changed, someOps)
	})
}

// FuzzTables changes entries of all kinds of tables.
func FuzzTables(f *testing.F) {
	images := fuzzImages(f)
	for i := range images {
		f.Add(uint8(i), []byte{1, 0, 0, 0, 0x80, 0, 0, 3})
		f.Add(uint8(i), []byte{0, 4, 0, 8, 0x40, 0, 0, 0, 0, 0, 0x30, 0, 3, 1, 0, 0, 0, 5, 0, 9})
		f.Add(uint8(i), []byte{2, 2, 0, 9, 0, 0, 0, 0, 2, 1, 0, 2, 0, 0, 0, 0xff})
	}
	f.Fuzz(func(t *testing.T, i uint8, patches []byte) {
		base := &images[int(i)%len(images)]
		b := append([]byte(nil), base.data...)
		in := fuzzInput(patches)
		in.patch(b, base.tables)
		fuzz(t, base, b, len(patches) > 0, someOps)
	})
}

// FuzzOperations changes entries of tables, or none, and does what the input
// says.
func FuzzOperations(f *testing.F) {
	images := fuzzImages(f)
	for i := range images {
		f.Add(uint8(i), []byte{}, someOps)
		f.Add(uint8(i), []byte{1, 0, 0, 0, 0x80, 0, 0, 3}, someOps)
	}
	f.Fuzz(func(t *testing.T, i uint8, patches, ops []byte) {
		base := &images[int(i)%len(images)]
		b := append([]byte(nil), base.data...)
		in := fuzzInput(patches)
		in.patch(b, base.tables)
		fuzz(t, base, b, len(patches) > 0, ops)
	})
}

package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// trackedBitmap is what a bitmap is to be.
type trackedBitmap struct {
	Bitmap
	bits []bool
}

// tracked are the bitmaps that an image is to have, by name.
type tracked map[string]*trackedBitmap

func (all tracked) clone() tracked {
	c := tracked{}
	for name, b := range all {
		c[name] = &trackedBitmap{b.Bitmap, slices.Clone(b.bits)}
	}
	return c
}

// pick returns the name of a bitmap, empty if there is none.
func (all tracked) pick(r *rand.Rand) string {
	names := slices.Sorted(maps.Keys(all))
	if len(names) == 0 {
		return ""
	}
	return names[r.IntN(len(names))]
}

// anyInUse reports whether there is a bitmap with which QEMU resizes no disk.
func (all tracked) anyInUse() bool {
	for _, b := range all {
		if b.InUse {
			return true
		}
	}
	return false
}

func newTracked(name string, grain, size int64, enabled bool) *trackedBitmap {
	return &trackedBitmap{Bitmap{Name: name, Granularity: grain, Enabled: enabled}, make([]bool, (size+grain-1)/grain)}
}

// set sets the bits of a range of the disk.
func (b *trackedBitmap) set(off, n int64) {
	for i := off / b.Granularity; n > 0 && i*b.Granularity < off+n; i++ {
		b.bits[i] = true
	}
}

// ranges are the dirty ranges of a disk with the given size.
func (b *trackedBitmap) ranges(size int64) []Range {
	var all []Range
	for i, bit := range b.bits {
		r := Range{Offset: int64(i) * b.Granularity}
		r.Length = min(b.Granularity, size-r.Offset)
		switch k := len(all) - 1; {
		case !bit:
		case k >= 0 && all[k].Offset+all[k].Length == r.Offset:
			all[k].Length += r.Length
		default:
			all = append(all, r)
		}
	}
	return all
}

// wrote sets the bits of the bitmaps that follow the disk, as QEMU does.
func (all tracked) wrote(off, n int64) {
	for _, b := range all {
		if b.Enabled && !b.InUse {
			b.set(off, n)
		}
	}
}

// bitmapOp is one action of qemu-img bitmap, or a resize.
type bitmapOp struct {
	how, name string
	source    string // of merge, a bitmap
	from      string // its image, empty if it is the same
	opts      BitmapOptions
	size      int64 // of resize
}

// args are the arguments of qemu-img.
func (o bitmapOp) args(path string) []string {
	if o.how == "resize" {
		return []string{"resize", "-q", "--shrink", "-f", "qcow2", path, strconv.FormatInt(o.size, 10)}
	}
	args := []string{"bitmap", "--" + o.how}
	switch o.how {
	case "merge":
		args = append(args, o.source)
		if o.from != "" {
			args = append(args, "-b", o.from, "-F", "qcow2")
		}
	case "add":
		args = append(args, "-g", strconv.FormatInt(o.opts.Granularity, 10))
		if o.opts.Disabled {
			args = append(args, "--disable")
		}
	}
	return append(args, "-f", "qcow2", path, o.name)
}

// do does it to an open image.
func (o bitmapOp) do(ctx context.Context, m *Image) (err error) {
	switch o.how {
	case "add":
		return m.AddBitmap(ctx, o.name, o.opts)
	case "remove":
		return m.RemoveBitmap(ctx, o.name)
	case "clear":
		return m.ClearBitmap(ctx, o.name)
	case "enable":
		return m.EnableBitmap(ctx, o.name)
	case "disable":
		return m.DisableBitmap(ctx, o.name)
	case "resize":
		return m.Resize(ctx, o.size, ResizeOptions{Shrink: true})
	}
	from := m
	if o.from != "" {
		if from, err = Open(o.from, Options{ReadOnly: true}); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, from.Close()) }()
	}
	return m.MergeBitmap(ctx, o.name, from, o.source)
}

// track does it to what is expected. others are the bitmaps of the other image.
func (all tracked) track(o bitmapOp, size int64, others tracked) {
	b := all[o.name]
	switch o.how {
	case "add":
		all[o.name] = newTracked(o.name, o.opts.Granularity, size, !o.opts.Disabled)
	case "remove":
		delete(all, o.name)
	case "clear":
		clear(b.bits)
	case "enable", "disable":
		b.Enabled = o.how == "enable"
	case "resize":
		for _, b := range all {
			n := int(ceilDiv(o.size, b.Granularity))
			b.bits = append(slices.Clip(b.bits[:min(n, len(b.bits))]), make([]bool, max(n-len(b.bits), 0))...)
		}
	case "merge":
		source := all[o.source]
		if o.from != "" {
			source = others[o.source]
		}
		for _, r := range source.ranges(size) {
			b.set(r.Offset, r.Length)
		}
	}
}

// randomBitmapOp chooses an action that is possible. others is the other image, empty
// if its bitmaps cannot be merged.
func randomBitmapOp(r *rand.Rand, all tracked, others string, otherNames tracked, n int) bitmapOp {
	name := all.pick(r)
	if name == "" || len(all) < 5 && r.IntN(2) == 0 {
		return bitmapOp{how: "add", name: fmt.Sprintf("bitmap %d%s", n, strings.Repeat("-", r.IntN(40))), opts: BitmapOptions{
			Granularity: 512 << r.IntN(12), Disabled: r.IntN(3) == 0,
		}}
	}
	if all[name].InUse {
		return bitmapOp{how: "remove", name: name}
	}
	o := bitmapOp{how: [...]string{"remove", "clear", "enable", "disable", "merge", "merge", "merge"}[r.IntN(7)], name: name}
	if o.how != "merge" {
		return o
	}
	if others != "" && r.IntN(3) == 0 {
		o.from, o.source = others, otherNames.pick(r)
	} else if o.source = all.pick(r); all[o.source].InUse {
		o.source = name
	}
	return o
}

// verifyBitmaps compares the bitmaps of the image at path with want, in every
// respect, as this package and as QEMU see them.
func verifyBitmaps(t *testing.T, path string, size int64, want tracked) {
	t.Helper()
	qemu(t, "qemu-img", "check", "-q", path)
	if r := check(t, path); !r.Clean() {
		t.Fatalf("%+v", r.Findings)
	}
	m := open(t, path, Options{ReadOnly: true, DataFile: true})
	defer closeImage(t, m)
	list, err := m.Bitmaps()
	must(t, err)
	if theirs := qemuBitmaps(t, path); fmt.Sprint(theirs) != fmt.Sprint(list) || len(list) != len(want) {
		t.Fatalf("the bitmaps are %v, QEMU sees %v, %d are to be there", list, theirs, len(want))
	}
	var names []string
	for _, b := range list {
		if want[b.Name] == nil || want[b.Name].Bitmap != b {
			t.Fatalf("there is the bitmap %v, want %v", b, want[b.Name])
		}
		if b.InUse {
			for _, err := range m.DirtyRanges(b.Name) {
				if !errors.Is(err, ErrBitmapInUse) {
					t.Fatalf("a bitmap in use is read: %v", err)
				}
			}
			continue
		}
		names = append(names, b.Name)
		got, err := dirtyOf(m, b.Name)
		must(t, err)
		if ranges := want[b.Name].ranges(size); !slices.Equal(got, ranges) {
			t.Fatalf("%v says %v, want %v", b, got, ranges)
		}
	}
	theirs := qemuDirty(t, path, names)
	for i, name := range names {
		if ranges := want[name].ranges(size); !slices.Equal(theirs[i], ranges) {
			t.Fatalf("QEMU finds %v in %q, want %v", theirs[i], name, ranges)
		}
	}
}

// dirtyOf collects the dirty ranges.
func dirtyOf(m *Image, name string) (all []Range, err error) {
	for r, err := range m.DirtyRanges(name) {
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

// qemuDirty returns the dirty ranges of some bitmaps as a client of qemu-nbd sees
// them.
func qemuDirty(t *testing.T, path string, names []string) (all [][]Range) {
	t.Helper()
	if len(names) == 0 {
		return nil
	}
	socket, stop := serveBitmaps(t, path, names)
	defer stop()
	for _, name := range names {
		var parts []struct {
			Start, Length int64
			Data          bool
		}
		out := qemu(t, "qemu-img", "map", "--output=json", "--image-opts",
			"driver=nbd,server.type=unix,server.path="+socket+",x-dirty-bitmap=qemu:dirty-bitmap:"+name)
		must(t, json.Unmarshal([]byte(out), &parts))
		var dirty []Range
		for _, p := range parts {
			if !p.Data { // which is QEMU's way of saying dirty here
				dirty = append(dirty, Range{p.Start, p.Length})
			}
		}
		all = append(all, dirty)
	}
	return all
}

// serveBitmaps has qemu-nbd serve the image, for reading, with some bitmaps until
// stop is called. The name of the socket means nothing to QEMU's options.
func serveBitmaps(t *testing.T, path string, names []string) (socket string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	must(t, err)
	socket = filepath.Join(dir, "socket")
	args := []string{"-r", "-t", "-f", "qcow2", "-k", socket}
	for _, name := range names {
		args = append(args, "-B", name)
	}
	server := exec.Command("qemu-nbd", append(args, path)...)
	var messages bytes.Buffer
	server.Stderr = &messages
	must(t, server.Start())
	stop = func() {
		_ = server.Process.Kill()
		_ = server.Wait()
		must(t, os.RemoveAll(dir))
	}
	for range 500 {
		if c, err := net.Dial("unix", socket); err == nil {
			must(t, c.Close())
			return socket, stop
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	t.Fatalf("qemu-nbd does not serve: %s", &messages)
	return "", nil
}

// TestBitmapChanges changes bitmaps and the size of the disk, by turns with us and with
// QEMU, sets bits by writing with QEMU, and lets both read all that the bitmaps say after each turn.
func TestBitmapChanges(t *testing.T) {
	turns := 14
	if brief() {
		turns = 6
	}
	for _, c := range []struct {
		options string
		size    int64
		overlay bool
	}{
		{options: "cluster_size=512", size: 5<<20 + 512},
		{options: "cluster_size=4k", size: 3<<20 + 1024, overlay: true},
		{options: "cluster_size=64k", size: 40<<20 + 512},
		{options: "cluster_size=16k,extended_l2=on", size: 1 << 20, overlay: true},
		{options: "cluster_size=2M,refcount_bits=64", size: 64 << 20},
		{options: "data_file=data.raw,data_file_raw=on", size: 2 << 20},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			t.Chdir(dir)
			path := filepath.Join(dir, "disk.qcow2")
			args := []string{"create", "-q", "-f", "qcow2", "-o", c.options}
			if c.overlay {
				makeBase(t, r, dir, "qcow2", 1<<20)
				args = append(args, "-F", "qcow2", "-b", "base.qcow2")
			}
			qemu(t, "qemu-img", append(args, path, strconv.FormatInt(c.size, 10))...)
			other, others := otherBitmaps(t, r, dir, c.size)
			want, size, cutByQEMU := tracked{}, c.size, false
			for i := range turns {
				ours := i%2 == 0
				for range 1 + r.IntN(3) {
					from := other
					if size != c.size {
						from = ""
					}
					o := randomBitmapOp(r, want, from, others, i*10+len(want))
					if _, exists := want[o.name]; exists && o.how == "add" {
						continue
					}
					changeBitmap(t, path, o, ours)
					want.track(o, size, others)
				}
				// QEMU resizes no disk with bitmaps in use. It takes what a disk gains
				// for changed where it writes zeros there.
				zeros := c.overlay || strings.Contains(c.options, "raw")
				if r.IntN(2) == 0 && (ours || !want.anyInUse() && !zeros) {
					to := c.size
					if r.IntN(3) > 0 {
						to = (c.size/8 + r.Int64N(c.size*2)) &^ 511
					}
					// What QEMU cuts off may show again when it makes the disk longer.
					if ours || to < size || !cutByQEMU {
						cutByQEMU = !ours && (cutByQEMU || to < size)
						size = to
						o := bitmapOp{how: "resize", size: size}
						changeBitmap(t, path, o, ours)
						want.track(o, size, nil)
					}
				}
				switch {
				case !ours:
					qemuDirtyWrites(t, r, path, size, want)
				case r.IntN(3) == 0:
					m := open(t, path, Options{DataFile: true})
					if _, err := m.WriteAt([]byte("x"), r.Int64N(size)); err != nil {
						t.Fatal(err)
					}
					closeImage(t, m)
					for _, b := range want {
						b.InUse = b.InUse || b.Enabled
					}
				}
				verifyBitmaps(t, path, size, want)
			}
			for name := range want {
				changeBitmap(t, path, bitmapOp{how: "remove", name: name}, true)
			}
			verifyBitmaps(t, path, size, tracked{})
		})
	}
}

// changeBitmap does one action, with us or with QEMU.
func changeBitmap(t *testing.T, path string, o bitmapOp, ours bool) {
	t.Helper()
	if !ours {
		qemu(t, "qemu-img", o.args(path)...)
		return
	}
	m := open(t, path, Options{DataFile: true})
	if err := o.do(t.Context(), m); err != nil {
		t.Fatalf("%+v: %v", o, err)
	}
	closeImage(t, m)
}

// otherBitmaps makes another image whose bitmaps are merged.
func otherBitmaps(t *testing.T, r *rand.Rand, dir string, size int64) (string, tracked) {
	t.Helper()
	path, all := filepath.Join(dir, "other.qcow2"), tracked{}
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", path, strconv.FormatInt(size, 10))
	for _, grain := range []int64{512, 32 << 10, 1 << 20} {
		o := bitmapOp{how: "add", name: strconv.FormatInt(grain, 10), opts: BitmapOptions{Granularity: grain}}
		changeBitmap(t, path, o, false)
		all.track(o, size, nil)
	}
	qemuDirtyWrites(t, r, path, size, all)
	return path, all
}

// qemuDirtyWrites writes to the disk with QEMU, which sets bits.
func qemuDirtyWrites(t *testing.T, r *rand.Rand, path string, size int64, all tracked) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for range 3 {
		off, n := randomRange(r, size, size/6)
		off, n = off&^511, (n+511)&^511
		n = min(n, size-off)
		args = append(args, "-c", fmt.Sprintf("%s %d %d", [...]string{"write", "write -z"}[r.IntN(2)], off, n))
		all.wrote(off, n)
	}
	if out, err := exec.Command("qemu-io", append(args, path)...).CombinedOutput(); err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io: %v\n%s", err, out)
	}
}

// TestBitmapRefused shows what is refused, by kind and words, and that the file is
// what it was then.
func TestBitmapRefused(t *testing.T) {
	ctx := t.Context()
	good := readFile(t, withBitmaps(t, CreateOptions{Size: 1 << 20}))
	add := func(name string, grain int64) func(*Image) error {
		return func(m *Image) error { return m.AddBitmap(ctx, name, BitmapOptions{Granularity: grain}) }
	}
	ext := int64(bytes.Index(good, []byte{0x23, 0x85, 0x28, 0x75}))
	dir := int64(tableEntry(good, ext+8+16))
	old := readFile(t, create(t, CreateOptions{Size: 1 << 20, Version: 2}))
	none := readFile(t, create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512}))
	full := append([]byte(nil), none...)
	copy(full[headerLengthOur:], append(appendExtension(nil, 0x12345678, make([]byte, 376)), make([]byte, 8)...))
	for _, c := range []struct {
		start  []byte
		change func(m *Image) error
		kind   error
		says   string
	}{
		{good, add("a", 0), ErrInvalidOption, "already"},
		{good, add("", 0), ErrInvalidOption, "1023"},
		{good, add(strings.Repeat("x", 1024), 0), ErrInvalidOption, "1023"},
		{good, add("x\x00y", 0), ErrInvalidOption, "1023"},
		{good, add("x", 256), ErrInvalidOption, "power of two"},
		{good, add("x", 4<<30), ErrInvalidOption, "power of two"},
		{good, add("x", 1000), ErrInvalidOption, "power of two"},
		{good, add("x", -512), ErrInvalidOption, "power of two"},
		{old, add("x", 0), ErrUnsupported, "version 2"},
		{readFile(t, create(t, CreateOptions{})), add("x", 0), ErrUnsupported, "no bytes"},
		{readFile(t, create(t, CreateOptions{Size: 64 << 40})), add("x", 4096), ErrUnsupported, "512 MiB"},
		{full, add("x", 0), ErrUnsupported, "no room"},
		{good, func(m *Image) error { return m.RemoveBitmap(ctx, "x") }, ErrNoBitmap, `"x"`},
		{good, func(m *Image) error { return m.ClearBitmap(ctx, "x") }, ErrNoBitmap, `bitmap "x"; it has "a", "b"`},
		{good, func(m *Image) error { return m.MergeBitmap(ctx, "a", m, "x") }, ErrNoBitmap, `"x"`},
		{patched(good, dir+12, 4, 3), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrBitmapInUse, "calf image bitmap -f qcow2 --remove"},
		{patched(good, dir+12, 4, 3), func(m *Image) error { return m.EnableBitmap(ctx, "a") }, ErrBitmapInUse, ""},
		{patched(good, dir+12, 4, 3), func(m *Image) error { return m.DisableBitmap(ctx, "a") }, ErrBitmapInUse, ""},
		{patched(good, dir+12, 4, 3), func(m *Image) error { return m.MergeBitmap(ctx, "a", m, "b") }, ErrBitmapInUse, ""},
		{patched(good, dir+12, 4, 3), func(m *Image) error { return m.MergeBitmap(ctx, "b", m, "a") }, ErrBitmapInUse, ""},
		{patched(good, dir+12, 4, 8), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrUnsupported, "unknown kind"},
		{patched(good, dir+16, 1, 2), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrUnsupported, "unknown kind"},
		{patched(good, dir+17, 1, 8), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrCorrupt, "granularity"},
		{patched(good, dir+17, 1, 32), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrCorrupt, "granularity"},
		{patched(good, dir+8, 4, 2), func(m *Image) error { return m.ClearBitmap(ctx, "a") }, ErrCorrupt, "does not agree"},
	} {
		f := &memFile{data: append([]byte(nil), c.start...)}
		m, err := openFile(f, "memory", Options{}, &chain{})
		must(t, err)
		if err := c.change(m); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.says, err)
		}
		closeImage(t, m)
		if n := min(len(f.data), len(c.start)); checkState(f.data) != nil && !errors.Is(c.kind, ErrCorrupt) || !bytes.Equal(f.data[:512], c.start[:512]) || n < len(c.start) {
			t.Errorf("%s: the image has changed", c.says)
		}
	}
	m := open(t, withBitmaps(t, CreateOptions{Size: 1 << 20}), Options{ReadOnly: true})
	if err := m.ClearBitmap(ctx, "a"); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	longer := open(t, withBitmaps(t, CreateOptions{Size: 2 << 20}), Options{})
	for _, from := range []*Image{m, open(t, withBitmaps(t, CreateOptions{Size: 2 << 20}), Options{})} {
		if err := longer.MergeBitmap(ctx, "a", from, "a"); !errors.Is(err, ErrInvalidOption) {
			t.Error(err)
		}
	}
}

// patched is a copy of b with a field changed.
func patched(b []byte, off int64, width int, value uint64) []byte {
	b = append([]byte(nil), b...)
	put(b, off, width, value)
	return b
}

// TestManyBitmaps adds large bitmaps until there is no room for more.
func TestManyBitmaps(t *testing.T) {
	const grain, entries = 1024, 1 << 17 // of 512 MiB of bits in clusters of 4 KiB
	f := &memFile{data: readFile(t, create(t, CreateOptions{Size: entries * 4096 * 8 * grain, ClusterSize: 4096}))}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	for i := range maxBitmapEntries / entries {
		must(t, m.AddBitmap(t.Context(), fmt.Sprint(i), BitmapOptions{Granularity: grain}))
	}
	if err := m.AddBitmap(t.Context(), "more", BitmapOptions{Granularity: grain}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "parts") {
		t.Error(err)
	}
	closeImage(t, m)
	m, err = openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	closeImage(t, m)
}

// TestBitmapsWhileWriting changes the bitmaps of a disk while others write to it and
// read a bitmap: every write is there, the reader ends with whole contents or an error,
// and an enabled bitmap is marked as in use if a write came after its last change.
func TestBitmapsWhileWriting(t *testing.T) {
	r := newSeed(t)
	path := withBitmaps(t, CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	m := open(t, path, Options{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range uint64(3) {
		wg.Go(func() {
			for seq := uint64(1); ; seq++ {
				select {
				case <-stop:
					return
				default:
				}
				lba := seq%1000*3 + g
				if err := m.WritevAt([][]byte{stamps(lba, 1, seq)}, int64(lba*sector)); err != nil {
					t.Error(err)
					return
				}
				for r, err := range m.DirtyRanges("b") {
					if err == nil && (r.Offset < 0 || r.Length <= 0 || r.Offset+r.Length > m.Size()) {
						t.Errorf("the range %v", r)
					}
				}
			}
		})
	}
	for i := range 30 {
		name := fmt.Sprint(i)
		must(t, m.AddBitmap(t.Context(), name, BitmapOptions{Granularity: 512 << r.IntN(8)}))
		if i%3 > 0 {
			must(t, m.MergeBitmap(t.Context(), "b", m, "b"))
			must(t, m.RemoveBitmap(t.Context(), name))
		}
	}
	close(stop)
	wg.Wait()
	must(t, m.AddBitmap(t.Context(), "new", BitmapOptions{}))
	closeImage(t, m)
	if list := qemuBitmaps(t, path); len(list) != 13 || list[12] != (Bitmap{"new", 4096, true, false}) || !list[0].InUse {
		t.Errorf("the bitmaps are %v", list)
	}
	qemu(t, "qemu-img", "check", "-q", path)
	m = open(t, path, Options{})
	if _, err := m.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	closeImage(t, m)
	if list := qemuBitmaps(t, path); !list[12].InUse || list[1].InUse {
		t.Errorf("the bitmaps are %v", list)
	}
}

// TestApplyWithBitmaps shows that a snapshot of a disk with another length is not
// applied while there are bitmaps, and that one of the same length marks them.
func TestApplyWithBitmaps(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	m := open(t, path, Options{})
	must(t, changeSnapshot(m, "-c", "s"))
	must(t, m.Resize(t.Context(), 2<<20, ResizeOptions{}))
	closeImage(t, m)
	sameBitmaps(t, path, false)
	m = open(t, path, Options{})
	if err := changeSnapshot(m, "-a", "s"); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "1048576 bytes long before") {
		t.Error(err)
	}
	must(t, m.Resize(t.Context(), 1<<20, ResizeOptions{Shrink: true}))
	must(t, changeSnapshot(m, "-a", "s"))
	closeImage(t, m)
	sameBitmaps(t, path, true)
}

// TestBitmapExtension removes all bitmaps of an image that has another extension behind
// theirs, which then stays and is void, and adds one again.
func TestBitmapExtension(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 1 << 20})
	b := readFile(t, path)
	end := int64(bytes.Index(b, []byte{0x23, 0x85, 0x28, 0x75})) + extensionHead + bitmapExtension
	copy(b[end:], appendExtension(appendExtension(nil, 0x12345678, []byte("kept")), extEnd, nil))
	writeFile(t, path, b)
	for range 2 {
		m := open(t, path, Options{})
		must(t, errors.Join(m.RemoveBitmap(t.Context(), "a"), m.RemoveBitmap(t.Context(), "b")))
		if all, err := m.Bitmaps(); err != nil || len(all) > 0 {
			t.Errorf("%v, %v", all, err)
		}
		must(t, m.AddBitmap(t.Context(), "a", BitmapOptions{Granularity: 65536}))
		must(t, m.AddBitmap(t.Context(), "b", BitmapOptions{Granularity: 512, Disabled: true}))
		closeImage(t, m)
		sameBitmaps(t, path, false)
	}
	if b := readFile(t, path); string(b[end+extensionHead:][:4]) != "kept" {
		t.Error("the other extension is gone")
	}
	// A void extension of another length has no room.
	put(b, offAutoclear, 8, 0)
	put(b, end-bitmapExtension-4, 4, 16)
	put(b, end-8, 8, 0)
	f := &memFile{data: b}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	if err := m.AddBitmap(t.Context(), "a", BitmapOptions{}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "no room") {
		t.Error(err)
	}
	closeImage(t, m)
	if !bytes.Equal(f.data[:65536], b[:65536]) {
		t.Error("the header has changed")
	}
}

// TestDirtyRangesOfChanged changes the bitmaps while one is read, which ends with an
// error rather than with what has come into its clusters.
func TestDirtyRangesOfChanged(t *testing.T) {
	path := withBitmaps(t, CreateOptions{Size: 8 << 20, ClusterSize: 512})
	qemu(t, "qemu-img", "bitmap", "--enable", path, "b")
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write 3M 512", "-c", "write 5M 512", path)
	m := open(t, path, Options{})
	next, stop := iter.Pull2(m.DirtyRanges("b")) // of an entry for each 2 MiB
	defer stop()
	if r, err, ok := next(); !ok || err != nil || r != (Range{100 << 10, 200 << 10}) {
		t.Fatalf("%v, %v, %v", r, err, ok)
	}
	must(t, m.ClearBitmap(t.Context(), "b"))
	if r, err, ok := next(); !ok || err == nil || !strings.Contains(err.Error(), "while bitmaps changed") {
		t.Errorf("%v, %v, %v", r, err, ok)
	}
}

// TestBitmapTail makes a disk shorter inside a dirty range: the bits behind its end are
// zeros, as the format has it, and the disk gains none of them back.
func TestBitmapTail(t *testing.T) {
	m := open(t, withBitmaps(t, CreateOptions{Size: 1 << 20}), Options{})
	must(t, m.Resize(t.Context(), 200<<10, ResizeOptions{Shrink: true}))
	b, err := m.loadBitmap("b")
	must(t, err)
	data := make([]byte, m.clusterSize)
	must(t, readFull(m.file, data, int64(b.table[0])))
	if first := nextBit(data, 0, 8<<16, true); first != 200 {
		t.Errorf("bit %d is the first", first)
	}
	if last := nextBit(data, 400, 8<<16, true); last != 8<<16 {
		t.Errorf("bit %d is set, behind the end of the disk", last)
	}
	must(t, m.Resize(t.Context(), 2<<20, ResizeOptions{}))
	if got, err := dirtyOf(m, "b"); err != nil || !slices.Equal(got, []Range{{100 << 10, 100 << 10}}) {
		t.Errorf("%v, %v", got, err)
	}
}

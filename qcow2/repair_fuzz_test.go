package qcow2

import (
	"bytes"
	"errors"
	"runtime"
	"testing"
)

// mutation is a change of 8 bytes of an image: at any place to any value, or of a
// whole entry of a table to one that may lead somewhere.
type mutation struct {
	off   uint32
	value uint64
}

const plausible = 1 << 31 // in off

func (u mutation) apply(b []byte, clusterSize uint64) {
	off := int64(u.off&^plausible) % int64(len(b)-8)
	if u.off&plausible == 0 {
		put(b, off, 8, u.value)
		return
	}
	to := u.value & 0xffff % (uint64(len(b))/clusterSize + 2) * clusterSize
	if u.value>>16&7 == 0 {
		to += u.value >> 19 & 1023 &^ 511
	}
	put(b, off&^7, 8, u.value>>62<<62|to|u.value>>61&1)
}

// mangle breaks an image, repairs it, and compares what can be read of it with
// what could be read before. A repair that claims success is put to the test.
func mangle(t *testing.T, good []byte, mutations []mutation) {
	t.Helper()
	cs := uint64(1) << (&inspector{b: good}).at(16) // the 4 bytes at 20 are the low half
	b := append([]byte(nil), good...)
	for _, u := range mutations {
		u.apply(b, cs)
	}
	f := &memFile{data: append([]byte(nil), b...)}
	before := guestView(b)
	_, after, err := repairIn(t.Context(), f, "fuzz", RepairAll, CheckOptions{MemoryBytes: 4 << 20})
	if err != nil {
		if e, ok := errors.AsType[*Error](err); !ok || e.Kind == nil {
			t.Fatalf("%v: %v", mutations, err)
		}
		return
	}
	now := guestView(f.data)
	for c, data := range before {
		if got := now[c]; !bytes.Equal(got, data) {
			t.Fatalf("%v: the guest sees other data in cluster %d", mutations, c)
		}
	}
	again, err := checkIn(t.Context(), f, "fuzz", CheckOptions{})
	if err != nil || again.Leaks != after.Leaks || again.Corruptions != after.Corruptions {
		t.Fatalf("%v: %+v after the repair, then %+v (%v)", mutations, after, again, err)
	}
	if after.Clean() {
		takesWrites(t, f, mutations)
	}
}

// mostSeen is how much of a disk the fuzzer looks at.
const mostSeen = 256 << 10

// guestView returns what the guest of the image in b sees in each cluster at the
// beginning of its disk that can be read.
func guestView(b []byte) map[int64][]byte {
	m, err := openFile(&memFile{data: append([]byte(nil), b...)}, "fuzz", Options{ReadOnly: true, NoBacking: true}, &chain{})
	if err != nil {
		return nil
	}
	defer m.Close()
	view := map[int64][]byte{}
	for off := int64(0); off < min(m.Size(), mostSeen); off += m.ClusterSize() {
		data := make([]byte, min(m.ClusterSize(), m.Size()-off))
		if _, err := m.ReadAt(data, off); err == nil {
			view[off/m.ClusterSize()] = data
		}
	}
	return view
}

// takesWrites overwrites the disk of the image in f, which then has what was
// written and no corruption.
func takesWrites(t *testing.T, f *memFile, mutations []mutation) {
	t.Helper()
	m, err := openFile(f, "fuzz", Options{NoBacking: true}, &chain{})
	if errors.Is(err, ErrUnsupported) || errors.Is(err, ErrBackingRefused) {
		return
	}
	if err != nil {
		t.Fatalf("%v: a clean image does not open: %v", mutations, err)
	}
	b := bytes.Repeat([]byte{0xe5}, int(min(m.Size(), mostSeen)))
	if _, err := m.WriteAt(b, 0); err != nil {
		t.Fatalf("%v: a write to a clean image: %v", mutations, err)
	}
	got := make([]byte, len(b))
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("%v: reading what was written: %v", mutations, err)
	}
	if err := m.Close(); err != nil {
		t.Fatalf("%v: close: %v", mutations, err)
	}
	x, err := newChecker(t.Context(), f, "fuzz", CheckOptions{})
	must(t, err)
	must(t, x.check())
	// Counts beyond what was the end of the file may leak now. A cluster that two
	// entries shared is one's alone, and that one does not know.
	if x.result.Corruptions > x.flags {
		t.Fatalf("%v: after writing: %+v", mutations, x.result)
	}
}

// FuzzCheckRepair mutates the header and the tables of an image and repairs it:
// it ends, in bounded memory, never panics, never changes what the guest sees,
// and is right when it claims success.
func FuzzCheckRepair(f *testing.F) {
	images := fuzzImages(f)
	f.Add(uint8(0), uint32(48), uint64(0), uint32(56), uint64(0), uint32(1<<31|0x600), uint64(1<<63|4))
	f.Add(uint8(1), uint32(1<<31|0x400), uint64(7), uint32(64), uint64(1<<32), uint32(1<<31|0xc00), uint64(1<<63|3))
	f.Add(uint8(2), uint32(1<<31|0x3000), uint64(3), uint32(20), uint64(12<<32), uint32(0x2000), uint64(0))
	f.Fuzz(func(t *testing.T, which uint8, off1 uint32, v1 uint64, off2 uint32, v2 uint64, off3 uint32, v3 uint64) {
		mangle(t, images[int(which)%len(images)].data, []mutation{{off1, v1}, {off2, v2}, {off3, v3}})
	})
}

// TestMangle does for a while what the fuzzer does without end.
func TestMangle(t *testing.T) {
	images := fuzzImages(t)
	r := newSeed(t)
	rounds := 1500
	if brief() {
		rounds = 150
	}
	for range rounds {
		image := images[r.IntN(len(images))]
		var all []mutation
		for range 1 + r.IntN(3) {
			u := mutation{off: r.Uint32N(112), value: r.Uint64()}
			if r.IntN(8) > 0 {
				u.off = plausible | uint32(image.tables[r.IntN(len(image.tables))]) + r.Uint32N(512)
			}
			all = append(all, u)
		}
		mangle(t, image.data, all)
	}
}

// TestCheckMemory gives a check tables of impossible length and a file of
// impossible length: it neither takes memory nor time for them.
func TestCheckMemory(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 512})
	for name, pokes := range map[string][]poke{
		"nothing":          nil,
		"L1 table":         {{36, 4, 4 << 20}, {24, 8, 1 << 36}},
		"count table":      {{56, 4, 16 << 10}},
		"snapshots":        {{60, 4, 65536}, {64, 8, 0x400}},
		"bitmap directory": {{offAutoclear, 8, 1}, {112, 8, extBitmaps<<32 | 24}, {120, 8, 65535 << 32}, {128, 8, 64 << 20}, {136, 8, 0x400}},
		"entry at 32 PB":   {{int64((&inspector{b: good}).at(40)), 8, 0x0080000000000000}},
	} {
		b := append([]byte(nil), good...)
		for _, p := range pokes {
			put(b, p.off, p.width, p.value)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := repairIn(t.Context(), &longFile{memFile{data: b}}, name, RepairAll, CheckOptions{MemoryBytes: 1 << 20})
		runtime.ReadMemStats(&after)
		if err != nil && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
			t.Errorf("%s: the check took %d MiB (%v)", name, n>>20, err)
		}
	}
}

// longFile says that it is as long as a file may be.
type longFile struct{ memFile }

func (*longFile) Size() (int64, error) { return 1 << 62, nil }

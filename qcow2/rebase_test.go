package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// under is a backing file by name and format.
type under struct{ name, format string }

// randomUnder returns a backing file whose name has up to most bytes, or none.
func randomUnder(r *rand.Rand, most int) under {
	if r.IntN(4) == 0 {
		return under{}
	}
	name := strings.Repeat("n", 1+r.IntN(most)-1) + string(rune('a'+r.IntN(26)))
	return under{name, [...]string{"raw", "qcow2"}[r.IntN(2)]}
}

// underIn is what the image in b lies over. The rest of it has to be as in the
// beginning: its extensions but that for the format, and the header.
func underIn(b, beginning []byte) (under, error) {
	m := &Image{path: "memory", file: &memFile{data: b}}
	info, err := m.examine()
	if err == nil {
		err = errors.Join(info.Faults...)
	}
	if err != nil {
		return under{}, err
	}
	if got, want := restOf(b), restOf(beginning); !bytes.Equal(got, want) {
		return under{}, fmt.Errorf("the rest of the first cluster was\n%x\nand is\n%x", want, got)
	}
	return under{info.BackingFile, info.BackingFormat}, checkState(b)
}

// restOf is what the first cluster of the image has beside a backing file.
func restOf(b []byte) []byte {
	h, err := parseHeader(b)
	if err != nil {
		return nil
	}
	rest := bytes.Clone(b[:h.length])
	clear(rest[8:20])
	if h.version > 2 {
		rest[offAutoclear] &^= 1 << 7 // of an unknown feature, in underImage
	}
	for kind, data := range h.extensions(b[:1<<h.clusterBits]) {
		if kind != extBackingFormat && kind != extSkip {
			rest = append(binary.BigEndian.AppendUint32(rest, kind), data...)
		}
	}
	return rest
}

// underImages are what backing files are changed of: how QEMU makes the image, and
// the longest names that fit beside another.
var underImages = []struct {
	options, base string
	longest       int
	unknown       int // bytes of an extension that nobody knows
}{
	{"cluster_size=512", "", 100, 16},
	{"cluster_size=64k", "base.raw", 1023, 0},
	{"cluster_size=64k", "", 1023, 0},
	{"cluster_size=4k", "base.raw", 1023, 9},
	{"cluster_size=4k", "", 800, 500},
	{"cluster_size=64k,compat=0.10", "base.raw", 1023, 2000},
	{"cluster_size=2k,compat=0.10", "", 500, 1},
	{"cluster_size=64k,extended_l2=on,compression_type=zstd", "", 1023, 3},
}

// underImage makes one of them.
func underImage(t *testing.T, i int) []byte {
	t.Helper()
	x := underImages[i]
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	args := []string{"create", "-q", "-f", "qcow2", "-o", x.options}
	if x.base != "" {
		args = append(args, "-u", "-b", x.base, "-F", "raw")
	}
	qemu(t, "qemu-img", append(args, path, "1M")...)
	b := readFile(t, path)
	if x.unknown > 0 {
		b = withUnknown(t, b, x.unknown)
	}
	if !strings.Contains(x.options, "compat") {
		b[offAutoclear] |= 1 << 7
	}
	return b
}

// tidy returns an error if the change of a backing file has left something behind.
func tidy(b []byte) error {
	h, err := parseHeader(b)
	if err != nil {
		return err
	}
	first := b[:1<<h.clusterBits]
	for kind := range h.extensions(first) {
		if kind == extSkip {
			return errors.New("what lay in the way is still there")
		}
	}
	if !isZero(first[h.usedFirst(first):]) {
		return errors.New("there is something behind what is in use")
	}
	if h.autoclear>>63 != 0 {
		return errors.New("an unknown feature is still said to be right")
	}
	return nil
}

// withUnknown adds an extension of n bytes to the image in b.
func withUnknown(t *testing.T, b []byte, n int) []byte {
	t.Helper()
	h, err := parseHeader(b)
	must(t, err)
	name := bytes.Clone(b[h.backingOffset:][:h.backingSize])
	at := h.length
	for _, data := range h.extensions(b[:1<<h.clusterBits]) {
		at += uint32(extensionHead + (len(data)+7)&^7)
	}
	ext := appendExtension(nil, 0x12345678, bytes.Repeat([]byte{0xee}, n))
	copy(b[at:], append(append(ext, make([]byte, extensionHead)...), name...))
	if len(name) > 0 {
		put(b, offBackingName, 8, uint64(at)+uint64(len(ext))+extensionHead)
	}
	return b
}

// TestSetBacking changes backing files at random; QEMU sees each change, and
// everything else as it was.
func TestSetBacking(t *testing.T) {
	r := newSeed(t)
	turns := 12
	if brief() {
		turns = 4
	}
	for i, x := range underImages {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		beginning := underImage(t, i)
		writeFile(t, path, beginning)
		for range turns {
			want := randomUnder(r, x.longest)
			must(t, SetBacking(path, want.name, want.format))
			if got, err := underIn(readFile(t, path), beginning); err != nil || got != want {
				t.Fatalf("%+v: %v, want %v; %v", x, got, want, err)
			}
			must(t, tidy(readFile(t, path)))
			out := qemu(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path)
			if has := strings.Contains(out, `"backing-filename": "`+want.name+`"`); has != (want.name != "") {
				t.Fatalf("%+v: want %v, QEMU says %s", x, want, out)
			}
			if has := strings.Contains(out, `"backing-filename-format": "`+want.format+`"`); has != (want.name != "") {
				t.Fatalf("%+v: want %v, QEMU says %s", x, want, out)
			}
		}
		must(t, SetBacking(path, "", ""))
		qemu(t, "qemu-img", "check", "-q", path)
	}
}

// underRun records some changes of the backing file of image i.
func underRun(t *testing.T, r *rand.Rand, i int, noBarrier func(string) bool) (*crashRun, []under, []int) {
	t.Helper()
	b := underImage(t, i)
	run := &crashRun{start: b, f: &memFile{data: bytes.Clone(b), rec: true, noBarrier: noBarrier}}
	first, err := underIn(b, b)
	must(t, err)
	all, marks := []under{first}, []int{0}
	for range 4 {
		u := randomUnder(r, underImages[i].longest)
		must(t, (&Image{path: "memory", file: run.f}).setUnopened(u.name, u.format))
		all, marks = append(all, u), append(marks, run.f.mark("flush"))
	}
	return run, all, marks
}

// judgeUnder returns an error unless the state is one that a power cut may leave.
func (run *crashRun) judgeUnder(s state, all []under, marks []int) error {
	i := 0
	for i+1 < len(marks) && marks[i+1] < s.cut {
		i++
	}
	got, err := underIn(s.data, run.start)
	if err == nil && got != all[i] && got != all[min(i+1, len(all)-1)] {
		err = fmt.Errorf("the backing file is %v, was %v", got, all[i:min(i+2, len(all))])
	}
	if err == nil { // and it can be changed again
		f := &memFile{data: bytes.Clone(s.data)}
		if err = (&Image{path: "memory", file: f}).setUnopened("", ""); err == nil {
			err = tidy(f.data)
		}
	}
	if err != nil {
		return fmt.Errorf("%s at %d, after change %d: %w", s.what, s.cut, i, err)
	}
	return nil
}

// TestCrashSetBacking cuts the power while backing files change: there is the old
// one or the new one, each with its format.
func TestCrashSetBacking(t *testing.T) {
	n := 300
	if brief() {
		n = 60
	}
	for i := range underImages {
		r := newSeed(t)
		run, all, marks := underRun(t, r, i, nil)
		run.states(r, n, func(s state) bool {
			if err := run.judgeUnder(s, all, marks); err != nil {
				t.Errorf("%+v: %v", underImages[i], err)
			}
			return !t.Failed()
		})
	}
}

// underWithout is the control of a barrier: see controls.
func underWithout(t *testing.T, r *rand.Rand, noBarrier func(string) bool) (found error) {
	run, all, marks := underRun(t, r, 1, noBarrier)
	run.statesAt(afterLost(run.f.log, cuts(run.f.log, r, 5000), 300), func(s state) bool {
		found = run.judgeUnder(s, all, marks)
		return found == nil
	})
	return found
}

// TestFaultySetBacking fails each file operation of a change: it has not happened,
// or nobody can tell, and all the rest is as it was.
func TestFaultySetBacking(t *testing.T) {
	r := newSeed(t)
	for i, x := range underImages {
		b := underImage(t, i)
		from, err := underIn(b, b)
		must(t, err)
		to := under{strings.Repeat("x", x.longest), "qcow2"}
		for at := 1; ; at++ {
			f := &memFile{data: bytes.Clone(b)}
			ops, bad := 0, fault{at, [...]syscall.Errno{syscall.EIO, syscall.ENOSPC}[r.IntN(2)], r.IntN(2) == 0}
			f.setFail(func(op string) error {
				if ops++; bad.hits(ops, op) {
					return bad.errno
				}
				return nil
			})
			err := (&Image{path: "memory", file: f}).setUnopened(to.name, to.format)
			f.setFail(nil)
			if err != nil && !known(err) {
				t.Errorf("%v: %v", bad, err)
			}
			got, badState := underIn(f.data, b)
			if badState != nil || got != to && (err == nil || got != from) {
				t.Errorf("%+v, %v: the backing file is %v; %v, %v", x, bad, got, err, badState)
			}
			if ops < at {
				break
			}
		}
	}
}

// TestSetBackingRefused shows what is refused, with the file unchanged.
func TestSetBackingRefused(t *testing.T) {
	t.Chdir(t.TempDir())
	must(t, Create("small.qcow2", CreateOptions{Size: 1 << 20, ClusterSize: 1024, BackingFile: strings.Repeat("o", 500), BackingFormat: "raw"}))
	must(t, Create("raw.qcow2", CreateOptions{Size: 1 << 20, DataFile: "data", DataFileRaw: true}))
	must(t, Create("disk.qcow2", CreateOptions{Size: 1 << 20}))
	corrupt := create(t, CreateOptions{Size: 1 << 20})
	b := readFile(t, corrupt)
	put(b, offIncompatible, 8, 1<<incompatCorrupt)
	writeFile(t, "corrupt.qcow2", b)
	put(b, offIncompatible, 8, 1<<63)
	writeFile(t, "unknown.qcow2", b)
	writeFile(t, "not.qcow2", make([]byte, 4096))
	for _, c := range []struct {
		path, name, format string
		kind               error
	}{
		{"disk.qcow2", strings.Repeat("n", 1024), "raw", ErrInvalidOption},
		{"disk.qcow2", "a\x00b", "raw", ErrInvalidOption},
		{"disk.qcow2", "nbd://here", "raw", ErrInvalidOption},
		{"disk.qcow2", `json:{"driver":"raw"}`, "raw", ErrInvalidOption},
		{"disk.qcow2", "a", "", ErrInvalidOption},
		{"disk.qcow2", "a", "vmdk", ErrInvalidOption},
		{"small.qcow2", strings.Repeat("n", 900), "raw", ErrInvalidOption},
		{"small.qcow2", strings.Repeat("n", 501), "raw", ErrUnsupported},
		{"raw.qcow2", "a", "raw", ErrInvalidOption},
		{"corrupt.qcow2", "a", "raw", ErrCorrupt},
		{"unknown.qcow2", "a", "raw", ErrUnsupported},
		{"not.qcow2", "a", "raw", ErrNotQCOW2},
		{"none.qcow2", "a", "raw", os.ErrNotExist},
	} {
		before, _ := os.ReadFile(c.path)
		if err := SetBacking(c.path, c.name, c.format); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.path) {
			t.Errorf("%+v: %v", c, err)
		}
		if after, _ := os.ReadFile(c.path); !bytes.Equal(before, after) {
			t.Errorf("%+v: the file has changed", c)
		}
	}
	m := open(t, "disk.qcow2", Options{ReadOnly: true})
	defer closeImage(t, m)
	if err := m.SetBacking("a", "raw"); !errors.Is(err, ErrReadOnly) {
		t.Errorf("read-only: %v", err)
	}
	if err := SetBacking("disk.qcow2", "a", "raw"); !errors.Is(err, ErrLocked) {
		t.Errorf("in use: %v", err)
	}
}

// TestBackingSize makes ranges zero where the backing file has ended, or there is
// none: a longer one that the image gets does not show in them.
func TestBackingSize(t *testing.T) {
	for _, version := range []int{2, 3} {
		for _, extended := range []bool{false, version == 3} {
			t.Chdir(t.TempDir())
			const size = 1 << 20
			writeFile(t, "short.raw", bytes.Repeat([]byte{1}, size/4))
			writeFile(t, "long.raw", bytes.Repeat([]byte{2}, size))
			for _, old := range []under{{}, {"short.raw", "raw"}} {
				_ = os.Remove("disk.qcow2")
				must(t, Create("disk.qcow2", CreateOptions{
					Size: size, Version: version, ExtendedL2: extended, BackingFile: old.name, BackingFormat: old.format,
				}))
				want := bytes.Repeat([]byte{2}, size)
				m := open(t, "disk.qcow2", Options{BackingSize: size})
				for _, hole := range [][2]int{{0, 1000}, {size/4 - 70000, 140000}, {size/2 + 1, 3}, {size - 99999, 99999}} {
					must(t, m.PunchHole(int64(hole[0]), int64(hole[1])))
					clear(want[hole[0]:][:hole[1]])
				}
				before := make([]byte, size)
				must(t, m.ReadvAt([][]byte{before}, 0))
				for e, err := range m.Map(0, size) {
					must(t, err)
					if e.Layer == 0 && e.Kind != MapUnallocated { // with whole clusters around
						copy(want[e.Offset:], before[e.Offset:][:e.Length])
					}
				}
				must(t, m.SetBacking("long.raw", "raw"))
				closeImage(t, m)
				if got := content(t, "disk.qcow2", ""); !bytes.Equal(got, want) {
					t.Errorf("version %d, extended %v, over %v: the disk shows what it should hide", version, extended, old)
				}
				checkClean(t, "disk.qcow2")
			}
		}
	}
}

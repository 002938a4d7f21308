package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
)

// hostileImage returns a small good image with data in its first clusters, and
// the offset of its L2 table.
func hostileImage(t testing.TB, opts CreateOptions) (b []byte, l2 int64) {
	t.Helper()
	path := create(t, opts)
	m := open(t, path, Options{})
	if _, err := m.WriteAt(make([]byte, 3*m.clusterSize), 0); err != nil {
		t.Fatal(err)
	}
	l2 = int64(m.l1[0] & entryOffset)
	closeImage(t, m)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b, l2
}

func put(b []byte, off int64, width int, v uint64) {
	var e [8]byte
	binary.BigEndian.PutUint64(e[:], v)
	copy(b[off:], e[8-width:])
}

// metadata calls visit with the ranges of the metadata in b that its own tables
// reach, until visit returns false. b may be broken: what does not fit into it
// is left out.
func metadata(b []byte, visit func(off, n int64) bool) {
	be := binary.BigEndian
	cs := int64(1) << be.Uint32(b[20:])
	more := true
	see := func(off uint64, n int64) []byte {
		if !more || off > uint64(len(b)) {
			return nil
		}
		n = min(n, int64(len(b))-int64(off))
		more = visit(int64(off), n)
		return b[off : int64(off)+n]
	}
	tables := func(list []byte, n int64) {
		for ; more && len(list) >= 8; list = list[8:] {
			if e := be.Uint64(list) & entryOffset; e != 0 {
				see(e, n)
			}
		}
	}
	see(0, cs)
	tables(see(be.Uint64(b[offRefTable:]), int64(be.Uint32(b[56:]))*cs), cs)
	tables(see(be.Uint64(b[offL1Offset:]), int64(be.Uint32(b[36:]))*8), cs)
	off := be.Uint64(b[64:])
	for range be.Uint32(b[60:]) {
		e := see(off, snapshotFixed)
		if len(e) < snapshotFixed {
			break
		}
		see(be.Uint64(e), int64(be.Uint32(e[8:]))*8)
		off += (snapshotFixed + uint64(be.Uint16(e[12:])) + uint64(be.Uint16(e[14:])) + uint64(be.Uint32(e[36:])) + 7) &^ 7
	}
}

// hostilePath is the name of the image of a hostileRun.
const hostilePath = "hostile.qcow2"

// hostileRun is one use of an image that nobody trusts. It holds the engine to
// what it promises of any image.
type hostileRun struct {
	t     *testing.T
	f     *memFile
	under []byte // the backing file, nil if there is none
	m     *Image
	buf   []byte // guest data; a write of it is known by its place in memory
}

func newHostileRun(t *testing.T, b, under []byte) *hostileRun {
	return &hostileRun{t: t, f: &memFile{data: b}, under: under, buf: bytes.Repeat([]byte{0xa5}, 64<<10)}
}

// open opens the image. One that is refused is left as it was, unless it was dirty:
// then its repair may have come part of the way.
func (h *hostileRun) open(opts Options) error {
	before := append([]byte(nil), h.f.data...)
	opts.NoBacking = true
	m, err := openFile(&guardFile{file: h.f, run: h}, hostilePath, opts, &chain{})
	if err != nil {
		dirty := len(before) > offIncompatible+7 && before[offIncompatible+7]>>incompatDirty&1 != 0
		if !dirty && !bytes.Equal(before, h.f.data) {
			h.t.Errorf("a refused image was changed: %v", err)
		}
		return h.judge(err)
	}
	if h.under != nil {
		under := &rawBacking{file: &memFile{data: h.under}, readOnly: true}
		must(h.t, under.measure())
		m.backing = under
	}
	h.m = m
	return nil
}

// typed checks that an error tells what and where, and returns it.
func (h *hostileRun) typed(err error) error {
	var e *Error
	if err != nil && (!errors.As(err, &e) || e.Path != hostilePath || e.What == "") {
		h.t.Errorf("an error without a type or a name: %#v", err)
	}
	return err
}

// judge judges the error of a request, if it is one, and returns it.
func (h *hostileRun) judge(err error) error {
	if h.typed(err) == nil {
		return nil
	}
	if h.m != nil && !h.m.readOnly && h.m.version > 2 && errors.Is(err, ErrCorrupt) && !h.markedCorrupt() {
		h.t.Errorf("the image is not marked corrupt after: %v", err)
	}
	return err
}

func (h *hostileRun) markedCorrupt() bool {
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	return h.f.data[offIncompatible+7]>>incompatCorrupt&1 != 0
}

// guardFile sees to it that guest data and holes spare the metadata that the
// tables in the file reach.
type guardFile struct {
	file
	run *hostileRun
}

func (g *guardFile) WritevAt(iov [][]byte, off int64) error {
	at := off
	for _, b := range iov {
		if n := int64(len(b)); n > 0 && g.run.owns(b) {
			g.check(at, n, "guest data")
		}
		at += int64(len(b))
	}
	return g.file.WritevAt(iov, off)
}

// owns reports whether b is a part of buf.
func (h *hostileRun) owns(b []byte) bool {
	i := len(h.buf) - cap(b)
	return i >= 0 && &h.buf[i] == &b[0]
}

func (g *guardFile) Punch(off, n int64) error {
	g.check(off, n, "a hole")
	return g.file.Punch(off, n)
}

func (g *guardFile) check(off, n int64, what string) {
	g.run.f.mu.Lock()
	defer g.run.f.mu.Unlock()
	metadata(g.run.f.data, func(at, size int64) bool {
		if at < off+n && off < at+size {
			g.run.t.Errorf("%s at %#x, in the metadata at %#x", what, off, at)
			return false
		}
		return true
	})
}

// TestFeatureNames shows that a refusal uses the image's own name of a feature.
func TestFeatureNames(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	put(good, offIncompatible, 8, 1<<61)
	name := make([]byte, featureNameEntry)
	name[1] = 61
	copy(name[2:], "time travel")
	copy(good[headerLengthOur:], append(appendExtension(nil, extFeatureNames, name), appendExtension(nil, extEnd, nil)...))
	path := t.TempDir() + "/disk.qcow2"
	writeFile(t, path, good)
	_, err := Open(path, Options{})
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `"time travel"`) {
		t.Errorf("got %v", err)
	}
}

// TestCloseCorrupt shows that Close does not hide the loss of a write that was
// not flushed when something else in the image was found corrupt.
func TestCloseCorrupt(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, l2+8*8, 8, 0x8000000000052a00)
	path := t.TempDir() + "/hostile.qcow2"
	writeFile(t, path, good)
	m := open(t, path, Options{})
	if _, err := m.WriteAt([]byte("precious"), 5<<16); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(make([]byte, 10), 8<<16); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("read: %v", err)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
}

// TestHostileCompressed gives compressed clusters impossible data.
func TestHostileCompressed(t *testing.T) {
	run := compressedRun(t, 64<<10, 4096)
	m := run.open(t, &memFile{data: append([]byte(nil), run.start...)}, true)
	l2 := int64(m.l1[0] & entryOffset)
	first := binary.BigEndian.Uint64(run.start[l2:])
	for entry, good := range map[uint64]bool{
		0x4000_0000_0000_3000:         false, // a table as data
		0x40ff_0000_0000_0000:         false, // far beyond the end of the file
		first | 0x3c00_0000_0000_0000: true,  // longer than its data, past the end of the file
	} {
		f := &memFile{data: append([]byte(nil), run.start...)}
		put(f.data, l2, 8, entry)
		m := run.open(t, f, false)
		if _, err := m.ReadAt(make([]byte, 10), 0); (err == nil) != good {
			t.Errorf("entry %#x: %v", entry, err)
		}
		if _, err := m.ReadAt(make([]byte, 10), 4096); err != nil {
			t.Errorf("entry %#x: the next cluster: %v", entry, err)
		}
		_ = m.Close() // it may have found the corruption or not
	}
}

// TestCloseMarks makes two guest clusters zero that share a host cluster which is
// counted once. Only the last commit finds that out: it still marks the image.
func TestCloseMarks(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	shared := binary.BigEndian.Uint64(good[l2:]) &^ entryCopied
	put(good, l2, 8, shared)
	put(good, l2+8, 8, shared)
	path := t.TempDir() + "/hostile.qcow2"
	writeFile(t, path, good)
	m := open(t, path, Options{})
	if err := m.Discard(0, 2*m.clusterSize); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	if _, err := Open(path, Options{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "marked corrupt") {
		t.Errorf("opening it for writing again: %v", err)
	}
}

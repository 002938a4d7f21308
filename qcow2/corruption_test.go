package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The rows of QEMU's tests of broken images, by the number of the test, as far as
// they concern opening, reading, writing and discarding. TestCorruption has all
// but these:
//
//	029  a snapshot larger than the disk     TestSmallDiskWithLargeSnapshot
//	036  names of unknown features           TestFeatureNames
//	036  autoclear bits                      TestUnknownAutoclear
//	060  copy-on-write in flight             TestCorruptionDuringCopy
//	060  shrinking with a broken table       refused at open: "060 table entry 1 far"
//	080  making snapshots of broken images   TestSnapshotRefused
//	112, 138  counts of the header           for the check: nothing reads them
//	114  unknown format of the backing file  TestBackingFormat
//	214  compressed data beyond its sectors  TestCorruptCompressedSize
//	220  compressed beside full counts       TestFullCounts
//
// This engine reads all first-level tables when it opens an image for writing, so
// it refuses many of them there that QEMU would find at the first request, and
// leaves them unmarked. Where a request finds a fault, reads and discards by a
// writer mark the image like writes do: there is nobody to report it to but the
// caller.

// brokenField is a change of an image: the field of width bytes at off becomes value.
type brokenField struct {
	off   int64
	width int
	value uint64
}

// Places in the image "data", which QEMU made.
const (
	atTable = 0x10000
	atBlock = 0x20000
	atL1    = 0x30000
	atL2    = 0x40000
	atData  = 0x50000
)

// corruption is a broken image and how its use ends: what the error says, empty
// if there is none.
type corruption struct {
	name    string
	base    string // empty: "data"
	patches []brokenField
	kind    error // of every error; nil: ErrCorrupt
	opens   string
	writes  string // what only opening for writing says
	read    string // of the whole disk, by a reader and a writer
	write   string // of three bytes into each cluster, the first time it fails
	discard string // of the whole disk
}

func one(off int64, width int, value uint64) []brokenField { return []brokenField{{off, width, value}} }

var corruptions = []corruption{
	// The header.
	{name: "magic", patches: one(0, 4, 0x514649fa), kind: ErrNotQCOW2, opens: "raw"},
	{name: "version 1", patches: one(4, 4, 1), kind: ErrUnsupported, opens: "version 1"},
	{name: "version 4", patches: one(4, 4, 4), kind: ErrUnsupported, opens: "version 4"},
	{name: "080 backing offset ff", patches: one(8, 8, 1<<64-1), opens: "backing file name"},
	{name: "080 backing offset past the cluster", patches: one(8, 8, 0x10001), opens: "backing file name"},
	{name: "080 backing size", patches: []brokenField{{8, 8, 0x1000}, {16, 4, 1<<32 - 1}}, opens: "too long"},
	{name: "backing name in the header", patches: []brokenField{{8, 8, 50}, {16, 4, 4}}, opens: "backing file name"},
	{name: "backing size without a place", patches: one(16, 4, 4)},
	{name: "080 extension before the backing name", patches: []brokenField{{8, 8, 120}, {16, 4, 4}, {112, 4, 0x12345678}, {116, 4, 0x7fffffff}}, opens: "extension"},
	{name: "080 extension length", patches: one(116, 4, 0x7fffffff), opens: "extension"},
	{name: "cluster bits 8", patches: one(20, 4, 8), opens: "cluster size"},
	{name: "cluster bits 22", patches: one(20, 4, 22), opens: "cluster size"},
	{name: "cluster bits 64", patches: one(20, 4, 64), opens: "cluster size"},
	{name: "size", patches: one(24, 8, 1<<64-1), opens: "disk size"},
	{name: "size beyond L1", patches: one(24, 8, 1<<40), opens: "too small"},
	{name: "AES", patches: one(32, 4, 1), kind: ErrUnsupported, opens: "AES"},
	{name: "LUKS", patches: one(32, 4, 2), kind: ErrUnsupported, opens: "LUKS"},
	{name: "encryption 3", patches: one(32, 4, 3), kind: ErrUnsupported, opens: "method 3"},
	{name: "080 L1 size ff", patches: one(36, 4, 0xffffffff), opens: "L1 table"},
	{name: "080 L1 size 7f", patches: one(36, 4, 0x7fffffff), opens: "L1 table"},
	{name: "080 L1 size 0", patches: one(36, 4, 0), opens: "too small"},
	{name: "080 L1 size 0 with a snapshot", base: "snapshot", patches: one(36, 4, 0), opens: "too small"},
	{name: "080 L1 far", patches: []brokenField{{40, 8, 0x7fffffffffff0000}, {36, 4, 0xffff}}, opens: "L1 table"},
	{name: "080 L1 unaligned", patches: one(40, 8, 0x30200), opens: "not aligned"},
	{name: "L1 at the header", patches: one(40, 8, 0), opens: "header"},
	{name: "080 table offset", patches: one(48, 8, 0x1234567890abcdef), opens: "not aligned"},
	{name: "080 table far", patches: []brokenField{{48, 8, 0xffffffffffff0000}, {56, 4, 0x7f}}, opens: "outside"},
	{name: "060 108 table at the header", patches: one(48, 8, 0), opens: "header"},
	{name: "080 table clusters ff", patches: one(56, 4, 0xffffffff), opens: "8 MiB"},
	{name: "080 table clusters many", patches: one(56, 4, 0x20001), opens: "8 MiB"},
	{name: "060 108 no table", patches: one(56, 4, 0), opens: "no reference count table"},
	{name: "108 no table, at the header", patches: []brokenField{{48, 8, 0}, {56, 4, 0}}, opens: "no reference count table"},
	{name: "080 snapshots ff", patches: one(60, 4, 0xffffffff), opens: "snapshots"},
	{name: "080 snapshots 7f", patches: one(60, 4, 0x7fffffff), opens: "snapshots"},
	{name: "261 snapshots 131072", base: "snapshot", patches: one(60, 4, 131072), opens: "snapshots"},
	{name: "080 no snapshots, unaligned", patches: one(64, 8, 0x1234567890abcdef), opens: "snapshot table"},
	{name: "080 snapshots far", patches: []brokenField{{60, 4, 0xffff}, {64, 8, 0xffffffffffff0000}}, opens: "snapshot table"},
	{name: "080 empty snapshots to the limit", patches: []brokenField{{60, 4, 65536}, {64, 8, 16 << 20}, {16<<20 + 65536*40, 1, 0}}},
	{name: "036 bit 61", patches: one(72, 8, 1<<61), kind: ErrUnsupported, opens: "bit 61"},
	{name: "036 bit 62", patches: one(72, 8, 1<<62), kind: ErrUnsupported, opens: "bit 62"},
	{name: "036 bit 63", patches: one(72, 8, 1<<63), kind: ErrUnsupported, opens: "bit 63"},
	{name: "287 compression bit alone", patches: one(72, 8, 8), opens: "compression"},
	{name: "287 compression type alone", patches: one(104, 1, 1), opens: "compression"},
	{name: "compression type 2", patches: []brokenField{{72, 8, 8}, {104, 1, 2}}, kind: ErrUnsupported, opens: "compression type 2"},
	{name: "refcount order", patches: one(96, 4, 7), opens: "reference counts"},
	{name: "080 header length ff", patches: one(100, 4, 0xffffffff), opens: "header length"},
	{name: "080 header length 7f", patches: one(100, 4, 0x7fffffff), opens: "header length"},
	{name: "header length short", patches: one(100, 4, 96), opens: "header length"},
	{name: "dirty", patches: one(72, 8, 1)},
	{name: "corrupt", patches: one(72, 8, 2), writes: "calf image check -f qcow2 -r all"},

	// First-level tables.
	{name: "060 L1 entry at its table", patches: one(atL1, 8, 0x8000000000030000), writes: "claimed by two", read: ""},
	{name: "060 L1 entry unaligned", patches: one(atL1, 8, 0x8000000000042a00), writes: "L1 entry 0", read: "L1 entry 0"},
	{name: "060 L1 entry 2a2a2a2a", patches: one(atL1, 8, 0x2a2a2a2a), writes: "L1 entry 0", read: "L1 entry 0"},
	{name: "L1 entry outside", patches: one(atL1, 8, 0x8000000990040000), writes: "end of the file"},
	{name: "060 table entry unaligned", patches: one(atTable, 8, 0x22a00), writes: "entry 0 of the reference count table"},
	{name: "060 table entry in the header", patches: one(atTable, 8, 0x2a00), writes: "entry 0"},
	{name: "060 table entry far and unaligned", patches: one(atTable, 8, 0xffff2a00), writes: "entry 0"},
	{name: "060 table entry 0", patches: one(atTable, 8, 0), write: "no block for the header"},
	{name: "060 table entry 1 far", patches: one(atTable+8, 8, 0x00ffffff00000000), writes: "end of the file"},
	{name: "060 table entries 1 and 2", patches: []brokenField{{atTable + 8, 8, 0x1000000000}, {atTable + 16, 8, 0x200}}, writes: "reference count"},
	{name: "305 table entry 1 unaligned", patches: one(atTable+8, 8, 0x60006), writes: "entry 1"},
	{name: "108 table entry 1 past the end", patches: one(atTable+8, 8, 0x100000), writes: "end of the file"},
	{name: "108 table entry 1 far", patches: one(atTable+8, 8, 0x7fffffffffff0000), writes: "end of the file"},
	{name: "108 table entry 1 negative", patches: one(atTable+8, 8, 0xffffffffffff0000), writes: "entry 1"},
	{name: "108 two blocks in one cluster", patches: one(atTable+8, 8, atBlock), writes: "claimed by two"},

	// Counts.
	{name: "060 header counted 0", patches: one(atBlock, 2, 0), write: "header has a reference count of zero"},
	{name: "060 nothing counted", patches: []brokenField{{atBlock, 8, 0}, {atBlock + 8, 8, 0}, {atBlock + 16, 8, 0}}, write: "reference count of zero"},
	{name: "060 live L2 table counted 0", patches: one(atBlock+2*(atL2>>16), 2, 0), write: "an active L2 table"},
	{name: "220 all counts full", base: "small", patches: fullCounts()},

	// L2 entries.
	{name: "060 L2 entry unaligned", patches: one(atL2, 8, 0x8000000000052a00), read: "0x52a00", write: "0x52a00", discard: "0x52a00"},
	{name: "060 zero entry unaligned", patches: one(atL2, 8, 0x8000000000052a01), read: "0x52a00", write: "0x52a00", discard: "0x52a00"},
	{name: "060 zero entry in the header", patches: one(atL2, 8, 0x8000000000002a01), read: "0x2a00", write: "0x2a00", discard: "0x2a00"},
	{name: "L2 entry in the header", patches: one(atL2, 8, 0x8000000000000200), read: "0x200", write: "0x200", discard: "0x200"},
	{name: "060 L2 entry at the block", patches: one(atL2, 8, 0x8000000000020000), write: "reference count structure", discard: "reference count structure"},
	{name: "L2 entry at the L1 table", patches: one(atL2, 8, 0x8000000000030000), write: "L1 table", discard: "L1 table"},
	{name: "L2 entry at itself", patches: one(atL2, 8, 0x8000000000040000), write: "L2 table", discard: "L2 table"},
	{name: "L2 entry far away", patches: one(atL2, 8, 0x8080000000000000), write: "no reference count", discard: "no reference count"},
	{name: "080 L2 entry with reserved bits", patches: one(atL2, 8, 0xbfffffffffff0000), read: "reserved bits", write: "reserved bits", discard: "reserved bits"},
	{name: "080 L2 entry past the end of the file", patches: one(atL2, 8, 0x8000000001ff0000)},
	{name: "138 L2 entry at 32 PB", base: "small", patches: one(l2Small, 8, 0x8080000000000000), write: "no reference count", discard: "no reference count"},
	{name: "zero flag in version 2", base: "version 2", patches: one(atL2, 8, 0x8000000000050001), read: "reserved bits", write: "reserved bits", discard: "reserved bits"},
	{name: "compressed data in the header", patches: one(atL2, 8, 0x4000000000000100), read: "0x100", write: "0x100", discard: "0x100"},

	// Extended L2 entries.
	{name: "271 data and zero", base: "extended", patches: one(atL2+8, 8, 1<<32|1), read: "impossible subclusters", write: "impossible subclusters", discard: "impossible subclusters"},
	{name: "271 data without a cluster", base: "extended", patches: one(atL2+5*16+8, 8, 1), read: "impossible subclusters", write: "impossible subclusters", discard: "impossible subclusters"},
	{name: "271 entry unaligned", base: "extended", patches: one(atL2, 8, 0x8000000000050200), read: "0x50200", write: "0x50200", discard: "0x50200"},
	{name: "271 compressed with bits", base: "extended", patches: one(atL2+4*16+8, 8, 1<<32|1)},

	// Snapshots.
	{name: "080 snapshot L1 unaligned", base: "snapshot", patches: one(atSnapshots, 8, 0x400200), writes: "not aligned"},
	{name: "080 snapshot L1 size", base: "snapshot", patches: one(atSnapshots+8, 4, 0x10000000), writes: "too large"},
	{name: "snapshot L1 at the L1 table", base: "snapshot", patches: one(atSnapshots, 8, atL1), writes: "claimed by two"},
	{name: "060 L2 entry at a snapshot's L2 table", base: "snapshot", patches: one(l2Snapshot, 8, 1<<63|atL2), write: "L2 table of a snapshot", discard: "L2 table of a snapshot"},
	{name: "snapshot's L2 table counted 0", base: "snapshot", patches: one(atBlock+2*(atL2>>16), 2, 0), write: "L2 table of a snapshot"},
	{name: "261 extra data of 0 bytes", base: "snapshot", patches: []brokenField{{atSnapshots + 36, 4, 0}}},
	{name: "261 extra data of 8 bytes", base: "snapshot", patches: []brokenField{{atSnapshots + 36, 4, 8}}},
	{name: "261 extra data of 50 bytes", base: "snapshot", patches: []brokenField{{atSnapshots + 36, 4, 50}}},
	{name: "261 extra data of 65536 bytes", base: "snapshot", patches: one(atSnapshots+36, 4, 65536), writes: "65536 bytes of extra data"},
}

// Places in the images "small", of clusters of 512 bytes, and "snapshot", as QEMU
// made them.
const (
	blockSmall  = 0x400
	l2Small     = 0x800
	atSnapshots = 0x90000
	l2Snapshot  = 0xa0000
)

// fullCounts are patches that count each cluster of the image "small" that has a
// count 65535 times.
func fullCounts() []brokenField {
	var p []brokenField
	for i := range int64(512 / 8) {
		p = append(p, brokenField{blockSmall + 8*i, 8, 1<<64 - 1})
	}
	return p
}

// corruptionBases makes the images that TestCorruption breaks.
func corruptionBases(t *testing.T) map[string][]byte {
	bases := map[string][]byte{}
	for name, options := range map[string]string{
		"data": "compat=1.1", "version 2": "compat=0.10", "small": "cluster_size=512", "snapshot": "compat=1.1",
		"extended": "extended_l2=on",
	} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		size, n := "1M", "192k"
		if name == "small" {
			size, n = "32k", "1536"
		}
		qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
		qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 "+n, path)
		if name == "extended" {
			qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 3 256k 64k", path)
		}
		if name == "snapshot" {
			qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", path)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bases[name] = b
	}
	be := binary.BigEndian
	for off, want := range map[int64]uint64{atTable: atBlock, atL1: 1<<63 | atL2, atL2: 1<<63 | atData} {
		if got := be.Uint64(bases["data"][off:]); got != want {
			t.Fatalf("QEMU has put %#x at %#x instead of %#x", got, off, want)
		}
	}
	if at, l2 := be.Uint64(bases["snapshot"][64:]), be.Uint64(bases["snapshot"][atL1:]); at != atSnapshots || l2 != 1<<63|l2Snapshot {
		t.Fatalf("QEMU has put the snapshot table at %#x, the L2 table at %#x", at, l2)
	}
	small := bases["small"]
	if block, l2 := be.Uint64(small[be.Uint64(small[offRefTable:]):]), be.Uint64(small[be.Uint64(small[offL1Offset:]):]); block != blockSmall || l2 != 1<<63|l2Small {
		t.Fatalf("QEMU has put a block at %#x, an L2 table at %#x", block, l2)
	}
	return bases
}

// TestCorruption breaks images in each way and uses them. What every use of a
// hostile image has to hold to is in hostileRun.
func TestCorruption(t *testing.T) {
	bases := corruptionBases(t)
	for _, c := range corruptions {
		t.Run(c.name, func(t *testing.T) {
			defer watch(t)()
			base := c.base
			if base == "" {
				base = "data"
			}
			good := append([]byte(nil), bases[base]...)
			for _, p := range c.patches {
				if end := p.off + int64(p.width); end > int64(len(good)) {
					good = append(good, make([]byte, end-int64(len(good)))...)
				}
				put(good, p.off, p.width, p.value)
			}
			c.reads(newHostileRun(t, append([]byte(nil), good...), nil))
			for says, use := range map[*string]func(m *Image) error{
				&c.read: readAll, &c.write: touchAll, &c.discard: func(m *Image) error { return m.Discard(0, m.Size()) },
			} {
				c.use(newHostileRun(t, append([]byte(nil), good...), nil), *says, use)
			}
		})
	}
}

func readAll(m *Image) error { return m.ReadvAt([][]byte{make([]byte, m.Size())}, 0) }

// touchAll writes three bytes into each cluster, as far as it gets.
func touchAll(m *Image) error {
	for off := int64(0); off < m.Size(); off += m.clusterSize {
		if _, err := m.WriteAt([]byte("xyz"), off+100); err != nil {
			return err
		}
	}
	return m.Flush()
}

// want judges an error.
func (c *corruption) want(t *testing.T, what string, err error, says string) {
	t.Helper()
	kind := c.kind
	if kind == nil {
		kind = ErrCorrupt
	}
	switch {
	case says == "" && err != nil:
		t.Errorf("%s: %v", what, err)
	case says != "" && (!errors.Is(err, kind) || !strings.Contains(err.Error(), says)):
		t.Errorf("%s: got %v, want %v that says %q", what, err, kind, says)
	}
}

// reads uses the image as a reader.
func (c *corruption) reads(h *hostileRun) {
	start := append([]byte(nil), h.f.data...)
	err := h.open(Options{ReadOnly: true})
	c.want(h.t, "open for reading", err, c.opens)
	if err == nil {
		c.want(h.t, "read", h.judge(readAll(h.m)), c.read)
		c.want(h.t, "close", h.m.Close(), "")
	}
	if !bytes.Equal(start, h.f.data) {
		h.t.Error("a reader changed the image")
	}
}

// use uses the image as a writer. A corruption that it finds ends all writing, now
// and at the next open, but no reading.
func (c *corruption) use(h *hostileRun, says string, use func(m *Image) error) {
	t := h.t
	err := h.open(Options{})
	c.want(t, "open for writing", err, c.opens+c.writes)
	if err != nil {
		return
	}
	c.want(t, "use", h.judge(use(h.m)), says)
	if says == "" {
		c.want(t, "close", h.judge(h.m.Close()), "")
		return
	}
	if _, err := h.m.WriteAt([]byte("x"), h.m.Size()-1); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a write after the corruption was found: %v", err)
	}
	if err := h.m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	if h.m.version < 3 {
		return
	}
	if err := h.open(Options{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "marked corrupt") ||
		!strings.Contains(err.Error(), "calf image check -f qcow2 -r all") {
		t.Errorf("opening it for writing again: %v", err)
	}
	if err := h.open(Options{ReadOnly: true}); err != nil {
		t.Errorf("opening it for reading: %v", err)
	}
}

// TestCorruptCompressedSize lets the descriptor of a compressed cluster say too
// few sectors, or more than there are (214).
func TestCorruptCompressedSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "8M")
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -c -P 17 0 2M", "-c", "write -c -P 34 2M 2M", "-c", "write -c -P 51 4M 2M", path)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l2 := int64(binary.BigEndian.Uint64(good[binary.BigEndian.Uint64(good[offL1Offset:]):]) & entryOffset)
	for _, c := range []struct {
		value uint64
		reads bool
	}{{0x4006, false}, {0x7ffe, true}} {
		t.Run(fmt.Sprintf("%#x", c.value), func(t *testing.T) {
			h := newHostileRun(t, append([]byte(nil), good...), nil)
			put(h.f.data, l2, 2, c.value)
			for _, readOnly := range []bool{true, false} {
				if err := h.open(Options{ReadOnly: readOnly}); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 1000)
				_, err := h.m.ReadAt(b, 2<<20-1000)
				if err = h.judge(err); (err == nil) != c.reads || c.reads && !bytes.Equal(b, bytes.Repeat([]byte{17}, 1000)) {
					t.Errorf("read: %v", err)
				}
				if _, err := h.m.ReadAt(b, 2<<20); err != nil || b[0] != 34 {
					t.Errorf("the next cluster: %v", err)
				}
				if err := h.m.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}
		})
	}
}

// TestFullCounts writes to an image that counts each of its clusters as often as it
// can (220): compressed clusters find no room beside others, and do no harm.
func TestFullCounts(t *testing.T) {
	h := newHostileRun(t, corruptionBases(t)["small"], nil)
	for _, p := range fullCounts() {
		put(h.f.data, p.off, p.width, p.value)
	}
	must(t, h.open(Options{}))
	want := bytes.Repeat([]byte{5}, 1024)
	must(t, h.m.WriteCompressed(want[:512], 4096))
	_, err := h.m.WriteAt(want[512:], 4096+512)
	must(t, err)
	must(t, h.m.Close())
	must(t, h.open(Options{ReadOnly: true}))
	got := make([]byte, 1024)
	if _, err := h.m.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk has other bytes (%v)", err)
	}
}

// TestCorruptionDuringCopy holds up a write that fills its cluster with zeros
// around its data, while another finds the L2 table counted as free (060).
func TestCorruptionDuringCopy(t *testing.T) {
	h := newHostileRun(t, corruptionBases(t)["data"], nil)
	put(h.f.data, atBlock+2*(atL2>>16), 2, 0)
	put(h.f.data, atL2+8, 8, 1<<63|(atData+1<<16)|entryZero)
	before := append([]byte(nil), h.f.data...)
	if err := h.open(Options{}); err != nil {
		t.Fatal(err)
	}
	gate := newGate(h.m, func(write bool, off, _ int64) bool { return write && off == atData+1<<16 })
	held := make(chan error)
	go func() { _, err := h.m.WriteAt([]byte("held"), 1<<16+5000); held <- err }()
	<-gate.held
	_, err := h.m.WriteAt([]byte("new"), 5<<16)
	if err = h.judge(err); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the second write: %v", err)
	}
	close(gate.open)
	if err := h.judge(<-held); err != nil && !errors.Is(err, ErrCorrupt) {
		t.Errorf("the first write: %v", err)
	}
	if err := h.m.Flush(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("flush: %v", err)
	}
	if err := h.m.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
	for off := range before {
		own := off >= atData+1<<16 && off < atData+2<<16 || off == offIncompatible+7
		if !own && before[off] != h.f.data[off] {
			t.Fatalf("the byte at %#x changed", off)
		}
	}
}

// TestSmallDiskWithLargeSnapshot uses a disk whose L1 table is smaller than that
// of its snapshot (029), which has to survive it.
func TestSmallDiskWithLargeSnapshot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	put(b, 24, 8, 512)
	put(b, 36, 4, 1)
	writeFile(t, path, b)
	m := open(t, path, Options{})
	if _, err := m.WriteAt(bytes.Repeat([]byte{2}, 512), 0); err != nil {
		t.Fatal(err)
	}
	closeImage(t, m)
	raw := filepath.Join(dir, "s.raw")
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-l", "s", "-O", "raw", path, raw)
	got, err := os.ReadFile(raw)
	if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{1}, 512)) {
		t.Errorf("the snapshot has %d bytes, or others than before (%v)", len(got), err)
	}
}

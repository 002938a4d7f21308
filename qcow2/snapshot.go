package qcow2

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"math"
	"strings"
	"time"
)

// Limits of the snapshot table.
const (
	maxSnapshotTable = 64 << 20 // bytes
	maxSnapshotExtra = 1024     // bytes of one entry
	snapshotFixed    = 40       // bytes before the extra data of an entry
	maxSnapshotL1s   = 1 << 30  // bytes of all their L1 tables together
)

// Snapshot describes an internal snapshot: a state of the disk that is kept in
// the image beside the present one.
type Snapshot struct {
	// ID and Name say which it is. IDs are unique; QEMU counts them.
	ID, Name string
	// Date is when it was made.
	Date time.Time
	// DiskSize is the length of its disk in bytes.
	DiskSize int64
	// VMStateSize is the length in bytes of the state of a machine that was
	// saved with it, 0 if there is none; VMClock is for how long that machine
	// had run, and Instructions how many it had executed, -1 if they were not
	// counted.
	VMStateSize  int64
	VMClock      time.Duration
	Instructions int64
}

// snapshotTable says where the snapshot table of an image is.
type snapshotTable struct {
	n      uint32 // snapshots
	offset uint64 // in the file; of no meaning if n is zero
}

// snapshotRow is an entry of the snapshot table, as it is in the file.
type snapshotRow []byte

func (e snapshotRow) head() *snapshotHead { return (*snapshotHead)(e) }

// extra is the extra data, of which some may be unknown.
func (e snapshotRow) extra() []byte { return e[snapshotFixed : snapshotFixed+e.head().extra()] }

// text returns the n bytes at off behind the extra data.
func (e snapshotRow) text(off, n uint16) string {
	b := e[snapshotFixed+len(e.extra())+int(off):]
	return string(b[:n])
}

func (e snapshotRow) id() string { return e.text(0, binary.BigEndian.Uint16(e[12:])) }

func (e snapshotRow) name() string {
	return e.text(binary.BigEndian.Uint16(e[12:]), binary.BigEndian.Uint16(e[14:]))
}

// diskSize is the length of the snapshot's disk. Old entries do not say it: they
// are of the time when a disk could not change its size.
func (e snapshotRow) diskSize(ofImage int64) (int64, error) {
	x := e.extra()
	if len(x) < 16 {
		return ofImage, nil
	}
	size := binary.BigEndian.Uint64(x[8:])
	if size > math.MaxInt64 {
		return 0, corruptf("the disk of snapshot %q has the impossible size of %d bytes", e.id(), size)
	}
	return int64(size), nil
}

// decode returns the snapshot that the entry describes, in an image whose disk is
// of the given size.
func (e snapshotRow) decode(ofImage int64) (Snapshot, error) {
	be := binary.BigEndian
	size, err := e.diskSize(ofImage)
	s := Snapshot{
		ID: e.id(), Name: e.name(), DiskSize: size,
		Date:         time.Unix(int64(be.Uint32(e[16:])), int64(be.Uint32(e[20:]))),
		VMClock:      time.Duration(min(be.Uint64(e[24:]), math.MaxInt64)),
		VMStateSize:  int64(be.Uint32(e[32:])),
		Instructions: -1,
	}
	x := e.extra()
	if len(x) >= 8 {
		s.VMStateSize = int64(min(be.Uint64(x), math.MaxInt64))
	}
	if len(x) >= 24 {
		s.Instructions = int64(be.Uint64(x[16:])) //nolint:gosec // G115: all ones is -1
	}
	return s, err
}

// fileReader reads a file from off on, for readers that want io.Reader.
type fileReader struct {
	f   file
	off int64
}

func (r *fileReader) Read(p []byte) (int, error) {
	if err := readFull(r.f, p, r.off); err != nil {
		return 0, err
	}
	r.off += int64(len(p))
	return len(p), nil
}

// entries yields the entries of the table in f, in order. Each is valid until the
// next. It ends with the first error.
func (t snapshotTable) entries(f file) iter.Seq2[snapshotRow, error] {
	return func(yield func(snapshotRow, error) bool) {
		r := bufio.NewReaderSize(&fileReader{f, int64(t.offset)}, 4096) //nolint:gosec // G115: checked by checkTable
		left := uint64(maxSnapshotTable)
		var b []byte
		for i := range t.n {
			var err error
			b, err = appendSnapshot(b[:0], r, i)
			if err == nil && uint64(len(b)) > left {
				err = corruptf("the snapshot table is larger than 64 MiB")
			}
			if err != nil {
				yield(nil, err)
				return
			}
			if left -= uint64(len(b)); !yield(b, nil) {
				return
			}
		}
	}
}

// appendSnapshot appends entry i of the table, which r is at.
func appendSnapshot(b []byte, r io.Reader, i uint32) ([]byte, error) {
	b = append(b, make([]byte, snapshotFixed)...)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	head := (*snapshotHead)(b)
	if head.extra() > maxSnapshotExtra {
		return nil, corruptf("snapshot %d has %d bytes of extra data, more than %d", i, head.extra(), maxSnapshotExtra)
	}
	b = append(b, make([]byte, head.size(head.extra())-snapshotFixed)...)
	_, err := io.ReadFull(r, b[snapshotFixed:])
	return b, err
}

// Snapshots returns the internal snapshots of the image, in the order in which it
// has them. They are read from the file.
func (m *Image) Snapshots() ([]Snapshot, error) {
	p, err := m.hold(0) // keeps the table where it is
	if err != nil {
		return nil, err
	}
	defer p.leave()
	all, err := m.listSnapshots()
	return all, inFile(m.path, err)
}

func (m *Image) listSnapshots() ([]Snapshot, error) {
	fileSize, err := m.file.Size()
	if err != nil {
		return nil, err
	}
	h, err := m.loadHeader(fileSize)
	if err != nil {
		return nil, err
	}
	return h.listSnapshots(m.file)
}

// listSnapshots reads the internal snapshots from the table in f.
func (h *header) listSnapshots(f file) ([]Snapshot, error) {
	var all []Snapshot
	for e, err := range h.snapshotTable().entries(f) {
		if err != nil {
			return nil, err
		}
		s, err := e.decode(int64(h.size)) //nolint:gosec // G115: validated
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

func (h *header) snapshotTable() snapshotTable {
	return snapshotTable{n: h.snapshots, offset: h.snapshotsOffset}
}

// find returns the entry of the one snapshot in f that has the ID or the name
// which.
func (t snapshotTable) find(f file, which string) (snapshotRow, error) {
	const shown = 20
	var found snapshotRow
	var names []string
	for e, err := range t.entries(f) {
		if err != nil {
			return nil, err
		}
		if len(names) < shown {
			names = append(names, fmt.Sprintf("%.60q (ID %.60q)", e.name(), e.id()))
		}
		if e.id() != which && e.name() != which {
			continue
		}
		if found != nil {
			return nil, &Error{
				Kind: ErrNoSnapshot, What: fmt.Sprintf("%q is the ID or the name of more than one internal snapshot", which),
				Mend: "say one by what it alone has: its ID or its name",
			}
		}
		found = append(snapshotRow(nil), e...)
	}
	if found != nil {
		return found, nil
	}
	missing := &Error{Kind: ErrNoSnapshot, What: fmt.Sprintf("the image has no internal snapshot %q, nor any other", which)}
	if t.n > 0 {
		missing.What = fmt.Sprintf("the image has no internal snapshot %q", which)
		missing.Mend = "it has " + strings.Join(names, ", ")
	}
	if t.n > shown {
		missing.Mend += fmt.Sprintf(" and %d more", t.n-shown)
	}
	return nil, missing
}

// showSnapshot makes h the header of an image whose disk is the snapshot which: it
// has its L1 table and its size.
func (m *Image) showSnapshot(h *header, which string, fileSize int64) error {
	if h.incompat(incompatDataFile) && h.snapshots > 0 {
		return corruptf("the image has internal snapshots and an external data file")
	}
	e, err := h.snapshotTable().find(m.file, which)
	if err != nil {
		return err
	}
	size, err := e.diskSize(int64(h.size)) //nolint:gosec // G115: validated
	if err != nil {
		return err
	}
	off, entries := e.head().l1()
	if err := h.checkSnapshotL1(e, fileSize); err != nil {
		return err
	}
	h.size, h.l1Offset, h.l1Size = uint64(size), off, entries //nolint:gosec // G115: not negative
	if n := h.l1Entries(h.size); n*8 > maxL1Bytes {
		return corruptf("the disk of snapshot %q, %d bytes, needs an L1 table of more than 32 MiB", which, size)
	}
	return nil
}

// checkSnapshotL1 checks that the L1 table of a snapshot may be where its entry
// says.
func (h *header) checkSnapshotL1(e snapshotRow, fileSize int64) error {
	off, entries := e.head().l1()
	bytes := uint64(entries) * 8
	if bytes > maxL1Bytes {
		return corruptf("the L1 table of snapshot %q, %d bytes, is too large", e.id(), bytes)
	}
	if bytes == 0 {
		return nil
	}
	return h.checkTable(fmt.Sprintf("L1 table of snapshot %q", e.id()), off, bytes, fileSize)
}

// claimSnapshots walks the snapshot table and claims it and the snapshots' L1 and
// L2 tables, so that they are never written over. Their data is protected by its
// reference counts.
func (m *Image) claimSnapshots(h *header, fileSize int64) error {
	t := h.snapshotTable()
	total, l1Total := uint64(0), uint64(0)
	var l1s []extent // in bytes
	for e, err := range t.entries(m.file) {
		if err != nil {
			return err
		}
		total += uint64(len(e))
		if err := h.checkSnapshotL1(e, fileSize); err != nil {
			return err
		}
		off, entries := e.head().l1()
		l1 := extent{start: off, n: uint64(entries) * 8}
		if l1Total += l1.n; l1Total > maxSnapshotL1s {
			return corruptf("the L1 tables of the snapshots are too large, %d bytes", l1Total)
		}
		if err := m.claimRange(l1.start, l1.n); err != nil {
			return err
		}
		l1s = append(l1s, l1)
	}
	if err := m.claimRange(t.offset, total); err != nil {
		return err
	}
	return m.claimShared(l1s, fileSize)
}

// claimRange claims the clusters of the n bytes at off for the snapshots.
func (m *Image) claimRange(off, n uint64) error {
	return m.meta.claim(&m.geometry, m.clustersOf(off, n), metaSnapshots)
}

// clustersOf returns the clusters that the n bytes at off touch.
func (g *geometry) clustersOf(off, n uint64) extent {
	if n == 0 {
		return extent{}
	}
	first := off >> g.clusterBits
	return extent{start: first, n: (off+n-1)>>g.clusterBits - first + 1}
}

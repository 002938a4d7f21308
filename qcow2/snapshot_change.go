package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxSnapshotName is the greatest length of a name that QEMU shows, in bytes.
const maxSnapshotName = 255

// CreateSnapshot keeps the present state of the disk as an internal snapshot with
// the given name, 1 to 255 bytes, which no other snapshot of the image may have as
// its name or ID. It has every write that completed before the call, and none that
// begins after it; no request is served meanwhile, which takes about as long as to
// read and write all tables of the image. Clusters are shared from then on, and
// copied when they are written.
//
// Whatever happens, a crash too, the image has the snapshot or is what it was; it
// is on stable storage when CreateSnapshot returns without an error. Cancelling ctx
// leaves the image as it was. An image with an external data file or with counts
// that are too narrow to share a cluster is refused with ErrUnsupported, as is one
// that has 65536 snapshots or would have 64 MiB of descriptions of them.
func (m *Image) CreateSnapshot(ctx context.Context, name string) (Snapshot, error) {
	var made Snapshot
	err := m.changeSnapshots(ctx, func(h *header, to *tables) error {
		if name == "" || len(name) > maxSnapshotName || strings.ContainsRune(name, 0) {
			return invalidOption("the name of a snapshot has 1 to %d bytes, none of them zero", maxSnapshotName)
		}
		ids := snapshotIDs{}
		if err := m.keepSnapshots(h, to, func(row snapshotRow) (bool, error) {
			ids.add(row.id())
			if row.id() == name || row.name() == name {
				return true, invalidOption("the image has an internal snapshot with the name or ID %q", name)
			}
			return true, nil
		}); err != nil {
			return err
		}
		row := newSnapshotRow(ids.next(), name, time.Now(), h.size)
		if to.n == maxSnapshots || len(to.snapshots)+len(row) > maxSnapshotTable {
			return &Error{
				Kind: ErrUnsupported, What: fmt.Sprintf("the image has %d internal snapshots and no room for more", to.n),
				Err: unix.EFBIG, Mend: "delete one",
			}
		}
		if m.maxCount() == 1 {
			return m.errNarrow()
		}
		to.snapshots, to.n = append(to.snapshots, row...), to.n+1
		to.more, to.saved, to.last = m.l1, true, len(to.snapshots)-len(row)
		var err error
		made, err = row.decode(m.Size())
		return err
	})
	if err != nil {
		return Snapshot{}, err
	}
	return made, nil
}

// snapshotIDs are the IDs of an image's snapshots.
type snapshotIDs map[string]bool

func (ids snapshotIDs) add(id string) { ids[id] = true }

// next returns an ID that is not among them: the number after the greatest.
func (ids snapshotIDs) next() string {
	last := uint64(0)
	for id := range ids {
		if n, err := strconv.ParseUint(id, 10, 64); err == nil {
			last = max(last, n)
		}
	}
	for { // again only where the greatest number there is was used
		last++
		if id := strconv.FormatUint(last, 10); !ids[id] {
			return id
		}
	}
}

// newSnapshotRow returns the row of a snapshot of a disk of size bytes, without the
// state of a machine. Where its L1 table is, a rewrite fills in.
func newSnapshotRow(id, name string, now time.Time, size uint64) snapshotRow {
	be := binary.BigEndian
	b := make([]byte, snapshotFixed+snapshotExtraKnown, snapshotFixed+snapshotExtraKnown+maxSnapshotName+32)
	be.PutUint16(b[12:], uint16(len(id)))          //nolint:gosec // G115: at most 20
	be.PutUint16(b[14:], uint16(len(name)))        //nolint:gosec // G115: checked
	be.PutUint32(b[16:], uint32(now.Unix()))       //nolint:gosec // G115: what the format has
	be.PutUint32(b[20:], uint32(now.Nanosecond())) //nolint:gosec // G115: below 2^30
	be.PutUint32(b[36:], snapshotExtraKnown)
	be.PutUint64(b[snapshotFixed+8:], size)
	be.PutUint64(b[snapshotFixed+16:], ^uint64(0)) // instructions are not counted
	b = append(append(b, id...), name...)
	return append(b, make([]byte, -len(b)&7)...)
}

// ApplySnapshot makes the disk what it was when the internal snapshot with the
// given ID or name was made, of the size that it had; the snapshot stays. What the
// disk is now is lost, unless another snapshot has it. The state of a machine that
// was saved with the snapshot is not restored. Persistent bitmaps cannot be trusted
// any more.
//
// It is all or nothing like CreateSnapshot, and keeps requests waiting like it. A
// snapshot of another size is refused with ErrUnsupported where Resize would be.
func (m *Image) ApplySnapshot(ctx context.Context, which string) error {
	return m.changeSnapshots(ctx, func(h *header, to *tables) error {
		row, err := h.snapshotTable().find(m.file, which)
		if err != nil {
			return err
		}
		if err := m.keepSnapshots(h, to, func(snapshotRow) (bool, error) { return true, nil }); err != nil {
			return err
		}
		size, err := row.diskSize(m.Size())
		if err == nil && size != m.Size() {
			err = m.checkApplied(size)
		}
		if err != nil {
			return err
		}
		saved, err := m.loadSnapshotL1(h, row)
		if err != nil {
			return err
		}
		// Behind the disk's entries there may be those of a machine's state.
		to.size = uint64(size) //nolint:gosec // G115: not negative
		to.l1 = make([]uint64, h.l1Entries(to.size))
		copy(to.l1, saved)
		to.more, to.less, to.other = to.l1, m.l1, true
		return nil
	})
}

// DeleteSnapshot removes the internal snapshot with the given ID or name. Clusters
// that nothing else uses go back to the host.
//
// It is all or nothing like CreateSnapshot, and keeps requests waiting like it. The
// image needs some room of its own for it: as much as its tables take.
func (m *Image) DeleteSnapshot(ctx context.Context, which string) error {
	return m.changeSnapshots(ctx, func(h *header, to *tables) error {
		row, err := h.snapshotTable().find(m.file, which)
		if err != nil {
			return err
		}
		if err := m.keepSnapshots(h, to, func(row snapshotRow) (bool, error) {
			return row.id() != which && row.name() != which, nil
		}); err != nil {
			return err
		}
		off, entries := row.head().l1()
		to.dropped = append(to.dropped, m.clustersOf(off, uint64(entries)*8))
		to.less, err = m.loadSnapshotL1(h, row)
		return err
	})
}

// changeSnapshots rewrites the image as plan says, which gets its header, and what
// it is, to change.
func (m *Image) changeSnapshots(ctx context.Context, plan func(h *header, to *tables) error) error {
	return m.changeTables(func(h *header) error {
		if m.external {
			return &Error{Kind: ErrUnsupported, What: "an image with an external data file has no internal snapshots"}
		}
		to := &tables{size: h.size, l1: m.l1}
		if err := plan(h, to); err != nil {
			return err
		}
		return (&rewrite{m: m, ctx: ctx, to: to}).run()
	})
}

// checkApplied refuses a snapshot whose disk has another length, size bytes, as
// Resize would.
func (m *Image) checkApplied(size int64) error {
	if m.bitmaps.n > 0 {
		return &Error{
			Kind: ErrUnsupported, What: "a snapshot of a disk with another length cannot be applied to an image with persistent bitmaps",
			Mend: fmt.Sprintf("make the disk %d bytes long before", size),
		}
	}
	_, err := m.checkHeader(size)
	return err
}

// changeTables runs change, which gets the header as it is in the file. Nothing
// else is done to the image meanwhile, and the file has all that was done before.
func (m *Image) changeTables(change func(h *header) error) error {
	if m.readOnly {
		return &Error{Path: m.path, Kind: ErrReadOnly, What: "the image is open for reading only"}
	}
	m.resizing.Lock() // a Resize has tables beyond the end of the disk
	defer m.resizing.Unlock()
	// Most of what is dirty is written while requests go on.
	if err := m.Flush(); err != nil {
		return err
	}
	return m.explain(m.exclusively(func() error {
		if err := m.commitAll(); err != nil {
			return err
		}
		fileSize, err := m.file.Size()
		if err != nil {
			return err
		}
		h, err := m.loadHeader(fileSize)
		if err != nil {
			return err
		}
		return change(h)
	}))
}

// keepSnapshots makes the snapshot table of to the image's, of which it has the
// rows that keep says, and drops that one.
func (m *Image) keepSnapshots(h *header, to *tables, keep func(snapshotRow) (bool, error)) error {
	t, total := h.snapshotTable(), uint64(0)
	for row, err := range t.entries(m.file) {
		if err != nil {
			return err
		}
		total += uint64(len(row))
		kept, err := keep(row)
		if err != nil {
			return err
		}
		if kept {
			to.snapshots, to.n = append(to.snapshots, row...), to.n+1
		}
	}
	to.dropped = append(to.dropped, m.clustersOf(t.offset, total))
	return nil
}

// loadSnapshotL1 reads the L1 table of the snapshot with the given row.
func (m *Image) loadSnapshotL1(h *header, row snapshotRow) ([]uint64, error) {
	fileSize, err := m.file.Size()
	if err != nil {
		return nil, err
	}
	if err := h.checkSnapshotL1(row, fileSize); err != nil {
		return nil, err
	}
	off, entries := row.head().l1()
	return m.loadTable(off, int64(entries)*8)
}

package qcow2

import "encoding/binary"

// Limits of the snapshot table.
const (
	maxSnapshotTable = 64 << 20 // bytes
	maxSnapshotExtra = 1024     // bytes of one entry
	snapshotFixed    = 40       // bytes before the extra data of an entry
	maxSnapshotL1s   = 1 << 30  // bytes of all their L1 tables together
)

// claimSnapshots walks the snapshot table and claims it and the snapshots' L1 and
// L2 tables, so that they are never written over. Their data is protected by its
// reference counts.
func (m *Image) claimSnapshots(h *header, fileSize int64) error {
	off, l1Total := h.snapshotsOffset, uint64(0)
	var l1s []extent // in bytes
	for i := range h.snapshots {
		var b [snapshotFixed]byte
		if err := readFull(m.file, b[:], int64(off)); err != nil { //nolint:gosec // G115: checked by checkTable
			return err
		}
		l1Offset := binary.BigEndian.Uint64(b[0:])
		l1Bytes := uint64(binary.BigEndian.Uint32(b[8:])) * 8
		extra := uint64(binary.BigEndian.Uint32(b[36:]))
		if extra > maxSnapshotExtra {
			return corruptf("snapshot %d has %d bytes of extra data, more than %d", i, extra, maxSnapshotExtra)
		}
		names := uint64(binary.BigEndian.Uint16(b[12:])) + uint64(binary.BigEndian.Uint16(b[14:]))
		off += (snapshotFixed + extra + names + 7) &^ 7
		if off-h.snapshotsOffset > maxSnapshotTable {
			return corruptf("the snapshot table is larger than 64 MiB")
		}
		if l1Bytes == 0 {
			continue
		}
		if l1Total += l1Bytes; l1Bytes > maxL1Bytes || l1Total > maxSnapshotL1s {
			return corruptf("the L1 table of snapshot %d, %d bytes, is too large", i, l1Bytes)
		}
		if err := h.checkTable("L1 table of a snapshot", l1Offset, l1Bytes, fileSize); err != nil {
			return err
		}
		if err := m.claimRange(l1Offset, l1Bytes); err != nil {
			return err
		}
		l1s = append(l1s, extent{start: l1Offset, n: l1Bytes})
	}
	if h.snapshots == 0 {
		return nil
	}
	if err := m.claimRange(h.snapshotsOffset, off-h.snapshotsOffset); err != nil {
		return err
	}
	return m.claimShared(l1s, fileSize)
}

// claimRange claims the clusters of the n bytes at off for the snapshots.
func (m *Image) claimRange(off, n uint64) error {
	first := off >> m.clusterBits
	return m.meta.claim(&m.geometry, extent{start: first, n: (off+n-1)>>m.clusterBits - first + 1}, metaSnapshots)
}

package qcow2

import "context"

// Empty makes the image hold nothing, so that its backing file shows everywhere,
// and zeros beyond that: what is left to do to an overlay once its contents are in
// the backing file. Internal snapshots keep what they have, and the room of all
// else goes back to the host. Persistent bitmaps cannot be trusted any more.
//
// It is all or nothing, whatever happens, and keeps requests waiting, like
// CreateSnapshot; after an error the image may be either. One with a raw data file,
// which lies over nothing, is refused with ErrUnsupported.
func (m *Image) Empty(ctx context.Context) error {
	if m.raw {
		return &Error{Path: m.path, Kind: ErrUnsupported, What: "an image with a raw data file cannot be emptied"}
	}
	// The new tables lie behind all that is there, where they keep the file as
	// long as it is. Once that is gone, others find room at the beginning.
	for range 2 {
		if err := m.changeTables(func(h *header) error { return m.empty(ctx, h) }); err != nil {
			return err
		}
	}
	return m.explain(m.exclusively(m.trim))
}

// empty makes an empty L1 table that of the disk. It runs exclusively.
func (m *Image) empty(ctx context.Context, h *header) error {
	m.lock()
	m.pool.sort()
	m.mu.Unlock()
	to := &tables{size: h.size, l1: make([]uint64, len(m.l1)), less: m.l1, other: true}
	if err := m.keepSnapshots(h, to, func(snapshotRow) (bool, error) { return true, nil }); err != nil {
		return err
	}
	if err := (&rewrite{m: m, ctx: ctx, to: to}).run(); err != nil || !m.external {
		return err
	}
	m.punch(m.data, hole{n: m.Size()})
	return nil
}

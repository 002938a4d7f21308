package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// rewrite replaces the tables of an image as a whole: the reference counts, the
// L1 table, those L2 tables that change, and the snapshot table. The new ones are
// written where nothing points to, and made durable; then one write of one sector
// makes the header point to them all. Whatever cuts it short, the image is what it
// was or what it is to be, in every respect: no cluster leaks, and no flag
// contradicts a count even for an instant.
//
// It runs exclusively, so what mu guards is read without it.
type rewrite struct {
	m   *Image
	ctx context.Context
	to  *tables

	room     []extent // reserved and not used
	used     []extent // taken of it
	runs     []extent // reserved for tables of many clusters
	freed    []extent // free once the header says so
	counts   *refcounts
	l1       []uint64 // the disk's new table
	tableRun extent   // where the new tables will be: of the counts,
	l1Run    extent   // the L1 table,
	savedRun extent   // that of a new snapshot,
	snapsRun extent   // and the snapshot table
}

// tables is what a rewrite makes of an image.
type tables struct {
	size  uint64   // of the disk, in bytes
	l1    []uint64 // the disk's L1 table, with any COPIED flags
	other bool     // the disk's contents change
	// saved says that the present disk is to be the snapshot whose row begins
	// at last in snapshots.
	saved bool
	last  int
	// snapshots is the new snapshot table, of n snapshots.
	snapshots []byte
	n         uint32
	more      []uint64 // the L1 table of a tree that gains a reference to all in it
	less      []uint64 // and of one that loses it
	dropped   []extent // clusters that lose a reference beside that
}

// run does all of it. On an error the image is what it was, unless the header could
// not be written.
func (w *rewrite) run() error {
	err := w.prepare()
	if err == nil && w.to.other {
		err = w.m.markBitmaps()
	}
	if err == nil {
		err = w.switchOver()
	}
	if err != nil {
		w.abandon()
		return err
	}
	w.adopt()
	return nil
}

// prepare makes all new tables, durably.
func (w *rewrite) prepare() error {
	for _, step := range []func() error{
		w.reserveAll,
		w.copyCounts,
		func() error { return inactive(!w.to.saved, w.follow(w.to.more, 1)) },
		func() error { return inactive(!w.to.other, w.follow(w.to.less, -1)) },
		w.dropOld,
		func() error { return inactive(w.to.other, w.flagTables()) },
		w.write,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return w.m.datasync()
}

// inactiveError is a fault in what the disk can do without: the tables of a
// snapshot, a persistent bitmap.
type inactiveError struct{ error }

func (e inactiveError) Unwrap() error { return e.error }

// inactive is err, as a fault in what the disk can do without if that is so.
func inactive(so bool, err error) error {
	if err == nil || !so {
		return err
	}
	return inactiveError{err}
}

func (w *rewrite) cancelled() error {
	if err := w.ctx.Err(); err != nil {
		return &Error{What: "the change of the image was cancelled", Err: err}
	}
	return nil
}

// reserveAll reserves all clusters that may be needed. To do so may make refcount
// blocks, and a larger table of them, for the counts that there are.
func (w *rewrite) reserveAll() (err error) {
	m, to := w.m, w.to
	l1 := m.clusters(uint64(len(to.l1)) * 8)
	if w.l1Run, err = w.reserve(l1); err != nil {
		return err
	}
	if to.saved {
		if w.savedRun, err = w.reserve(m.clusters(uint64(len(m.l1)) * 8)); err != nil {
			return err
		}
	}
	if w.snapsRun, err = w.reserve(m.clusters(uint64(len(to.snapshots)))); err != nil {
		return err
	}
	have, l2 := uint64(0), entriesIn(to.l1)
	for {
		if run := m.clusters(uint64(len(m.refs.table)) * 8); run != w.tableRun.n {
			w.tableRun, err = w.reserve(run) // the one before is too short by now
		} else if need := l2 + entriesIn(m.refs.table); have < need {
			var e extent
			if e, err = w.takeFree(1, func(p *pool) extent { return p.take(need - have) }); err == nil {
				w.room = append(w.room, e)
				have += e.n
			}
		} else {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// entriesIn is the number of entries of a table that are not zero.
func entriesIn(table []uint64) (n uint64) {
	for _, e := range table {
		n += b2u(e != 0)
	}
	return n
}

// reserve reserves n contiguous clusters.
func (w *rewrite) reserve(n uint64) (extent, error) {
	if n > w.m.refs.longestRun() {
		return extent{}, &Error{
			Kind: ErrUnsupported, What: fmt.Sprintf("a table of %d clusters does not fit between the reference counts", n),
			Mend: "make an image with larger clusters: calf image convert -f qcow2 -O qcow2 " + shellWord(w.m.path) + " NEW",
		}
	}
	e, err := w.takeFree(n, func(p *pool) extent { return p.takeRun(n) })
	w.runs = append(w.runs, e)
	return e, err
}

// takeFree reserves what take takes of the pool, once that has n contiguous
// clusters.
func (w *rewrite) takeFree(n uint64, take func(*pool) extent) (extent, error) {
	if n == 0 {
		return extent{}, nil
	}
	m := w.m
	for {
		if err := w.cancelled(); err != nil {
			return extent{}, err
		}
		m.lock()
		e := take(&m.pool)
		err := m.checkFree(e)
		m.mu.Unlock()
		if err != nil {
			return extent{}, err
		}
		if e.n > 0 {
			m.claimNew(e)
			return e, nil
		}
		if err := m.findFree(n); err != nil {
			return extent{}, err
		}
	}
}

// claimNew keeps the reserved clusters of e from being taken for anything that
// the tables of a broken image refer to.
func (m *Image) claimNew(e extent) {
	m.lock()
	defer m.mu.Unlock()
	m.meta.add(e, metaSnapshots)
}

// one takes a cluster of the room, of which there is enough.
func (w *rewrite) one() uint64 {
	e := &w.room[0]
	c := e.start
	w.used = appendExtent(w.used, extent{start: c, n: 1})
	if e.start, e.n = e.start+1, e.n-1; e.n == 0 {
		w.room = w.room[1:]
	}
	return c
}

// write writes what is not written yet: the tables that were not final.
func (w *rewrite) write() error {
	m := w.m
	for _, e := range append(w.used, w.newTables()...) {
		for c := e.start; c < e.start+e.n; c++ {
			if _, err := w.counts.add(c, 1); err != nil {
				return err
			}
		}
	}
	for i, e := range w.l1 {
		if e == 0 {
			continue
		}
		n, err := w.inUse(e >> m.clusterBits)
		if err != nil {
			return err
		}
		w.l1[i] = withFlag(e, n == 1)
	}
	if err := w.counts.writeDirty(); err != nil {
		return err
	}
	if w.to.saved {
		saved := make([]uint64, len(m.l1))
		for i, e := range m.l1 {
			saved[i] = withFlag(e, false)
		}
		if err := m.writeRun(w.savedRun, encodeEntries(nil, saved)); err != nil {
			return err
		}
		row := w.to.snapshots[w.to.last:]
		binary.BigEndian.PutUint64(row, m.pointer(w.savedRun.start))
		binary.BigEndian.PutUint32(row[8:], uint32(len(saved))) //nolint:gosec // G115: at most 4 Mi
	}
	for _, t := range []struct {
		at extent
		b  []byte
	}{
		{w.tableRun, encodeEntries(nil, w.counts.table)},
		{w.l1Run, encodeEntries(nil, w.l1)},
		{w.snapsRun, w.to.snapshots},
	} {
		if err := m.writeRun(t.at, t.b); err != nil {
			return err
		}
	}
	return nil
}

// newTables are the clusters of all new tables but those of one cluster each.
func (w *rewrite) newTables() []extent {
	return []extent{w.tableRun, w.l1Run, w.savedRun, w.snapsRun}
}

// writeRun writes b to the clusters of e, which it fills up with zeros.
func (m *Image) writeRun(e extent, b []byte) error {
	if e.n == 0 {
		return nil
	}
	rest := m.offset(e.n) - int64(len(b))
	return m.file.WritevAt(append([][]byte{b}, zeroBuffers(rest)...), m.offset(e.start))
}

// switchOver makes the header point to the new tables. After an error it may point
// to them or to the old ones; then the image takes no further writes.
func (w *rewrite) switchOver() error {
	m := w.m
	be := binary.BigEndian
	var b [offIncompatible - offSize]byte // inside one sector
	be.PutUint64(b[0:], w.to.size)
	be.PutUint32(b[offL1Size-offSize:], uint32(len(w.l1)))      //nolint:gosec // G115: at most 4 Mi
	be.PutUint64(b[offL1Offset-offSize:], uint64(w.l1Offset())) //nolint:gosec // G115: an offset
	be.PutUint64(b[offRefTable-offSize:], m.pointer(w.tableRun.start))
	be.PutUint32(b[offRefTable+8-offSize:], uint32(w.tableRun.n)) //nolint:gosec // G115: at most 16 Ki
	be.PutUint32(b[offSnapshots-offSize:], w.to.n)
	be.PutUint64(b[offSnapshots+4-offSize:], m.pointer(w.snapsRun.start))
	err := writeFull(m.file, b[:], offSize)
	if err == nil {
		err = m.datasync()
	}
	if err != nil {
		return m.fail(fmt.Errorf("switching to the changed tables: %w", err))
	}
	return nil
}

// l1Offset is where the new L1 table is; an empty one may be anywhere.
func (w *rewrite) l1Offset() int64 {
	if w.l1Run.n == 0 {
		return w.m.l1Offset
	}
	return w.m.offset(w.l1Run.start)
}

// abandon gives back all that was reserved. Nothing points to it.
func (w *rewrite) abandon() {
	m := w.m
	m.lock()
	defer m.mu.Unlock()
	w.giveBack(nil)
	for _, e := range w.used {
		m.pool.recycle(e)
	}
}

// giveBack ends the reservation of everything, and gives what is neither used nor
// among the kept runs to the pool. mu is held exclusively.
func (w *rewrite) giveBack(kept []extent) {
	m := w.m
	for _, list := range [][]extent{w.used, w.runs, w.room} {
		for _, e := range list {
			m.meta.remove(e)
		}
	}
	for _, e := range append(w.room, w.runs...) {
		if e.n > 0 && !slices.Contains(kept, e) {
			m.pool.recycle(e) // first of all, so that the file does not grow
		}
	}
}

// adopt makes the new tables those of the open image.
func (w *rewrite) adopt() {
	m, r := w.m, w.m.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	oldTable := extent{start: m.cluster(r.offset), n: m.clusters(uint64(len(r.table)) * 8)}
	m.lock()
	w.giveBack(w.newTables())
	for _, e := range append(w.to.dropped, oldTable, extent{start: m.cluster(m.l1Offset), n: m.clusters(uint64(len(m.l1)) * 8)}) {
		m.meta.remove(e)
	}
	m.meta.replace(r.table, m.clusterBits, metaNone)
	m.meta.replace(w.counts.table, m.clusterBits, metaRefBlock)
	m.meta.replace(m.l1, m.clusterBits, metaSharedL2) // until its count says otherwise; see recycle
	m.meta.replace(w.l1, m.clusterBits, metaL2)
	m.meta.add(w.tableRun, metaRefTable)
	m.meta.add(w.l1Run, metaL1)
	m.meta.add(w.savedRun, metaSnapshots)
	m.meta.add(w.snapsRun, metaSnapshots)
	m.l1, m.l1Offset = w.l1, w.l1Offset()
	m.setSize(int64(w.to.size)) //nolint:gosec // G115: checked
	m.cache.lru.Purge()         // its slices are clean, and some are of other tables
	m.mu.Unlock()
	r.table, r.offset, r.slices = w.counts.table, w.counts.offset, w.counts.slices
	for _, e := range w.freed {
		m.recycleAll(e)
	}
}

// replace makes what the entries of a table point to metadata of kind k.
func (s *metaSet) replace(table []uint64, clusterBits uint, k metaKind) {
	for _, e := range table {
		if e&entryOffset == 0 {
			continue
		}
		c := extent{start: e & entryOffset >> clusterBits, n: 1}
		if s.remove(c); k != metaNone {
			s.add(c, k)
		}
	}
}

// recycleAll recycles the clusters of e, a part at a time. refcounts.mu is held.
func (m *Image) recycleAll(e extent) {
	const most = 1 << 16
	for e.n > 0 {
		free := make([]uint64, min(e.n, most))
		for i := range free {
			free[i] = e.start + uint64(i)
		}
		m.recycle(free)
		e.start, e.n = e.start+uint64(len(free)), e.n-uint64(len(free))
	}
}

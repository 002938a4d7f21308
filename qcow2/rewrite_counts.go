package qcow2

import (
	"fmt"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// copyCounts makes a copy of the reference counts, to change.
func (w *rewrite) copyCounts() error {
	m := w.m
	lru, err := simplelru.NewLRU[uint64, *refSlice](refSlices, nil)
	if err != nil {
		return err
	}
	w.counts = &refcounts{img: m, table: make([]uint64, len(m.refs.table)), offset: m.offset(w.tableRun.start), slices: lru}
	block := make([]byte, m.clusterSize)
	for i, e := range m.refs.table {
		if e == 0 {
			continue
		}
		if err := w.cancelled(); err != nil {
			return err
		}
		off, err := m.decodeRefTable(e, i)
		if err != nil {
			return err
		}
		if err := readFull(m.file, block, off); err != nil {
			return err
		}
		c := w.one()
		if err := writeFull(m.file, block, m.offset(c)); err != nil {
			return err
		}
		w.counts.table[i] = m.pointer(c)
	}
	return nil
}

// count returns the new count of cluster c.
func (w *rewrite) count(c uint64) (uint64, error) {
	s, err := w.counts.slice(c)
	if err != nil || s == nil {
		return 0, err
	}
	return count(s.b, w.m.refcountOrder, c&(1<<w.counts.perSlice()-1)), nil
}

// inUse is count for a cluster that is in use, and so counted.
func (w *rewrite) inUse(c uint64) (uint64, error) {
	n, err := w.count(c)
	if err == nil && n == 0 {
		err = corruptf("the cluster at %#x is in use but has a reference count of zero", w.m.offset(c))
	}
	return n, err
}

// refer adds delta, 1 or -1, to the new count of cluster c, which is in use.
func (w *rewrite) refer(c uint64, delta int) error {
	n, err := w.inUse(c)
	if err != nil {
		return err
	}
	if delta > 0 && n == w.m.maxCount() {
		return w.m.errNarrow()
	}
	if n, err = w.counts.add(c, delta); err == nil && n == 0 {
		w.freed = appendExtent(w.freed, extent{start: c, n: 1})
	}
	return err
}

// errNarrow refuses a snapshot that the reference counts cannot count.
func (m *Image) errNarrow() error {
	return &Error{
		Kind: ErrUnsupported, What: fmt.Sprintf("reference counts of %d bits are too narrow for another internal snapshot", 1<<m.refcountOrder),
		Mend: "delete one, or make an image with wider counts: calf image convert -f qcow2 -O qcow2 " + shellWord(m.path) + " NEW",
	}
}

// follow adds delta references to all in the tree below l1: its L2 tables and what
// their entries refer to. It reads no table twice: no disk may have one at two places.
func (w *rewrite) follow(l1 []uint64, delta int) error {
	m := w.m
	var seen metaSet
	for i, e := range l1 {
		off, err := m.decodeL1(e, uint64(i))
		if err != nil {
			return err
		}
		if off == 0 {
			continue
		}
		if k := m.meta.at(m.cluster(off)); k != metaNone && k != metaL2 && k != metaSharedL2 {
			return corruptf("L1 entry %d points to %#x, which holds the %s", i, off, k)
		}
		if err := seen.claim(&m.geometry, extent{start: m.cluster(off), n: 1}, metaL2); err != nil {
			return err
		}
		if err := w.refer(m.cluster(off), delta); err != nil {
			return err
		}
		if err := w.eachEntry(off, func(_ *uint64, first, n uint64) error {
			for c := first; c < first+n; c++ {
				if err := m.checkData(m.offset(c)); err != nil {
					return err
				}
				if err := w.refer(c, delta); err != nil {
					return err
				}
			}
			return nil
		}, nil); err != nil {
			return err
		}
	}
	return nil
}

// eachEntry calls visit with each entry of the L2 table at off that refers to host
// clusters, and with those. If any of the entries has changed, it then calls
// changed with the table.
func (w *rewrite) eachEntry(off int64, visit func(e *uint64, first, n uint64) error, changed func(table []uint64) error) error {
	if err := w.cancelled(); err != nil {
		return err
	}
	m := w.m
	table, err := m.loadTable(uint64(off), m.clusterSize) //nolint:gosec // G115: an offset
	if err != nil {
		return err
	}
	any := false
	for i := 0; i < len(table); i += 1 << m.wordBits {
		e := table[i]
		first, n, err := m.references(e)
		if err == nil && n > 0 {
			err = visit(&table[i], first, n)
		}
		if err != nil {
			return err
		}
		any = any || table[i] != e
	}
	if !any {
		return nil
	}
	return changed(table)
}

// references returns the host clusters [first, first+n) that the L2 entry e refers
// to, none if n is zero, whatever of them is shown to a reader. External data is
// not counted.
func (g *geometry) references(e uint64) (first, n uint64, err error) {
	off, size := e&entryOffset, uint64(g.clusterSize) //nolint:gosec // G115: positive
	switch {
	case e&entryCompressed != 0:
		off, size = g.compressedRange(e)
	case off == 0 || g.external:
		return 0, 0, nil
	case e&l2Reserved != 0 || g.version == 2 && e&entryZero != 0:
		return 0, 0, corruptf("the L2 entry %#x has reserved bits set", e)
	case g.inCluster(int64(off)) != 0:
		return 0, 0, corruptf("the L2 entry %#x points into the middle of a cluster", e)
	}
	if off>>g.clusterBits == 0 || off >= 1<<56 {
		return 0, 0, corruptf("the L2 entry %#x points to %#x, which is no data cluster", e, off)
	}
	first = off >> g.clusterBits
	return first, (off+size-1)>>g.clusterBits - first + 1, nil
}

// dropOld takes the references from what the new tables replace.
func (w *rewrite) dropOld() error {
	m := w.m
	old := append(w.to.dropped,
		extent{start: m.cluster(m.refs.offset), n: m.clusters(uint64(len(m.refs.table)) * 8)},
		extent{start: m.cluster(m.l1Offset), n: m.clusters(uint64(len(m.l1)) * 8)})
	for _, e := range m.refs.table {
		if e != 0 {
			old = appendExtent(old, extent{start: e >> m.clusterBits, n: 1})
		}
	}
	for _, e := range old {
		for c := e.start; c < e.start+e.n; c++ {
			if err := w.refer(c, -1); err != nil {
				return err
			}
		}
	}
	return nil
}

// flagTables makes the disk's new L1 table, with copies of those L2 tables whose
// COPIED flags do not agree with the new counts.
func (w *rewrite) flagTables() error {
	m := w.m
	w.l1 = make([]uint64, len(w.to.l1))
	for i, e := range w.to.l1 {
		off, err := m.decodeL1(e, uint64(i))
		if err != nil {
			return err
		}
		if off == 0 {
			continue
		}
		c := m.cluster(off)
		if err := w.eachEntry(off, w.flag, func(table []uint64) error {
			if err := w.refer(c, -1); err != nil {
				return err
			}
			c = w.one()
			return writeFull(m.file, encodeEntries(nil, table), m.offset(c))
		}); err != nil {
			return err
		}
		w.l1[i] = m.pointer(c)
	}
	return nil
}

// flag sets the COPIED flag of the L2 entry e, which refers to n clusters, to what
// the new counts say. It fails if one of them would be free, as it is when the old
// counts were too low.
func (w *rewrite) flag(e *uint64, first, n uint64) error {
	for c := first; c < first+n; c++ {
		times, err := w.inUse(c)
		if err != nil {
			return err
		}
		*e = withFlag(*e, times == 1 && *e&entryCompressed == 0)
	}
	return nil
}

func withFlag(e uint64, copied bool) uint64 {
	if copied {
		return e | entryCopied
	}
	return e &^ entryCopied
}

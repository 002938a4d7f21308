package qcow2

import (
	"slices"
	"sort"
)

// metaKind names the metadata that a host cluster holds.
type metaKind uint8

const (
	metaNone metaKind = iota
	metaHeader
	metaL1
	metaL2
	metaRefTable
	metaRefBlock
	metaSharedL2 // of a snapshot, and no longer of the active disk
	metaSnapshots
	metaBitmaps
)

func (k metaKind) String() string {
	return [...]string{
		"data", "header", "L1 table", "an active L2 table", "reference count table",
		"reference count structure", "an L2 table of a snapshot", "snapshot table or a snapshot's L1 table",
		"directory, table or data of a persistent bitmap",
	}[k]
}

// metaSet knows which host clusters hold metadata, so that no guest data is ever
// written there, whatever the tables of a broken image say. It is guarded by
// Image.mu.
//
// It takes 8 to 16 bytes for each run of up to 64 clusters of one kind. There are
// at most as many runs as entries of the L1 table (4 Mi), of the refcount table
// (1 Mi), of the snapshots' L1 tables (4 Mi of them are looked at) and of the
// bitmaps' tables (4 Mi), and few for the tables of the header and the snapshots:
// that bounds it to some 200 MiB for any image. The 2048 L2 tables of 1 TiB in clusters of 64 KiB
// take 32 KiB at most.
type metaSet struct {
	leaves []metaLeaf // ascending, none empty
}

// metaLeaf is some runs in ascending order, so that to insert one moves few.
type metaLeaf []metaRun

// maxLeaf is the greatest length of a leaf.
const maxLeaf = 512

// metaRun is a run of clusters that hold metadata of one kind: the first cluster,
// which is below 2^54, then in 6 bits how many follow it, then in 4 the kind.
type metaRun uint64

const (
	metaKindBits = 4
	metaMoreBits = 6
	maxMetaRun   = 1 << metaMoreBits
)

func newMetaRun(start, n uint64, k metaKind) metaRun {
	return metaRun(start<<(metaKindBits+metaMoreBits) | (n-1)<<metaKindBits | uint64(k))
}

func (r metaRun) kind() metaKind { return metaKind(r & (1<<metaKindBits - 1)) }
func (r metaRun) start() uint64  { return uint64(r) >> (metaKindBits + metaMoreBits) }
func (r metaRun) end() uint64    { return r.start() + uint64(r)>>metaKindBits&(maxMetaRun-1) + 1 }

// metaPlace is where a run is in a set.
type metaPlace struct{ leaf, at int }

// search returns where the first run is that ends after cluster c.
func (s *metaSet) search(c uint64) metaPlace {
	i := sort.Search(len(s.leaves), func(i int) bool { l := s.leaves[i]; return l[len(l)-1].end() > c })
	if i == len(s.leaves) {
		return metaPlace{leaf: i}
	}
	l := s.leaves[i]
	return metaPlace{i, sort.Search(len(l), func(j int) bool { return l[j].end() > c })}
}

// run returns the run at p, none at the end of the set.
func (s *metaSet) run(p metaPlace) (metaRun, bool) {
	if p.leaf == len(s.leaves) {
		return 0, false
	}
	return s.leaves[p.leaf][p.at], true
}

// end is the cluster after the last one that holds metadata.
func (s *metaSet) end() uint64 {
	if len(s.leaves) == 0 {
		return 0
	}
	last := s.leaves[len(s.leaves)-1]
	return last[len(last)-1].end()
}

// at returns what cluster c holds.
func (s *metaSet) at(c uint64) metaKind {
	r, ok := s.run(s.search(c))
	if !ok || r.start() > c {
		return metaNone
	}
	return r.kind()
}

// add puts the clusters of e, which are not in the set, into it.
func (s *metaSet) add(e extent, k metaKind) {
	for e.n > 0 {
		n := min(e.n, maxMetaRun)
		s.insert(newMetaRun(e.start, n, k))
		e.start, e.n = e.start+n, e.n-n
	}
}

// insert puts r, which overlaps no other run, into the set.
func (s *metaSet) insert(r metaRun) {
	p := s.search(r.start())
	if p.leaf == len(s.leaves) { // behind all others: leaves get full
		if k := p.leaf - 1; k >= 0 && len(s.leaves[k]) < maxLeaf {
			s.leaves[k] = append(s.leaves[k], r)
			return
		}
		s.leaves = append(s.leaves, metaLeaf{r})
		return
	}
	if l := s.leaves[p.leaf]; len(l) == maxLeaf {
		s.leaves = slices.Insert(s.leaves, p.leaf+1, slices.Clone(l[maxLeaf/2:]))
		s.leaves[p.leaf] = l[:maxLeaf/2]
		if p.at >= maxLeaf/2 {
			p.leaf, p.at = p.leaf+1, p.at-maxLeaf/2
		}
	}
	s.leaves[p.leaf] = slices.Insert(s.leaves[p.leaf], p.at, r)
}

// remove takes the clusters of e out of the set; those that are not in it do not
// matter.
func (s *metaSet) remove(e extent) {
	end := e.start + e.n
	for {
		p := s.search(e.start)
		r, ok := s.run(p)
		if !ok || r.start() >= end {
			return
		}
		if l := slices.Delete(s.leaves[p.leaf], p.at, p.at+1); len(l) > 0 {
			s.leaves[p.leaf] = l
		} else {
			s.leaves = slices.Delete(s.leaves, p.leaf, p.leaf+1)
		}
		if r.start() < e.start {
			s.insert(newMetaRun(r.start(), e.start-r.start(), r.kind()))
		}
		if r.end() > end {
			s.insert(newMetaRun(end, r.end()-end, r.kind()))
		}
	}
}

// claim is add for clusters of which none may be in the set yet.
func (s *metaSet) claim(g *geometry, e extent, k metaKind) error {
	if r, ok := s.run(s.search(e.start)); ok && r.start() < e.start+e.n {
		return corruptf("the cluster at %#x is claimed by two: %s and %s", g.offset(max(e.start, r.start())), r.kind(), k)
	}
	s.add(e, k)
	return nil
}

// claimTables fills the set with the metadata of an image being opened for
// writing, and checks on the way that every table is where a table can be and
// that no two share a cluster.
func (m *Image) claimTables(h *header, fileSize int64) error {
	clusters := func(off, n uint64) extent {
		first := off >> m.clusterBits
		return extent{start: first, n: (off+n-1)>>m.clusterBits - first + 1}
	}
	if err := m.meta.claim(&m.geometry, extent{start: 0, n: 1}, metaHeader); err != nil {
		return err
	}
	if err := m.meta.claim(&m.geometry, clusters(h.refTableOffset, uint64(len(m.refs.table))*8), metaRefTable); err != nil {
		return err
	}
	if len(m.l1) > 0 {
		if err := m.meta.claim(&m.geometry, clusters(h.l1Offset, uint64(len(m.l1))*8), metaL1); err != nil {
			return err
		}
	}
	for i, e := range m.refs.table {
		off, err := m.decodeRefTable(e, i)
		if err != nil {
			return err
		}
		if err := m.claimTable(off, fileSize, metaRefBlock); err != nil {
			return err
		}
	}
	for i, e := range m.l1 {
		off, err := m.decodeL1(e, uint64(i))
		if err != nil {
			return err
		}
		if err := m.claimTable(off, fileSize, metaL2); err != nil {
			return err
		}
	}
	return m.claimSnapshots(h, fileSize)
}

// claimTable claims the one cluster of a table at off, if off is not 0.
func (m *Image) claimTable(off, fileSize int64, k metaKind) error {
	if off == 0 {
		return nil
	}
	if off >= fileSize {
		return corruptf("the %s at %#x lies beyond the end of the file", k, off)
	}
	return m.meta.claim(&m.geometry, extent{start: m.cluster(off), n: 1}, k)
}

// maxSharedEntries is how many entries of snapshots' L1 tables are looked at.
const maxSharedEntries = maxL1Bytes / 8

// claimShared adds the L2 tables that only snapshots use to the set, whose L1
// tables lie in the ranges of bytes l1s. A cluster that is counted too low is then
// not handed out or written while a snapshot needs it as a table. An entry that
// points to no table is left alone: it harms the snapshot and nothing else.
func (m *Image) claimShared(l1s []extent, fileSize int64) error {
	left := uint64(maxSharedEntries)
	for _, l1 := range l1s {
		const most = 1 << 16 // entries read at a time
		for l1.n > 0 && left > 0 {
			n := min(l1.n/8, most, left)
			table, err := m.loadTable(l1.start, int64(n)*8)
			if err != nil {
				return err
			}
			for _, e := range table {
				off, err := m.decodeL1(e, 0)
				if err == nil && off != 0 && off < fileSize && m.meta.at(m.cluster(off)) == metaNone {
					m.meta.add(extent{start: m.cluster(off), n: 1}, metaSharedL2)
				}
			}
			l1.start, l1.n, left = l1.start+n*8, l1.n-n*8, left-n
		}
	}
	return nil
}

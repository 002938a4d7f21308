package qcow2

// metaKind names the metadata that a host cluster holds.
type metaKind uint8

const (
	metaNone metaKind = iota
	metaHeader
	metaL1
	metaL2
	metaRefTable
	metaRefBlock
	metaSnapshots
)

func (k metaKind) String() string {
	return [...]string{
		"data", "header", "L1 table", "an active L2 table", "reference count table",
		"reference count structure", "snapshot table or a snapshot's L1 table",
	}[k]
}

// metaSet knows which host clusters hold metadata, so that no guest data is ever
// written there, whatever the tables of a broken image say. It is guarded by
// Image.mu. Its size is bounded by the limits on the tables: at most one entry
// for each L1 entry, refcount table entry and cluster of a table.
type metaSet map[uint64]metaKind

func (s metaSet) at(c uint64) metaKind { return s[c] }

func (s metaSet) add(e extent, k metaKind) {
	for c := e.start; c < e.start+e.n; c++ {
		s[c] = k
	}
}

func (s metaSet) remove(e extent) {
	for c := e.start; c < e.start+e.n; c++ {
		delete(s, c)
	}
}

// claim is add for clusters that must not be in the set yet.
func (s metaSet) claim(g *geometry, e extent, k metaKind) error {
	for c := e.start; c < e.start+e.n; c++ {
		if old := s[c]; old != metaNone {
			return corruptf("the cluster at %#x is claimed by two: %s and %s", g.offset(c), old, k)
		}
		s[c] = k
	}
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

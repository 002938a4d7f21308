package qcow2

// span is the beginning of a requested range that is alike: length bytes of one
// kind, contiguous in the host file where they are there.
type span struct {
	kind   kind
	length int64
	host   int64  // of the first byte; for a compressed cluster, of its data
	size   int64  // of the data of a compressed cluster
	pin    *pin   // ended by the user of the span
	miss   bool   // the slice with ID missID has to be loaded first, by loadMissing
	missID uint64 // set if miss
}

// cursor remembers the slice of the last lookup, because most follow it.
type cursor struct {
	valid  bool
	id     uint64
	slice  *slice // nil if there is no table
	copied bool   // the table belongs to the active disk alone
}

// entryAt looks up guest cluster c. hit is false if its slice is not in memory.
// mu is held.
func (m *Image) entryAt(cur *cursor, c uint64) (e entry, hit bool, err error) {
	if id := m.sliceID(c); !cur.valid || cur.id != id {
		off, err := m.tableOf(id)
		if err != nil {
			return entry{}, false, err
		}
		*cur = cursor{id: id}
		if off != 0 {
			if cur.slice = m.cache.find(id); cur.slice == nil {
				return entry{}, false, nil
			}
			cur.copied = m.l1[m.l1Index(id)]&entryCopied != 0
		}
		cur.valid = true
	}
	if cur.slice == nil {
		return entry{}, true, nil
	}
	e, err = m.decode(cur.slice.entries[m.sliceIndex(c)], c)
	return e, err == nil, err
}

// find maps the beginning of [off, off+n) for a reader and pins it.
func (m *Image) find(off, n int64, shard int) (span, error) {
	if err := m.admit(); err != nil {
		return span{}, err
	}
	defer m.mu.RUnlock()
	if err := m.checkReach(off, n); err != nil {
		return span{}, err
	}
	var cur cursor
	c := m.cluster(off)
	e, hit, err := m.entryAt(&cur, c)
	if err != nil {
		return span{}, err
	}
	if !hit {
		return m.missed(m.sliceID(c), shard), nil
	}
	s := m.spanOf(e, off, n)
	for s.length < n && s.kind != kindCompressed {
		c++
		// An error is reported when a range begins with it.
		e, hit, _ := m.entryAt(&cur, c)
		if !hit || !s.continues(e) {
			break
		}
		s.length = min(s.length+m.clusterSize, n)
	}
	s.pin = m.epochs.enter(shard)
	return s, nil
}

// missed returns the pinned span of a lookup whose slice is not in memory. mu is
// held.
func (m *Image) missed(id uint64, shard int) span {
	m.counts.held.Add(1)
	return span{miss: true, missID: id, pin: m.epochs.enter(shard)}
}

// loadMissing loads what the lookup of s did not find and ends its pin.
func (m *Image) loadMissing(s *span) error {
	err := m.loadSlice(s.missID)
	s.pin.leave()
	return err
}

// lookup is find with the slice loaded where it has to be.
func (m *Image) lookup(off, n int64, shard int) (span, error) {
	for {
		s, err := m.find(off, n, shard)
		if err != nil || !s.miss {
			return s, err
		}
		if err := m.loadMissing(&s); err != nil {
			return span{}, err
		}
	}
}

// findOwned maps the beginning of [off, off+n) for a writer. The span is of
// kindNormal, and pinned, iff it may be written in place: the image owns its
// clusters alone. Of another kind it has no meaning but that.
func (m *Image) findOwned(off, n int64, shard int) (span, error) {
	if err := m.admit(); err != nil {
		return span{}, err
	}
	defer m.mu.RUnlock()
	if err := m.checkReach(off, n); err != nil {
		return span{}, err
	}
	var cur cursor
	c := m.cluster(off)
	e, hit, err := m.entryAt(&cur, c)
	if err != nil {
		return span{}, err
	}
	if !hit {
		return m.missed(m.sliceID(c), shard), nil
	}
	if !cur.owns(e) {
		return span{}, nil
	}
	if err := m.checkData(e.host); err != nil {
		return span{}, err
	}
	s := m.spanOf(e, off, n)
	for s.length < n {
		c++
		e, hit, _ := m.entryAt(&cur, c)
		if !hit || !cur.owns(e) || !s.continues(e) || m.checkData(e.host) != nil {
			break
		}
		s.length = min(s.length+m.clusterSize, n)
	}
	s.pin = m.epochs.enter(shard)
	return s, nil
}

// owns reports whether e, the entry last looked up, may be written in place.
func (cur *cursor) owns(e entry) bool { return cur.copied && e.copied && e.kind == kindNormal }

// checkData returns an error if guest data must not be written to the host
// cluster at off, whatever the tables say. mu is held.
func (m *Image) checkData(off int64) error {
	c := m.cluster(off)
	if k := m.meta.at(c); k != metaNone {
		return corruptf("an L2 entry points to %#x, which holds the %s", off, k)
	}
	if c >= m.covered {
		return corruptf("an L2 entry points to %#x, which has no reference count", off)
	}
	return nil
}

// spanOf returns the span of the part of [off, off+n) that is in the cluster of
// off, whose entry is e.
func (m *Image) spanOf(e entry, off, n int64) span {
	in := m.inCluster(off)
	s := span{kind: e.kind, length: min(n, m.clusterSize-in), host: e.host, size: e.size}
	switch e.kind {
	case kindNormal:
		s.host += in
	case kindZeroAlloc:
		s.kind = kindZero
	}
	return s
}

// continues reports whether the cluster with entry e, next in guest order, may
// be joined to the span, which reaches to the end of its last cluster.
func (s *span) continues(e entry) bool {
	switch s.kind {
	case kindNormal:
		return e.kind == kindNormal && e.host == s.host+s.length
	case kindZero:
		return e.kind == kindZero || e.kind == kindZeroAlloc
	}
	return s.kind == e.kind
}

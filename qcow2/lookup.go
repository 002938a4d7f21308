package qcow2

// span is the beginning of a requested range that is alike: length bytes of one
// kind, contiguous in the host file where they are there.
type span struct {
	kind   kind
	length int64
	host   int64  // of the first byte, noHost if there is no place for it; for a compressed cluster, of its data
	size   int64  // of the data of a compressed cluster
	pin    *pin   // ended by the user of the span
	miss   bool   // the slice with ID missID has to be loaded first, by loadMissing
	missID uint64 // set if miss
}

// noHost is the place of what has none in the file.
const noHost = -1

// purpose is what a lookup is for.
type purpose uint8

const (
	forReading purpose = iota
	forWriting         // in place: only what the image owns alone is of use
	forMapping         // places count for all kinds, as they do for data
)

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
	e, err = m.entryIn(cur.slice, c)
	return e, err == nil, err
}

// entryIn decodes the entry of guest cluster c, which slice s maps. mu is held.
func (m *Image) entryIn(s *slice, c uint64) (entry, error) {
	i := m.sliceIndex(c) << m.wordBits
	return m.decode(s.entries[i], s.entries[i+uint64(m.wordBits)], c)
}

// store makes e the entry of guest cluster c, which slice s maps. mu is held
// exclusively.
func (m *Image) store(s *slice, c uint64, e entry) {
	desc, bitmap := m.encode(e)
	i := m.sliceIndex(c) << m.wordBits
	s.set(i, desc)
	if m.wordBits > 0 {
		s.set(i+1, bitmap)
	}
	m.cache.markDirty(s)
}

// find maps the beginning of [off, off+n) for a reader and pins it.
func (m *Image) find(off, n int64, shard int) (span, error) {
	return m.findFor(off, n, shard, forReading)
}

// findOwned maps the beginning of [off, off+n) for a writer. The span is of
// kindNormal, and pinned, iff it may be written in place: the image owns its
// clusters alone. Of another kind it has no meaning but that.
func (m *Image) findOwned(off, n int64, shard int) (span, error) {
	return m.findFor(off, n, shard, forWriting)
}

func (m *Image) findFor(off, n int64, shard int, use purpose) (span, error) {
	if err := m.admit(shard); err != nil {
		return span{}, err
	}
	defer m.mu.RUnlockShard(shard)
	if err := m.checkReach(off, n, shard); err != nil {
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
	s := m.spanOf(&e, off, n)
	if use == forWriting {
		if s.kind != kindNormal || !cur.owns(&e) {
			return span{}, nil
		}
		if err := m.checkData(e.host); err != nil {
			return span{}, err
		}
	}
	last := m.cluster(off + n - 1)
	for s.length < n && s.kind != kindCompressed && m.inCluster(off+s.length) == 0 {
		c++
		// An error is reported when a range begins with it.
		e, hit, _ := m.entryAt(&cur, c)
		if !hit || use == forWriting && (!cur.owns(&e) || m.checkData(e.host) != nil) {
			break
		}
		next := m.spanOf(&e, m.offset(c), n-s.length)
		if !s.continues(&next, use) {
			break
		}
		s.length += next.length
		if use != forWriting && m.inCluster(off+s.length) == 0 {
			more := m.alike(&cur, &e, c, last)
			c += more
			s.length = min(n, s.length+m.offset(more))
		}
	}
	s.pin = m.epochs.enter(shard)
	return s, nil
}

// alike returns how many clusters after c, up to last, continue c, whose entry is e,
// in the slice of cur: those whose entries differ from the one before in the place
// alone, which is next. It need not find all, but finds most without decoding them.
// mu is held.
func (m *Image) alike(cur *cursor, e *entry, c, last uint64) uint64 {
	i := m.sliceIndex(c)
	most := min(last-c, 1<<m.sliceBits-1-i)
	switch {
	case cur.slice == nil: // without a table, what follows in it is alike, too
		return most
	case m.wordBits > 0: // what they say of subclusters is in a word of its own
		return 0
	}
	step := uint64(0)
	if e.allocated {
		step = 1 << m.clusterBits
	}
	found := uint64(0)
	desc := cur.slice.entries[i]
	for _, next := range cur.slice.entries[i+1 : i+1+most] {
		if desc += step; next != desc || desc&l2Reserved != 0 {
			break
		}
		found++
	}
	return found
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
	return m.lookupFor(off, n, shard, forReading)
}

func (m *Image) lookupFor(off, n int64, shard int, use purpose) (span, error) {
	for {
		s, err := m.findFor(off, n, shard, use)
		if err != nil || !s.miss {
			return s, err
		}
		if err := m.loadMissing(&s); err != nil {
			return span{}, err
		}
	}
}

// owns reports whether the image owns the host cluster of e, the entry last looked
// up, and its table.
func (cur *cursor) owns(e *entry) bool { return cur.copied && e.owned() }

// checkData returns an error if guest data must not be written to the host
// cluster at off, whatever the tables say. mu is held.
func (m *Image) checkData(off int64) error {
	if m.external {
		return nil // there is nothing but guest data
	}
	c := m.cluster(off)
	if k := m.meta.at(c); k != metaNone {
		return corruptf("an L2 entry points to %#x, which holds the %s", off, k)
	}
	if c >= m.covered {
		return corruptf("an L2 entry points to %#x, which has no reference count", off)
	}
	return nil
}

// spanOf returns the span at the beginning of the part of [off, off+n) that is in
// the cluster of off, whose entry is e: subclusters of one kind.
func (m *Image) spanOf(e *entry, off, n int64) span {
	in := m.inCluster(off)
	first := m.sub(off)
	s := span{kind: e.kindOf(first), host: e.host, size: e.size}
	switch {
	case e.allocated:
		s.host += in
	case !e.compressed:
		s.host = noHost
	}
	stop := first + 1
	for stop < 1<<m.subBits && e.kindOf(stop) == s.kind {
		stop++
	}
	s.length = min(n, int64(stop)*m.grain()-in) //nolint:gosec // G115: at most 32
	return s
}

// continues reports whether next, the span of the cluster that is next in guest
// order, may be joined to s, which reaches to the end of its last cluster.
func (s *span) continues(next *span, use purpose) bool {
	if s.kind != next.kind {
		return false
	}
	return s.kind != kindNormal && use != forMapping || next.host == s.host+s.length || s.host == noHost && next.host == noHost
}

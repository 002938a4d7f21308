package qcow2

import "math/bits"

// WritevAt writes the buffers of iov in order at off; together they must lie
// inside the disk. It neither keeps iov nor changes its elements. On an error
// any part of the range may have been written.
//
// Of writes to the same bytes at the same time, either may win.
func (m *Image) WritevAt(iov [][]byte, off int64) error {
	r := newRequest(iov)
	err := m.write(r, off, length(iov))
	r.release()
	return err
}

// WriteAt implements io.WriterAt.
func (m *Image) WriteAt(p []byte, off int64) (int, error) {
	r := newRequestOf(p)
	err := m.write(r, off, int64(len(p)))
	r.release()
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// write writes the buffers of r, n bytes in all, at off.
func (m *Image) write(r *requestState, off, n int64) error {
	if err := m.checkWrite(off, n); err != nil {
		return err
	}
	return m.writeAll(r, off, n)
}

// writeAll is write to a range within reach of the request.
func (m *Image) writeAll(r *requestState, off, n int64) error {
	for n > 0 {
		if err := m.usable(); err != nil {
			return err
		}
		done, err := m.writeSome(r, off, n)
		if err != nil {
			return m.explain(err)
		}
		off, n = off+done, n-done
	}
	return nil
}

// checkWrite returns an error if nothing may be written to [off, off+n).
func (m *Image) checkWrite(off, n int64) error {
	if m.readOnly {
		return &Error{Path: m.path, Kind: ErrReadOnly, What: "the image is open for reading only"}
	}
	if err := m.checkRange(off, n); err != nil {
		return err
	}
	if n > 0 && m.followed.Load() {
		return m.disownBitmaps()
	}
	return nil
}

// writeSome writes the beginning of [off, off+n) and returns its length, which
// may be zero if only something in the way was removed.
func (m *Image) writeSome(r *requestState, off, n int64) (int64, error) {
	s, err := m.findOwned(off, n, r.shard)
	switch {
	case err != nil:
		return 0, err
	case s.miss:
		return 0, m.loadMissing(&s)
	case s.kind != kindNormal:
		return m.writeNew(r, off, n)
	}
	err = m.data.WritevAt(r.take(s.length), s.host)
	s.pin.leave()
	return s.length, err
}

// writeNew writes the beginning of [off, off+n), whose first cluster is not
// owned: it reserves host clusters, fills them, and publishes them. It returns
// how much it wrote, which is zero if it had to wait for something, because then
// the mapping may have changed.
func (m *Image) writeNew(r *requestState, off, n int64) (int64, error) {
	p, err := m.hold(r.shard)
	if err != nil {
		return 0, err
	}
	defer p.leave()
	if err := m.checkReach(off, n, r.shard); err != nil {
		return 0, err // the disk shrank
	}
	if err := m.limitDirty(); err != nil {
		return 0, err
	}
	a, err := m.reserve(off, n)
	if err != nil || a == nil {
		return 0, err
	}
	end := min(off+n, m.offset(a.end()))
	err = m.fillAllocation(a, r, off, end)
	if err != nil {
		m.abandon(a)
		return 0, err
	}
	m.publish(a)
	return end - off, nil
}

// reserve begins the allocation of the clusters at the beginning of
// [off, off+n), for a caller that has a pin. It returns nil after it had to
// wait, or to do something without the lock: then the caller looks again.
func (m *Image) reserve(off, n int64) (*allocation, error) {
	c := m.cluster(off)
	s, err := m.lockSlice(c)
	if err != nil || s == nil {
		return nil, err
	}
	a, err := m.choose(s, off, off+n, m.claimable(c, m.cluster(off+n-1)+1))
	if err == nil && a != nil && a.host.n > 0 {
		m.frame(a, off, off+n)
		s.users++
		m.inflight.add(&a.claim)
		m.mu.Unlock()
		return a, nil
	}
	m.mu.Unlock()
	if err == nil && a != nil {
		err = m.refill()
	}
	return nil, err
}

// lockSlice takes the exclusive side of mu for a change to the entry of guest
// cluster c, and returns its slice. If the image does not own the table yet, the
// slice is not in memory or a hole, or another request claims the cluster, it sees
// to that instead, and returns nil without the lock: the caller looks again.
func (m *Image) lockSlice(c uint64) (*slice, error) {
	id := m.sliceID(c)
	i := m.l1Index(id)
	m.lock()
	if m.l1[i]&entryCopied == 0 {
		m.mu.Unlock()
		return nil, m.ownTable(i)
	}
	s := m.cache.find(id)
	if s == nil {
		m.mu.Unlock()
		return nil, m.loadSlice(id)
	}
	if s.hollow {
		m.mu.Unlock()
		return nil, m.fillHollow(s)
	}
	if other := m.inflight.overlapping(c); other != nil && other.guest <= c {
		done := other.wait()
		m.mu.Unlock()
		<-done
		return nil, nil
	}
	return s, nil
}

// claimable returns the end of the guest clusters from c on that a request for
// those below limit can claim at once: c's slice, up to the next claim. mu is held.
func (m *Image) claimable(c, limit uint64) uint64 {
	limit = min(limit, (m.sliceID(c)+1)<<m.sliceBits)
	if other := m.inflight.overlapping(c); other != nil {
		limit = min(limit, other.guest)
	}
	return limit
}

// choose picks host clusters for the guest clusters of [off, end) below limit, or
// the first of them, all mapped by s: those that their entries have, where the
// image owns them, else new ones. It returns nil if off may be written in place by
// now, and no host clusters if the pool is empty. mu is held exclusively.
func (m *Image) choose(s *slice, off, end int64, limit uint64) (*allocation, error) {
	c := m.cluster(off)
	first, err := m.entryIn(s, c)
	if err != nil {
		return nil, err
	}
	if first.owned() && first.kindOf(m.sub(off)) == kindNormal {
		return nil, nil
	}
	a := &allocation{claim: claim{guest: c}, slice: s, first: first, reused: first.owned() || m.external}
	n := uint64(1)
	for ; c+n < limit; n++ {
		e, err := m.entryIn(s, c+n)
		if err != nil || !m.extends(a, &e, n) {
			break
		}
	}
	if a.host, err = m.hostsFor(a, n); err != nil || a.host.n == 0 {
		return a, err
	}
	a.n = a.host.n
	if a.last, err = m.entryIn(s, a.end()-1); err != nil || a.reused {
		return a, err
	}
	return a, m.checkReplaced(a)
}

// extends reports whether the guest cluster with entry e, n clusters after the
// first, can be part of the allocation.
func (m *Image) extends(a *allocation, e *entry, n uint64) bool {
	switch {
	case !a.reused:
		return !e.owned()
	case e.kindOf(0) == kindNormal:
		return false // it may be written in place
	}
	return m.external || e.owned() && e.host == a.first.host+m.offset(n)
}

// hostsFor returns the host clusters of a for n guest clusters, or the first of
// them. mu is held exclusively.
func (m *Image) hostsFor(a *allocation, n uint64) (extent, error) {
	switch {
	case m.external:
		return extent{start: a.guest, n: n}, nil
	case !a.reused:
		e := m.pool.take(n)
		return e, m.checkFree(e)
	}
	e := extent{start: m.cluster(a.first.host), n: n}
	for i := range n {
		if err := m.checkData(m.offset(e.start + i)); err != nil {
			return extent{}, err
		}
	}
	return e, nil
}

// frame says which bytes a fills for a request to write [off, end): beside those,
// the rest of the subclusters at both ends, unless it is there already. New host
// clusters also get the data that the old ones have before and behind.
func (m *Image) frame(a *allocation, off, end int64) {
	begin, last := m.offset(a.guest), m.offset(a.end()-1)
	end = min(end, last+m.clusterSize)
	grain := m.grain()
	a.from, a.to = off&^(grain-1), (end+grain-1)&^(grain-1)
	if !a.reused {
		if old := a.first.data; old != 0 {
			a.from = min(a.from, begin+int64(bits.TrailingZeros32(old))*grain)
		}
		if old := a.last.data; old != 0 {
			a.to = max(a.to, last+int64(bits.Len32(old))*grain)
		}
		return
	}
	if a.last.kindOf(m.sub(end-1)) == kindNormal {
		a.to = end
	}
	if m.external {
		a.to = min(a.to, m.reach.Load()) // a raw data file ends with the disk
	}
}

// checkReplaced checks that the clusters which a replaces are data and not those
// that replace them, as they may be where the counts lie: their counts are going
// to be lowered. mu is held exclusively.
func (m *Image) checkReplaced(a *allocation) error {
	for c := a.guest; c < a.end(); c++ {
		old, err := m.entryIn(a.slice, c)
		if err == nil {
			err = m.checkFreed(&old)
		}
		if err != nil {
			return err
		}
		first, n := m.hostClusters(&old)
		for h := first; h < first+n; h++ {
			if h >= a.host.start && h < a.host.start+a.host.n {
				return corruptf("the cluster at %#x is in use but has a reference count of zero", m.offset(h))
			}
		}
	}
	return nil
}

// checkFreed checks that the host clusters of e, an entry that is going, are data
// and counted. mu is held.
func (m *Image) checkFreed(e *entry) error {
	first, n := m.hostClusters(e)
	for h := first; h < first+n; h++ {
		if err := m.checkData(m.offset(h)); err != nil {
			return err
		}
	}
	return nil
}

// publish makes the filled clusters of a the contents of its guest clusters.
func (m *Image) publish(a *allocation) {
	m.lock()
	defer m.mu.Unlock()
	for i := range a.n {
		c := a.guest + i
		old, _ := m.entryIn(a.slice, c) // checked by choose, and nobody has changed it
		filled := m.subs(c, a.from, a.to)
		next := entry{
			allocated: true, copied: true, host: m.offset(a.host.start + i),
			data: filled, zero: old.zero &^ filled,
		}
		if a.reused {
			next.data |= old.data
		} else {
			m.unreference(&old)
		}
		m.store(a.slice, c, next)
	}
	if !a.reused {
		m.grown = appendExtent(m.grown, a.host)
		m.counts.allocated.Add(a.host.n)
	}
	m.end(a)
}

// unreference notes that an L2 entry, which was e, is going. mu is held
// exclusively.
func (m *Image) unreference(e *entry) {
	first, n := m.hostClusters(e)
	for i := range n {
		m.freed = append(m.freed, first+i)
	}
}

// abandon undoes the reservation of an allocation that failed. Its guest
// clusters are what they were.
func (m *Image) abandon(a *allocation) {
	m.lock()
	defer m.mu.Unlock()
	if !a.reused {
		m.pool.recycle(a.host)
	}
	m.end(a)
}

// end lets go of all that a holds and wakes who waits for it.
func (m *Image) end(a *allocation) {
	a.slice.users--
	m.inflight.remove(&a.claim)
}

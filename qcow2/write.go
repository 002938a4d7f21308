package qcow2

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

// writeAll is write to a range within reach.
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
	return m.checkRange(off, n)
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
	if err := m.checkReach(off, n); err != nil {
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
	id := m.sliceID(c)
	m.lock()
	if m.l1[m.l1Index(id)]&entryCopied == 0 {
		m.mu.Unlock()
		return nil, m.ownTable(m.l1Index(id))
	}
	s := m.cache.find(id)
	if s == nil {
		m.mu.Unlock()
		return nil, m.loadSlice(id)
	}
	// At most to the end of the slice, and to the next claim.
	limit := min(m.cluster(off+n-1)+1, (id+1)<<m.sliceBits)
	if other := m.inflight.overlapping(c); other != nil {
		if other.guest <= c {
			done := other.wait()
			m.mu.Unlock()
			<-done
			return nil, nil
		}
		limit = min(limit, other.guest)
	}
	a, err := m.choose(s, c, limit)
	if err == nil && a != nil && a.host.n > 0 {
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

// choose picks host clusters for the guest clusters [c, limit), or the first of
// them, all mapped by s: those that a zero entry reserves, where the image owns
// them, else new ones. It returns nil if c may be written in place by now, and
// no host clusters if the pool is empty. mu is held exclusively.
func (m *Image) choose(s *slice, c, limit uint64) (*allocation, error) {
	first, err := m.decode(s.entries[m.sliceIndex(c)], c)
	if err != nil {
		return nil, err
	}
	if first.copied && first.kind == kindNormal {
		return nil, nil
	}
	a := &allocation{claim: claim{guest: c}, slice: s, first: first, last: first}
	a.reused = first.reserves()
	n := uint64(1)
	for ; c+n < limit; n++ {
		e, err := m.decode(s.entries[m.sliceIndex(c+n)], c+n)
		if err != nil || !a.extends(e, n, m.clusterSize) {
			break
		}
	}
	if a.reused {
		a.host = extent{start: m.cluster(first.host), n: n}
		for i := range n {
			if err := m.checkData(m.offset(a.host.start + i)); err != nil {
				return nil, err
			}
		}
	} else if a.host = m.pool.take(n); a.host.n == 0 {
		return a, nil
	} else if err := m.checkFree(a.host); err != nil {
		return nil, err
	}
	a.n = a.host.n
	end := a.end() - 1
	if a.last, err = m.decode(s.entries[m.sliceIndex(end)], end); err != nil || a.reused {
		return a, err
	}
	return a, m.checkReplaced(a)
}

// checkReplaced checks that the clusters which a replaces are data and not those
// that replace them, as they may be where the counts lie: their counts are going
// to be lowered. mu is held exclusively.
func (m *Image) checkReplaced(a *allocation) error {
	for c := a.guest; c < a.end(); c++ {
		old, err := m.decode(a.slice.entries[m.sliceIndex(c)], c)
		if err != nil {
			return err
		}
		first, n := m.hostClusters(old)
		for h := first; h < first+n; h++ {
			if err := m.checkData(m.offset(h)); err != nil {
				return err
			}
			if h >= a.host.start && h < a.host.start+a.host.n {
				return corruptf("the cluster at %#x is in use but has a reference count of zero", m.offset(h))
			}
		}
	}
	return nil
}

// reserves reports whether the entry reserves a host cluster to write to.
func (e entry) reserves() bool { return e.copied && e.kind == kindZeroAlloc }

// extends reports whether the guest cluster with entry e, n clusters after the
// first, can be part of the allocation.
func (a *allocation) extends(e entry, n uint64, clusterSize int64) bool {
	if a.reused {
		return e.reserves() && e.host == a.first.host+int64(n)*clusterSize //nolint:gosec // G115: at most 512 clusters
	}
	return !e.reserves() && (!e.copied || e.kind != kindNormal)
}

// publish makes the filled clusters of a the contents of its guest clusters.
func (m *Image) publish(a *allocation) {
	m.lock()
	defer m.mu.Unlock()
	for i := range a.host.n {
		at := m.sliceIndex(a.guest + i)
		if !a.reused {
			m.unreference(a.slice.entries[at], a.guest+i)
		}
		a.slice.set(at, m.pointer(a.host.start+i)|entryCopied)
	}
	m.cache.markDirty(a.slice)
	if !a.reused {
		m.grown = appendExtent(m.grown, a.host)
		m.counts.allocated.Add(a.host.n)
	}
	m.end(a)
}

// unreference notes that L2 entry e, of guest cluster c, is going. mu is held
// exclusively.
func (m *Image) unreference(e, c uint64) {
	old, err := m.decode(e, c)
	if err != nil {
		return // checked when the allocation was made, and nobody has changed it
	}
	first, n := m.hostClusters(old)
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

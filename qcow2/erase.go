package qcow2

import (
	"errors"

	"golang.org/x/sys/unix"
)

// room says what becomes of the host clusters of a range that is made zero.
type room uint8

const (
	roomKept     room = iota // a write to the range needs no new ones
	roomGiven                // the host gets their space back
	roomOptional             // and nothing is written to make zeros
	roomDropped              // the range is not part of the disk any more
)

// WriteZeroes makes the n bytes at off read as zero. Clusters that the image
// owns keep their room: a write to them needs no new space.
func (m *Image) WriteZeroes(off, n int64) error { return m.erase(off, n, roomKept) }

// PunchHole makes the n bytes at off read as zero and gives the room of whole
// clusters back to the host, where its file system can take it.
func (m *Image) PunchHole(off, n int64) error { return m.erase(off, n, roomGiven) }

// Discard is PunchHole for the whole clusters in the n bytes at off; what the
// range has of others stays. The contents of a backing file do not show. Only
// in an image of version 2, which cannot hide them, a cluster over a backing
// file stays as it is.
func (m *Image) Discard(off, n int64) error { return m.erase(off, n, roomOptional) }

// DiscardGranularity is the size in bytes of the aligned pieces that Discard
// frees.
func (m *Image) DiscardGranularity() int64 { return m.clusterSize }

// erase makes [off, off+n) zero.
func (m *Image) erase(off, n int64, how room) error {
	if err := m.checkWrite(off, n); err != nil {
		return err
	}
	return m.eraseAll(off, n, how)
}

// eraseAll is erase of a range within reach.
func (m *Image) eraseAll(off, n int64, how room) error {
	r := newRequest(nil)
	defer r.release()
	for n > 0 {
		if err := m.usable(); err != nil {
			return err
		}
		done, err := m.eraseSome(off, n, how, r.shard)
		if err != nil {
			return m.explain(err)
		}
		off, n = off+done, n-done
	}
	return nil
}

// eraseSome makes the beginning of [off, off+n) zero and returns its length,
// which may be zero if only something in the way was removed.
func (m *Image) eraseSome(off, n int64, how room, shard int) (int64, error) {
	if empty := m.emptyTable(off); empty > 0 {
		return min(n, empty), nil
	}
	part := min(n, m.clusterSize-m.inCluster(off))
	size := m.reach.Load()
	whole := part == m.clusterSize || m.inCluster(off) == 0 && off+part == size
	if !whole || m.version == 2 && (how == roomKept || m.showsBacking(off)) {
		if how == roomOptional {
			return part, nil
		}
		return m.zeroPart(off, part, shard)
	}
	p, err := m.hold(shard)
	if err != nil {
		return 0, err
	}
	defer p.leave()
	if m.reach.Load() != size {
		return 0, m.checkReach(off, n) // look again
	}
	if err := m.limitDirty(); err != nil {
		return 0, err
	}
	limit := m.cluster(off + n)
	if off+n == size {
		limit = m.cluster(size + m.clusterSize - 1)
	}
	end, err := m.eraseClusters(m.cluster(off), limit, how)
	return min(m.offset(end), off+n) - off, err
}

// emptyTable returns how many bytes from off on are zero because there is no L2
// table for them; 0 if there is one.
func (m *Image) emptyTable(off int64) int64 {
	i := m.l1Index(m.sliceID(m.cluster(off)))
	if m.admit() != nil {
		return 0
	}
	defer m.mu.RUnlock()
	if i >= uint64(len(m.l1)) || m.l1[i] != 0 || m.showsBacking(off) {
		return 0
	}
	return m.offset((i+1)<<m.l2Bits) - off
}

// zeroPart writes zeros to the beginning of [off, off+n), a part of one cluster
// or one that no flag can make zero, unless it is zero already.
func (m *Image) zeroPart(off, n int64, shard int) (int64, error) {
	s, err := m.lookup(off, n, shard)
	if err != nil {
		return 0, err
	}
	s.pin.leave()
	if s.kind == kindZero || s.kind == kindUnallocated && !m.showsBacking(off) {
		return s.length, nil
	}
	return s.length, m.writeZeros(off, s.length)
}

// writeZeros writes zeros to [off, off+n), a part of one cluster within reach.
func (m *Image) writeZeros(off, n int64) error {
	r := newRequest(zeroBuffers(n))
	err := m.writeAll(r, off, n)
	r.release()
	return err
}

// eraseClusters makes guest clusters from c on zero, all below limit, for a
// caller that has a pin. It returns the cluster after the last it treated, which
// is c after it had to wait, or to do something without the lock.
//
// The entries change first, all at one instant. Requests that looked the
// clusters up before may still read and write them; as they run beside this one,
// either may win. Holes are punched while the range is claimed, so no write that
// finds the new entries reaches a host cluster before its hole is complete.
func (m *Image) eraseClusters(c, limit uint64, how room) (uint64, error) {
	id := m.sliceID(c)
	i := m.l1Index(id)
	m.lock()
	if m.l1[i]&entryCopied == 0 {
		m.mu.Unlock()
		return c, m.ownTable(i)
	}
	s := m.cache.find(id)
	if s == nil {
		m.mu.Unlock()
		return c, m.loadSlice(id)
	}
	limit = min(limit, (id+1)<<m.sliceBits)
	if other := m.inflight.overlapping(c); other != nil {
		if other.guest <= c {
			done := other.wait()
			m.mu.Unlock()
			<-done
			return c, nil
		}
		limit = min(limit, other.guest)
	}
	end, holes, err := m.eraseEntries(s, c, limit, how)
	if len(holes) == 0 {
		m.mu.Unlock()
		return end, err
	}
	claimed := &claim{guest: c, n: end - c}
	m.inflight.add(claimed)
	m.mu.Unlock()
	for _, e := range holes {
		m.punch(e)
	}
	m.lock()
	m.inflight.remove(claimed)
	m.mu.Unlock()
	return end, err
}

// eraseEntries changes the entries of guest clusters [c, limit), all mapped by
// s, to zero. It returns the cluster after the last it changed, and the host
// clusters to punch. mu is held exclusively.
func (m *Image) eraseEntries(s *slice, c, limit uint64, how room) (uint64, []extent, error) {
	var holes []extent
	for ; c < limit; c++ {
		at := m.sliceIndex(c)
		old := s.entries[at]
		e, err := m.decode(old, c)
		if err == nil && e.copied {
			err = m.checkData(e.host)
		}
		if err != nil {
			return c, holes, err
		}
		next := m.erased(old, e, m.offset(c), how)
		if e.copied && next != 0 && how != roomKept {
			holes = appendExtent(holes, extent{start: m.cluster(e.host), n: 1})
		}
		if next == old {
			continue
		}
		if next&entryOffset == 0 {
			m.unreference(old, c)
		}
		s.set(at, next)
		m.cache.markDirty(s)
	}
	return c, holes, nil
}

// erased returns the L2 entry that makes the guest cluster at off zero, whose
// entry is old and decodes to e. A cluster that the image owns stays where it
// is: that spares the search for another one, and all ordering.
func (m *Image) erased(old uint64, e entry, off int64, how room) uint64 {
	switch {
	case how == roomDropped:
		return 0
	case m.version == 2:
		return 0 // no backing file shows here
	case e.copied:
		return old | entryZero
	case e.kind == kindZero, e.kind == kindZeroAlloc && how == roomKept,
		e.kind == kindUnallocated && !m.showsBacking(off):
		return old
	}
	return entryZero
}

// punch gives the space of host clusters, whose contents nobody needs, back to
// the host. Whether the host takes it or fails makes no difference to the image.
func (m *Image) punch(e extent) {
	if m.unpunchable.Load() {
		return
	}
	m.counts.punched.Add(m.pointer(e.n))
	err := m.file.Punch(m.offset(e.start), m.offset(e.n))
	if errors.Is(err, unix.EOPNOTSUPP) {
		m.unpunchable.Store(true)
	}
}

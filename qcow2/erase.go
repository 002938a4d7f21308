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
	roomDropped              // the range, of whole clusters, is not part of the disk any more
)

// WriteZeroes makes the n bytes at off read as zero. Clusters that the image
// owns keep their room: a write to them needs no new space.
func (m *Image) WriteZeroes(off, n int64) error { return m.erase(off, n, roomKept) }

// PunchHole makes the n bytes at off read as zero and gives the room of whole
// clusters back to the host, where its file system can take it.
func (m *Image) PunchHole(off, n int64) error { return m.erase(off, n, roomGiven) }

// Discard is PunchHole for the whole pieces of DiscardGranularity in the n bytes
// at off; what the range has of others stays. The contents of a backing file do
// not show. What would take room stays as it is: in an image of version 2, which
// cannot hide them, a cluster over a backing file; with extended L2 entries, a
// part of a compressed cluster.
func (m *Image) Discard(off, n int64) error { return m.erase(off, n, roomOptional) }

// DiscardGranularity is the size in bytes of the aligned pieces that Discard
// frees: clusters, or with extended L2 entries their 32 subclusters.
func (m *Image) DiscardGranularity() int64 { return m.grain() }

// erase makes [off, off+n) zero.
func (m *Image) erase(off, n int64, how room) error {
	if err := m.checkWrite(off, n); err != nil {
		return err
	}
	r := newRequest(nil)
	defer r.release()
	return m.eraseAll(off, n, how, r.shard)
}

// eraseAll is erase of a range within reach of the shard.
func (m *Image) eraseAll(off, n int64, how room, shard int) error {
	for n > 0 {
		if err := m.usable(); err != nil {
			return err
		}
		done, err := m.eraseSome(off, n, how, shard)
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
	if empty := m.emptyTable(off); empty > 0 && !m.raw {
		return min(n, empty), nil
	}
	size := m.limit(shard)
	part, byFlag, err := m.erasable(off, n, size, how, shard)
	if err != nil {
		return 0, err
	}
	if !byFlag {
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
	if m.limit(shard) != size {
		return 0, m.checkReach(off, n, shard) // look again
	}
	if err := m.limitDirty(); err != nil {
		return 0, err
	}
	end := off + n
	if end < size {
		end &^= m.grain() - 1
	}
	if m.raw {
		return m.eraseRaw(off, end, how)
	}
	return m.eraseEntries(off, end, end == size, how)
}

// erasable returns the length of the beginning of [off, off+n) that is treated
// alike, and whether its entry can say that it is zero; else zeros have to be
// written. Entries speak of whole subclusters; a compressed cluster has none.
func (m *Image) erasable(off, n, size int64, how room, shard int) (part int64, byFlag bool, err error) {
	grain := m.grain()
	in := off & (grain - 1)
	part = min(n, grain-in)
	switch {
	case in != 0 || part < grain && off+part < size:
		return part, false, nil
	case m.version == 2:
		return part, how != roomKept && !m.showsBacking(off), nil
	case m.subBits == 0 || m.inCluster(off) == 0 && (n >= m.clusterSize || off+n == size):
		return part, true, nil
	}
	s, err := m.lookup(off, min(n, m.clusterSize-m.inCluster(off)), shard)
	if err != nil {
		return 0, false, err
	}
	s.pin.leave()
	if s.kind == kindCompressed {
		return s.length, false, nil
	}
	return part, true, nil
}

// emptyTable returns how many bytes from off on are zero because there is no L2
// table for them; 0 if there is one.
func (m *Image) emptyTable(off int64) int64 {
	i := m.l1Index(m.sliceID(m.cluster(off)))
	if m.admit(0) != nil {
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
	if !m.raw && (s.kind == kindZero || s.kind == kindUnallocated && !m.showsBacking(off)) {
		return s.length, nil
	}
	return s.length, m.writeZeros(off, s.length, shard)
}

// writeZeros writes zeros to [off, off+n), a part of one cluster within reach of
// the shard.
func (m *Image) writeZeros(off, n int64, shard int) error {
	return m.writeAll(&requestState{iov: zeroBuffers(n), shard: shard}, off, n)
}

// eraseEntries makes the beginning of [off, end) zero, which is of whole
// subclusters, for a caller that has a pin; last says that the disk ends there. It
// returns how much it treated, which is nothing after it had to wait, or to do
// something without the lock.
//
// The entries change first, all at one instant. Requests that looked the
// clusters up before may still read and write them; as they run beside this one,
// either may win. Holes are punched while the range is claimed, so no write that
// finds the new entries reaches a host cluster before its hole is complete.
func (m *Image) eraseEntries(off, end int64, last bool, how room) (int64, error) {
	c := m.cluster(off)
	s, err := m.lockSlice(c)
	if err != nil || s == nil {
		return 0, err
	}
	n := end - off
	limit := m.claimable(c, m.cluster(end-1)+1)
	if stop := m.offset(limit); last && stop >= end {
		end = stop // what the last cluster has beyond the disk goes with it
	} else {
		end = min(end, stop)
	}
	done, holes, err := m.markZero(s, off, end, how)
	if len(holes) == 0 {
		m.mu.Unlock()
		return min(done, n), err
	}
	claimed := &claim{guest: c, n: m.cluster(off+done-1) + 1 - c}
	m.inflight.add(claimed)
	m.mu.Unlock()
	for _, h := range holes {
		m.punch(m.data, h)
	}
	m.lock()
	m.inflight.remove(claimed)
	m.mu.Unlock()
	return min(done, n), err
}

// markZero changes the entries of [off, end), all in s, to zero. It returns how
// much it treated, and what to punch in the file for data. mu is held
// exclusively.
func (m *Image) markZero(s *slice, off, end int64, how room) (done int64, holes []hole, err error) {
	for from := off; from < end; {
		c := m.cluster(from)
		next := min(m.offset(c+1), end)
		subs := m.subs(c, from, next)
		old, err := m.entryIn(s, c)
		if err == nil && old.owned() {
			err = m.checkData(old.host)
		}
		if err != nil || old.compressed && subs != m.allSubs() { // that has to be written
			return done, holes, err
		}
		erased := entry{}
		if how != roomDropped {
			erased = m.erased(old, subs, m.offset(c))
		}
		if old.owned() && erased.allocated && how != roomKept {
			holes = appendHole(holes, hole{off: old.host + m.inCluster(from), n: next - from})
		}
		if old.allocated != erased.allocated || old.compressed {
			if err := m.checkFreed(&old); err != nil {
				return done, holes, err
			}
			m.unreference(&old)
		}
		if erased != old {
			m.store(s, c, erased)
		}
		from, done = next, next-off
	}
	return done, holes, nil
}

// erased returns what makes the given subclusters of the guest cluster at off
// zero, whose entry is e. A host cluster that the image owns stays where it is:
// that spares the search for another one, and all ordering.
func (m *Image) erased(e entry, subs uint32, off int64) entry {
	switch {
	case m.version == 2:
		return entry{} // no backing file shows here
	case e.compressed:
		return entry{zero: subs}
	}
	if e.data&subs != 0 || e.zero&subs != subs && m.showsBacking(off) {
		e.data &^= subs
		e.zero |= subs
	}
	if !e.owned() && e.data == 0 {
		return entry{zero: e.zero} // nothing is in the host cluster
	}
	return e
}

// eraseRaw makes the beginning of [off, end) zero in a raw data file, which has to
// read like the disk without any table, for a caller that has a pin. It returns
// how much it treated.
func (m *Image) eraseRaw(off, end int64, how room) (int64, error) {
	const most = 1 << 20
	n := min(end-off, most)
	if how != roomKept {
		err := m.data.Punch(off, n)
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return n, err
		}
	}
	return n, m.data.WritevAt(zeroBuffers(n), off)
}

// hole is a run of n bytes at off in a file whose contents nobody needs.
type hole struct{ off, n int64 }

// appendHole appends h to list, merging it with the last hole if it follows.
func appendHole(list []hole, h hole) []hole {
	if k := len(list) - 1; k >= 0 && list[k].off+list[k].n == h.off {
		list[k].n += h.n
		return list
	}
	return append(list, h)
}

// holeOf is the hole of the clusters of e.
func (g *geometry) holeOf(e extent) hole { return hole{off: g.offset(e.start), n: g.offset(e.n)} }

// punch gives the space of h in f back to the host. Whether the host takes it or
// fails makes no difference to the image.
func (m *Image) punch(f file, h hole) {
	if m.unpunchable.Load() {
		return
	}
	m.counts.punched.Add(uint64(h.n)) //nolint:gosec // G115: not negative
	if errors.Is(f.Punch(h.off, h.n), unix.EOPNOTSUPP) {
		m.unpunchable.Store(true)
	}
}

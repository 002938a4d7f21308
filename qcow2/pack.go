package qcow2

import (
	"bytes"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"
)

// WriteCompressed writes p at off and stores it compressed, in the way that the
// image has (deflate or zstd). p is one whole cluster of the disk: off is a
// multiple of ClusterSize, and len(p) is ClusterSize, or what the disk has left
// there. Any number of goroutines may call it at once, and each compresses on its
// own. What the cluster was before is replaced.
//
// A cluster that does not get smaller is stored as it is; one of zeros takes no
// room. A later write to a compressed cluster makes it a normal one.
//
// Compressed clusters need more care of the format: an image with narrow
// reference counts cannot put many of them into one cluster of the file, and none
// may lie beyond 2^(70-n) bytes in the file with clusters of 2^n bytes (512 TiB
// for those of 2 MiB). There it fails with EFBIG; other writes go on.
func (m *Image) WriteCompressed(p []byte, off int64) error {
	n := int64(len(p))
	if err := m.checkWrite(off, n); err != nil {
		return err
	}
	if err := m.checkWhole(off, n); err != nil {
		return err
	}
	if m.external {
		return &Error{
			Path: m.path, Kind: ErrUnsupported, What: "an image with an external data file has no compressed clusters",
			Mend: "write without compression",
		}
	}
	if isZero(p) && (m.version > 2 || !m.showsBacking(off)) {
		return m.PunchHole(off, n)
	}
	x, err := m.encoders.get()
	if err != nil {
		return inFile(m.path, err)
	}
	defer m.encoders.idle.Put(x)
	packed, ok := x.encode(p, m.clusterSize)
	if !ok {
		return m.WritevAt([][]byte{p}, off)
	}
	r := newRequest(nil)
	defer r.release()
	for done := false; !done && err == nil; {
		if err := m.usable(); err != nil {
			return err
		}
		done, err = m.writePacked(packed, off, n, r.shard)
	}
	return m.explain(err)
}

// checkWhole returns an error unless [off, off+n) is what the disk has of one
// cluster.
func (m *Image) checkWhole(off, n int64) error {
	if m.inCluster(off) == 0 && n == min(m.clusterSize, m.Size()-off) {
		return nil
	}
	return &Error{
		Path: m.path, Kind: ErrRange,
		What: fmt.Sprintf("%d bytes at %d are not one whole cluster of %d bytes, which compression takes", n, off, m.clusterSize),
	}
}

// isZero reports whether all of p is zero.
func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// packRun is how many host clusters the packer takes at a time, at most, so that
// what is compressed together lies together. In a short file it takes fewer: what
// it does not fill in the end is a hole in the file.
const packRun = 16

// packer says where compressed clusters go: one after the other, across the
// borders of host clusters and sectors. It is guarded by Image.mu.
//
// Each host cluster has one reference for each compressed cluster that touches
// it. While more may come, or are being written, the packer holds it: its count
// is not lowered, so that it is not taken for free between the last reference
// that goes and the next that comes.
type packer struct {
	gap
	spare gap // what was left of an earlier one, in one cluster
	held  map[uint64]*packed
}

// gap is room in the file, [next, end) in bytes; end is that of a cluster.
type gap struct{ next, end int64 }

func (g gap) left() int64 { return g.end - g.next }

// packed is a host cluster that the packer holds.
type packed struct {
	refs    uint64 // how many compressed clusters have been put into it
	writers int    // how many of those are being written
	used    bool   // one of them was published
}

// packing is a claim to one guest cluster whose compressed data is being written.
type packing struct {
	allocation // its host clusters are those that this data is the first in
	at         place
}

// writePacked makes packed the compressed data of the cluster of [off, off+n). It
// returns false after it had to wait, or to do something without the lock.
func (m *Image) writePacked(packed []byte, off, n int64, shard int) (bool, error) {
	p, err := m.hold(shard)
	if err != nil {
		return false, err
	}
	defer p.leave()
	if err := m.checkWhole(off, n); err != nil {
		return false, err // the size of the disk has changed
	}
	if err := m.limitDirty(); err != nil {
		return false, err
	}
	a, err := m.reservePacked(int64(len(packed)), m.cluster(off))
	if err != nil || a == nil {
		return false, err
	}
	if err := writeFull(m.file, packed, a.at.host); err != nil {
		m.abandonPacked(a)
		return false, err
	}
	m.publishPacked(a)
	return true, nil
}

// reservePacked finds room for n bytes of compressed data and claims guest
// cluster c, for a caller that has a pin. It returns nil where the caller has to
// look again.
func (m *Image) reservePacked(n int64, c uint64) (*packing, error) {
	s, err := m.lockSlice(c)
	if err != nil || s == nil {
		return nil, err
	}
	a, err := m.choosePacked(s, n, c)
	m.mu.Unlock()
	if a == nil && err == nil {
		err = m.refill()
	}
	return a, err
}

// choosePacked picks room for n bytes of compressed data of guest cluster c, which
// s maps. It returns nil if the pool is empty. mu is held exclusively.
func (m *Image) choosePacked(s *slice, n int64, c uint64) (*packing, error) {
	off, err := m.packRoom(n)
	if err != nil || off == 0 {
		return nil, err
	}
	a := &packing{at: place{host: off, size: n}}
	a.allocation = allocation{claim: claim{guest: c, n: 1}, slice: s}
	first, last := m.touched(a.at)
	for h := first; h <= last; h++ {
		if m.packer.held[h] == nil {
			m.packer.held[h] = &packed{}
			a.host = extent{start: h - a.host.n, n: a.host.n + 1}
		}
		m.packer.held[h].refs++
		m.packer.held[h].writers++
	}
	s.users++
	m.inflight.add(&a.claim)
	if err := m.checkReplaced(&a.allocation); err != nil {
		m.letGoOf(a)
		return nil, err
	}
	return a, nil
}

// touched returns the first and the last host cluster of the data at p.
func (g *geometry) touched(p place) (first, last uint64) {
	return g.cluster(p.host), g.cluster(p.host + p.size - 1)
}

// packRoom takes room for n bytes of compressed data and returns where it is, 0
// if the pool is empty. mu is held exclusively.
func (m *Image) packRoom(n int64) (int64, error) {
	k := &m.packer
	if k.spare.left() >= n && !m.packedFull(k.spare) {
		return k.spare.take(n), nil
	}
	if m.packedFull(k.gap) {
		m.movePacker(gap{m.offset(m.cluster(k.next) + 1), k.end})
	}
	if k.left() < n {
		e := m.pool.take(min(packRun, 1+m.cluster(k.end)/512))
		if e.n == 0 {
			return 0, nil
		}
		if err := m.checkFree(e); err != nil {
			return 0, err
		}
		if e.start+e.n > m.packLimit() {
			m.pool.recycle(e)
			return 0, &Error{
				Kind: ErrUnsupported, What: "the file has grown beyond what compressed clusters can lie in", Err: unix.EFBIG,
				Mend: "write without compression",
			}
		}
		next := k.next
		if m.offset(e.start) != k.end {
			next = m.offset(e.start)
			m.keepSpare()
		}
		m.movePacker(gap{next, m.offset(e.start + e.n)})
	}
	return k.take(n), nil
}

// take takes n bytes, which there are.
func (g *gap) take(n int64) int64 {
	g.next += n
	return g.next - n
}

// packedFull reports whether g goes on in a cluster that has as many references as
// can be counted.
func (m *Image) packedFull(g gap) bool {
	return m.inCluster(g.next) != 0 && m.packer.held[m.cluster(g.next)].refs == m.maxCount()
}

// keepSpare keeps what is left of the packer's room, less than a cluster, if it is
// more than what is spare already.
func (m *Image) keepSpare() {
	k := &m.packer
	if k.left() <= k.spare.left() {
		return
	}
	old := k.spare
	k.spare = k.gap
	m.letGo(m.cluster(old.next))
}

// maxCount is the greatest reference count.
func (g *geometry) maxCount() uint64 { return math.MaxUint64 >> (64 - 1<<g.refcountOrder) }

// packLimit is the number of host clusters that the entry of a compressed cluster
// can point to.
func (g *geometry) packLimit() uint64 { return 1 << min(70-2*g.clusterBits, 56-g.clusterBits) }

// movePacker gives the packer the room g. It leaves the cluster that it would have
// gone on in.
func (m *Image) movePacker(g gap) {
	left := m.cluster(m.packer.next)
	m.packer.gap = g
	m.letGo(left)
}

// sealPacker gives back the room that the packer has. mu is held exclusively.
func (m *Image) sealPacker() {
	first := m.cluster(m.packer.next + m.clusterSize - 1)
	rest := extent{start: first, n: m.cluster(m.packer.end) - first}
	spare := m.cluster(m.packer.spare.next)
	m.packer.spare = gap{}
	m.letGo(spare)
	m.movePacker(gap{})
	if rest.n > 0 {
		m.pool.recycle(rest)
	}
}

// goesOnIn reports whether g goes on in host cluster h, part of which is taken.
func (m *Image) goesOnIn(h uint64, g gap) bool {
	return m.inCluster(g.next) != 0 && m.cluster(g.next) == h
}

// letGo ends the packer's hold on host cluster h, unless more may be put into it
// or is being written. If nothing in it was published it is as free as it was. mu
// is held exclusively.
func (m *Image) letGo(h uint64) {
	p := m.packer.held[h]
	if p == nil || p.writers > 0 || m.goesOnIn(h, m.packer.gap) || m.goesOnIn(h, m.packer.spare) {
		return
	}
	delete(m.packer.held, h)
	if !p.used {
		m.pool.recycle(extent{start: h, n: 1})
	}
}

// letGoOf ends a, whose data is published or was not written. mu is held
// exclusively.
func (m *Image) letGoOf(a *packing) {
	first, last := m.touched(a.at)
	for h := first; h <= last; h++ {
		m.packer.held[h].writers--
		m.letGo(h)
	}
	m.end(&a.allocation)
}

// publishPacked makes the written data of a the contents of its guest cluster.
func (m *Image) publishPacked(a *packing) {
	m.lock()
	defer m.mu.Unlock()
	old, _ := m.entryIn(a.slice, a.guest) // checked by choosePacked, and nobody has changed it
	m.unreference(&old)
	m.store(a.slice, a.guest, entry{compressed: true, host: a.at.host, size: a.at.size})
	first, last := m.touched(a.at)
	for h := first; h <= last; h++ {
		m.grown = appendExtent(m.grown, extent{start: h, n: 1})
		if p := m.packer.held[h]; !p.used {
			p.used = true
			m.counts.allocated.Add(1)
		}
	}
	m.letGoOf(a)
}

// abandonPacked undoes the reservation of a, whose data was not written. The guest
// cluster is what it was.
func (m *Image) abandonPacked(a *packing) {
	m.lock()
	defer m.mu.Unlock()
	m.letGoOf(a)
}

// withhold keeps the commit that has captured c from lowering the counts of
// clusters that the packer holds: they are left for a later one. What was put into
// a cluster before c was captured is counted by now, and what comes later needs
// the cluster to be held. mu is held exclusively.
func (m *Image) withhold(c *capture) {
	if len(m.packer.held) == 0 {
		return
	}
	for i := range c.lower {
		b := &c.lower[i]
		later := freeBatch{epoch: b.epoch}
		b.clusters = slices.DeleteFunc(b.clusters, func(h uint64) bool {
			if m.packer.held[h] == nil {
				return false
			}
			later.clusters = append(later.clusters, h)
			return true
		})
		if len(later.clusters) > 0 {
			m.released = append(m.released, later)
		}
	}
}

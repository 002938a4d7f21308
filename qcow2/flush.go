package qcow2

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sync"
)

// Flush returns when every write that completed before it was called is on
// stable storage, with the metadata that leads to it. Flushes at the same time
// share their work. A flush that fails keeps what it could not write, for the
// next to try again; but once the system has failed to make written data
// durable, every later flush fails with ErrFlushFailed.
func (m *Image) Flush() error {
	p, err := m.hold(0)
	if err != nil {
		return err
	}
	if m.readOnly {
		p.leave()
		return nil
	}
	m.counts.flushes.Add(1)
	err = m.commits.run(m.commit)
	p.leave()
	return m.explain(err)
}

// commits serialises the commits of an image and lets callers that wait for the
// same one share it.
type commits struct {
	mu   sync.Mutex // guards next
	next *batch     // not begun yet; nil if nobody waits

	running sync.Mutex // held by the one that commits; taken before mu

	kick chan struct{} // asks the background goroutine for a commit
	quit chan struct{}
	done chan struct{}
}

// batch is one commit, to be done by the first of its callers that may.
type batch struct {
	begun bool // guarded by commits.running, as is err
	err   error
}

// run returns the result of a commit that began after run was called.
func (c *commits) run(commit func() error) error {
	c.mu.Lock()
	if c.next == nil {
		c.next = &batch{}
	}
	b := c.next
	c.mu.Unlock()

	c.running.Lock()
	defer c.running.Unlock()
	if b.begun {
		return b.err
	}
	b.begun = true
	c.mu.Lock()
	c.next = nil // who comes from now on needs a later commit
	c.mu.Unlock()
	b.err = commit()
	return b.err
}

// start begins the goroutine that commits when asked to; stop ends it.
func (c *commits) start(m *Image) {
	c.kick = make(chan struct{}, 1)
	c.quit = make(chan struct{})
	c.done = make(chan struct{})
	go func() {
		defer close(c.done)
		for {
			select {
			case <-c.quit:
				return
			case <-c.kick:
				// An error stays in the image or comes again at the next
				// flush; there is nobody to report it to here.
				_ = m.explain(c.run(m.commit))
			}
		}
	}()
}

func (c *commits) stop() {
	close(c.quit)
	<-c.done
}

// freedBytes is how much room may have lost its references before a commit begins
// to give it back. A few times that much waits for commits and requests to end.
const freedBytes = 32 << 20

// limitDirty keeps the dirty slices, which cannot be evicted, few, and the
// clusters that only a commit makes free to use again: it asks for a commit in
// time and waits for one where they are too many.
func (m *Image) limitDirty() error {
	most := max(freedBytes>>m.clusterBits, 16)
	m.mu.RLock()
	soon := m.cache.commitSoon() || len(m.freed) >= most
	now := m.cache.commitNow() || len(m.freed) >= 2*most
	m.mu.RUnlock()
	if now {
		return m.commits.run(m.commit)
	}
	if soon {
		select {
		case m.commits.kick <- struct{}{}:
		default:
		}
	}
	return nil
}

// capture is the metadata that one commit makes durable, as it was at one
// instant. Everything that it points to had been written before.
type capture struct {
	slices  []capturedSlice // by offset
	l1      []uint64        // indexes, ascending
	l1Value []uint64
	grown   []extent
	freed   []uint64    // their removal is part of the capture
	lower   []freeBatch // their removal is durable and their I/O over
	epoch   uint64
}

type capturedSlice struct {
	slice   *slice
	off     int64
	entries []uint64 // frozen
}

// pointers reports whether the capture changes what the file's tables point to.
func (c *capture) pointers() bool { return len(c.slices) > 0 || len(c.l1) > 0 }

// commit makes the present state of the image durable. Only one runs at a time
// (commits), and no lock of the metadata is held across input and output.
//
// Phase A writes what nothing on stable storage points to yet: raised reference
// counts, beside guest data and new L2 tables that were written before. Phase B
// writes the pointers, after a barrier. Counts are lowered in phase A of a later
// commit than the one that removed the pointers. A power cut anywhere leaves
// counts that are too high, never too low.
func (m *Image) commit() error {
	if err := m.usable(); err != nil {
		return err
	}
	m.counts.commits.Add(1)
	c := m.captureDirty()
	err := m.commitCounts(c)
	if err == nil {
		err = m.datasync()
	}
	if err == nil && c.pointers() {
		if err = m.writePointers(c); err == nil {
			err = m.datasync()
		}
	}
	m.settle(c, err)
	return err
}

// captureDirty takes what the next commit has to do.
func (m *Image) captureDirty() *capture {
	m.lock()
	defer m.mu.Unlock()
	m.epochs.advance()
	c := &capture{grown: m.grown, freed: m.freed, epoch: m.epochs.now}
	m.grown, m.freed = nil, nil
	m.released = slices.DeleteFunc(m.released, func(b freeBatch) bool {
		if m.epochs.over(b.epoch) {
			c.lower = append(c.lower, b)
			return true
		}
		return false
	})
	m.withhold(c)
	for _, s := range m.cache.dirty {
		s.dirty, s.inCommit, s.frozen = false, true, true
		table := int64(m.l1[m.l1Index(s.id)] & entryOffset)
		c.slices = append(c.slices, capturedSlice{slice: s, off: table + m.sliceOffset(s.id), entries: s.entries})
	}
	m.cache.dirty = nil
	for i := range m.dirtyL1 {
		c.l1 = append(c.l1, i)
	}
	slices.Sort(c.l1)
	for _, i := range c.l1 {
		c.l1Value = append(c.l1Value, m.l1[i])
	}
	clear(m.dirtyL1)
	return c
}

// commitCounts brings the reference counts up to the capture, in memory and in
// the file. What it has done in memory it removes from the capture.
func (m *Image) commitCounts(c *capture) error {
	r := m.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	var err error
	if c.grown, err = r.raise(c.grown); err != nil {
		return err
	}
	for len(c.lower) > 0 {
		b := &c.lower[0]
		var free []uint64
		free, b.clusters, err = r.lower(b.clusters)
		m.recycle(free)
		if err != nil {
			return err
		}
		c.lower = c.lower[1:]
	}
	return r.writeDirty()
}

// recycle punches clusters without references and gives them back to the pool,
// or leaves them to the search, which finds them as clusters that were written
// to. refcounts.mu is held, so nobody takes one before its hole is complete.
func (m *Image) recycle(free []uint64) {
	if len(free) == 0 {
		return
	}
	m.counts.freed.Add(uint64(len(free)))
	m.decoder.forget() // it goes by offsets, which may have other data soon
	var holes []extent
	m.lock()
	for _, c := range free {
		if m.meta.at(c) == metaSharedL2 {
			m.meta.remove(extent{start: c, n: 1})
		}
		if m.meta.at(c) == metaNone { // always, unless the counts lie
			holes = appendExtent(holes, extent{start: c, n: 1})
		}
	}
	m.mu.Unlock()
	for _, e := range holes {
		m.punch(m.file, m.holeOf(e))
	}
	m.lock()
	defer m.mu.Unlock()
	for _, c := range free {
		if c < m.refs.cursor {
			m.pool.recycle(extent{start: c, n: 1})
		} else {
			m.refs.virgin = max(m.refs.virgin, c+1)
		}
	}
}

// writePointers writes the captured slices and L1 entries. Neighbours go in one
// write.
func (m *Image) writePointers(c *capture) error {
	slices.SortFunc(c.slices, func(a, b capturedSlice) int { return cmp.Compare(a.off, b.off) })
	const most = 1 << 20 // bytes in one write
	var buf []byte
	for i, s := range c.slices {
		buf = encodeEntries(buf, s.entries)
		end := s.off + m.sliceBytes()
		if i+1 < len(c.slices) && c.slices[i+1].off == end && len(buf) < most {
			continue
		}
		if err := writeFull(m.file, buf, end-int64(len(buf))); err != nil {
			return err
		}
		buf = buf[:0]
	}
	for i, index := range c.l1 {
		buf = binary.BigEndian.AppendUint64(buf, c.l1Value[i])
		if i+1 < len(c.l1) && c.l1[i+1] == index+1 {
			continue
		}
		if err := writeFull(m.file, buf, m.l1Offset+int64(index+1)*8-int64(len(buf))); err != nil { //nolint:gosec // G115: an index
			return err
		}
		buf = buf[:0]
	}
	return nil
}

// settle ends a commit: after a success, what lost its pointers waits for its
// I/O to end; after a failure, all that was not done is to do again.
func (m *Image) settle(c *capture, err error) {
	m.lock()
	defer m.mu.Unlock()
	for _, s := range c.slices {
		s.slice.inCommit, s.slice.frozen = false, false
		if err != nil {
			m.cache.markDirty(s.slice)
		}
	}
	if err == nil {
		if len(c.freed) > 0 {
			m.released = append(m.released, freeBatch{epoch: c.epoch, clusters: c.freed})
		}
		return
	}
	for _, i := range c.l1 {
		m.dirtyL1[i] = struct{}{}
	}
	m.grown = append(m.grown, c.grown...)
	m.freed = append(c.freed, m.freed...)
	m.released = append(m.released, c.lower...)
}

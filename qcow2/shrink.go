package qcow2

import "context"

// dropMost is how many clusters are freed at a time while a disk shrinks. The
// world stands still meanwhile.
const dropMost = 1 << 16

// shrink makes the disk shorter. The size changes first, so that the image is
// never shown with a part missing; then what lies beyond goes.
func (m *Image) shrink(ctx context.Context, size int64) error {
	if err := m.commits.run(m.commit); err != nil {
		return err
	}
	err := m.exclusively(func() error {
		if _, err := m.checkHeader(size); err != nil {
			return err
		}
		return m.switchSize(ctx, size)
	})
	if err != nil {
		return err
	}
	return m.drop(ctx, size)
}

// drop frees all clusters beyond the end of the disk, which is at size, a part at
// a time, and cuts the file off behind the last cluster that is left.
func (m *Image) drop(ctx context.Context, size int64) error {
	c := m.clusters(uint64(size)) //nolint:gosec // G115: not negative
	for c < uint64(len(m.l1))<<m.l2Bits {
		if err := cancelled(ctx); err != nil {
			return err
		}
		err := m.exclusively(func() (err error) {
			c, err = m.dropSome(c)
			return err
		})
		if err != nil {
			return err
		}
	}
	return m.exclusively(func() error {
		if m.external {
			if err := m.data.Truncate(size); err != nil {
				return err
			}
		}
		return m.trim()
	})
}

// dropSome frees the guest clusters from c on, all beyond the end of the disk,
// and returns the one after the last it freed. It runs exclusively.
func (m *Image) dropSome(c uint64) (uint64, error) {
	if err := m.commit(); err != nil { // then the file has what is in memory
		return c, err
	}
	for len(m.freed) < dropMost {
		i := m.l1Index(m.sliceID(c))
		if i >= uint64(len(m.l1)) {
			break
		}
		next := (i + 1) << m.l2Bits
		drop := m.dropTable
		if c != i<<m.l2Bits {
			drop = m.dropEntries
		}
		if m.l1[i] != 0 {
			if err := drop(c, next); err != nil {
				return c, err
			}
		}
		c = next
	}
	return c, m.commitAll()
}

// dropEntries frees the guest clusters [c, limit), the end of those of one table.
// It runs exclusively.
func (m *Image) dropEntries(c, limit uint64) error {
	for off, end := m.offset(c), m.offset(limit); off < end; {
		n, err := m.eraseEntries(off, end, false, roomDropped)
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// dropTable frees the guest clusters [c, limit), all those of one table, and the
// table. A table that snapshots share has a reference from each, as has what it
// points to. It runs exclusively, after a commit.
func (m *Image) dropTable(c, limit uint64) error {
	i := m.l1Index(m.sliceID(c))
	off, err := m.decodeL1(m.l1[i], i)
	if err != nil {
		return err
	}
	b := make([]byte, m.clusterSize)
	if err := readFull(m.file, b, off); err != nil {
		return err
	}
	table := decodeTable(b)
	m.lock()
	defer m.mu.Unlock()
	var gone []entry
	for g := c; g < limit; g++ {
		at := (g - c) << m.wordBits
		e, err := m.decode(table[at], table[at+uint64(m.wordBits)], g)
		if err == nil {
			err = m.checkFreed(&e)
		}
		if err != nil {
			return err
		}
		gone = append(gone, e)
	}
	for i := range gone {
		m.unreference(&gone[i])
	}
	for id := m.sliceID(c); id < m.sliceID(limit); id++ {
		m.cache.lru.Remove(id)
	}
	m.retireTable(off)
	m.l1[i] = 0
	m.dirtyL1[i] = struct{}{}
	return nil
}

// trim cuts the file off behind the last cluster in use. Whether the host can do
// that makes no difference to the image. It runs exclusively.
func (m *Image) trim() error {
	if err := m.commitAll(); err != nil {
		return err
	}
	fileSize, err := m.file.Size()
	if err != nil {
		return err
	}
	r := m.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	end, err := r.end(m.cluster(fileSize + m.clusterSize - 1))
	m.mu.RLock()
	end = max(end, m.meta.end()) // whatever the counts say
	m.mu.RUnlock()
	if err != nil || m.offset(end) >= fileSize {
		return err
	}
	if m.file.Truncate(m.offset(end)) != nil {
		return nil
	}
	m.lock()
	defer m.mu.Unlock()
	m.pool.cut(end)
	r.cursor, r.virgin = min(r.cursor, end), end
	return nil
}

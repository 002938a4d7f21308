package qcow2

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// loadSlice reads slice id into the cache. Of several callers one reads, without
// the lock; the others wait for it. The caller has a pin, which keeps the
// table's cluster from being reused while it is read, should the table be copied
// meanwhile: the copy has the same contents. Image.mu is not held.
func (m *Image) loadSlice(id uint64) error {
	m.lock()
	off, err := m.tableOf(id)
	if err != nil || off == 0 || m.cache.find(id) != nil {
		m.mu.Unlock()
		return err // no table any more, or loaded by now: look it up again
	}
	if l := m.loads[id]; l != nil {
		m.mu.Unlock()
		<-l.done
		return l.err
	}
	l := &flight{done: make(chan struct{})}
	m.loads[id] = l
	m.counts.misses.Add(1)
	m.mu.Unlock()

	entries, err := m.readSlice(off + m.sliceOffset(id))

	set := func(e uint64) bool { return e != 0 }
	s := &slice{id: id, entries: entries, hollow: !slices.ContainsFunc(entries, set)}
	m.lock()
	if err == nil {
		m.cache.add(s)
	}
	delete(m.loads, id)
	l.err = err
	close(l.done)
	m.mu.Unlock()
	m.cache.budget.trim(s)
	return err
}

// sliceBuffers has what slices are read into before they are decoded.
var sliceBuffers = sync.Pool{New: func() any { return new([8 << maxSliceBits]byte) }}

func (m *Image) readSlice(off int64) ([]uint64, error) {
	buf := sliceBuffers.Get().(*[8 << maxSliceBits]byte)
	defer sliceBuffers.Put(buf)
	b := buf[:m.sliceBytes()]
	if err := readFull(m.file, b, off); err != nil {
		return nil, err
	}
	return decodeTable(b), nil
}

// fillHollow makes sure that slice s can be written. The caller has a pin; Image.mu
// is not held.
func (m *Image) fillHollow(s *slice) error {
	m.mu.RLock()
	off, err := m.tableOf(s.id)
	m.mu.RUnlock()
	if err == nil && off != 0 {
		err = m.secure(off+m.sliceOffset(s.id), m.sliceBytes())
	}
	if err != nil {
		return err
	}
	m.lock()
	defer m.mu.Unlock()
	s.hollow = false
	return nil
}

// secure makes sure that the n bytes of metadata at off, which may be a hole in the
// file, can be written by a commit, whatever room the host has by then: else guest
// data that was written meanwhile would have nothing that leads to it. Some hosts
// cannot.
func (m *Image) secure(off, n int64) error {
	if err := m.file.Allocate(off, n); !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	return nil
}

// tableOf returns the offset of the L2 table that holds slice id, 0 if there is
// none. mu is held.
func (m *Image) tableOf(id uint64) (int64, error) {
	i := m.l1Index(id)
	return m.decodeL1(m.l1[i], i)
}

// ownTable makes sure that the L2 table which L1 entry i points to exists and
// belongs to the active disk alone, so that it may be changed. It makes a table
// of zeros or a copy. The new table is in the file as a whole before anything
// points to it, and the next commit's first barrier makes it durable before the
// L1 entry. The caller has a pin; Image.mu is not held.
func (m *Image) ownTable(i uint64) error {
	host, err := m.reserveTable(i)
	if err != nil || host.n == 0 {
		return err
	}
	old, err := m.fillTable(i, m.offset(host.start))

	m.lock()
	defer m.mu.Unlock()
	f := m.tables[i]
	delete(m.tables, i)
	f.err = err
	close(f.done)
	if err != nil {
		m.pool.recycle(host)
		return err
	}
	if old != 0 {
		m.retireTable(old)
	}
	m.meta.add(host, metaL2)
	m.grown = appendExtent(m.grown, host)
	m.counts.allocated.Add(host.n)
	m.l1[i] = m.pointer(host.start) | entryCopied
	m.dirtyL1[i] = struct{}{}
	return nil
}

// retireTable notes that the disk no longer uses the L2 table at off. A snapshot
// may, so it stays known as a table until its count is zero; see recycle. mu is
// held exclusively.
func (m *Image) retireTable(off int64) {
	table := extent{start: m.cluster(off), n: 1}
	m.freed = append(m.freed, table.start)
	m.meta.remove(table)
	m.meta.add(table, metaSharedL2)
}

// reserveTable reserves the cluster for a new table at L1 entry i. It returns
// none if there is nothing to do, or another caller has done it.
func (m *Image) reserveTable(i uint64) (extent, error) {
	for {
		m.lock()
		if m.l1[i]&entryCopied != 0 {
			m.mu.Unlock()
			return extent{}, nil
		}
		if f := m.tables[i]; f != nil {
			m.mu.Unlock()
			<-f.done
			return extent{}, f.err
		}
		if host := m.pool.take(1); host.n != 0 {
			err := m.checkFree(host)
			if err == nil {
				m.tables[i] = &flight{done: make(chan struct{})}
			}
			m.mu.Unlock()
			return host, err
		}
		m.mu.Unlock()
		if err := m.refill(); err != nil {
			return extent{}, err
		}
	}
}

// fillTable writes the contents of L1 entry i's table to the host offset: those
// of the present table, whose offset it returns, or zeros. A table that is
// shared never has dirty slices, so the file has its contents. The entry can be
// written from then on.
func (m *Image) fillTable(i uint64, host int64) (int64, error) {
	m.mu.RLock()
	old, err := m.decodeL1(m.l1[i], i)
	entry := m.l1Offset + int64(8*i) //nolint:gosec // G115: an index
	m.mu.RUnlock()
	if err == nil {
		err = m.secure(entry, 8)
	}
	if err != nil {
		return 0, err
	}
	table := make([]byte, m.clusterSize)
	if old != 0 {
		if err := readFull(m.file, table, old); err != nil {
			return 0, err
		}
	}
	return old, writeFull(m.file, table, host)
}

// encodeEntries appends the file's form of entries to b.
func encodeEntries(b []byte, entries []uint64) []byte {
	for _, e := range entries {
		b = binary.BigEndian.AppendUint64(b, e)
	}
	return b
}

package qcow2

// zeros is written where new clusters have to read as zero.
var zeros [1 << 16]byte

// fillAllocation writes the request's bytes [off, end) to the host clusters of a,
// and around them what the first and the last guest cluster held before. Nothing
// that reads as zero already is written as zero.
func (m *Image) fillAllocation(a *allocation, r *requestState, off, end int64) error {
	begin := m.offset(a.guest)
	stop := m.offset(a.end())
	head, err := m.oldData(a, a.first, begin, off)
	if err != nil {
		return err
	}
	tail, err := m.oldData(a, a.last, end, stop)
	if err != nil {
		return err
	}
	host := m.offset(a.host.start)
	if head == nil {
		host += off - begin
	}
	iov := append(r.take(end-off, head...), tail...)
	return m.data.WritevAt(iov, host)
}

// oldData returns buffers with the guest bytes [from, to) of one cluster, whose
// entry is e, as they were before a. It returns nil if they are zero and the
// host clusters of a are, too.
func (m *Image) oldData(a *allocation, e entry, from, to int64) ([][]byte, error) {
	n := to - from
	if n == 0 {
		return nil, nil
	}
	if m.readsZero(e, from) {
		if a.host.virgin {
			return nil, nil
		}
		return zeroBuffers(n), nil
	}
	b := make([]byte, n)
	// Beyond the end of the disk there is nothing to preserve, and zeros
	// must appear there if the disk grows.
	b = b[:max(0, min(n, m.Size()-from))]
	s := m.spanOf(e, from, n)
	if err := m.readSpan(&s, [][]byte{b}, from); err != nil {
		return nil, err
	}
	return [][]byte{b[:n]}, nil
}

// readsZero reports whether the cluster with entry e is known to read as zero
// from guest offset off on.
func (m *Image) readsZero(e entry, off int64) bool {
	switch e.kind {
	case kindZero, kindZeroAlloc:
		return true
	case kindUnallocated:
		return !m.showsBacking(off)
	}
	return off >= m.Size()
}

// showsBacking reports whether a cluster at guest offset off, or reaching there,
// shows the backing file if it is not allocated.
func (m *Image) showsBacking(off int64) bool {
	return m.backing != nil && off < m.backing.Size()
}

// zeroBuffers returns buffers with n zero bytes.
func zeroBuffers(n int64) [][]byte {
	var iov [][]byte
	for ; n > 0; n -= int64(len(zeros)) {
		iov = append(iov, zeros[:min(n, int64(len(zeros)))])
	}
	return iov
}

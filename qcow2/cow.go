package qcow2

// zeros is written where new clusters have to read as zero.
var zeros [1 << 16]byte

// fillAllocation writes the request's bytes [off, end) to the host clusters of a,
// and around them what a's first and last guest cluster held before, as far as a
// says. Nothing that reads as zero already is written as zero.
func (m *Image) fillAllocation(a *allocation, r *requestState, off, end int64) error {
	head, err := m.oldData(a, &a.first, a.from, off)
	if err != nil {
		return err
	}
	tail, err := m.oldData(a, &a.last, end, a.to)
	if err != nil {
		return err
	}
	begin := off
	if head != nil {
		begin = a.from
	}
	iov := append(r.take(end-off, head...), tail...)
	return m.data.WritevAt(iov, m.offset(a.host.start)+begin-m.offset(a.guest))
}

// oldData returns buffers with the guest bytes [from, to) of one cluster, whose
// entry is e, as they were before a. It returns nil if there are none, or if they
// are zero and the host clusters of a are, too.
func (m *Image) oldData(a *allocation, e *entry, from, to int64) ([][]byte, error) {
	if from >= to {
		return nil, nil
	}
	if m.readsZero(e, from, to) {
		if a.host.virgin {
			return nil, nil
		}
		return zeroBuffers(to - from), nil
	}
	b := make([]byte, to-from)
	begin := from
	// Beyond the end of the disk there is nothing to preserve, and zeros
	// must appear there if the disk grows.
	for stop := min(to, m.Size()); from < stop; {
		s := m.spanOf(e, from, stop-from)
		if err := m.readSpan(&s, [][]byte{b[from-begin:][:s.length]}, from); err != nil {
			return nil, err
		}
		from += s.length
	}
	return [][]byte{b}, nil
}

// readsZero reports whether [from, to), in the cluster with entry e, is known to
// read as zero.
func (m *Image) readsZero(e *entry, from, to int64) bool {
	for to = min(to, m.Size()); from < to; {
		s := m.spanOf(e, from, to-from)
		if s.kind != kindZero && (s.kind != kindUnallocated || m.showsBacking(from)) {
			return false
		}
		from += s.length
	}
	return true
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

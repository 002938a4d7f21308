package qcow2

import "io"

// ReadvAt fills the buffers of iov in order from the bytes at off, which together
// must lie inside the disk. It neither keeps iov nor changes its elements. On an
// error the contents of the buffers are undefined.
func (m *Image) ReadvAt(iov [][]byte, off int64) error {
	r := newRequest(iov)
	err := m.read(r, off, length(iov))
	r.release()
	return err
}

// ReadAt implements io.ReaderAt.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if size := m.Size(); off >= 0 && off <= size {
		n = min(n, size-off)
	}
	r := newRequestOf(p[:n])
	err := m.read(r, off, n)
	r.release()
	if err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read fills the buffers of r from [off, off+n), which is all of them.
func (m *Image) read(r *requestState, off, n int64) error {
	if err := m.checkRange(off, n); err != nil {
		return err
	}
	for n > 0 {
		s, err := m.lookup(off, n, r.shard)
		if err != nil {
			return m.explain(err)
		}
		err = m.readSpan(&s, r.take(s.length), off)
		s.pin.leave()
		if err != nil {
			return m.explain(err)
		}
		off, n = off+s.length, n-s.length
	}
	return nil
}

// readSpan fills iov from the span at guest offset off.
func (m *Image) readSpan(s *span, iov [][]byte, off int64) error {
	switch s.kind {
	case kindNormal:
		return m.data.ReadvAt(iov, s.host)
	case kindCompressed:
		return m.readCompressed(place{s.host, s.size}, iov, m.inCluster(off))
	case kindUnallocated:
		return m.readBacking(iov, off)
	}
	zeroFrom(iov, 0)
	return nil
}

// readBacking fills iov with what lies under the image at off: the backing
// file's bytes, then zeros.
func (m *Image) readBacking(iov [][]byte, off int64) error {
	if !m.showsBacking(off) {
		zeroFrom(iov, 0)
		return nil
	}
	return readPadded(m.backing, iov, off)
}

// readPadded fills iov with the bytes at off of b, which has some there, and zeros
// behind its end.
func readPadded(b backing, iov [][]byte, off int64) error {
	have := b.Size() - off
	if length(iov) <= have {
		return b.ReadvAt(iov, off)
	}
	zeroFrom(iov, int(have))
	r := newRequest(iov)
	err := b.ReadvAt(r.take(have), off)
	r.release()
	return err
}

func (m *Image) errClosed() error {
	return &Error{Path: m.path, Kind: ErrClosed, What: "the image is closed"}
}

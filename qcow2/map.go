package qcow2

import "iter"

// MapKind says what a range of a disk is.
type MapKind uint8

const (
	// MapUnallocated ranges are in no layer and read as zero.
	MapUnallocated MapKind = iota
	// MapZero ranges are marked to read as zero.
	MapZero
	// MapData ranges are stored in the layer's file as they are.
	MapData
	// MapCompressed ranges are stored compressed.
	MapCompressed
)

func (k MapKind) String() string {
	return [...]string{"unallocated", "zero", "data", "compressed"}[k]
}

// NoOffset is the HostOffset of a range that has no place in a file.
const NoOffset = noHost

// Mapping says what the range [Offset, Offset+Length) of a disk is and where.
type Mapping struct {
	Offset, Length int64
	Kind           MapKind
	// Layer has the range: 0 is the image, 1 its backing file, and so on. Of
	// MapUnallocated it is the lowest that is long enough to have it.
	Layer int
	// Path is the file of the layer, or its external data file, that has the
	// range at HostOffset. What is zero, or not allocated, may have a place there
	// too; NoOffset if it has none, as compressed data has none of its own.
	Path       string
	HostOffset int64
	// Hole is set for MapData that reads as zero because nothing is written at its
	// place, where that is known: in a file that takes clearly less room on the host
	// than it has clusters in use.
	Hole bool
	// Missing is set for MapData whose place lies beyond the end of the file, which
	// was cut off. It reads as zero.
	Missing bool
}

// Map returns the mappings of the n bytes at off, in order and without gaps.
// Neighbours that are alike, and contiguous in the file, are one. It ends with
// the first error. Writes at the same time may show or not, piece by piece.
func (m *Image) Map(off, n int64) iter.Seq2[Mapping, error] {
	return m.mappings(off, n, func() error { return nil })
}

// mappings is Map, which ends with the error of stop before the next lookup.
func (m *Image) mappings(off, n int64, stop func() error) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		if err := m.checkRange(off, n); err != nil {
			yield(Mapping{}, err)
			return
		}
		var last Mapping // not yielded yet, if it has a length
		for n > 0 {
			err := stop()
			var next Mapping
			if err == nil {
				next, err = m.mapAt(off, n)
			}
			if err != nil {
				if last.Length == 0 || yield(last, nil) {
					yield(Mapping{}, err)
				}
				return
			}
			off, n = off+next.Length, n-next.Length
			if last.join(next) {
				continue
			}
			if last.Length > 0 && !yield(last, nil) {
				return
			}
			last = next
		}
		if last.Length > 0 {
			yield(last, nil)
		}
	}
}

// join makes the next mapping a part of a if it continues a.
func (a *Mapping) join(next Mapping) bool {
	whole := *a
	whole.Offset, whole.Length = next.Offset, next.Length
	if a.HostOffset != NoOffset {
		whole.HostOffset += a.Length
	}
	if a.Length == 0 || whole != next {
		return false
	}
	a.Length += next.Length
	return true
}

// mapAt returns the mapping of the beginning of [off, off+n), which lies inside
// the disk.
func (m *Image) mapAt(off, n int64) (Mapping, error) {
	s, err := m.lookupFor(off, n, 0, forMapping)
	if err != nil {
		return Mapping{}, m.explain(err)
	}
	defer s.pin.leave()
	found := Mapping{Offset: off, Length: s.length, Path: m.path, HostOffset: s.host}
	if s.host != noHost {
		found.Path = m.dataPath
	}
	switch s.kind {
	case kindNormal:
		found.Kind = MapData
		end, err := m.dataEnd()
		switch {
		case err != nil:
			return found, inFile(m.path, err)
		case s.host >= end:
			found.Missing = true
			return found, nil
		}
		found.Length = min(s.length, end-s.host)
		if m.sparse() {
			found.Hole, found.Length = m.data.Extent(s.host, found.Length)
		}
	case kindCompressed:
		found.Kind, found.HostOffset = MapCompressed, NoOffset
	case kindZero:
		found.Kind = MapZero
	case kindUnallocated:
		if m.showsBacking(off) {
			return m.mapBacking(found)
		}
	}
	return found, nil
}

// dataEnd is where the last cluster ends that the file for data has in part at least.
// The caller has a pin.
func (m *Image) dataEnd() (int64, error) {
	n, err := m.data.Size()
	return m.offset(m.clusters(uint64(n))), err //nolint:gosec // G115: not negative
}

// mapBacking returns what the backing file has for the beginning of the range,
// which begins inside it.
func (m *Image) mapBacking(r Mapping) (Mapping, error) {
	under, err := m.backing.mapAt(r.Offset, min(r.Length, m.backing.Size()-r.Offset))
	under.Layer++
	return under, err
}

// sparse reports whether the file takes clearly less room on the host than it has
// clusters in use, as after a preallocation: then, and only then, it is worth a call
// for each range to learn from the host what is a hole. The bounds are QEMU's, so
// that both say the same of an image. The caller has a pin.
func (m *Image) sparse() bool {
	m.sparseOnce.Do(func() {
		f, ok := m.file.(interface{ allocated() (int64, error) })
		if !ok {
			return
		}
		bytes, err := f.allocated()
		if err != nil {
			return
		}
		full := uint64(bytes) >> m.clusterBits //nolint:gosec // G115: not negative
		many := max(full*10/9, full+2)
		used, err := m.countUsed(many)
		m.isSparse = err == nil && used >= many
	})
	return m.isSparse
}

// countUsed counts the clusters of the file with a reference count, until they are
// as many as enough.
func (m *Image) countUsed(enough uint64) (uint64, error) {
	fileSize, err := m.file.Size()
	if err != nil {
		return 0, err
	}
	h, err := m.loadHeader(fileSize)
	if err != nil {
		return 0, err
	}
	table, err := m.loadTable(h.refTableOffset, int64(h.refTableClusters)<<m.clusterBits)
	if err != nil {
		return 0, err
	}
	left := m.clusters(uint64(fileSize)) //nolint:gosec // G115: not negative
	used, block := uint64(0), make([]byte, m.clusterSize)
	for _, e := range table {
		n := min(left, 1<<m.refBlockBits)
		if left -= n; n == 0 || used >= enough {
			break
		}
		off := int64(e & entryOffset)
		if off == 0 {
			continue
		}
		if err := readFull(m.file, block, off); err != nil {
			return 0, err
		}
		for i := range n {
			used += b2u(count(block, m.refcountOrder, i) != 0)
		}
	}
	return used, nil
}

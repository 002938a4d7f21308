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

// Mapping says what the range [Offset, Offset+Length) of a disk is and where.
type Mapping struct {
	Offset, Length int64
	Kind           MapKind
	// Layer has the range: 0 is the image, 1 its backing file, and so on;
	// Path is its file, or its external data file for MapData. For MapUnallocated they are those of the image.
	Layer int
	Path  string
	// HostOffset is where the range begins in the file, for MapData only.
	HostOffset int64
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
				yield(Mapping{}, err)
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
	if a.Kind == MapData {
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
	s, err := m.lookup(off, n, 0)
	if err != nil {
		return Mapping{}, m.explain(err)
	}
	s.pin.leave()
	found := Mapping{Offset: off, Length: s.length, Path: m.path}
	switch s.kind {
	case kindNormal:
		found.Kind, found.Path, found.HostOffset = MapData, m.dataPath, s.host
	case kindCompressed:
		found.Kind = MapCompressed
	case kindZero:
		found.Kind = MapZero
	case kindUnallocated:
		if m.showsBacking(off) {
			return m.mapBacking(found)
		}
	}
	return found, nil
}

// mapBacking returns what the backing file has for the beginning of the range,
// which begins inside it.
func (m *Image) mapBacking(r Mapping) (Mapping, error) {
	under, err := m.backing.mapAt(r.Offset, min(r.Length, m.backing.Size()-r.Offset))
	if err != nil {
		return under, err
	}
	if under.Kind == MapUnallocated {
		r.Length = under.Length
		return r, nil
	}
	under.Layer++
	return under, nil
}

// mapAt takes the holes of a raw file for zero ranges.
func (r *rawBacking) mapAt(off, n int64) (Mapping, error) {
	hole, length := r.file.Extent(off, n)
	if hole {
		return Mapping{Offset: off, Length: length, Kind: MapZero, Path: r.path}, nil
	}
	return Mapping{Offset: off, Length: length, Kind: MapData, Path: r.path, HostOffset: off}, nil
}

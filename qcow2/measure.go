package qcow2

import "iter"

// Measurement is how long the file of an image is, in bytes.
type Measurement struct {
	// Required is enough for what the image is to hold at first, FullyAllocated for
	// data everywhere on its disk. Neither has room for snapshots and bitmaps.
	Required, FullyAllocated int64
}

// Measure returns how long the file of an image with the options has to be at
// most: one that is empty, or if content is not nil, one that holds as data what
// content says of a disk of the same size. The numbers are QEMU's: metadata is
// counted as if the whole disk had data, data in an external file as if it had not,
// and with a backing file content may be needed as a whole.
func (o CreateOptions) Measure(content iter.Seq2[Mapping, error]) (Measurement, error) {
	o = o.withDefaults()
	backed, mode := o.BackingFile != "", o.Preallocation
	// What has no part in the numbers need not fit together.
	o.BackingFile, o.BackingFormat, o.DataFile, o.DataFileRaw = "", "", "", false
	o.Preallocation = PreallocateFull
	p, err := o.layout()
	if err != nil {
		return Measurement{}, err
	}
	used := uint64(0)
	switch {
	case mode >= PreallocateFalloc || backed && content != nil:
		used = p.data
	case content != nil:
		if used, err = p.usedBy(content); err != nil {
			return Measurement{}, err
		}
	}
	return Measurement{Required: p.offset(p.end() - p.data + used), FullyAllocated: p.offset(p.end())}, nil
}

// usedBy counts the clusters of the disk that have data of content.
func (g *geometry) usedBy(content iter.Seq2[Mapping, error]) (uint64, error) {
	used, next := uint64(0), uint64(0) // the first cluster that is not counted yet
	for m, err := range content {
		if err != nil {
			return 0, err
		}
		if m.Kind != MapCompressed && (m.Kind != MapData || m.Hole) {
			continue
		}
		first, end := max(g.cluster(m.Offset), next), g.cluster(m.Offset+m.Length-1)+1
		used, next = used+max(end, first)-first, max(end, next)
	}
	return used, nil
}

// MeasureBitmaps returns how many bytes persistent bitmaps take in an image with a
// disk of size bytes and clusters of clusterSize bytes, or 0 for the usual ones.
func MeasureBitmaps(bitmaps []Bitmap, size, clusterSize int64) int64 {
	if clusterSize == 0 {
		clusterSize = defaultClusterSize
	}
	whole := func(n int64) int64 { return (n + clusterSize - 1) / clusterSize * clusterSize }
	total, directory := int64(0), int64(0)
	for _, b := range bitmaps {
		data := whole((ceil(size, b.Granularity) + 7) / 8)
		total += data + whole(data/clusterSize*8)
		directory += (bitmapFixed + int64(len(b.Name)) + 7) &^ 7
	}
	return total + whole(directory)
}

// ceil is a/b rounded up.
func ceil(a, b int64) int64 { return a/b + int64(b2u(a%b != 0)) } //nolint:gosec // G115: 0 or 1

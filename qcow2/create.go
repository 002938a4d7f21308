package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CreateOptions describe a new image. Zero fields other than Size mean the
// default.
type CreateOptions struct {
	// Size of the disk in bytes.
	Size int64
	// ClusterSize is a power of two from 512 bytes to 2 MiB; default 64 KiB.
	ClusterSize int64
	// Version of the format, 2 or 3; default 3.
	Version int
	// RefcountBits is the width of the reference counts, a power of two up
	// to 64; default 16, the only width of version 2.
	RefcountBits int
	// BackingFile is written into the image as it is: a relative name counts
	// from the directory of the image. Create does not open it.
	BackingFile string
	// BackingFormat is "qcow2" or "raw". It must be given with BackingFile.
	BackingFormat string
	// ExtendedL2 divides each cluster into 32 subclusters that are allocated
	// one by one, at the price of L2 tables twice as large. It takes clusters
	// of at least 16 KiB and version 3.
	ExtendedL2 bool
}

const (
	defaultClusterSize  = 64 << 10
	defaultRefcountBits = 16
	// minFeatureNames is the smallest cluster into which the names of the
	// features are written, so that there is room for the other extensions.
	minFeatureNames = 4096
)

// Create makes an empty image at path, where no file may exist. The header is
// written last, so that whatever happens on the way, a file at path is a whole
// image or none. On an error it leaves no file.
func Create(path string, opts CreateOptions) error {
	h, err := opts.header()
	if err != nil {
		return inFile(path, err)
	}
	first, err := h.encode(opts)
	if err != nil {
		return inFile(path, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		if pe, ok := errors.AsType[*fs.PathError](err); ok {
			err = pe.Err
		}
		return &Error{Path: path, What: "cannot create the image", Err: err}
	}
	err = writeImage(newOSFile(f), h, first)
	if err = errors.Join(err, f.Close()); err != nil {
		return inFile(path, errors.Join(err, os.Remove(path)))
	}
	return syncDir(filepath.Dir(path))
}

// header returns the header of an image with the options o, its tables laid out
// one after the other: refcount table, refcount blocks, L1 table.
func (o *CreateOptions) header() (*header, error) {
	h, err := o.format()
	if err != nil {
		return nil, err
	}
	l1 := h.l1Entries(h.size)
	if l1*8 > maxL1Bytes {
		return nil, invalidOption("a disk of %d bytes is too large for clusters of %d bytes", o.Size, 1<<h.clusterBits)
	}
	cs := uint64(1) << h.clusterBits
	l1Clusters := (l1*8 + cs - 1) / cs
	blocks, table := uint64(1), uint64(1)
	for {
		total := 1 + table + blocks + l1Clusters
		perBlock := cs * 8 >> h.refcountOrder
		b := (total + perBlock - 1) / perBlock
		t := max(1, (b*8+cs-1)/cs)
		if b == blocks && t == table {
			break
		}
		blocks, table = max(b, blocks), max(t, table)
	}
	h.l1Size = uint32(l1)
	h.refTableClusters = uint32(table)
	h.refTableOffset = cs // behind the header
	h.l1Offset = cs * (1 + table + blocks)
	return h, nil
}

// format checks the options and returns a header without tables.
func (o *CreateOptions) format() (*header, error) {
	cs, version, refBits := o.ClusterSize, o.Version, o.RefcountBits
	if cs == 0 {
		cs = defaultClusterSize
	}
	if version == 0 {
		version = 3
	}
	if refBits == 0 {
		refBits = defaultRefcountBits
	}
	switch {
	case o.Size < 0:
		return nil, invalidOption("a size of %d bytes is impossible", o.Size)
	case cs < 1<<minClusterBits || cs > 1<<maxClusterBits || cs&(cs-1) != 0:
		return nil, invalidOption("a cluster size of %d bytes is no power of two from 512 to 2097152", cs)
	case version != 2 && version != 3:
		return nil, invalidOption("version %d of the format is not one of 2 and 3", version)
	case refBits < 1 || refBits > 64 || refBits&(refBits-1) != 0:
		return nil, invalidOption("reference counts of %d bits are no power of two from 1 to 64", refBits)
	case version == 2 && refBits != defaultRefcountBits:
		return nil, invalidOption("version 2 of the format has reference counts of 16 bits only")
	case o.ExtendedL2 && version == 2:
		return nil, invalidOption("version 2 of the format has no extended L2 entries")
	case o.ExtendedL2 && cs < 1<<minExtendedBits:
		return nil, invalidOption("extended L2 entries take clusters of at least 16384 bytes, not %d", cs)
	case (o.BackingFile == "") != (o.BackingFormat == ""):
		return nil, invalidOption("a backing file and its format go together")
	case o.BackingFile != "" && o.BackingFormat != "qcow2" && o.BackingFormat != "raw":
		return nil, invalidOption("the format %q of the backing file is not one of qcow2 and raw", o.BackingFormat)
	}
	h := &header{
		version:       uint32(version),
		clusterBits:   uint32(bits.TrailingZeros64(uint64(cs))), //nolint:gosec // G115: 9..21
		size:          uint64(o.Size),
		refcountOrder: uint32(bits.TrailingZeros(uint(refBits))), //nolint:gosec // G115: 0..6
		length:        headerLengthV2,
	}
	if version == 3 {
		h.length = headerLengthOur
	}
	if o.ExtendedL2 {
		h.incompatible |= 1 << incompatExtendedL2
	}
	return h, nil
}

func invalidOption(format string, args ...any) error {
	return &Error{Kind: ErrInvalidOption, What: fmt.Sprintf(format, args...)}
}

// encode returns the first cluster of the image: header, extensions, name of the
// backing file. It sets the place of that name in h.
func (h *header) encode(o CreateOptions) ([]byte, error) {
	var ext []byte
	if o.BackingFormat != "" {
		ext = appendExtension(ext, extBackingFormat, []byte(o.BackingFormat))
	}
	if h.version == 3 && 1<<h.clusterBits >= minFeatureNames {
		ext = appendExtension(ext, extFeatureNames, featureTable())
	}
	ext = appendExtension(ext, extEnd, nil)
	if o.BackingFile != "" {
		h.backingOffset = uint64(h.length) + uint64(len(ext))
		h.backingSize = uint32(len(o.BackingFile)) //nolint:gosec // G115: checked below
	}
	if len(o.BackingFile) > maxBackingName || uint64(h.length)+uint64(len(ext)+len(o.BackingFile)) > 1<<h.clusterBits {
		return nil, invalidOption("the name of the backing file, %d bytes, is too long", len(o.BackingFile))
	}
	b := make([]byte, h.length, 1<<h.clusterBits)
	be := binary.BigEndian
	be.PutUint32(b[0:], magic)
	be.PutUint32(b[4:], h.version)
	be.PutUint64(b[8:], h.backingOffset)
	be.PutUint32(b[16:], h.backingSize)
	be.PutUint32(b[20:], h.clusterBits)
	be.PutUint64(b[24:], h.size)
	be.PutUint32(b[36:], h.l1Size)
	be.PutUint64(b[offL1Offset:], h.l1Offset)
	be.PutUint64(b[offRefTable:], h.refTableOffset)
	be.PutUint32(b[56:], h.refTableClusters)
	if h.version == 3 {
		be.PutUint64(b[offIncompatible:], h.incompatible)
		be.PutUint32(b[96:], h.refcountOrder)
		be.PutUint32(b[100:], h.length)
	}
	b = append(b, ext...)
	return append(b, o.BackingFile...), nil
}

// appendExtension appends a header extension, padded to 8 bytes.
func appendExtension(b []byte, kind uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data))) //nolint:gosec // G115: the data is ours and short
	b = append(b, data...)
	return append(b, make([]byte, -len(data)&7)...)
}

// featureTable names the features of the format, for programs that do not know
// them.
func featureTable() []byte {
	var b []byte
	for _, f := range []struct {
		kind, bit byte
		name      string
	}{
		{0, incompatDirty, "dirty bit"},
		{0, incompatCorrupt, "corrupt bit"},
		{0, incompatDataFile, "external data file"},
		{0, incompatCompression, "compression type"},
		{0, incompatExtendedL2, "extended L2 entries"},
		{1, compatLazyRefcounts, "lazy refcounts"},
		{2, autoclearBitmaps, "bitmaps"},
	} {
		var e [featureNameEntry]byte
		e[0], e[1] = f.kind, f.bit
		copy(e[2:], f.name)
		b = append(b, e[:]...)
	}
	return b
}

// writeImage writes the empty image with header h, whose first cluster is first,
// and makes it durable.
func writeImage(f file, h *header, first []byte) error {
	cs := uint64(1) << h.clusterBits
	used := h.l1Offset/cs + (uint64(h.l1Size)*8+cs-1)/cs
	blocksAt := h.refTableOffset + uint64(h.refTableClusters)*cs
	blocks := (h.l1Offset - blocksAt) / cs
	if err := f.Truncate(int64(used * cs)); err != nil { //nolint:gosec // G115: a few dozen MiB at most
		return err
	}
	table := make([]byte, 0, 8*blocks)
	for i := range blocks {
		table = binary.BigEndian.AppendUint64(table, blocksAt+i*cs)
	}
	if err := writeFull(f, table, int64(h.refTableOffset)); err != nil { //nolint:gosec // G115: as above
		return err
	}
	counts := make([]byte, blocks*cs)
	for c := range used {
		setCount(counts, uint(h.refcountOrder), c, 1)
	}
	if err := writeFull(f, counts, int64(blocksAt)); err != nil { //nolint:gosec // G115: as above
		return err
	}
	if err := f.Fdatasync(); err != nil {
		return err
	}
	if err := writeFull(f, first, 0); err != nil {
		return err
	}
	return f.Fdatasync()
}

// syncDir makes a new name in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return inFile(dir, err)
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) {
		err = nil // a file system that has nothing to sync
	}
	return inFile(dir, errors.Join(err, d.Close()))
}

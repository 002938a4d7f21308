package qcow2

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CreateOptions describe a new image. Zero fields other than Size mean the
// default, which is that of qemu-img. What options say of the format holds for
// the life of the image. Version 2 of the format has none of ExtendedL2,
// LazyRefcounts, zstd and DataFile.
type CreateOptions struct {
	// Size of the disk in bytes, which is rounded up to a multiple of 512.
	Size int64
	// ClusterSize, the unit of allocation in bytes, is a power of two from
	// 512 to 2 MiB; default 64 KiB.
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
	// of at least 16 KiB.
	ExtendedL2 bool
	// LazyRefcounts allows a program that writes to the image to put off its
	// reference counts, which are rebuilt after a crash.
	LazyRefcounts bool
	// CompressionType is "zlib" or "zstd", how the clusters are packed that
	// will be written compressed; default "zlib".
	CompressionType string
	// DataFile is the name of a second file, which holds the data of the disk
	// at its own offsets, where the image holds metadata alone. The name is
	// written into the image as it is: a relative one counts from the
	// directory of the image. Create makes that file too, where none may
	// exist.
	DataFile string
	// DataFileRaw keeps DataFile readable as a raw image of the disk, which
	// rules out a BackingFile. Every cluster has its place from the
	// beginning, as by PreallocateMetadata.
	DataFileRaw bool
	// Preallocation says what of the disk has its place in the file from the
	// beginning; default PreallocateOff. With a BackingFile it takes
	// ExtendedL2, because a cluster with standard entries that has its place
	// hides the backing file.
	Preallocation Preallocation
}

const (
	defaultClusterSize  = 64 << 10
	defaultRefcountBits = 16
	// diskUnit is what the size of a new disk is rounded up to, in bytes.
	diskUnit = 512
	// minFeatureNames is the smallest cluster into which the names of the
	// features are written, so that there is room for the other extensions.
	minFeatureNames = 4096
)

// Create makes an empty image at path, where no file may exist, and its data
// file if it has one. The header is written last, so that whatever happens on
// the way, a file at path is a whole image or none. On an error it leaves no
// file. Options that are impossible, or exclude each other, are refused with
// ErrInvalidOption.
func Create(path string, opts CreateOptions) error {
	p, err := opts.plan()
	if err != nil {
		return inFile(path, err)
	}
	if opts.DataFile == "" {
		return makeFile(path, p.write)
	}
	data := opts.DataFile
	if !filepath.IsAbs(data) {
		data = filepath.Join(filepath.Dir(path), data)
	}
	if err := makeFile(data, p.writeData); err != nil {
		return err
	}
	if err := makeFile(path, p.write); err != nil {
		return errors.Join(err, os.Remove(data))
	}
	return nil
}

// makeFile makes a file at path, where none may exist, and fills it. If it has a
// part at all after a crash, it has the name path. On an error it leaves none.
func makeFile(path string, fill func(file) error) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return &Error{Path: path, What: "cannot create the image", Err: withoutPath(err)}
	}
	err = syncDir(filepath.Dir(path))
	if err == nil {
		err = fill(newOSFile(f))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return inFile(path, errors.Join(err, os.Remove(path)))
	}
	return nil
}

// format returns the header, without tables, of an image with options that have
// been checked.
func (o *CreateOptions) format() *header {
	h := &header{
		version:       uint32(o.Version),                                    //nolint:gosec // G115: 2 or 3
		clusterBits:   uint32(bits.TrailingZeros64(uint64(o.ClusterSize))),  //nolint:gosec // G115: 9..21
		size:          (uint64(o.Size) + diskUnit - 1) &^ (diskUnit - 1),    //nolint:gosec // G115: not negative
		refcountOrder: uint32(bits.TrailingZeros64(uint64(o.RefcountBits))), //nolint:gosec // G115: 0..6
		length:        headerLengthV2,
	}
	if o.Version == 3 {
		h.length = headerLengthOur
	}
	if o.ExtendedL2 {
		h.incompatible |= 1 << incompatExtendedL2
	}
	if o.LazyRefcounts {
		h.compatible |= 1 << compatLazyRefcounts
	}
	if o.CompressionType == "zstd" {
		h.incompatible |= 1 << incompatCompression
		h.compression = compressionZstd
	}
	if o.DataFile != "" {
		h.incompatible |= 1 << incompatDataFile
	}
	if o.DataFileRaw {
		h.autoclear |= 1 << autoclearRawData
	}
	return h
}

// withDefaults returns the options with the defaults in the place of zeros, and
// what follows from others.
func (o CreateOptions) withDefaults() CreateOptions {
	o.ClusterSize = cmp.Or(o.ClusterSize, defaultClusterSize)
	o.Version = cmp.Or(o.Version, 3)
	o.RefcountBits = cmp.Or(o.RefcountBits, defaultRefcountBits)
	o.CompressionType = cmp.Or(o.CompressionType, "zlib")
	if o.DataFileRaw {
		o.Preallocation = max(o.Preallocation, PreallocateMetadata)
	}
	return o
}

// check refuses options that are impossible. The defaults are in place.
func (o *CreateOptions) check() error {
	cs, refBits := o.ClusterSize, o.RefcountBits
	switch {
	case o.Size < 0:
		return invalidOption("a size of %d bytes is impossible", o.Size)
	case cs < 1<<minClusterBits || cs > 1<<maxClusterBits || cs&(cs-1) != 0:
		return invalidOption("a cluster size of %d bytes is no power of two from 512 to 2097152", cs)
	case o.Version != 2 && o.Version != 3:
		return invalidOption("version %d of the format is not one of 2 and 3", o.Version)
	case refBits < 1 || refBits > 64 || refBits&(refBits-1) != 0:
		return invalidOption("reference counts of %d bits are no power of two from 1 to 64", refBits)
	case o.CompressionType != "zlib" && o.CompressionType != "zstd":
		return invalidOption("the compression type %q is not one of zlib and zstd", o.CompressionType)
	case o.Preallocation > PreallocateFull:
		return invalidOption("the preallocation %d is unknown", o.Preallocation)
	case (o.BackingFile == "") != (o.BackingFormat == ""):
		return invalidOption("a backing file and its format go together")
	case o.BackingFile != "" && o.BackingFormat != "qcow2" && o.BackingFormat != "raw":
		return invalidOption("the format %q of the backing file is not one of qcow2 and raw", o.BackingFormat)
	case hasProtocol(o.DataFile):
		return invalidOption("the data file %q is not the plain name of a file", o.DataFile)
	}
	return o.checkTogether()
}

// checkTogether refuses options that exclude each other.
func (o *CreateOptions) checkTogether() error {
	if o.Version == 2 {
		switch {
		case o.RefcountBits != defaultRefcountBits:
			return invalidOption("version 2 of the format has reference counts of 16 bits only")
		case o.ExtendedL2:
			return invalidOption("version 2 of the format has no extended L2 entries")
		case o.LazyRefcounts:
			return invalidOption("version 2 of the format has no lazy reference counts")
		case o.CompressionType != "zlib":
			return invalidOption("version 2 of the format has no compression type but zlib")
		case o.DataFile != "":
			return invalidOption("version 2 of the format has no external data files")
		}
	}
	switch {
	case o.ExtendedL2 && o.ClusterSize < 1<<minExtendedBits:
		return invalidOption("extended L2 entries take clusters of at least 16384 bytes, not %d", o.ClusterSize)
	case o.DataFileRaw && o.DataFile == "":
		return invalidOption("a raw data file takes the name of a data file")
	case o.DataFileRaw && o.BackingFile != "":
		return invalidOption("an image with a raw data file cannot have a backing file")
	case o.Preallocation != PreallocateOff && o.BackingFile != "" && !o.ExtendedL2:
		return invalidOption("preallocation with a backing file takes extended L2 entries")
	}
	return nil
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
	if o.DataFile != "" {
		ext = appendExtension(ext, extDataFile, []byte(o.DataFile))
	}
	if h.version == 3 && 1<<h.clusterBits >= minFeatureNames {
		ext = appendExtension(ext, extFeatureNames, featureTable())
	}
	ext = appendExtension(ext, extEnd, nil)
	if o.BackingFile != "" {
		h.backingOffset = uint64(h.length) + uint64(len(ext))
		h.backingSize = uint32(len(o.BackingFile)) //nolint:gosec // G115: checked below
	}
	if len(o.BackingFile) > maxBackingName {
		return nil, invalidOption("the name of the backing file, %d bytes, is longer than %d", len(o.BackingFile), maxBackingName)
	}
	if int(h.length)+len(ext)+len(o.BackingFile) > 1<<h.clusterBits {
		return nil, invalidOption("the names of the backing file and the data file, %d bytes, are too long for the first cluster, of %d bytes",
			len(o.BackingFile)+len(o.DataFile), 1<<h.clusterBits)
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
		be.PutUint64(b[80:], h.compatible)
		be.PutUint64(b[offAutoclear:], h.autoclear)
		be.PutUint32(b[96:], h.refcountOrder)
		be.PutUint32(b[100:], h.length)
		b[104] = h.compression
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
		{2, autoclearRawData, "raw external data"},
	} {
		var e [featureNameEntry]byte
		e[0], e[1] = f.kind, f.bit
		copy(e[2:], f.name)
		b = append(b, e[:]...)
	}
	return b
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

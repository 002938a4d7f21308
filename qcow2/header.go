package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// Limits of the format, the same as QEMU's so that both accept the same images.
const (
	magic = 0x514649fb // "QFI\xfb"

	minClusterBits  = 9
	minExtendedBits = 14 // of extended L2 entries, whose 32 subclusters are sectors at least
	maxClusterBits  = 21
	maxL1Bytes      = 32 << 20
	maxRefTable     = 8 << 20 // bytes
	maxSnapshots    = 65536
	maxBackingName  = 1023
	headerLengthV2  = 72
	headerLengthV3  = 104
	headerLengthOur = 112 // what Create writes
)

// Bit numbers of the feature fields.
const (
	incompatDirty       = 0
	incompatCorrupt     = 1
	incompatDataFile    = 2
	incompatCompression = 3
	incompatExtendedL2  = 4

	knownIncompatible = 1<<incompatDirty | 1<<incompatCorrupt | 1<<incompatDataFile | 1<<incompatCompression | 1<<incompatExtendedL2

	compatLazyRefcounts = 0

	autoclearBitmaps = 0
	autoclearRawData = 1 // the external data file is a raw image of the disk
)

// Offsets in the header of the fields that are rewritten in place. Each lies
// inside one 512-byte sector, so a write of it is atomic.
const (
	offBackingName  = 8 // its offset
	offSize         = 24
	offL1Size       = 36 // entries, then the table's offset: 12 bytes
	offL1Offset     = 40
	offRefTable     = 48 // table offset, then its clusters: 12 bytes
	offIncompatible = 72
	offAutoclear    = 88
)

const (
	compressionDeflate = 0
	compressionZstd    = 1
)

// header is the fixed part of the image header. Fields are as in the file;
// those of version 3 have their defaults in a version 2 image.
type header struct {
	version          uint32
	backingOffset    uint64
	backingSize      uint32
	clusterBits      uint32
	size             uint64 // bytes
	crypt            uint32
	l1Size           uint32 // entries
	l1Offset         uint64
	refTableOffset   uint64
	refTableClusters uint32
	snapshots        uint32
	snapshotsOffset  uint64
	incompatible     uint64
	compatible       uint64
	autoclear        uint64
	refcountOrder    uint32
	length           uint32
	compression      uint8
}

// parseHeader decodes b, the first bytes of a file, of which there must be at
// least headerLengthOur unless the file is shorter. It checks only what it
// needs for decoding; validate does the rest.
func parseHeader(b []byte) (*header, error) {
	be := binary.BigEndian
	if len(b) < headerLengthV2 || be.Uint32(b) != magic {
		return nil, &Error{
			Kind: ErrNotQCOW2, What: "not a QCOW2 image: it does not begin with a QCOW2 header",
			Mend: "a raw image must be given as format raw",
		}
	}
	h := &header{
		version:          be.Uint32(b[4:]),
		backingOffset:    be.Uint64(b[8:]),
		backingSize:      be.Uint32(b[16:]),
		clusterBits:      be.Uint32(b[20:]),
		size:             be.Uint64(b[24:]),
		crypt:            be.Uint32(b[32:]),
		l1Size:           be.Uint32(b[36:]),
		l1Offset:         be.Uint64(b[offL1Offset:]),
		refTableOffset:   be.Uint64(b[offRefTable:]),
		refTableClusters: be.Uint32(b[56:]),
		snapshots:        be.Uint32(b[60:]),
		snapshotsOffset:  be.Uint64(b[64:]),
		refcountOrder:    4,
		length:           headerLengthV2,
	}
	switch h.version {
	case 2:
		return h, nil
	case 3:
	default:
		return nil, unsupported(fmt.Sprintf("QCOW2 version %d", h.version), "")
	}
	if len(b) < headerLengthV3 {
		return nil, headerFault("the header is cut off after %d bytes", len(b))
	}
	h.incompatible = be.Uint64(b[offIncompatible:])
	h.compatible = be.Uint64(b[80:])
	h.autoclear = be.Uint64(b[offAutoclear:])
	h.refcountOrder = be.Uint32(b[96:])
	h.length = be.Uint32(b[100:])
	if h.length > headerLengthV3 {
		if len(b) <= headerLengthV3 {
			return nil, headerFault("the header is cut off after %d bytes", len(b))
		}
		h.compression = b[104]
	}
	return h, nil
}

// validate checks every field against the limits of the format and against
// fileSize, the length of the file in bytes. No table has been read yet; after
// it, every size that the header gives is bounded.
func (h *header) validate(fileSize int64) error {
	if err := h.validateFields(); err != nil {
		return err
	}
	for _, table := range []func(int64) error{h.validateRefTable, h.validateL1, h.validateSnapshots} {
		if err := table(fileSize); err != nil {
			return err
		}
	}
	return nil
}

// validateFields checks what does not concern a table.
func (h *header) validateFields() error {
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return headerFault("cluster size 2^%d is outside 512 bytes to 2 MiB", h.clusterBits)
	}
	cs := uint64(1) << h.clusterBits
	switch {
	case h.version == 3 && h.length < headerLengthV3:
		return headerFault("the header length of %d bytes is below %d", h.length, headerLengthV3)
	case uint64(h.length) > cs:
		return headerFault("the header length of %d bytes exceeds the cluster size", h.length)
	case h.incompat(incompatExtendedL2) && h.clusterBits < minExtendedBits:
		return headerFault("clusters of %d bytes are too small for extended L2 entries", cs)
	case h.refcountOrder > 6:
		return headerFault("reference counts of 2^%d bits are wider than 64", h.refcountOrder)
	case h.size > math.MaxInt64:
		return headerFault("the disk size of %d bytes is impossible", h.size)
	case h.backingOffset > cs:
		return headerFault("the backing file name lies at %#x, outside the first cluster", h.backingOffset)
	case h.backingOffset != 0 && h.backingOffset < uint64(h.length):
		return headerFault("the backing file name lies at %#x, inside the header", h.backingOffset)
	case h.backingOffset != 0 && uint64(h.backingSize) > min(maxBackingName, cs-h.backingOffset):
		return headerFault("the backing file name of %d bytes is too long", h.backingSize)
	case (h.compression != compressionDeflate) != h.incompat(incompatCompression):
		return headerFault("the compression type %d contradicts the feature bit for it", h.compression)
	}
	return nil
}

func (h *header) validateRefTable(fileSize int64) error {
	cs := uint64(1) << h.clusterBits
	if h.refTableClusters == 0 {
		return corruptf("the image has no reference count table")
	}
	if uint64(h.refTableClusters)*cs > maxRefTable {
		return corruptf("the reference count table of %d clusters is larger than 8 MiB", h.refTableClusters)
	}
	return h.checkTable("reference count table", h.refTableOffset, uint64(h.refTableClusters)*cs, fileSize)
}

func (h *header) validateL1(fileSize int64) error {
	if uint64(h.l1Size)*8 > maxL1Bytes {
		return corruptf("the L1 table of %d entries is larger than 32 MiB", h.l1Size)
	}
	if need := h.l1Entries(h.size); uint64(h.l1Size) < need {
		return corruptf("the L1 table of %d entries is too small for the disk size, which needs %d", h.l1Size, need)
	}
	if h.l1Size > 0 {
		return h.checkTable("L1 table", h.l1Offset, uint64(h.l1Size)*8, fileSize)
	}
	return nil
}

func (h *header) validateSnapshots(fileSize int64) error {
	if h.snapshots > maxSnapshots {
		return corruptf("%d internal snapshots are more than %d", h.snapshots, maxSnapshots)
	}
	return h.placeSnapshots(h.snapshots, fileSize)
}

// placeSnapshots checks that a table of n snapshots may lie where the header
// says.
func (h *header) placeSnapshots(n uint32, fileSize int64) error {
	if h.snapshotsOffset&(1<<h.clusterBits-1) != 0 {
		return corruptf("the snapshot table at %#x is not aligned to a cluster", h.snapshotsOffset)
	}
	if n == 0 {
		return nil
	}
	return h.checkTable("snapshot table", h.snapshotsOffset, uint64(n)*snapshotFixed, fileSize)
}

// checkTable checks that a table of n bytes may lie at off. Its beginning must
// be inside the file; what lies beyond the end reads as zeros.
func (h *header) checkTable(what string, off, n uint64, fileSize int64) error {
	cs := uint64(1) << h.clusterBits
	switch {
	case off < cs:
		return corruptf("the %s at %#x overlaps the header", what, off)
	case off%cs != 0:
		return corruptf("the %s at %#x is not aligned to a cluster", what, off)
	case off > math.MaxInt64-n:
		return corruptf("the %s at %#x lies outside any file", what, off)
	case off >= uint64(max(fileSize, 0)):
		return corruptf("the %s at %#x lies beyond the end of the file (%d bytes): the file was cut off", what, off, fileSize)
	}
	return nil
}

func (h *header) incompat(bit uint) bool { return h.incompatible>>bit&1 != 0 }

// checkFeatures refuses by name what this package cannot do. names is the
// feature name table of the image.
func (h *header) checkFeatures(names featureNames) error {
	switch h.crypt {
	case 0:
	case 1:
		return unsupported("AES encryption", "")
	case 2:
		return unsupported("LUKS encryption", "")
	default:
		return unsupported(fmt.Sprintf("encryption method %d", h.crypt), "")
	}
	if h.compression > compressionZstd {
		return unsupported(fmt.Sprintf("compression type %d", h.compression), "-o compression_type=zstd")
	}
	if unknown := h.incompatible &^ knownIncompatible; unknown != 0 {
		bit := uint(bits.TrailingZeros64(unknown))
		return unsupported(fmt.Sprintf("%s (incompatible feature bit %d)", names.of(featureIncompatible, bit), bit), "")
	}
	return nil
}

// checkWritable refuses what may be read but not written.
func (h *header) checkWritable(path string) error {
	if h.incompat(incompatCorrupt) {
		return &Error{Kind: ErrCorrupt, What: "the image is marked corrupt and can only be opened for reading", Mend: repairHint(path)}
	}
	return nil
}

// unsupported refuses what by name. options are those of qemu-img convert that
// make an image without it, where the default ones do not.
func unsupported(what, options string) error {
	if options != "" {
		options += " "
	}
	return &Error{
		Kind: ErrUnsupported, What: what + " is not supported",
		Mend: "to have an image without it, run: qemu-img convert -O qcow2 " + options + "FILE NEW",
	}
}

// l1Entries is the number of L1 entries that cover size bytes.
func (h *header) l1Entries(size uint64) uint64 {
	shift := h.clusterBits + h.clusterBits - 3 // bytes that one L2 table covers
	if h.incompat(incompatExtendedL2) {
		shift-- // its entries are twice as long
	}
	return size>>shift + b2u(size&(1<<shift-1) != 0)
}

func b2u(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

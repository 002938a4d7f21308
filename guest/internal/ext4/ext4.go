// Package ext4 reads ext2, ext3 and ext4 file systems, as an fs.FS.
//
// It follows Documentation/filesystems/ext4 of Linux: block maps and extents,
// holes, inline data, hashed directories, which it scans, and the descriptors of
// large file systems. It checks no checksums and does not replay the journal: of
// a file system that was not unmounted it shows what is in place.
//
// File systems are not trusted. Nothing read from one is used before it is
// bounded, so a broken one yields an error; it can make a call read much, never
// without end, and never take more memory than the directory limit. All methods
// may be called concurrently if the reader's may.
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/google/uuid"
)

// ErrNotExt is returned by New for what is no ext2, ext3 or ext4 file system.
var ErrNotExt = errors.New("ext4: no ext2, ext3 or ext4 file system")

// errCorrupt is wrapped by what a broken file system is told by.
var errCorrupt = errors.New("ext4: the file system is damaged")

const (
	superOffset = 1024
	superSize   = 1024
	magic       = 0xEF53

	rootInode = 2

	// s_feature_compat
	featureHasJournal = 0x4
	featureSparse2    = 0x200
	// s_feature_incompat
	featureCompression = 0x1
	featureFiletype    = 0x2
	featureRecover     = 0x4
	featureJournalDev  = 0x8
	featureMetaBG      = 0x10
	featureExtents     = 0x40
	feature64Bit       = 0x80
	featureMMP         = 0x100
	featureFlexBG      = 0x200
	featureEAInode     = 0x400
	featureCsumSeed    = 0x2000
	featureLargeDir    = 0x4000
	featureInlineData  = 0x8000
	featureEncrypt     = 0x10000
	featureCasefold    = 0x20000
	// s_feature_ro_compat
	featureSparse      = 0x1
	featureHugeFile    = 0x8
	featureGDTCsum     = 0x10
	featureDirNlink    = 0x20
	featureExtraIsize  = 0x40
	featureBigalloc    = 0x200
	featureMetadataSum = 0x400

	known = featureFiletype | featureRecover | featureMetaBG | featureExtents | feature64Bit | featureMMP |
		featureFlexBG | featureEAInode | featureCsumSeed | featureLargeDir | featureInlineData | featureEncrypt | featureCasefold
	// of4 are the features that ext3 does not know.
	of4   = known &^ (featureFiletype | featureRecover | featureMetaBG)
	of4RO = featureHugeFile | featureGDTCsum | featureDirNlink | featureExtraIsize | featureBigalloc | featureMetadataSum
)

// FS is a file system.
type FS struct {
	r  io.ReaderAt
	id uuid.UUID

	label     string
	kind      string
	features  uint32 // s_feature_incompat
	blockSize int64
	blocks    uint64 // of those that the device holds as well
	firstData uint64

	blocksPerGroup uint64
	inodes         uint32
	inodesPerGroup uint32
	inodeSize      int64

	descSize       int64
	firstMetaGroup uint64
	hasSuper       func(group uint64) bool
}

var (
	_ fs.ReadDirFS  = (*FS)(nil)
	_ fs.ReadLinkFS = (*FS)(nil)
)

// New opens the file system on a device of size bytes. It returns ErrNotExt where
// there is none, and an error with a name for one with a feature that it does not
// know.
func New(r io.ReaderAt, size int64) (*FS, error) {
	if size < superOffset+superSize {
		return nil, ErrNotExt
	}
	b := make([]byte, superSize)
	if _, err := r.ReadAt(b, superOffset); err != nil {
		return nil, fmt.Errorf("read the superblock: %w", err)
	}
	le := binary.LittleEndian
	if le.Uint16(b[0x38:]) != magic {
		return nil, ErrNotExt
	}
	f := &FS{
		r: r, id: uuid.UUID(b[0x68:0x78]),
		label:          text(b[0x78:0x88]),
		features:       le.Uint32(b[0x60:]),
		firstData:      uint64(le.Uint32(b[0x14:])),
		blocks:         uint64(le.Uint32(b[0x4:])),
		blocksPerGroup: uint64(le.Uint32(b[0x20:])),
		inodes:         le.Uint32(b),
		inodesPerGroup: le.Uint32(b[0x28:]),
		inodeSize:      int64(le.Uint16(b[0x58:])),
		firstMetaGroup: uint64(le.Uint32(b[0x104:])),
		descSize:       32,
	}
	compat, ro := le.Uint32(b[0x5C:]), le.Uint32(b[0x64:])
	f.kind = kindOf(compat, f.features, ro)
	f.hasSuper = supers(compat, ro, [2]uint32{le.Uint32(b[0x24C:]), le.Uint32(b[0x250:])})
	if f.features&feature64Bit != 0 {
		f.blocks |= uint64(le.Uint32(b[0x150:])) << 32
		f.descSize = int64(le.Uint16(b[0xFE:]))
	}
	if le.Uint32(b[0x4C:]) == 0 { // revision 0 has no such field
		f.inodeSize = 128
	}
	return f, f.check(le.Uint32(b[0x18:]), size)
}

// check reports what of the superblock cannot be, or cannot be read, and derives
// what depends on the size of the blocks.
func (f *FS) check(logBlockSize uint32, size int64) error {
	switch unknown := f.features &^ known; {
	case unknown&featureJournalDev != 0:
		return errors.New("ext4: an external journal, not a file system")
	case unknown&featureCompression != 0:
		return errors.New("ext4: the file system is compressed (e2compr), which is not supported")
	case unknown != 0:
		return fmt.Errorf("ext4: the file system has features that are not supported: incompat %#x", unknown)
	case logBlockSize > 6:
		return corrupt("blocks of 2^%d KiB", logBlockSize)
	}
	f.blockSize = 1024 << logBlockSize
	f.blocks = min(f.blocks, uint64(size/f.blockSize)) //nolint:gosec // G115: size is positive
	switch {
	case f.blocksPerGroup == 0 || f.inodesPerGroup == 0:
		return corrupt("groups of %d blocks and %d inodes", f.blocksPerGroup, f.inodesPerGroup)
	case f.inodeSize < 128 || f.inodeSize > f.blockSize || f.inodeSize&(f.inodeSize-1) != 0:
		return corrupt("inodes of %d bytes", f.inodeSize)
	case f.descSize < 32 || f.descSize > f.blockSize || f.descSize&(f.descSize-1) != 0:
		return corrupt("group descriptors of %d bytes", f.descSize)
	}
	return nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errCorrupt, fmt.Sprintf(format, args...))
}

// text is what b holds up to its first zero.
func text(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}

func kindOf(compat, incompat, ro uint32) string {
	switch {
	case incompat&of4 != 0 || ro&of4RO != 0:
		return "ext4"
	case compat&featureHasJournal != 0:
		return "ext3"
	}
	return "ext2"
}

// supers returns which groups begin with a copy of the superblock.
func supers(compat, ro uint32, backups [2]uint32) func(uint64) bool {
	switch {
	case compat&featureSparse2 != 0:
		return func(g uint64) bool { return g == 0 || g == uint64(backups[0]) || g == uint64(backups[1]) }
	case ro&featureSparse != 0:
		return func(g uint64) bool { return g <= 1 || powerOf(g, 3) || powerOf(g, 5) || powerOf(g, 7) }
	}
	return func(uint64) bool { return true }
}

func powerOf(n, base uint64) bool {
	for n%base == 0 && n > 0 {
		n /= base
	}
	return n == 1
}

// Kind is ext2, ext3 or ext4, by the features that are in use.
func (f *FS) Kind() string { return f.kind }

// UUID is the file system's, in lower case.
func (f *FS) UUID() string { return f.id.String() }

// Label is the name of the volume, or empty.
func (f *FS) Label() string { return f.label }

// Unclean reports whether the journal holds changes that are not in place yet.
func (f *FS) Unclean() bool { return f.features&featureRecover != 0 }

// read fills p from the bytes at off of a block.
func (f *FS) read(p []byte, block uint64, off int64) error {
	if block >= f.blocks || off+int64(len(p)) > int64(f.blocks-block)*f.blockSize { //nolint:gosec // G115: less than the size of the device
		return corrupt("block %d lies beyond its end", block)
	}
	_, err := f.r.ReadAt(p, int64(block)*f.blockSize+off) //nolint:gosec // G115: less than the size of the device
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// super is the block that the superblock lies in.
func (f *FS) super() uint64 { return uint64(superOffset / f.blockSize) } //nolint:gosec // G115: positive

// descriptor returns the block and the offset in it of a group's descriptor.
func (f *FS) descriptor(group uint64) (block uint64, off int64) {
	perBlock := uint64(f.blockSize / f.descSize) //nolint:gosec // G115: both are positive
	meta := group / perBlock
	off = int64(group%perBlock) * f.descSize //nolint:gosec // G115: less than a block
	if f.features&featureMetaBG == 0 || meta < f.firstMetaGroup {
		return f.super() + 1 + meta, off
	}
	// A meta group has its descriptors in its first group.
	first := meta * perBlock
	if first == 0 {
		return f.super() + 1, off
	}
	block = f.firstData + first*f.blocksPerGroup
	if f.hasSuper(first) {
		block++
	}
	return block, off
}

// inode is an inode as it is on disk, with what follows it.
type inode struct {
	number uint32
	raw    []byte
}

// The fields of an inode that are used.
const (
	inodeMode   = 0x0
	inodeSizeLo = 0x4
	inodeMtime  = 0x10
	inodeFlags  = 0x20
	inodeBlock  = 0x28 // 60 bytes: the map, or data
	inodeSizeHi = 0x6C
	inodeExtra  = 0x80 // i_extra_isize
	inodeMtimeX = 0x88

	flagEncrypt    = 0x800
	flagExtents    = 0x80000
	flagInlineData = 0x10000000
)

func (f *FS) inode(number uint32) (inode, error) {
	if number == 0 || number > f.inodes {
		return inode{}, corrupt("there is no inode %d", number)
	}
	group, index := (number-1)/f.inodesPerGroup, (number-1)%f.inodesPerGroup
	desc := make([]byte, min(f.descSize, 64))
	block, off := f.descriptor(uint64(group))
	if err := f.read(desc, block, off); err != nil {
		return inode{}, fmt.Errorf("descriptor of group %d: %w", group, err)
	}
	table := uint64(binary.LittleEndian.Uint32(desc[0x8:]))
	if len(desc) == 64 {
		table |= uint64(binary.LittleEndian.Uint32(desc[0x28:])) << 32
	}
	n := inode{number, make([]byte, f.inodeSize)}
	if err := f.read(n.raw, table, int64(index)*f.inodeSize); err != nil {
		return inode{}, fmt.Errorf("inode %d: %w", number, err)
	}
	if n.size() < 0 {
		return inode{}, corrupt("inode %d has a size of %#x", number, uint64(n.size())) //nolint:gosec // G115: shown as it is
	}
	return n, nil
}

func (n inode) field(at int) uint32 { return binary.LittleEndian.Uint32(n.raw[at:]) }
func (n inode) has(flag uint32) bool {
	return n.field(inodeFlags)&flag != 0
}

func (n inode) size() int64 {
	return int64(uint64(n.field(inodeSizeHi))<<32 | uint64(n.field(inodeSizeLo))) //nolint:gosec // G115: inode refuses what is negative
}

// mode is the type and the permissions as package fs has them.
func (n inode) mode() fs.FileMode {
	m := binary.LittleEndian.Uint16(n.raw[inodeMode:])
	mode := fs.FileMode(m & 0o777)
	for bit, flag := range map[uint16]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if m&bit != 0 {
			mode |= flag
		}
	}
	return mode | typeOf(m>>12)
}

// typeOf is the type that the upper four bits of a mode stand for.
func typeOf(bits uint16) fs.FileMode {
	switch bits {
	case 0x1:
		return fs.ModeNamedPipe
	case 0x2:
		return fs.ModeDevice | fs.ModeCharDevice
	case 0x4:
		return fs.ModeDir
	case 0x6:
		return fs.ModeDevice
	case 0x8:
		return 0
	case 0xA:
		return fs.ModeSymlink
	case 0xC:
		return fs.ModeSocket
	}
	return fs.ModeIrregular
}

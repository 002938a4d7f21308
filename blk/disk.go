package blk

import "io"

// Disk is what a block device serves: a number of bytes that can be read,
// written and made durable. *qcow2.Image and *Raw are disks; another one only
// has to pass blktest.
//
// All methods are safe for concurrent use: every queue of a device calls them
// from a goroutine of its own. Offsets and lengths are in bytes and of any
// alignment. A range that does not lie inside [0, Size) is an error and
// transfers nothing.
type Disk interface {
	// ReadvAt fills the buffers of iov in order from the bytes at off. On an
	// error the contents of the buffers are undefined.
	ReadvAt(iov [][]byte, off int64) error
	// WritevAt writes the buffers of iov in order at off. On an error any
	// part of the range may have been written.
	//
	// Neither method keeps iov or changes its elements. The buffers may be
	// guest memory, whose bytes change while they are being used.
	WritevAt(iov [][]byte, off int64) error
	// Flush returns when every write that completed before it was called is
	// on stable storage. A failed flush stays failed.
	Flush() error
	// Size is the length of the disk in bytes. It changes only at the bidding
	// of whoever owns the disk; see Device.Resize.
	Size() int64
	// ReadOnly reports whether WritevAt fails whatever it is given.
	ReadOnly() bool
}

// Discarder is a Disk that can give up what parts of it hold. A device finds
// out when it is made.
type Discarder interface {
	// Discard says that the n bytes at off are not needed any more. Until they
	// are written they read as anything the disk has held at that place, or as
	// zeros; what a disk lies over, such as a backing file, must not show.
	Discard(off, n int64) error
	// DiscardGranularity is the size in bytes, a multiple of SectorSize, of the
	// aligned pieces that Discard frees. It is constant; 0 means that there is
	// no use in calling Discard.
	DiscardGranularity() int64
}

// ZeroWriter is a Disk that knows a better way to make a range zero than to
// write zeros. A device finds out when it is made, and writes zeros otherwise.
type ZeroWriter interface {
	// WriteZeroes makes the n bytes at off read as zero. Their room stays
	// theirs: a write to them afterwards needs no new space.
	WriteZeroes(off, n int64) error
	// PunchHole makes the n bytes at off read as zero and gives up what room
	// it can.
	PunchHole(off, n int64) error
}

// BlockSizer is a Disk whose blocks are not sectors: whoever has put a partition
// table on it has counted in them, and shorter writes may tear. A device finds
// out when it is made.
type BlockSizer interface {
	// BlockSize is a power of 2 from 512 to 64 KiB that divides Size, in bytes.
	// It is constant.
	BlockSize() int
}

// Hinter is a Disk that knows which requests suit it. A device passes that on
// to its guest.
type Hinter interface {
	// IOHints returns, in bytes, the largest unit that is written without
	// reading it first or tearing it, a power of 2; the smallest length of
	// requests that suits the disk; and the one that suits it best. 0 means
	// that there is nothing to say. They are constant.
	IOHints() (physicalBlock, minIO, optimalIO int64)
}

// NewReader returns a reader of all of a disk as it is now.
func NewReader(d Disk) *io.SectionReader { return io.NewSectionReader(reader{d}, 0, d.Size()) }

// reader reads ranges that lie inside a disk.
type reader struct{ Disk }

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.ReadvAt([][]byte{p}, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

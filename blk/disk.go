package blk

// Disk is what a block device serves: a fixed number of bytes that can be read,
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
	// Size is the length of the disk in bytes.
	Size() int64
	// ReadOnly reports whether WritevAt fails whatever it is given.
	ReadOnly() bool
}

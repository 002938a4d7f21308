package qcow2

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// file is all the engine does with a host file. Tests put recording and failing
// layers under it. Methods are positional and safe for concurrent use; none
// keeps iov or changes its elements.
type file interface {
	// ReadvAt fills iov from off. What lies past the end of the file reads
	// as zeros.
	ReadvAt(iov [][]byte, off int64) error
	// WritevAt writes all of iov at off, extending the file as needed.
	WritevAt(iov [][]byte, off int64) error
	// Fdatasync makes what was written, and the size, durable.
	Fdatasync() error
	// Punch makes the n bytes at off, whole clusters, read as zero and gives
	// their space back, without changing the size. Where that is impossible
	// the error is EOPNOTSUPP.
	Punch(off, n int64) error
	// Allocate reserves room on the host for the n bytes at off, at least one,
	// and extends the file to their end. It does not change what they hold.
	Allocate(off, n int64) error
	// Truncate sets the length in bytes.
	Truncate(size int64) error
	// Size is the length in bytes.
	Size() (int64, error)
	// Extent tells whether the beginning of [off, off+n) is a hole, which reads
	// as zero, and how long it is so.
	Extent(off, n int64) (hole bool, length int64)
	Close() error
}

// osFile is a file of the host.
type osFile struct {
	f  *os.File
	fd int // of f; valid until Close
}

var _ file = (*osFile)(nil)

func newOSFile(f *os.File) *osFile { return &osFile{f: f, fd: int(f.Fd())} }

func (o *osFile) Fdatasync() error {
	for {
		err := unix.Fdatasync(o.fd)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

func (o *osFile) Punch(off, n int64) error {
	return o.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (o *osFile) Allocate(off, n int64) error { return o.fallocate(0, off, n) }

func (o *osFile) fallocate(mode uint32, off, n int64) error {
	for {
		err := unix.Fallocate(o.fd, mode, off, n)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fallocate", err)
		}
	}
}

func (o *osFile) Truncate(size int64) error { return o.f.Truncate(size) }

func (o *osFile) Size() (int64, error) {
	fi, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	if fi.Mode().IsRegular() {
		return fi.Size(), nil
	}
	// A block device: its size is where its end is. All other input and
	// output is positional, so moving the cursor disturbs nothing.
	return o.f.Seek(0, 2)
}

// Extent takes all for data where the file system does not tell.
func (o *osFile) Extent(off, n int64) (hole bool, length int64) {
	data, err := o.f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // there is no data from here on
		return true, n
	case err != nil || data < off:
		return false, n
	case data > off:
		return true, min(n, data-off)
	}
	end, err := o.f.Seek(off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		return false, n
	}
	return false, min(n, end-off)
}

// allocated is the room that the file takes on the host, in bytes.
func (o *osFile) allocated() (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(o.fd, &st); err != nil {
		return 0, os.NewSyscallError("fstat", err)
	}
	return st.Blocks * 512, nil
}

func (o *osFile) Close() error { return o.f.Close() }

// readFull and writeFull are ReadvAt and WritevAt of one buffer.
func readFull(f file, p []byte, off int64) error  { return f.ReadvAt([][]byte{p}, off) }
func writeFull(f file, p []byte, off int64) error { return f.WritevAt([][]byte{p}, off) }

package blk

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrBounds is returned for a range that is not wholly on the disk.
var ErrBounds = errors.New("blk: range is outside the disk")

// RawOptions say how OpenRaw opens a disk. The zero value opens it for reading
// and writing.
type RawOptions struct {
	// ReadOnly opens the disk for reading only, which others may do at the
	// same time.
	ReadOnly bool
	// ForceShare opens it for reading only beside a process that writes to it,
	// whose changes may show in part.
	ForceShare bool
	// Direct moves data between memory and the disk without the host's page
	// cache (O_DIRECT). What the host cannot move so, because of its alignment,
	// goes through a buffer.
	Direct bool
}

// Raw is a Disk whose bytes are those of a regular file or a block device. A
// file whose length is not a multiple of 512 is as long as the next multiple:
// what is missing reads as zero, and writing there makes the file longer.
//
// It holds QEMU's image lock while it is open, so that neither QEMU nor another
// calf can write beside it. The file must not become shorter while it is open.
type Raw struct {
	path     string
	fd       int
	readOnly bool

	// Both in bytes, written by Grow alone.
	length atomic.Int64 // of the file, when it was opened or last grown
	size   atomic.Int64 // length rounded up to sectors

	device      bool    // it is a block device
	align       int64   // what its ranges are aligned to: 1, or a device's block
	granularity int64   // of discards; 0 if it has none
	direct      *direct // nil unless it is open for direct I/O
	hints       struct{ physical, min, optimal int64 }

	flushes *flushes
}

var (
	_ Disk       = (*Raw)(nil)
	_ Discarder  = (*Raw)(nil)
	_ ZeroWriter = (*Raw)(nil)
	_ Hinter     = (*Raw)(nil)
	_ BlockSizer = (*Raw)(nil)
)

// OpenRaw opens the regular file or block device at path as it is, whatever its
// content looks like, and locks it.
func OpenRaw(path string, opts RawOptions) (*Raw, error) {
	opts.ReadOnly = opts.ReadOnly || opts.ForceShare
	flags := unix.O_RDWR
	if opts.ReadOnly {
		flags = unix.O_RDONLY
	}
	if opts.Direct {
		flags |= unix.O_DIRECT
	}
	// O_NONBLOCK has no meaning for a disk; it keeps the open of a FIFO, which
	// is refused below, from waiting.
	fd, err := openFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK)
	if opts.Direct && errors.Is(err, unix.EINVAL) {
		err = errNoDirect
	}
	if err != nil {
		return nil, fmt.Errorf("open raw disk %s: %w", path, err)
	}
	r := &Raw{path: path, fd: fd, readOnly: opts.ReadOnly, flushes: newFlushes()}
	if err := r.prepare(opts); err != nil {
		return nil, errors.Join(fmt.Errorf("open raw disk %s: %w", path, err), unix.Close(fd))
	}
	return r, nil
}

func openFile(path string, flags int) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Open(path, flags, 0)
		return err
	})
	return fd, err
}

// prepare checks what has been opened, locks it and measures it.
func (r *Raw) prepare(opts RawOptions) error {
	var st unix.Stat_t
	if err := unix.Fstat(r.fd, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
	case unix.S_IFDIR:
		return errors.New("it is a directory; name a file or a block device")
	default:
		return errors.New("it is neither a regular file nor a block device")
	}
	if err := lockImage(r.fd, opts); err != nil {
		return err
	}
	end, err := unix.Seek(r.fd, 0, unix.SEEK_END)
	if err != nil {
		return fmt.Errorf("find its length: %w", err)
	}
	r.length.Store(end)
	r.size.Store((end + SectorSize - 1) &^ (SectorSize - 1))
	if err := r.measureRanges(&st); err != nil || !opts.Direct {
		return err
	}
	if r.direct, err = measureDirect(r.fd, end); err != nil {
		return err
	}
	r.hints.physical = max(r.hints.physical, r.direct.offset)
	return nil
}

// Close gives up the lock and the file. No other method may be running.
func (r *Raw) Close() error { return unix.Close(r.fd) }

// Size implements Disk.
func (r *Raw) Size() int64 { return r.size.Load() }

// Grow makes the disk size bytes long, a multiple of SectorSize; what is new
// reads as zero. It is safe beside all methods but itself and Close. A block
// device must already be that long.
func (r *Raw) Grow(size int64) error {
	switch {
	case r.readOnly:
		return fmt.Errorf("grow %s: %w", r.path, unix.EROFS)
	case size%SectorSize != 0:
		return fmt.Errorf("grow %s: %d bytes are no whole number of sectors", r.path, size)
	case r.direct != nil && size%r.direct.offset != 0:
		return fmt.Errorf("grow %s: %d bytes are no whole number of blocks of %d", r.path, size, r.direct.offset)
	case size < r.size.Load():
		return fmt.Errorf("grow %s: %d bytes are less than the %d it has", r.path, size, r.size.Load())
	}
	if r.device {
		end, err := unix.Seek(r.fd, 0, unix.SEEK_END)
		if err != nil || end < size {
			return fmt.Errorf("grow %s to %d bytes: the device has %d: %w", r.path, size, end, errors.Join(err, ErrBounds))
		}
	} else if err := retry(func() error { return unix.Ftruncate(r.fd, size) }); err != nil {
		return fmt.Errorf("grow %s to %d bytes: %w", r.path, size, err)
	}
	r.length.Store(size) // before size: what lies between reads from the file
	r.size.Store(size)
	return nil
}

// ReadOnly implements Disk.
func (r *Raw) ReadOnly() bool { return r.readOnly }

// ReadvAt implements Disk.
func (r *Raw) ReadvAt(iov [][]byte, off int64) error { return r.transfer(unix.SYS_PREADV, iov, off) }

// WritevAt implements Disk.
func (r *Raw) WritevAt(iov [][]byte, off int64) error {
	if r.readOnly {
		return fmt.Errorf("write %s: %w", r.path, unix.EROFS)
	}
	return r.transfer(unix.SYS_PWRITEV, iov, off)
}

// Flush implements Disk.
func (r *Raw) Flush() error {
	if r.readOnly {
		return nil
	}
	err := r.flushes.do(func() error {
		return retry(func() error { return unix.Fdatasync(r.fd) })
	})
	if err != nil {
		return fmt.Errorf("flush %s: %w", r.path, err)
	}
	return nil
}

// transfer moves all of iov from or to the disk at off with the given system
// call.
func (r *Raw) transfer(call uintptr, iov [][]byte, off int64) error {
	switch {
	case !inRange(iov, off, r.size.Load()):
		return ErrBounds
	case r.direct != nil:
		return r.transferDirect(call, iov, off)
	default:
		return r.move(call, iov, off)
	}
}

// move moves all of iov, which is in range, as the file takes it, going on after
// a short transfer (B3).
func (r *Raw) move(call uintptr, iov [][]byte, off int64) error {
	v := vectors.Get().(*vector)
	defer vectors.Put(v)
	for len(iov) > 0 {
		iov = v.load(iov)
		for !v.empty() {
			length := r.length.Load() // before the call: Grow may come after it
			n, err := v.call(call, r.fd, off)
			switch {
			case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
			case err != nil:
				return fmt.Errorf("%s %s at %d: %w", callName(call), r.path, off, err)
			case n > 0:
				v.advance(n)
				off += int64(n)
			case call == unix.SYS_PREADV && off >= length:
				// The end of the last sector of a file that lacks it. What
				// follows is zero up to the size, within which off is.
				v.zero()
			default:
				return fmt.Errorf("%s %s at %d: %w", callName(call), r.path, off, io.ErrUnexpectedEOF)
			}
		}
	}
	return nil
}

// inRange reports whether the buffers of iov fit in [0, size) at off.
func inRange(iov [][]byte, off, size int64) bool {
	if off < 0 || off > size {
		return false
	}
	left := uint64(size - off) //nolint:gosec // G115: off lies within size
	for _, b := range iov {
		if uint64(len(b)) > left {
			return false
		}
		left -= uint64(len(b))
	}
	return true
}

func callName(call uintptr) string {
	if call == unix.SYS_PREADV {
		return "read"
	}
	return "write"
}

// retry calls f until it is not interrupted by a signal.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// vectors recycles the system call arguments of transfer.
var vectors = sync.Pool{New: func() any { return new(vector) }}

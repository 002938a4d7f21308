package blk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVector is the most buffers one system call takes (UIO_MAXIOV).
const maxVector = 1024

// vector is the list of buffers of a preadv or pwritev that is under way.
type vector struct {
	buf  []unix.Iovec // storage
	left []unix.Iovec // what is still to be transferred: the end of buf
}

// load fills v from the front of iov and returns the rest of iov.
func (v *vector) load(iov [][]byte) (rest [][]byte) {
	v.buf = v.buf[:0]
	for i, b := range iov {
		if len(v.buf) == maxVector {
			rest = iov[i:]
			break
		}
		if len(b) > 0 {
			v.buf = append(v.buf, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
		}
	}
	v.left = v.buf
	return rest
}

func (v *vector) empty() bool { return len(v.left) == 0 }

// call does one system call with all that is left, which is not nothing.
func (v *vector) call(call uintptr, fd int, off int64) (n int, err error) {
	// The second half of the offset is ignored where a long has 64 bits.
	r, _, e := unix.Syscall6(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(v.left))),
		uintptr(len(v.left)), uintptr(off), 0, 0) //nolint:gosec // G115: an offset in a file
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// advance takes the first n bytes off.
func (v *vector) advance(n int) {
	for n > 0 {
		e := &v.left[0]
		if uint64(n) < e.Len {
			e.Base = (*byte)(unsafe.Add(unsafe.Pointer(e.Base), n))
			e.Len -= uint64(n)
			return
		}
		n -= int(e.Len) //nolint:gosec // G115: at most n
		v.left = v.left[1:]
	}
}

// zero fills all that is left with zero bytes.
func (v *vector) zero() {
	for _, e := range v.left {
		clear(unsafe.Slice(e.Base, e.Len))
	}
	v.left = nil
}

// alignedTo reports whether b begins at a multiple of n, a power of 2.
func alignedTo(b []byte, n int64) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(n-1) == 0 //nolint:gosec // G115: positive
}

// alignedBuffer returns n bytes at a multiple of align, a power of 2.
func alignedBuffer(n int, align int64) []byte {
	b := make([]byte, n+int(align))
	at := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & uintptr(align-1)) //nolint:gosec // G115: positive
	return b[at : at+n : at+n]
}

// ioctlRange does an ioctl of a block device that takes a range in bytes.
func ioctlRange(fd int, request uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)} //nolint:gosec // G115: neither is negative
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&r))); e != 0 {
		return e
	}
	return nil
}

package qcow2

import (
	"io"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vector is the iovec array of one system call, reused so that a hot request
// allocates nothing. 256 entries hold any virtio request in one call.
type vector [256]unix.Iovec

var vectors = sync.Pool{New: func() any { return new(vector) }}

// fill points v at the bytes of iov that follow the first skip, and returns how
// many entries it used: as many as fit.
func (v *vector) fill(iov [][]byte, skip int) int {
	n := 0
	for _, b := range iov {
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		if n == len(v) {
			break
		}
		v[n].Base = unsafe.SliceData(b[skip:])
		v[n].SetLen(len(b) - skip)
		skip = 0
		n++
	}
	return n
}

// ReadvAt implements file.
func (o *osFile) ReadvAt(iov [][]byte, off int64) error { return o.transfer(unix.SYS_PREADV, iov, off) }

// WritevAt implements file.
func (o *osFile) WritevAt(iov [][]byte, off int64) error {
	return o.transfer(unix.SYS_PWRITEV, iov, off)
}

// transfer moves all of iov with the system call trap, however often the kernel
// interrupts it or stops short. At the end of a file being read it zeroes the
// rest.
func (o *osFile) transfer(trap uintptr, iov [][]byte, off int64) (err error) {
	total, done := int(length(iov)), 0
	v := vectors.Get().(*vector)
	used := 0
	for done < total {
		n := v.fill(iov, done)
		used = max(used, n)
		r, _, errno := unix.Syscall6(trap, uintptr(o.fd), uintptr(unsafe.Pointer(v)), uintptr(n), uintptr(off+int64(done)), 0, 0) //nolint:gosec // G103, G115: arguments of preadv(2)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			err = os.NewSyscallError(callName(trap), errno)
			break
		}
		if r == 0 && trap == unix.SYS_PWRITEV {
			err = io.ErrShortWrite
			break
		}
		if r == 0 {
			zeroFrom(iov, done)
			break
		}
		done += int(r)
	}
	clear(v[:used]) // keep no reference to the caller's buffers
	vectors.Put(v)
	return err
}

func callName(trap uintptr) string {
	if trap == unix.SYS_PWRITEV {
		return "pwritev"
	}
	return "preadv"
}

// zeroFrom clears the bytes of iov after the first skip.
func zeroFrom(iov [][]byte, skip int) {
	for _, b := range iov {
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		clear(b[skip:])
		skip = 0
	}
}

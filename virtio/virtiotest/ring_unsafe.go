package virtiotest

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

var ringValue = binary.NativeEndian.AppendUint64(nil, 1)

// ring adds 1 to an eventfd, as the kernel does for a bound address.
func ring(fd int) {
	if _, err := unix.Write(fd, ringValue); err != nil {
		panic("virtiotest: ring: " + err.Error())
	}
}

// word16 returns the aligned 32-bit word around the even address of b[off].
func word16(b []byte, off int) (*uint32, uint) {
	p := unsafe.Pointer(&b[off])
	odd := uintptr(p) & 2
	return (*uint32)(unsafe.Add(p, -int(odd))), uint(odd) * 8
}

func load16(b []byte, off int) uint16 {
	w, shift := word16(b, off)
	return uint16(atomic.LoadUint32(w) >> shift)
}

// store16 stores to b[off:] and leaves the bytes beside it alone.
func store16(b []byte, off int, v uint16) {
	w, shift := word16(b, off)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

// storeDesc stores both halves of the descriptor at b[off:].
func storeDesc(b []byte, off int, lo, hi uint64) {
	p := (*[2]uint64)(unsafe.Pointer(&b[off : off+16][0]))
	atomic.StoreUint64(&p[0], lo)
	atomic.StoreUint64(&p[1], hi)
}

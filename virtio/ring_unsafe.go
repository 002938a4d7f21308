//go:build amd64 || arm64

package virtio

import (
	"sync/atomic"
	"unsafe"
)

// The ring protocol shares 16-bit fields with the guest, and Go has no 16-bit
// atomics. A field is read through the aligned 32-bit word around it: one load,
// never torn, never repeated by the compiler. Where avail is aligned to 2 only,
// that word reaches up to 2 bytes outside the ring but never outside the page.
//
// On amd64 an atomic store is an XCHG and an atomic read-modify-write is
// locked: both are full barriers. On arm64 they are store-releases, and the
// architecture keeps an earlier store-release before a later load-acquire.
// Either way an atomic store followed by an atomic load is not reordered, which
// is what V13(c) and V13(d) ask for.

// word returns the aligned 32-bit word that holds b[off:off+2] and the shift of
// those bits inside it. The address of b[off] must be even.
func word(b []byte, off int) (w *uint32, shift uint) {
	p := unsafe.Pointer(&b[off : off+2][0])
	odd := uintptr(p) & 2
	return (*uint32)(unsafe.Add(p, -int(odd))), uint(odd) * 8
}

// load16 loads the 16 bits at b[off:] with acquire order.
func load16(b []byte, off int) uint16 {
	w, shift := word(b, off)
	return uint16(atomic.LoadUint32(w) >> shift) //nolint:gosec // G115: one half of the word
}

// store16 stores v to the 16 bits at b[off:], leaving the bits beside them as
// they are even while the guest writes them, with a full barrier after it.
func store16(b []byte, off int, v uint16) {
	w, shift := word(b, off)
	// Only a guest that rewrites the neighbouring bytes without end can keep
	// failing the exchange: it forfeits their preservation, not our time.
	for range 64 {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
	atomic.StoreUint32(w, uint32(v)<<shift)
}

// storeFlagsIdx stores the first two fields of a used ring at once, with
// release order before and a full barrier after. b is aligned to 4.
func storeFlagsIdx(b []byte, flags, idx uint16) {
	p := (*uint32)(unsafe.Pointer(&b[0:4][0]))
	atomic.StoreUint32(p, uint32(flags)|uint32(idx)<<16)
}

// storeUsedElem stores a used element at b[off:]. It becomes visible to the
// driver with the next storeFlagsIdx. b+off is aligned to 4.
func storeUsedElem(b []byte, off int, id, n uint32) {
	p := (*[2]uint32)(unsafe.Pointer(&b[off : off+8][0]))
	p[0], p[1] = id, n
}

// loadDesc loads the 16-byte descriptor at b[off:], each half once. b+off is
// aligned to 8.
func loadDesc(b []byte, off int) (lo, hi uint64) {
	p := (*[2]uint64)(unsafe.Pointer(&b[off : off+16][0]))
	return atomic.LoadUint64(&p[0]), atomic.LoadUint64(&p[1])
}

// alignedTo reports whether the address of b[0] is a multiple of n.
func alignedTo(b []byte, n uintptr) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%n == 0
}

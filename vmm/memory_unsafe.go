package vmm

import "unsafe"

// padding is how many bytes of b come before its first byte at a multiple of
// align, a power of two.
func padding(b []byte, align uintptr) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (align - 1))
}

package qcow2

import "unsafe"

// alignedTo reports whether b begins at a multiple of n, a power of 2.
func alignedTo(b []byte, n int64) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(n-1) == 0 //nolint:gosec // G103, G115: the address is only looked at
}

// alignedBuffer returns n bytes at a multiple of align, a power of 2.
func alignedBuffer(n int, align int64) []byte {
	b := make([]byte, n+int(align))
	at := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & uintptr(align-1)) //nolint:gosec // G103, G115: likewise
	return b[at : at+n : at+n]
}

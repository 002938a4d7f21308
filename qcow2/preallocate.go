package qcow2

import "fmt"

// Preallocation says what of a disk has its place in the file before it is
// written.
type Preallocation uint8

const (
	// PreallocateOff gives a cluster its place with the first write to it.
	PreallocateOff Preallocation = iota
	// PreallocateMetadata gives every cluster its place at once, but no room
	// on the host. Writes then change no metadata, which is the fastest.
	PreallocateMetadata
	// PreallocateFalloc is PreallocateMetadata with room on the host, as its
	// file system reserves it. It fails where the file system cannot.
	PreallocateFalloc
	// PreallocateFull is PreallocateMetadata with zeros written everywhere.
	PreallocateFull
)

// String is the name that qemu-img gives it.
func (p Preallocation) String() string {
	if p > PreallocateFull {
		return fmt.Sprintf("Preallocation(%d)", uint8(p))
	}
	return [...]string{"off", "metadata", "falloc", "full"}[p]
}

// pieceBytes is how much is written at once where much is written.
const pieceBytes = 1 << 20

// prepare takes the room that p gives the n bytes at off of f, in which nothing
// has been written and which are part of the file already.
func (p Preallocation) prepare(f file, off, n int64) error {
	switch p {
	case PreallocateFalloc:
		if n == 0 {
			return nil
		}
		if err := f.Allocate(off, n); err != nil {
			return &Error{What: fmt.Sprintf("the host cannot reserve %d bytes", n), Err: err, Mend: "free some space, or use another preallocation"}
		}
	case PreallocateFull:
		piece := zeroBuffers(min(n, pieceBytes))
		for ; n > 0; off, n = off+pieceBytes, n-pieceBytes {
			if n < pieceBytes {
				piece = zeroBuffers(n)
			}
			if err := f.WritevAt(piece, off); err != nil {
				return err
			}
		}
	}
	return nil
}

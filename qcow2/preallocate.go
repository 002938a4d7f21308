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

// preallocate gives guest clusters at the beginning of [off, off+n), which read as
// zero, their places, and returns how many bytes that was: zero if only something
// in the way was removed. off is the beginning of a cluster.
func (m *Image) preallocate(off, n int64, mode Preallocation) (int64, error) {
	s, err := m.lookup(off, n, growShard)
	if err != nil {
		return 0, err
	}
	s.pin.leave()
	if s.kind == kindNormal {
		// It has its place already.
		return min(n, m.clusterSize), nil
	}
	p, err := m.hold(growShard)
	if err != nil {
		return 0, err
	}
	defer p.leave()
	if err := m.limitDirty(); err != nil {
		return 0, err
	}
	a, err := m.reserve(off, n)
	if err != nil || a == nil {
		return 0, err
	}
	if err := m.prepareHost(a.host, mode); err != nil {
		m.abandon(a)
		return 0, err
	}
	m.publish(a)
	return min(n, m.offset(a.end())-off), nil
}

// prepareHost makes new host clusters read as zero and takes the room for them
// that mode says.
func (m *Image) prepareHost(e extent, mode Preallocation) error {
	off, n := m.offset(e.start), m.offset(e.n)
	if m.external {
		n = min(n, m.reach.Load()-off) // a data file is as long as the disk
	}
	if !e.virgin && (!m.external || m.data.Punch(off, n) != nil) {
		return PreallocateFull.prepare(m.data, off, n)
	}
	if mode == PreallocateMetadata && !m.external {
		// The file has to be so long, and only what is written at its end
		// makes it longer without a risk to what others write there.
		return writeFull(m.data, zeros[:diskUnit], off+n-diskUnit)
	}
	return mode.prepare(m.data, off, n)
}

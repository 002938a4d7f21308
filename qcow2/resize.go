package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
)

// ResizeOptions say how a disk changes its size.
type ResizeOptions struct {
	// Shrink allows the disk to become smaller, which loses what lies beyond
	// its new end. Without it such a Resize is refused.
	Shrink bool
	// Preallocation is what becomes of the clusters that a growing disk gains.
	// With a backing file they do not show it, as nothing beyond the old end
	// does. Where the data file is raw it is PreallocateMetadata at least.
	Preallocation Preallocation
}

// Resize makes the disk size bytes long, a multiple of 512. Other requests go on
// meanwhile; those that reach beyond the end of a disk that shrinks fail with
// ErrRange, from the beginning or in the middle.
//
// What a disk gains reads as zero, whatever a longer backing file has there. What
// it loses is gone, and its room goes back to the host.
//
// The new size is on stable storage when Resize returns without an error, and
// whatever happens, a crash too, the image has one of the two sizes, with all that
// was flushed. After an error of a growing disk it has the old one. A disk that
// shrinks has the new one as soon as Size says so; if its Resize fails after that
// or is cancelled, the room beyond the end is not all given back, which the same
// Resize can make up for.
//
// Persistent bitmaps change their size with the disk, and say of what it gains that
// it has not changed. Those that are in use stay so. A crash at the moment at which
// the size changes may leave all of them in use.
//
// A disk larger than its L1 table can be, or for its bitmaps to be loaded by QEMU,
// and an image of version 2 with internal snapshots, which do not know their size,
// are refused with ErrUnsupported, a shrinking that is not allowed with
// ErrInvalidOption.
func (m *Image) Resize(ctx context.Context, size int64, opts ResizeOptions) error {
	m.resizing.Lock()
	defer m.resizing.Unlock()
	err := m.checkResize(size, opts)
	if err == nil {
		err = cancelled(ctx)
	}
	if err != nil {
		return inFile(m.path, err)
	}
	if size < m.Size() || opts.Shrink && size == m.Size() {
		return m.explain(m.shrink(ctx, size))
	}
	mode := opts.Preallocation
	if m.raw {
		mode = max(mode, PreallocateMetadata)
	}
	return m.explain(m.grow(ctx, size, mode))
}

// checkResize refuses a Resize for what can be known of it in memory.
func (m *Image) checkResize(size int64, opts ResizeOptions) error {
	old := m.Size()
	switch {
	case m.readOnly:
		return &Error{Kind: ErrReadOnly, What: "the image is open for reading only"}
	case size < 0 || size%diskUnit != 0:
		return invalidOption("a size of %d bytes is no multiple of %d", size, diskUnit)
	case opts.Preallocation > PreallocateFull:
		return invalidOption("the preallocation %d is unknown", opts.Preallocation)
	case size < old && !opts.Shrink:
		return &Error{
			Kind: ErrInvalidOption, What: fmt.Sprintf("shrinking the disk from %d to %d bytes loses what lies beyond", old, size),
			Mend: "have the guest give up that part of the disk, then allow shrinking",
		}
	case size < old && opts.Preallocation != PreallocateOff:
		return invalidOption("a disk that shrinks cannot be preallocated")
	}
	return m.usable()
}

// checkHeader refuses a Resize for what the file tells, and returns how many L1
// entries a disk of size bytes takes. It runs exclusively.
func (m *Image) checkHeader(size int64) (uint64, error) {
	fileSize, err := m.file.Size()
	if err != nil {
		return 0, err
	}
	h, err := m.loadHeader(fileSize)
	if err != nil {
		return 0, err
	}
	entries := h.l1Entries(uint64(size)) //nolint:gosec // G115: not negative
	switch {
	case entries*8 > maxL1Bytes:
		return 0, &Error{Kind: ErrUnsupported, What: fmt.Sprintf("a disk of %d bytes is too large for clusters of %d bytes", size, m.clusterSize)}
	case m.version == 2 && h.snapshots > 0:
		return 0, &Error{
			Kind: ErrUnsupported, What: "an image of version 2 that has internal snapshots cannot be resized",
			Mend: "make it version 3 with: qemu-img amend -f qcow2 -o compat=1.1 " + shellWord(m.path),
		}
	}
	return entries, m.checkBitmapSizes(size)
}

// switchSize makes size the disk's, on stable storage first. On an error of the
// header that may have either size; the image then takes no further writes. It runs
// exclusively.
//
// Bitmaps are in use from before the size changes until those of the new one are in
// place, so nobody takes bits for what they do not stand for.
func (m *Image) switchSize(ctx context.Context, size int64) error {
	if err := m.commit(); err != nil {
		return err
	}
	bitmaps, err := m.resizeBitmaps(ctx, size)
	if err != nil {
		return err
	}
	var field [8]byte
	binary.BigEndian.PutUint64(field[:], uint64(size)) //nolint:gosec // G115: not negative
	err = writeFull(m.file, field[:], offSize)
	if err == nil {
		err = m.datasync()
	}
	if err != nil {
		return m.fail(fmt.Errorf("changing the size of the disk: %w", err))
	}
	m.setSize(size)
	if bitmaps == nil {
		return nil
	}
	return bitmaps.put()
}

func (m *Image) setSize(size int64) {
	m.size.Store(size)
	m.reach.Store(size)
}

// grow makes the disk longer. All of what it gains is made ready beyond its end,
// where no request looks, and the size changes at last.
func (m *Image) grow(ctx context.Context, size int64, mode Preallocation) error {
	old := m.Size()
	err := m.exclusively(func() error {
		entries, err := m.checkHeader(size)
		if err == nil {
			err = m.growL1(entries)
		}
		return err
	})
	if err != nil || size == old {
		return err
	}
	m.reach.Store(size)
	if m.external {
		err = m.data.Truncate(size)
	}
	if err == nil {
		err = m.prepareGrowth(ctx, old, size, mode)
	}
	if err == nil {
		// The world stands still for the rest of it, so that should be short.
		err = m.commits.run(m.commit)
	}
	if err == nil {
		err = m.exclusively(func() error { return m.switchSize(ctx, size) })
	}
	if err == nil {
		return nil
	}
	if m.exclusively(func() error { m.reach.Store(old); return nil }) == nil && m.usable() == nil {
		// What this cannot undo lies beyond the end, where it harms nobody.
		_ = m.drop(context.WithoutCancel(ctx), old)
	}
	return err
}

// prepareGrowth makes the bytes [old, size), which are beyond the end of the disk
// but within reach, read as zero, and preallocates the clusters that they are in.
func (m *Image) prepareGrowth(ctx context.Context, old, size int64, mode Preallocation) error {
	// The last cluster may have anything behind the end of the disk.
	whole := min(m.offset(m.clusters(uint64(old))), size) //nolint:gosec // G115: not negative
	var err error
	if mode == PreallocateOff {
		err = m.eraseAll(old, whole-old, roomGiven, growShard)
	} else {
		err = m.writeZeros(old, whole-old, growShard)
	}
	if err != nil {
		return err
	}
	const piece = 1 << 40
	for off := whole; off < size; off += piece {
		if err := cancelled(ctx); err != nil {
			return err
		}
		if err := m.eraseAll(off, min(piece, size-off), roomGiven, growShard); err != nil {
			return err
		}
	}
	if mode == PreallocateOff {
		return nil
	}
	for off := whole; off < size; {
		if err := cancelled(ctx); err != nil {
			return err
		}
		n, err := m.preallocate(off, size-off, mode)
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

func cancelled(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return &Error{What: "the resizing was cancelled", Err: err}
	}
	return nil
}

// growL1 makes the L1 table entries long, if it is shorter. It runs exclusively.
func (m *Image) growL1(entries uint64) error {
	if entries <= uint64(len(m.l1)) {
		return nil
	}
	if err := m.commit(); err != nil { // then m.l1 is what the file has
		return err
	}
	run, err := m.newRun(m.clusters(entries * 8))
	if err != nil {
		return err
	}
	l1 := make([]uint64, entries)
	copy(l1, m.l1)
	if err := m.switchL1(l1, run); err != nil {
		m.free(run)
		return err
	}
	return nil
}

// switchL1 writes the new L1 table to host, makes the header point to it, and
// frees the old one. On an error of the header it may point to either; then the
// image takes no further writes. It runs exclusively.
func (m *Image) switchL1(l1 []uint64, host extent) error {
	if err := writeFull(m.file, encodeEntries(nil, l1), m.offset(host.start)); err != nil {
		return err
	}
	if err := m.datasync(); err != nil {
		return err
	}
	var field [12]byte
	binary.BigEndian.PutUint32(field[:], uint32(len(l1))) //nolint:gosec // G115: at most 4 Mi
	binary.BigEndian.PutUint64(field[4:], m.pointer(host.start))
	if err := writeFull(m.file, field[:], offL1Size); err != nil {
		return m.fail(fmt.Errorf("switching to a larger L1 table: %w", err))
	}
	// No barrier: the first one of the next commit comes before any change to
	// the new table, and before the old one is let go.
	old := extent{start: m.cluster(m.l1Offset), n: m.clusters(uint64(len(m.l1)) * 8)}
	m.lock()
	m.meta.remove(old)
	m.meta.add(host, metaL1)
	m.l1, m.l1Offset = l1, m.offset(host.start)
	m.mu.Unlock()
	m.free(old)
	return nil
}

// newRun returns n contiguous clusters that count one reference each, on stable
// storage. It runs exclusively.
func (m *Image) newRun(n uint64) (extent, error) {
	run, err := m.takeRun(n)
	if err != nil {
		return extent{}, err
	}
	if err := m.commit(); err != nil {
		m.free(run)
		return extent{}, err
	}
	return run, nil
}

// takeRun returns n contiguous clusters that will count one reference each after
// the next commit. It runs exclusively.
func (m *Image) takeRun(n uint64) (extent, error) {
	if n >= 1<<m.refBlockBits {
		// So many may not fit between the refcount blocks.
		m.refs.mu.Lock()
		defer m.refs.mu.Unlock()
		return m.refs.growTable(n)
	}
	for {
		m.lock()
		run := m.pool.takeRun(n)
		err := m.checkFree(run)
		if err == nil && run.n > 0 {
			m.grown = appendExtent(m.grown, run)
		}
		m.mu.Unlock()
		if err != nil {
			return extent{}, err
		}
		if run.n == 0 {
			if err := m.findFree(n); err != nil {
				return extent{}, err
			}
			continue
		}
		return run, nil
	}
}

// free notes that the clusters of e lose a reference.
func (m *Image) free(e extent) {
	m.lock()
	defer m.mu.Unlock()
	for c := e.start; c < e.start+e.n; c++ {
		m.freed = append(m.freed, c)
	}
}

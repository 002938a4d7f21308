package blk

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxFileBlock bounds what a file system may call its block size; network file
// systems call their transfer size so.
const maxFileBlock = 64 << 10

// measureRanges finds out in what units the file or device st is best written
// and gives up space.
func (r *Raw) measureRanges(st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		r.align = 1
		r.granularity = 4096
		b := int64(st.Blksize) //nolint:unconvert // it has 32 bits on arm64
		if b >= SectorSize && b <= maxFileBlock && b&(b-1) == 0 {
			r.granularity = b
		}
		r.hints.physical, r.hints.min = r.granularity, r.granularity
		return nil
	}
	r.device = true
	block, err := unix.IoctlGetInt(r.fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("find its block size: %w", err)
	}
	r.align = int64(block)
	r.granularity = deviceGranularity(st.Rdev, r.align)
	for request, hint := range map[uint]*int64{
		unix.BLKPBSZGET: &r.hints.physical,
		unix.BLKIOMIN:   &r.hints.min,
		unix.BLKIOOPT:   &r.hints.optimal,
	} {
		if n, err := unix.IoctlGetUint32(r.fd, request); err == nil {
			*hint = int64(n)
		}
	}
	return nil
}

// BlockSize implements BlockSizer. A file has what its content says, which is not
// looked at, and nearly always 512; a block device has its own.
func (r *Raw) BlockSize() int {
	if r.device {
		return int(r.align)
	}
	return SectorSize
}

// IOHints implements Hinter.
func (r *Raw) IOHints() (physicalBlock, minIO, optimalIO int64) {
	return r.hints.physical, r.hints.min, r.hints.optimal
}

// deviceGranularity is what the kernel says of discards on a block device, or
// block where it says nothing.
func deviceGranularity(rdev uint64, block int64) int64 {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(rdev), unix.Minor(rdev))
	for _, queue := range []string{"queue", "../queue"} { // a partition has its disk's
		b, err := os.ReadFile(dir + queue + "/discard_granularity")
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && n%SectorSize == 0 {
			return n
		}
	}
	return block
}

// DiscardGranularity implements Discarder.
func (r *Raw) DiscardGranularity() int64 { return r.granularity }

// Discard implements Discarder. On a host that cannot discard it does nothing.
func (r *Raw) Discard(off, n int64) error {
	if err := r.checkRange("discard", off, n); err != nil || n == 0 {
		return err
	}
	var err error
	if r.device {
		first, end := r.blocks(off, n)
		if first == end {
			return nil
		}
		err = r.change(func() error { return ioctlRange(r.fd, unix.BLKDISCARD, first, end-first) })
	} else {
		err = r.allocate(unix.FALLOC_FL_PUNCH_HOLE, off, n)
	}
	if err != nil && !unsupported(err) {
		return fmt.Errorf("discard %s at %d: %w", r.path, off, err)
	}
	return nil
}

// WriteZeroes implements ZeroWriter.
func (r *Raw) WriteZeroes(off, n int64) error {
	return r.zero(off, n, func(off, n int64) error {
		if r.device {
			return r.change(func() error { return ioctlRange(r.fd, unix.BLKZEROOUT, off, n) })
		}
		return r.allocate(unix.FALLOC_FL_ZERO_RANGE, off, n)
	})
}

// PunchHole implements ZeroWriter. A block device gives up space only where it
// then reads as zero for certain, which BLKDISCARD does not promise (B7).
func (r *Raw) PunchHole(off, n int64) error {
	return r.zero(off, n, func(off, n int64) error {
		err := r.allocate(unix.FALLOC_FL_PUNCH_HOLE, off, n)
		if r.device && err != nil && unsupported(err) {
			return r.change(func() error { return ioctlRange(r.fd, unix.BLKZEROOUT, off, n) })
		}
		return err
	})
}

// zero makes [off, off+n) zero with fast, which takes whole blocks and may turn
// out not to be supported, and with written zeros where fast cannot.
func (r *Raw) zero(off, n int64, fast func(off, n int64) error) error {
	if err := r.checkRange("write zeroes to", off, n); err != nil || n == 0 {
		return err
	}
	first, end := r.blocks(off, n)
	if first == end {
		return writeZeros(r, off, n)
	}
	err := fast(first, end-first)
	switch {
	case err == nil:
	case unsupported(err):
		return writeZeros(r, off, n)
	default:
		return fmt.Errorf("write zeroes to %s at %d: %w", r.path, off, err)
	}
	if err := writeZeros(r, off, first-off); err != nil {
		return err
	}
	return writeZeros(r, end, off+n-end)
}

// blocks is the part of [off, off+n) that consists of whole blocks, as [first,
// end). It is empty, with first == end, if there are none.
func (r *Raw) blocks(off, n int64) (first, end int64) {
	first = (off + r.align - 1) / r.align * r.align
	end = (off + n) / r.align * r.align
	return first, max(first, end)
}

// checkRange is the error for a range that may not be changed, or nil.
func (r *Raw) checkRange(op string, off, n int64) error {
	size := r.size.Load()
	switch {
	case r.readOnly:
		return fmt.Errorf("%s %s: %w", op, r.path, unix.EROFS)
	case off < 0 || n < 0 || off > size || n > size-off:
		return ErrBounds
	}
	return nil
}

// allocate does a fallocate that leaves the length of the file as it is.
func (r *Raw) allocate(mode uint32, off, n int64) error {
	return r.change(func() error { return unix.Fallocate(r.fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n) })
}

// unsupported reports whether err says that the host has no such operation for
// this file, as against the operation having failed.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY)
}

// Extent tells whether the beginning of the n bytes at off, which lie on the disk,
// is a hole, which reads as zero without being read, and for how many bytes it is
// so. Where the host does not tell, all is data.
func (r *Raw) Extent(off, n int64) (hole bool, length int64) {
	data, err := unix.Seek(r.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // there is no data from here on
		return true, n
	case err != nil || data < off:
		return false, n
	case data > off:
		return true, min(n, data-off)
	}
	end, err := unix.Seek(r.fd, off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		return false, n
	}
	return false, min(n, end-off)
}

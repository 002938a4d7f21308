package blk

import (
	"encoding/binary"
	"sync"

	"github.com/calfvm/calf/virtio"
)

// rangeLimits bound one DISCARD or WRITE_ZEROES request.
type rangeLimits struct {
	sectors  uint32 // of a segment
	segments uint32
	flags    uint32 // that a segment may have
}

const (
	segmentSize = 16 // of struct virtio_blk_discard_write_zeroes
	maxSegments = 32

	flagUnmap = 1 // VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP

	// maxRangePiece is the most bytes of a segment that are acted on without
	// looking for a stop. Pieces end at multiples of it, which are multiples of
	// any cluster or block size.
	maxRangePiece = 32 << 20
)

// The segment lengths are multiples of any cluster or block size. A zeroed
// segment is short enough that a disk which must write all the zeros does not
// delay other requests for long.
var (
	discardLimits = rangeLimits{sectors: 1 << 30 / SectorSize, segments: maxSegments}
	zeroLimits    = rangeLimits{sectors: 64 << 20 / SectorSize, segments: 1, flags: flagUnmap}
)

// byteRange is a range of a disk as a request names it. It lies on the disk.
type byteRange struct {
	sector uint64
	bytes  uint64
	unmap  bool
}

// span is the range in the terms of a Disk.
func (r byteRange) span() (off, n int64) {
	return int64(r.sector * SectorSize), int64(r.bytes) //nolint:gosec // G115: below the disk's size
}

// initRanges finds out what the disk can do with ranges and offers it.
func (d *Device) initRanges() {
	if disk, ok := d.cfg.Disk.(Discarder); ok && !d.cfg.NoDiscard && disk.DiscardGranularity() > 0 {
		d.discard = disk
		d.features |= 1 << featureDiscard
	}
	d.features |= 1 << featureWriteZeroes
	disk, ok := d.cfg.Disk.(ZeroWriter)
	if !ok {
		d.zero = zeroFiller{d.cfg.Disk}
		return
	}
	d.zero = disk
	d.punch = !d.cfg.NoDiscard
}

// discard carries out a DISCARD request. room is the number of writable data
// bytes, of which there must be none.
func (w *worker) discard(c *virtio.Chain, room uint64) (code byte) {
	ranges, code := w.takeRanges(c, room, featureDiscard, &discardLimits)
	for _, r := range ranges {
		if code := w.inPieces(r, "discard", w.dev.discard.Discard); code != statusOK {
			return code
		}
		w.count.bytesDiscarded.Add(r.bytes)
	}
	return code
}

// inPieces does act on r, piece by piece: a stop waits for one of them at most
// (P23), whichever range of a request it is in, and leaves the request without an
// answer.
func (w *worker) inPieces(r byteRange, op string, act func(off, n int64) error) (code byte) {
	off, left := r.span()
	for !w.stopping.Load() {
		n := min(left, maxRangePiece-off%maxRangePiece)
		if err := act(off, n); err != nil {
			return w.dev.diskFailed(op, uint64(off)/SectorSize, err) //nolint:gosec // G115: on the disk
		}
		off += n
		if left -= n; left == 0 {
			return statusOK
		}
	}
	return noStatus
}

// writeZeroes carries out a WRITE_ZEROES request. With or without the unmap
// flag, what is zeroed reads as zero (B7).
func (w *worker) writeZeroes(c *virtio.Chain, room uint64) (code byte) {
	ranges, code := w.takeRanges(c, room, featureWriteZeroes, &zeroLimits)
	if code != statusOK {
		return code
	}
	for _, r := range ranges {
		w.dev.rates.spend(0, r.bytes)
		act := w.dev.zero.WriteZeroes
		if r.unmap && w.dev.punch {
			act = w.dev.zero.PunchHole
		}
		if code := w.inPieces(r, "write zeroes", act); code != statusOK {
			return code
		}
		w.count.bytesZeroed.Add(r.bytes)
	}
	return w.settle()
}

// takeRanges reads the segments of a request of a feature and checks all of
// them before the caller acts on any (B6, V18). There are none unless the code
// is OK.
func (w *worker) takeRanges(c *virtio.Chain, room uint64, feature uint, limits *rangeLimits) (ranges []byteRange, code byte) {
	n := virtio.Len(c.Readable)
	switch {
	case w.disk.ReadOnly():
		return nil, statusIOErr // B5
	case w.dev.negotiated&(1<<feature) == 0:
		return nil, statusUnsupp // B4
	case room != 0 || n == 0 || n%segmentSize != 0 || n > uint64(limits.segments)*segmentSize:
		return nil, statusIOErr
	}
	ranges = w.ranges[:n/segmentSize]
	outside := false
	for i := range ranges {
		var s [segmentSize]byte
		c.TakeReadable(s[:])
		sector := binary.LittleEndian.Uint64(s[0:])
		num := binary.LittleEndian.Uint32(s[8:])
		flags := binary.LittleEndian.Uint32(s[12:])
		if flags&^limits.flags != 0 {
			code = statusUnsupp
			continue
		}
		bytes := uint64(num) * SectorSize
		if num > limits.sectors || !w.dev.inBounds(sector, bytes) {
			outside = true
			continue
		}
		ranges[i] = byteRange{sector, bytes, flags&flagUnmap != 0}
	}
	switch {
	case code != statusOK:
		return nil, code
	case outside:
		return nil, statusIOErr
	}
	return ranges, statusOK
}

// zeroFiller is the ZeroWriter of a disk that is none.
type zeroFiller struct{ disk Disk }

func (z zeroFiller) WriteZeroes(off, n int64) error { return writeZeros(z.disk, off, n) }
func (z zeroFiller) PunchHole(off, n int64) error   { return writeZeros(z.disk, off, n) }

// zeros are the bytes that writeZeros writes.
var zeros [64 << 10]byte

// zeroVectors recycles the lists of buffers of writeZeros.
var zeroVectors = sync.Pool{New: func() any { return new([16][]byte) }}

// writeZeros writes n zero bytes at off, up to 1 MiB at a time.
func writeZeros(d Disk, off, n int64) error {
	v := zeroVectors.Get().(*[16][]byte)
	defer zeroVectors.Put(v)
	for n > 0 {
		iov, piece := v[:0], int64(0)
		for len(iov) < cap(iov) && piece < n {
			m := min(n-piece, int64(len(zeros)))
			iov = append(iov, zeros[:m])
			piece += m
		}
		if err := d.WritevAt(iov, off); err != nil {
			return err
		}
		off += piece
		n -= piece
	}
	return nil
}

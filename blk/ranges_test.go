package blk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/guest"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// seg is one segment of a DISCARD or WRITE_ZEROES request.
type seg struct {
	sector     uint64
	num, flags uint32
}

const fUnmap = 1

// payload is the data of a request for segs.
func payload(segs ...seg) []byte {
	var b []byte
	for _, s := range segs {
		b = binary.LittleEndian.AppendUint64(b, s.sector)
		b = binary.LittleEndian.AppendUint32(b, s.num)
		b = binary.LittleEndian.AppendUint32(b, s.flags)
	}
	return b
}

func newThin(size int) *blktest.Thin {
	return &blktest.Thin{Memory: blktest.Memory{Bytes: newMemory(size).Bytes}}
}

// TestRanges sends DISCARD and WRITE_ZEROES requests, good and bad, and checks
// the status and what they have changed: for a bad one, nothing.
func TestRanges(t *testing.T) {
	const last = diskSize/512 - 1
	many := make([]seg, 33)
	for i := range many {
		many[i] = seg{uint64(i * 2), 1, 0}
	}
	for _, c := range []struct {
		name string
		kind uint32
		data []byte
		code byte
	}{
		{"B6 DISCARD", tDiscard, payload(seg{8, 16, 0}), sOK},
		{"B6 DISCARD of 32 segments", tDiscard, payload(many[:32]...), sOK},
		{"B6 DISCARD of 33 segments", tDiscard, payload(many...), sIOErr},
		{"B6 DISCARD of the whole disk", tDiscard, payload(seg{0, diskSize / 512, 0}), sOK},
		{"B6 DISCARD of nothing", tDiscard, payload(seg{4, 0, 0}), sOK},
		{"B6 DISCARD without a segment", tDiscard, nil, sIOErr},
		{"B6 DISCARD of half a segment", tDiscard, payload(seg{8, 16, 0})[:8], sIOErr},
		{"B6 DISCARD of one and a half", tDiscard, payload(many[:2]...)[:24], sIOErr},
		{"B6 DISCARD with unmap", tDiscard, payload(seg{8, 16, fUnmap}), sUnsupp},
		{"B6 DISCARD with an unknown flag", tDiscard, payload(seg{8, 16, 1 << 31}), sUnsupp},
		{"B6 unknown flag in the last segment", tDiscard, payload(seg{8, 16, 0}, seg{80, 16, 2}), sUnsupp},
		{"B6 unknown flag after one past the end", tDiscard, payload(seg{last, 2, 0}, seg{80, 16, 2}), sUnsupp},
		{"B6 second segment past the end", tDiscard, payload(seg{8, 16, 0}, seg{last, 2, 0}), sIOErr},
		{"B6 DISCARD past the end", tDiscard, payload(seg{last + 1, 1, 0}), sIOErr},
		{"B6 DISCARD whose byte offset wraps to 0", tDiscard, payload(seg{1 << 55, 1, 0}), sIOErr},
		{"B6 DISCARD of the highest sector", tDiscard, payload(seg{^uint64(0), 1, 0}), sIOErr},
		{"B6 DISCARD of too many sectors", tDiscard, payload(seg{0, ^uint32(0), 0}), sIOErr},
		{"B7 WRITE_ZEROES", tWriteZeroes, payload(seg{8, 16, 0}), sOK},
		{"B7 WRITE_ZEROES with unmap", tWriteZeroes, payload(seg{8, 16, fUnmap}), sOK},
		{"B7 WRITE_ZEROES of the last sector", tWriteZeroes, payload(seg{last, 1, 0}), sOK},
		{"B7 WRITE_ZEROES of the whole disk", tWriteZeroes, payload(seg{0, diskSize / 512, 0}), sOK},
		{"B6 WRITE_ZEROES without a segment", tWriteZeroes, nil, sIOErr},
		{"B6 WRITE_ZEROES of 17 bytes", tWriteZeroes, append(payload(seg{8, 16, 0}), 0), sIOErr},
		{"B6 WRITE_ZEROES of two segments", tWriteZeroes, payload(many[:2]...), sIOErr},
		{"B6 WRITE_ZEROES with an unknown flag", tWriteZeroes, payload(seg{8, 16, 2}), sUnsupp},
		{"B6 WRITE_ZEROES across the end", tWriteZeroes, payload(seg{last, 2, 0}), sIOErr},
		{"B6 WRITE_ZEROES whose byte offset wraps to 0", tWriteZeroes, payload(seg{1 << 55, 1, fUnmap}), sIOErr},
		{"B6 WRITE_ZEROES of too many sectors", tWriteZeroes, payload(seg{0, 64<<20/512 + 1, 0}), sIOErr},
	} {
		for _, disk := range []blk.Disk{newThin(diskSize), newMemory(diskSize)} {
			thin, isThin := disk.(*blktest.Thin)
			if c.kind == tDiscard && !isThin {
				continue
			}
			t.Run(fmt.Sprintf("%s/%T", c.name, disk), func(t *testing.T) {
				r := newRig(t, blk.Config{Disk: disk})
				r.start(allFeatures, 1, 16)
				want := bytes.Clone(newMemory(diskSize).Bytes)
				code, used, _ := r.do(c.kind, 12345, c.data)
				if code != c.code || used != 1 {
					t.Errorf("status %d, used length %d; want %d, 1", code, used, c.code)
				}
				if code == sOK {
					applyRanges(want, c.kind, c.data)
				}
				if got := read(t, disk); !bytes.Equal(got, want) {
					t.Error("the disk does not hold what it should")
				}
				if !isThin {
					return
				}
				discards, zeroed, punched := thin.Calls()
				if code != sOK && discards+zeroed+punched != 0 {
					t.Error("a refused request has reached the disk")
				}
				if unmap := len(c.data) == 16 && c.data[12] == fUnmap; c.kind == tWriteZeroes && code == sOK && (punched == 1) != unmap {
					t.Errorf("%d holes punched with unmap %v", punched, unmap)
				}
			})
		}
	}
}

// TestRangesRefused sends what only the limits of a request stand against: the
// disk is large enough, and the payload is good.
func TestRangesRefused(t *testing.T) {
	t.Run("B6 too many sectors", func(t *testing.T) {
		disk := &slowRanges{wideDisk: wideDisk{t: t, entered: make(chan struct{}), release: make(chan struct{})}}
		close(disk.release)
		r := newRig(t, blk.Config{Disk: disk})
		r.start(allFeatures, 1, 16)
		for num, want := range map[uint32]byte{64 << 20 / 512: sOK, 64<<20/512 + 1: sIOErr} {
			if code, _, _ := r.do(tWriteZeroes, 0, payload(seg{0, num, 0})); code != want {
				t.Errorf("status %d for %d sectors, want %d", code, num, want)
			}
		}
	})
	t.Run("B3 data to write", func(t *testing.T) {
		disk := newThin(diskSize)
		r := newRig(t, blk.Config{Disk: disk})
		r.start(allFeatures, 1, 16)
		for _, kind := range []uint32{tDiscard, tWriteZeroes} {
			q := r.newRequest(kind, 0, 16)
			copy(q.bytes(), payload(seg{8, 8, 0}))
			bufs := q.bufs(false)
			last := len(bufs) - 1
			extra := vt.Buf{Addr: 1 << 20, Len: 512, Write: true}
			if used := r.call(r.d.Rings[0], append(bufs[:last:last], extra, bufs[last])...); q.code() != sIOErr || used != 0 {
				t.Errorf("type %d: status %d, used length %d; want IOERR, 0", kind, q.code(), used)
			}
		}
		if discards, zeroed, punched := disk.Calls(); discards+zeroed+punched != 0 {
			t.Error("a refused request has reached the disk")
		}
	})
}

func read(t *testing.T, d blk.Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if err := d.ReadvAt([][]byte{b}, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// applyRanges does to b what a request does to a Thin.
func applyRanges(b []byte, kind uint32, data []byte) {
	v := byte(0)
	if kind == tDiscard {
		v = 0xdb
	}
	for ; len(data) > 0; data = data[16:] {
		off, n := binary.LittleEndian.Uint64(data)*512, uint64(binary.LittleEndian.Uint32(data[8:]))*512
		copy(b[off:], bytes.Repeat([]byte{v}, int(n)))
	}
}

// TestRangesNegotiated is about who may send such requests at all.
func TestRangesNegotiated(t *testing.T) {
	for _, c := range []struct {
		name           string
		cfg            blk.Config
		mask           uint64
		discard, zeros byte
	}{
		{"B4 neither negotiated", blk.Config{Disk: newThin(diskSize)}, ^uint64(1<<fDiscard | 1<<fWriteZeroes), sUnsupp, sUnsupp},
		{"B4 DISCARD only", blk.Config{Disk: newThin(diskSize)}, ^uint64(1 << fWriteZeroes), sOK, sUnsupp},
		{"B4 not offered", blk.Config{Disk: newThin(diskSize), NoDiscard: true}, allFeatures, sUnsupp, sOK},
		{"B5 read-only", blk.Config{Disk: &blktest.Thin{Memory: blktest.Memory{Bytes: make([]byte, diskSize), RO: true}}}, allFeatures, sIOErr, sIOErr},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, c.cfg)
			r.start(c.mask, 1, 16)
			if code, _, _ := r.do(tDiscard, 0, payload(seg{8, 16, 0})); code != c.discard {
				t.Errorf("DISCARD: status %d, want %d", code, c.discard)
			}
			if code, _, _ := r.do(tWriteZeroes, 0, payload(seg{8, 16, fUnmap})); code != c.zeros {
				t.Errorf("WRITE_ZEROES: status %d, want %d", code, c.zeros)
			}
			discards, zeroed, punched := c.cfg.Disk.(*blktest.Thin).Calls()
			if (discards != 0) != (c.discard == sOK) || (zeroed+punched != 0) != (c.zeros == sOK) {
				t.Errorf("the disk was asked for %d discards and %d zeroed ranges", discards, zeroed+punched)
			}
			if c.cfg.NoDiscard && punched != 0 {
				t.Error("space was given up although discards are off")
			}
		})
	}
}

// TestRangeLimits reads the limits of a disk with large clusters (B8).
func TestRangeLimits(t *testing.T) {
	for _, c := range []struct {
		name      string
		cfg       blk.Config
		alignment uint64
		unmap     uint64
	}{
		{"64 KiB clusters", blk.Config{Disk: &blktest.Thin{Granularity: 64 << 10}}, 128, 1},
		{"2 MiB clusters", blk.Config{Disk: &blktest.Thin{Granularity: 2 << 20}}, 4096, 1},
		{"4 KiB blocks over 512 byte clusters", blk.Config{Disk: &blktest.Thin{Granularity: 512}, BlockSize: 4096}, 8, 1},
	} {
		r := newRig(t, c.cfg)
		for _, f := range []struct {
			name   string
			off, n int
			want   uint64
		}{
			{"max_discard_sectors", 0x24, 4, 1 << 30 / 512},
			{"max_discard_seg", 0x28, 4, 32},
			{"discard_sector_alignment", 0x2c, 4, c.alignment},
			{"write_zeroes_may_unmap", 0x38, 1, c.unmap},
		} {
			if got := r.d.DeviceConfig(guest.GPA(f.off), f.n); got != f.want {
				t.Errorf("%s: %s is %d, want %d", c.name, f.name, got, f.want)
			}
		}
	}
}

// TestRangeErrors makes the disk fail, before and in the middle of a request.
func TestRangeErrors(t *testing.T) {
	disk := newThin(diskSize)
	disk.Fault = func(op string, off int64) error {
		if off == 4096 {
			return errors.New("broken " + op)
		}
		return nil
	}
	r := newRig(t, blk.Config{Disk: disk})
	r.start(allFeatures, 1, 16)
	for _, c := range []struct {
		kind uint32
		data []byte
	}{
		{tDiscard, payload(seg{0, 8, 0}, seg{8, 8, 0}, seg{16, 8, 0})},
		{tWriteZeroes, payload(seg{8, 8, 0})},
		{tWriteZeroes, payload(seg{8, 8, fUnmap})},
	} {
		if code, used, _ := r.do(c.kind, 0, c.data); code != sIOErr || used != 1 {
			t.Errorf("type %d: status %d, used length %d; want IOERR, 1", c.kind, code, used)
		}
	}
	s := r.dev.Stats()[0]
	if s.Discards != 1 || s.ZeroWrites != 2 || s.Errors != 3 || s.BytesDiscarded != 4096 || s.BytesZeroed != 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestZeroesWriteThrough checks that zeros are as durable as other writes.
func TestZeroesWriteThrough(t *testing.T) {
	for _, c := range []struct{ mask, want uint64 }{{allFeatures, 0}, {^uint64(1 << fFlush), 1}} {
		disk := newThin(diskSize)
		r := newRig(t, blk.Config{Disk: disk})
		r.start(c.mask, 1, 16)
		if code, _, _ := r.do(tWriteZeroes, 0, payload(seg{8, 8, 0})); code != sOK {
			t.Fatalf("status %d", code)
		}
		if got := disk.Flushes(); got != c.want {
			t.Errorf("B11 mask %#x: %d flushes, want %d", c.mask, got, c.want)
		}
	}
}

// TestRangesDoNotAllocate sends WRITE_ZEROES requests to a disk that has to
// write the zeros.
func TestRangesDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop values at random")
	}
	b := newBench(t, newMemory(diskSize), tWriteZeroes, 16, 16)
	b.fill(payload(seg{8, 300, fUnmap}))
	if n := testing.AllocsPerRun(100, b.round); n != 0 {
		t.Errorf("%v allocations per 16 requests", n)
	}
	if got := b.dev.Stats()[0]; got.Errors+got.Unsupported+got.Malformed != 0 || got.BytesZeroed == 0 {
		t.Errorf("stats %+v", got)
	}
}

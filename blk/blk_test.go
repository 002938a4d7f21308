package blk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

const diskSize = 1 << 20

func newMemory(size int) *blktest.Memory {
	m := &blktest.Memory{Bytes: make([]byte, size)}
	for i := range m.Bytes {
		m.Bytes[i] = byte(i*7 + i>>9)
	}
	return m
}

func TestConfigSpace(t *testing.T) {
	r := newRig(t, blk.Config{Disk: newMemory(diskSize), Queues: 4, QueueSize: 128, BlockSize: 4096})
	for _, c := range []struct {
		name   string
		off, n int
		want   uint64
	}{
		{"capacity", 0x00, 8, diskSize / 512},
		{"size_max", 0x08, 4, 0},
		{"seg_max", 0x0c, 4, 126},
		{"geometry", 0x10, 4, 0},
		{"blk_size", 0x14, 4, 4096},
		{"topology", 0x18, 8, 0},
		{"writeback", 0x20, 1, 0},
		{"num_queues", 0x22, 2, 4},
		{"max_discard_sectors, max_discard_seg", 0x24, 8, 0},
		{"discard_sector_alignment", 0x2c, 4, 0},
		{"max_write_zeroes_sectors", 0x30, 4, 64 << 20 / 512},
		{"max_write_zeroes_seg", 0x34, 4, 1},
		{"B8 write_zeroes_may_unmap", 0x38, 1, 0},
		{"max_secure_erase_sectors", 0x3c, 4, 0},
		{"end", 0x58, 8, 0},
		{"past the end", 0x5e, 4, 0},
		{"far past the end", 0xf8, 8, 0},
	} {
		if got := r.d.DeviceConfig(guest.GPA(c.off), c.n); got != c.want {
			t.Errorf("%s: got %#x, want %#x", c.name, got, c.want)
		}
	}
	r.start(allFeatures, 4, 8)
	r.m.Write(bar+guest.GPA(r.d.Device.Offset), 8, 0)
	if got := r.d.DeviceConfig(0, 8); got != diskSize/512 {
		t.Errorf("the driver has set the capacity to %d", got)
	}
}

func TestFeatures(t *testing.T) {
	const base = uint64(1<<fSegMax | 1<<fBlkSize | 1<<fFlush | 1<<fConfigWCE)
	const writable = base | 1<<fWriteZeroes
	thin := &blktest.Thin{}
	for _, c := range []struct {
		name string
		cfg  blk.Config
		want uint64
	}{
		{"one queue", blk.Config{Disk: &blktest.Memory{}}, writable},
		{"two queues", blk.Config{Disk: &blktest.Memory{}, Queues: 2}, writable | 1<<fMQ},
		{"read-only", blk.Config{Disk: &blktest.Memory{RO: true}}, base | 1<<fRO},
		{"thin", blk.Config{Disk: thin}, writable | 1<<fTopology | 1<<fDiscard},
		{"thin without discards", blk.Config{Disk: thin, NoDiscard: true}, writable | 1<<fTopology},
		{"thin that cannot", blk.Config{Disk: &blktest.Thin{Granularity: -1}}, writable | 1<<fTopology},
		{"thin, read-only", blk.Config{Disk: &blktest.Thin{Memory: blktest.Memory{RO: true}}}, base | 1<<fTopology | 1<<fRO},
	} {
		dev, err := blk.New(c.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := dev.Features(); got != c.want {
			t.Errorf("%s: features %#x, want %#x", c.name, got, c.want)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	disk := &blktest.Memory{Bytes: make([]byte, 4096)}
	for _, c := range []struct {
		name string
		cfg  blk.Config
	}{
		{"no disk", blk.Config{}},
		{"65 queues", blk.Config{Disk: disk, Queues: 65}},
		{"-1 queues", blk.Config{Disk: disk, Queues: -1}},
		{"queue size 2", blk.Config{Disk: disk, QueueSize: 2}},
		{"queue size 100", blk.Config{Disk: disk, QueueSize: 100}},
		{"block size 256", blk.Config{Disk: disk, BlockSize: 256}},
		{"block size 1000", blk.Config{Disk: disk, BlockSize: 1000}},
		{"block size above the disk's", blk.Config{Disk: disk, BlockSize: 8192}},
		{"unknown error policy", blk.Config{Disk: disk, OnError: 2}},
		{"long serial", blk.Config{Disk: disk, Serial: strings.Repeat("x", 21)}},
		{"half a sector", blk.Config{Disk: &blktest.Memory{Bytes: make([]byte, 700)}}},
	} {
		if _, err := blk.New(c.cfg); !errors.Is(err, blk.ErrConfig) {
			t.Errorf("%s: got %v, want ErrConfig", c.name, err)
		}
	}
}

// TestRequests sends one request of each kind and checks the status, the used
// length and what was moved.
func TestRequests(t *testing.T) {
	const last = diskSize/512 - 1
	for _, c := range []struct {
		name   string
		kind   uint32
		sector uint64
		n      int
		code   byte
		used   uint32
	}{
		{"V7 IN", tIn, 3, 4096, sOK, 4097},
		{"V7 OUT", tOut, 3, 4096, sOK, 1},
		{"V7 FLUSH", tFlush, 0, 0, sOK, 1},
		{"B1 last sector", tIn, last, 512, sOK, 513},
		{"B1 first sector past the end", tIn, last + 1, 512, sIOErr, 0},
		{"B1 across the end", tIn, last, 1024, sIOErr, 0},
		{"B1 far past the end", tIn, 1 << 32, 512, sIOErr, 0},
		{"B1 sector whose byte offset wraps to 0", tIn, 1 << 55, 512, sIOErr, 0},
		{"B1 highest sector", tIn, ^uint64(0), 512, sIOErr, 0},
		{"B1 OUT past the end", tOut, last + 1, 512, sIOErr, 1},
		{"B1 OUT across the end", tOut, last, 1024, sIOErr, 1},
		{"B1 OUT whose byte offset wraps to 0", tOut, 1 << 55, 512, sIOErr, 1},
		{"B1 IN of 511 bytes", tIn, 0, 511, sIOErr, 0},
		{"B1 OUT of 513 bytes", tOut, 0, 513, sIOErr, 1},
		{"B2 IN of nothing", tIn, 5, 0, sOK, 1},
		{"B2 OUT of nothing", tOut, 5, 0, sOK, 1},
		{"B2 OUT of nothing at the end", tOut, last + 1, 0, sOK, 1},
		{"B2 FLUSH with a sector", tFlush, ^uint64(0), 0, sOK, 1},
		{"B4 SCSI_CMD", tSCSI, 0, 512, sUnsupp, 0},
		{"B4 DISCARD", tDiscard, 0, 0, sUnsupp, 1},
		{"B4 SECURE_ERASE", 14, 0, 0, sUnsupp, 1},
		{"B4 unknown", 0xffff_ffff, 0, 0, sUnsupp, 1},
		{"B9 GET_ID of 20", tGetID, ^uint64(0), 20, sOK, 21},
		{"B9 GET_ID of 512", tGetID, 0, 512, sOK, 20},
		{"B9 GET_ID of 19", tGetID, 0, 19, sIOErr, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newMemory(diskSize)
			before := bytes.Clone(disk.Bytes)
			r := newRig(t, blk.Config{Disk: disk, Serial: "0123456789abcdefghij"})
			r.start(allFeatures, 1, 16)
			sent := bytes.Repeat([]byte{0x5a}, c.n)
			code, used, got := r.do(c.kind, c.sector, sent)
			if code != c.code || used != c.used {
				t.Errorf("status %d, used length %d; want %d, %d", code, used, c.code, c.used)
			}
			want := before
			switch off := int(c.sector * 512); {
			case c.code != sOK:
				if !bytes.Equal(got, sent) {
					t.Error("a request that failed has moved data")
				}
			case c.kind == tIn:
				if !bytes.Equal(got, before[off:off+c.n]) {
					t.Error("wrong data")
				}
			case c.kind == tOut:
				copy(want[off:], sent)
			case c.kind == tGetID:
				if string(got[:20]) != "0123456789abcdefghij" || !bytes.Equal(got[20:], sent[20:]) {
					t.Errorf("serial reads %q", got)
				}
			}
			if !bytes.Equal(disk.Bytes, want) {
				t.Error("the disk does not hold what it should")
			}
			if c.kind == tFlush && disk.Flushes() != 1 {
				t.Errorf("%d flushes, want 1", disk.Flushes())
			}
		})
	}
	t.Run("B9 short serial is padded", func(t *testing.T) {
		r := newRig(t, blk.Config{Disk: newMemory(512), Serial: "ab"})
		r.start(allFeatures, 1, 16)
		if _, _, got := r.do(tGetID, 0, bytes.Repeat([]byte{1}, 20)); !bytes.Equal(got, append([]byte("ab"), make([]byte, 18)...)) {
			t.Errorf("serial reads %q", got)
		}
	})
	t.Run("B1 multiple of the block size", func(t *testing.T) {
		r := newRig(t, blk.Config{Disk: newMemory(diskSize), BlockSize: 4096})
		r.start(allFeatures, 1, 16)
		if code, used, _ := r.do(tIn, 0, make([]byte, 512)); code != sIOErr || used != 0 {
			t.Errorf("status %d, used length %d; want IOERR, 0", code, used)
		}
		if code, _, _ := r.do(tIn, 0, make([]byte, 4096)); code != sOK {
			t.Errorf("status %d, want OK", code)
		}
	})
	t.Run("B3 data of the wrong direction", func(t *testing.T) {
		disk := newMemory(diskSize)
		before := bytes.Clone(disk.Bytes)
		r := newRig(t, blk.Config{Disk: disk})
		r.start(allFeatures, 1, 16)
		for kind, used := range map[uint32]uint32{tIn: 1, tOut: 0} {
			q := r.newRequest(kind, 0, 512)
			if got := r.call(r.d.Rings[0], q.bufs(kind == tOut)...); q.code() != sIOErr || got != used {
				t.Errorf("type %d: status %d, used length %d; want IOERR, %d", kind, q.code(), got, used)
			}
		}
		if !bytes.Equal(disk.Bytes, before) {
			t.Error("the disk has changed")
		}
	})
}

func TestReadOnly(t *testing.T) {
	disk := newMemory(diskSize)
	disk.RO = true
	before := bytes.Clone(disk.Bytes)
	for _, mask := range []uint64{allFeatures, ^uint64(1 << fRO)} {
		t.Run(fmt.Sprintf("B5 mask=%#x", mask), func(t *testing.T) {
			r := newRig(t, blk.Config{Disk: disk})
			r.start(mask, 1, 16)
			for _, n := range []int{0, 512, 4096} {
				if code, _, _ := r.do(tOut, 0, make([]byte, n)); code != sIOErr {
					t.Errorf("OUT of %d bytes: status %d, want IOERR", n, code)
				}
			}
			if code, _, got := r.do(tIn, 0, make([]byte, 512)); code != sOK || !bytes.Equal(got, before[:512]) {
				t.Errorf("IN: status %d", code)
			}
			if !bytes.Equal(disk.Bytes, before) {
				t.Error("the disk has changed")
			}
		})
	}
}

// TestFraming sends the same requests cut in every way that the specification
// allows: the bytes count, not the descriptors (V2).
func TestFraming(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	disk := newMemory(diskSize)
	r := newRig(t, blk.Config{Disk: disk})
	r.start(allFeatures, 1, 256)
	// frame cuts [addr, addr+n) into pieces at random places.
	frame := func(addr guest.GPA, n int, write bool) (bufs []vt.Buf) {
		for n > 0 {
			m := 1 + rnd.IntN(n)
			if rnd.IntN(3) == 0 {
				m = 1
			}
			bufs = append(bufs, vt.Buf{Addr: addr, Len: uint32(m), Write: write})
			addr, n = addr+guest.GPA(m), n-m
			if len(bufs) == 60 {
				m, n = n, 0
				if m > 0 {
					bufs = append(bufs, vt.Buf{Addr: addr, Len: uint32(m), Write: write})
				}
			}
		}
		return bufs
	}
	area := r.m.Alloc(64<<10, 16)
	for i := range 300 {
		n := 512 * (1 + rnd.IntN(16))
		sector := uint64(rnd.IntN(diskSize/512 - 16))
		on := disk.Bytes[sector*512:][:n]
		mem := r.m.Bytes(area, 16+uint64(n)+1)
		binary.LittleEndian.PutUint64(mem[8:], sector)
		mem[16+n] = sUntouched
		var bufs []vt.Buf
		want := make([]byte, n)
		wantUsed := uint32(n + 1)
		if rnd.IntN(2) == 0 {
			binary.LittleEndian.PutUint32(mem, tIn)
			copy(want, on)
			bufs = append(frame(area, 16, false), frame(area+16, n+1, true)...)
		} else {
			binary.LittleEndian.PutUint32(mem, tOut)
			for j := range want {
				want[j] = byte(rnd.Uint32())
			}
			copy(mem[16:], want)
			bufs = append(frame(area, 16+n, false), vt.Buf{Addr: area + 16 + guest.GPA(n), Len: 1, Write: true})
			wantUsed = 1
		}
		add := r.d.Rings[0].Add
		if rnd.IntN(2) == 0 {
			add = r.d.Rings[0].AddIndirect
		}
		if _, ok := add(bufs...); !ok {
			t.Fatal("the ring is full")
		}
		r.d.Rings[0].Publish()
		r.d.Rings[0].Kick()
		_, used := r.wait(r.d.Rings[0])
		if mem[16+n] != sOK || used != wantUsed || !bytes.Equal(mem[16:16+n], want) || !bytes.Equal(on, want) {
			t.Fatalf("request %d of %d bytes in %d buffers: status %d, used %d, want %d", i, n, len(bufs), mem[16+n], used, wantUsed)
		}
	}
}

// TestUnanswerable sends chains that have no place for an answer (B10).
func TestUnanswerable(t *testing.T) {
	r := newRig(t, blk.Config{Disk: newMemory(diskSize)})
	r.start(allFeatures, 1, 16)
	q := r.newRequest(tOut, 0, 512)
	header, data := vt.Buf{Addr: q.header, Len: 16}, vt.Buf{Addr: q.data, Len: 512}
	status := vt.Buf{Addr: q.status, Len: 1, Write: true}
	short := vt.Buf{Addr: q.header, Len: 15}
	for i, bufs := range [][]vt.Buf{{header}, {header, data}, {short}} {
		if used := r.call(r.d.Rings[0], bufs...); used != 0 || q.code() != sUntouched {
			t.Errorf("B10 chain %d: used length %d, status %#x; want 0, untouched", i, used, q.code())
		}
	}
	if got := r.dev.Stats()[0].Unanswerable; got != 3 {
		t.Errorf("%d unanswerable requests counted, want 3", got)
	}
	for i, bufs := range [][]vt.Buf{{short, status}, {status}} {
		q.set(tOut, 0)
		if used := r.call(r.d.Rings[0], bufs...); used != 1 || q.code() != sIOErr {
			t.Errorf("B10 headless chain %d: used length %d, status %#x; want 1, IOERR", i, used, q.code())
		}
	}
	for name, bad := range map[string]vt.Buf{"nowhere": {Addr: vt.Window, Len: 512}, "empty": {Addr: q.data}} {
		q.set(tOut, 0)
		if used := r.call(r.d.Rings[0], header, bad, status); used != 0 || q.code() != sIOErr {
			t.Errorf("B10 data that is %s: used length %d, status %#x; want 0, IOERR", name, used, q.code())
		}
	}
	if code, _, _ := r.do(tIn, 0, make([]byte, 512)); code != sOK {
		t.Errorf("status %d of the next request, want OK", code)
	}
}

// TestSmallQueue makes the ring smaller than the device offers, as Linux does
// when memory is short, and sends a request of as many segments as seg_max still
// allows (V4).
func TestSmallQueue(t *testing.T) {
	disk := newMemory(diskSize)
	r := newRig(t, blk.Config{Disk: disk, QueueSize: 128})
	r.start(allFeatures, 1, 16)
	const segments = 126
	if got := r.d.DeviceConfig(0x0c, 4); got != segments {
		t.Fatalf("seg_max is %d, want %d", got, segments)
	}
	q := r.newRequest(tOut, 0, blk.SectorSize*segments)
	bufs := []vt.Buf{{Addr: q.header, Len: 16}}
	for i := range segments {
		bufs = append(bufs, vt.Buf{Addr: q.data + guest.GPA(blk.SectorSize*i), Len: blk.SectorSize})
	}
	bufs = append(bufs, vt.Buf{Addr: q.status, Len: 1, Write: true})
	ring := r.d.Rings[0]
	if _, ok := ring.AddIndirect(bufs...); !ok {
		t.Fatal("the ring is full")
	}
	ring.Publish()
	ring.Kick()
	if _, used := r.wait(ring); used != 1 || q.code() != sOK {
		t.Errorf("used length %d, status %#x; want 1, OK", used, q.code())
	}
}

// TestWriteThrough is about drivers that have not taken FLUSH.
func TestWriteThrough(t *testing.T) {
	for _, c := range []struct {
		mask uint64
		want uint64
	}{
		{allFeatures, 0},
		{^uint64(1 << fConfigWCE), 0},
		{^uint64(1 << fFlush), 3},
		{^uint64(1<<fFlush | 1<<fConfigWCE), 3},
	} {
		t.Run(fmt.Sprintf("B11 mask=%#x", c.mask), func(t *testing.T) {
			disk := newMemory(diskSize)
			r := newRig(t, blk.Config{Disk: disk})
			r.start(c.mask, 1, 16)
			for range 3 {
				if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sOK {
					t.Fatalf("status %d", code)
				}
			}
			if got := disk.Flushes(); got != c.want {
				t.Errorf("%d flushes after 3 writes, want %d", got, c.want)
			}
		})
	}
	t.Run("B11 a write whose flush fails", func(t *testing.T) {
		disk := newMemory(diskSize)
		disk.Fault = func(op string, _ int64) error {
			if op == "flush" {
				return errors.New("no")
			}
			return nil
		}
		r := newRig(t, blk.Config{Disk: disk})
		r.start(^uint64(1<<fFlush), 1, 16)
		if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sIOErr {
			t.Errorf("status %d, want IOERR", code)
		}
	})
}

// TestWriteCache turns the write cache on and off (B11, B12).
func TestWriteCache(t *testing.T) {
	for _, c := range []struct {
		name    string
		through bool // Config.WriteThrough
		mask    uint64
		first   uint64 // writeback after the negotiation
		fixed   bool   // the driver may not change it
	}{
		{"B12 FLUSH and CONFIG_WCE", false, allFeatures, 1, false},
		{"B12 CONFIG_WCE without FLUSH", false, ^uint64(1 << fFlush), 0, false},
		{"B12 FLUSH without CONFIG_WCE", false, ^uint64(1 << fConfigWCE), 1, true},
		{"B12 neither", false, ^uint64(1<<fConfigWCE | 1<<fFlush), 0, true},
		{"write-through by configuration", true, allFeatures, 0, false},
		{"write-through by configuration, FLUSH only", true, ^uint64(1 << fConfigWCE), 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newMemory(diskSize)
			r := newRig(t, blk.Config{Disk: disk, WriteThrough: c.through})
			writeback := func() uint64 { return r.d.DeviceConfig(0x20, 1) }
			set := func(off guest.GPA, n int, v uint64) {
				r.m.Write(bar+guest.GPA(r.d.Device.Offset)+off, n, v)
			}
			flushes := func() uint64 { // caused by one write
				t.Helper()
				before := disk.Flushes()
				if code, _, _ := r.do(tOut, 0, make([]byte, 512)); code != sOK {
					t.Fatalf("status %d", code)
				}
				return disk.Flushes() - before
			}
			if err := r.d.Negotiate(c.mask); err != nil {
				t.Fatal(err)
			}
			if got := writeback(); got != c.first {
				t.Errorf("writeback is %d before DRIVER_OK, want %d", got, c.first)
			}
			r.start(c.mask, 1, 16)
			want := c.first
			for _, v := range []uint64{1 - want, want, 0, 1, 0, 1, 1} {
				before := disk.Flushes()
				set(0x20, 1, v)
				changed := want != v && !c.fixed
				if changed {
					want = v
				}
				// B11: what was written before becomes stable once the cache is
				// off, without another request.
				for end := time.Now().Add(10 * time.Second); changed && v == 0 && disk.Flushes() == before; time.Sleep(100 * time.Microsecond) {
					if time.Now().After(end) {
						t.Fatal("no flush by turning the cache off")
					}
				}
				if got := writeback(); got != want {
					t.Errorf("writeback is %d after it was set to %d, want %d", got, v, want)
				}
				if got := flushes(); got != 1-want {
					t.Errorf("B11 writeback %d: %d flushes by a write", want, got)
				}
			}
			set(0x1f, 1, 1-want) // beside it
			set(0x21, 1, 1-want)
			if got := writeback(); got != want {
				t.Errorf("writeback has become %d by writes beside it", got)
			}
			set(0x20, 1, 1-want)
			r.start(c.mask, 1, 16)
			if got := writeback(); got != c.first {
				t.Errorf("P24 writeback is %d after a reset, want %d", got, c.first)
			}
		})
	}
}

// TestTopology reads the hints of disks that give good and useless ones.
func TestTopology(t *testing.T) {
	for _, c := range []struct {
		name  string
		hints [3]int64
		block uint32
		want  uint64 // exponent, alignment offset, min, opt
	}{
		{"none", [3]int64{}, 512, 0},
		{"4 KiB, 64 KiB, 1 MiB", [3]int64{4096, 64 << 10, 1 << 20}, 512, 3 | 128<<16 | 2048<<32},
		{"with 4 KiB blocks", [3]int64{4096, 64 << 10, 1 << 20}, 4096, 16<<16 | 256<<32},
		{"physical block below the logical", [3]int64{512, 512, 0}, 4096, 0},
		{"no power of 2", [3]int64{12288, 12288, 0}, 4096, 3 << 16},
		{"too much", [3]int64{1 << 40, 1 << 40, 1 << 50}, 512, 31 | 0xffff<<16 | 0xffff_ffff<<32},
		{"negative", [3]int64{-4096, -4096, -4096}, 512, 0},
	} {
		r := newRig(t, blk.Config{Disk: &blktest.Thin{Hints: c.hints}, BlockSize: c.block})
		if got := r.d.DeviceConfig(0x18, 8); got != c.want {
			t.Errorf("%s: got %#x, want %#x", c.name, got, c.want)
		}
	}
}

// TestDiskErrors checks that the host's errors become the guest's, and one line
// in the log.
func TestDiskErrors(t *testing.T) {
	disk := newMemory(diskSize)
	disk.Fault = func(op string, _ int64) error { return errors.New("broken " + op) }
	var log bytes.Buffer
	r := newRig(t, blk.Config{Disk: disk, Name: "root.qcow2", Logger: slog.New(slog.NewTextHandler(&log, nil))})
	r.start(allFeatures, 1, 16)
	for range 20 {
		if code, used, got := r.do(tIn, 7, bytes.Repeat([]byte{9}, 512)); code != sIOErr || used != 0 || got[0] != 9 {
			t.Fatalf("IN: status %d, used %d", code, used)
		}
		if code, used, _ := r.do(tOut, 7, make([]byte, 512)); code != sIOErr || used != 1 {
			t.Fatalf("OUT: status %d, used %d", code, used)
		}
		if code, used, _ := r.do(tFlush, 0, nil); code != sIOErr || used != 1 {
			t.Fatalf("FLUSH: status %d, used %d", code, used)
		}
	}
	if err := r.t.Close(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines of log, want 1:\n%s", n, log.String())
	}
	for _, want := range []string{"root.qcow2", "broken read", "sector=7", "op=read"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log line lacks %q: %s", want, log.String())
		}
	}
	if got := r.dev.Stats()[0].Errors; got != 60 {
		t.Errorf("%d errors counted, want 60", got)
	}
}

func TestStats(t *testing.T) {
	r := newRig(t, blk.Config{Disk: newMemory(diskSize), Queues: 2})
	for turn := range uint64(3) { // counters outlive resets
		r.start(allFeatures, 2, 16)
		r.do(tIn, 0, make([]byte, 1024))
		r.do(tOut, 0, make([]byte, 512))
		r.do(tFlush, 0, nil)
		r.do(tGetID, 0, make([]byte, 20))
		r.do(tSCSI, 0, nil)
		r.call(r.d.Rings[0], vt.Buf{Addr: vt.Window, Len: 1, Write: true})
		s := r.dev.Stats()
		want := s[0]
		want.Reads, want.Writes, want.Flushes, want.Others = turn+1, turn+1, turn+1, 2*(turn+1)
		want.BytesRead, want.BytesWritten = 1024*(turn+1), 512*(turn+1)
		want.Unsupported, want.Malformed = turn+1, turn+1
		want.Errors, want.Unanswerable = 0, 0
		for name, n := range map[string][2]uint64{
			"reads":   {s[0].ReadTime.Count(), turn + 1},
			"writes":  {s[0].WriteTime.Count(), turn + 1},
			"flushes": {s[0].FlushTime.Count(), turn + 1},
			"ranges":  {s[0].RangeTime.Count(), 0},
		} {
			if n[0] != n[1] {
				t.Errorf("turn %d: %d %s timed, want %d", turn, n[0], name, n[1])
			}
		}
		if s[0] != want {
			t.Errorf("turn %d: got %+v", turn, s[0])
		}
		if s[0].Kicks == 0 || s[0].Interrupts == 0 || s[0].Interrupts+s[0].Suppressed < 6*(turn+1) {
			t.Errorf("turn %d: got %+v", turn, s[0])
		}
		if s[1].Reads != 0 || s[1].Interrupts != 0 {
			t.Errorf("turn %d: queue 1 has %+v", turn, s[1])
		}
	}
}

// TestLatency serves requests of a known length.
func TestLatency(t *testing.T) {
	const delay = 5 * time.Millisecond
	disk := newThin(diskSize)
	disk.Fault = func(op string, _ int64) error {
		if op != "read" {
			time.Sleep(delay)
		}
		return nil
	}
	r := newRig(t, blk.Config{Disk: disk})
	r.start(allFeatures, 1, 16)
	for range 5 {
		r.do(tIn, 0, make([]byte, 512))
		r.do(tOut, 0, make([]byte, 512))
		r.do(tFlush, 0, nil)
		r.do(tDiscard, 0, payload(seg{0, 1, 0}))
		r.do(tWriteZeroes, 0, payload(seg{0, 1, 0}))
	}
	s := r.dev.Stats()[0]
	for name, h := range map[string]*blk.Histogram{"write": &s.WriteTime, "flush": &s.FlushTime, "range": &s.RangeTime} {
		if got := h.Quantile(0); got < delay {
			t.Errorf("%s: the shortest took %v, want at least %v", name, got, delay)
		}
	}
	if s.RangeTime.Count() != 10 || s.ReadTime.Count() != 5 {
		t.Errorf("%d ranges and %d reads timed, want 10 and 5", s.RangeTime.Count(), s.ReadTime.Count())
	}
}

// TestNoAllocation checks that serving requests allocates nothing.
func TestNoAllocation(t *testing.T) {
	for _, kind := range []uint32{tIn, tOut, tFlush, tGetID} {
		t.Run(fmt.Sprintf("type=%d", kind), func(t *testing.T) {
			b := newBench(t, newMemory(diskSize), kind, 4096, 16)
			if n := testing.AllocsPerRun(1000, b.round); n != 0 {
				t.Errorf("%v allocations per 16 requests", n)
			}
			if got := b.dev.Stats()[0]; got.Errors+got.Unsupported+got.Malformed != 0 {
				t.Errorf("stats %+v", got)
			}
		})
	}
}

// TestMultiQueue checks data integrity with a driver goroutine per queue, all
// on one disk: each owns the sectors of its own stripe, and the disk is checked
// against what all of them wrote last (B15).
func TestMultiQueue(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	const queues, rounds = 4, 400
	disk := newMemory(diskSize)
	r := newRig(t, blk.Config{Disk: disk, Queues: queues})
	for _, mask := range []uint64{allFeatures, ^uint64(1<<virtio.FeatureEventIdx | 1<<virtio.FeatureIndirectDesc)} {
		r.start(mask, queues, 64)
		var wg sync.WaitGroup
		var failed atomic.Bool
		for i := range queues {
			d := newQueueDriver(r, i, queues, rand.New(rand.NewPCG(seed, uint64(i))))
			wg.Go(func() {
				if err := d.run(rounds); err != nil {
					failed.Store(true)
					t.Errorf("mask %#x: queue %d: %v", mask, i, err)
				}
			})
		}
		wg.Wait()
		if failed.Load() {
			t.Fatalf("stats %+v", r.dev.Stats())
		}
	}
	for i, s := range r.dev.Stats() {
		if s.Reads+s.Writes+s.Flushes != 2*rounds || s.Errors != 0 || s.Interrupts == 0 {
			t.Errorf("queue %d: %+v", i, s)
		}
		t.Logf("queue %d: %d requests, %d kicks, %d interrupts, %d suppressed", i, s.Reads+s.Writes, s.Kicks, s.Interrupts, s.Suppressed)
	}
}

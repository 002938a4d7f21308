package blk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
	vt "github.com/calfvm/calf/virtio/virtiotest"
)

// strictDisk remembers whether it was ever asked for what it does not have. A
// device knows its disk's size, so that is a mistake of the device.
type strictDisk struct {
	*blktest.Thin
	outside atomic.Bool
}

func (d *strictDisk) note(err error) error {
	if errors.Is(err, blk.ErrBounds) {
		d.outside.Store(true)
	}
	return err
}

func (d *strictDisk) ReadvAt(iov [][]byte, off int64) error { return d.note(d.Thin.ReadvAt(iov, off)) }

func (d *strictDisk) WritevAt(iov [][]byte, off int64) error {
	return d.note(d.Thin.WritevAt(iov, off))
}
func (d *strictDisk) Discard(off, n int64) error     { return d.note(d.Thin.Discard(off, n)) }
func (d *strictDisk) WriteZeroes(off, n int64) error { return d.note(d.Thin.WriteZeroes(off, n)) }
func (d *strictDisk) PunchHole(off, n int64) error   { return d.note(d.Thin.PunchHole(off, n)) }

// fuzzer is a whole device that a fuzz input drives.
type fuzzer struct {
	*rig
	in     []byte
	disk   *strictDisk
	broken atomic.Bool // every call of the disk fails
	reqs   []*request
	starts int
	resume func() // ends the last pause
}

// next takes n bytes, at most 8, off the input. What it lacks is zero.
func (f *fuzzer) next(n int) uint64 {
	var b [8]byte
	f.in = f.in[copy(b[:n], f.in):]
	return binary.LittleEndian.Uint64(b[:])
}

const (
	fuzzMemory = 512 << 10
	fuzzDisk   = 64 << 10
)

// FuzzDevice is a guest that writes registers, rings, descriptors and requests
// of any value in any order, resets, and has a second processor that rewrites its
// memory all the while, over a disk that fails, grows and shrinks. Then an honest
// driver must find a device that works.
func FuzzDevice(f *testing.F) {
	if raceEnabled {
		f.Skip("the guest's own races are the point")
	}
	f.Add([]byte{0, 7, 0xff, 0xff, 0x0b, 3, 4, 3, 4, 8 | 3, 4, 4})
	f.Add([]byte{1, 7, 0xff, 0xff, 6, 1, 0x13, 3, 4, 6, 2, 6, 1, 7, 0xff, 0xff, 3, 4})
	f.Add([]byte{2, 7, 0xff, 0xff, 5, 0, tDiscard, 5, 16, 1, 3, 4, 5, 0, tWriteZeroes, 3, 4, 2, 0x20, 0, 3, 4, 6, 0x40, 0x80, 3, 4})
	f.Add([]byte{3, 7, 0x0f, 0xf0, 3, 4, 0, 0x16, 1, 0, 0, 0, 0, 0x3a, 1, 0, 0, 0, 7, 0xff, 0xff, 3, 4, 1, 0x14, 0, 0})
	f.Add([]byte{2, 7, 0xff, 0xff, 3, 4, 0x1a, 0, 0, 3, 4, 0x1e, 0x1a, 4, 0, 3, 4, 0x3e})
	f.Add([]byte{0, 7, 0xff, 0xff, 5, 8, fuzzDisk/512 - 1, 3, 12}) // a read across the end
	f.Fuzz(func(t *testing.T, in []byte) {
		fz := &fuzzer{in: in, disk: &strictDisk{Thin: newThin(fuzzDisk)}, resume: func() {}}
		fz.disk.Fault = func(string, int64) error {
			if fz.broken.Load() {
				return errors.New("broken")
			}
			return nil
		}
		how := fz.next(1)
		cfg := blk.Config{Disk: fz.disk, Queues: 2, QueueSize: 16, OnError: blk.ErrorPolicy(how & 1)}
		fz.rig = newRigOn(t, vt.NewMachineOf(fuzzMemory), cfg)
		for i := range uint64(4) {
			fz.reqs = append(fz.reqs, fz.newRequest(uint32(i), i, 1024))
		}
		stop := func() {}
		if how&2 != 0 {
			stop = fz.rewrite(rand.New(rand.NewPCG(how, uint64(len(in)))))
		}
		for n := 0; len(fz.in) > 0 && n < 500; n++ {
			fz.step()
		}
		stop()
		fz.finish()
	})
}

// rewrite changes guest memory at random until the function it returns is called.
func (f *fuzzer) rewrite(rnd *rand.Rand) (stop func()) {
	mem := f.m.Bytes(0, 64<<10)
	var ended atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; !ended.Load(); n++ {
			mem[rnd.IntN(len(mem))] = byte(rnd.Uint32()) >> rnd.IntN(8)
			if n%100 == 0 {
				time.Sleep(10 * time.Microsecond)
			}
		}
	})
	return func() {
		ended.Store(true)
		wg.Wait()
	}
}

// step does one thing that the input says.
func (f *fuzzer) step() {
	op := f.next(1)
	switch op % 8 {
	case 0: // a register of the common configuration
		f.d.Set(guest.GPA(f.next(1)), []int{1, 2, 4, 8}[op>>3%4], f.next(4))
	case 1: // anywhere in the BAR
		off := guest.GPA(f.next(2))
		if n := 1 << (op >> 3 % 4); int(off)+n <= pci.BARSize {
			f.m.Write(bar+off, n, f.next(4))
			f.m.Read(bar+off, n)
		}
	case 2: // the configuration of the device, or what PCI lets it do
		if op>>3%4 == 3 {
			f.d.SetConfig(4, 2, 1<<1|f.next(2)&(1<<2|1<<10)) // Bus Master, Interrupt Disable
			return
		}
		off := guest.GPA(f.next(1))
		f.m.Write(bar+guest.GPA(f.d.Device.Offset)+off, 1, f.next(1))
		f.d.DeviceConfig(off, 4)
	case 3: // a chain
		f.chain(op >> 3)
	case 4:
		for _, ring := range f.d.Rings {
			ring.Kick()
		}
		if op>>3%2 != 0 {
			time.Sleep(200 * time.Microsecond) // let the workers come to it
		}
	case 5: // what a request holds
		q := f.reqs[op>>3%4]
		area := [][]byte{f.m.Bytes(q.header, 16), q.bytes()}[op>>5%2]
		at := int(f.next(1))
		area[at%len(area)] = byte(f.next(1))
	case 6: // the host
		f.host(op >> 3)
	default: // a driver that means well
		if f.starts++; f.starts <= 20 {
			f.broken.Store(false)
			f.start(allFeatures&^0xffff|f.next(2), 2, 8)
		}
	}
}

// chain makes a chain available that is a good one for some values of how.
func (f *fuzzer) chain(how uint64) {
	if len(f.d.Rings) == 0 {
		return
	}
	ring := f.d.Rings[how%2]
	q := f.reqs[how>>1%4]
	switch how >> 3 {
	case 0, 1:
		ring.Add(q.bufs(how>>3 == 0)...)
	case 2:
		ring.AddIndirect(q.bufs(true)...)
	default:
		ring.Add(vt.Buf{Addr: q.header, Len: uint32(f.next(2))}, vt.Buf{Addr: guest.GPA(f.next(3)), Len: uint32(f.next(2)), Write: true})
	}
	ring.Publish()
}

// host does what the owner of a device may do while its guest runs.
func (f *fuzzer) host(how uint64) {
	switch how % 8 {
	case 0, 4:
		f.broken.Store(how>>2&1 != 0)
	case 1, 5:
		f.dev.Resume()
	case 3:
		f.resume()
		f.resume = f.dev.Pause()
	case 7:
		f.resume()
	case 2:
		f.resize(int64(f.next(1)) % (fuzzDisk/512 + 1) * 512)
	default:
		f.dev.Stats()
	}
}

func (f *fuzzer) resize(n int64) {
	if err := f.t.UpdateConfig(func() error { return f.dev.Resize(n) }); err != nil {
		f.tb.Error(err)
	}
}

// finish checks that the device still works.
func (f *fuzzer) finish() {
	f.broken.Store(false)
	f.dev.Resume()
	f.resume()
	f.d.SetConfig(4, 2, 1<<1|1<<2)
	f.resize(fuzzDisk)
	f.start(allFeatures, 1, 8)
	want := bytes.Repeat([]byte{0x5a}, 1024)
	if code, used, _ := f.do(tOut, 6, want); code != sOK || used != 1 {
		f.tb.Errorf("an honest write: status %d, used length %d", code, used)
	}
	if code, used, got := f.do(tIn, 6, make([]byte, 1024)); code != sOK || used != 1025 || !bytes.Equal(got, want) {
		f.tb.Errorf("an honest read: status %d, used length %d", code, used)
	}
	if f.disk.outside.Load() {
		f.tb.Error("the disk was asked for what is outside of it")
	}
}

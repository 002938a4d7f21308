package vmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/vmm"
)

// memDisk is a disk in memory.
type memDisk struct {
	mu      sync.Mutex
	b       []byte
	flushes int
	broken  error // what every transfer returns, or nil
}

func (d *memDisk) move(iov [][]byte, off int64, f func(mem, buf []byte)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken != nil {
		return d.broken
	}
	for _, p := range iov {
		if off < 0 || off > int64(len(d.b)) || int64(len(p)) > int64(len(d.b))-off {
			return errors.New("out of range")
		}
		f(d.b[off:], p)
		off += int64(len(p))
	}
	return nil
}

func (d *memDisk) ReadvAt(iov [][]byte, off int64) error {
	return d.move(iov, off, func(mem, buf []byte) { copy(buf, mem) })
}

func (d *memDisk) WritevAt(iov [][]byte, off int64) error {
	return d.move(iov, off, func(mem, buf []byte) { copy(mem, buf) })
}

func (d *memDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return nil
}

func (d *memDisk) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.b))
}
func (d *memDisk) ReadOnly() bool { return false }

// driver writes a bare-metal virtio-blk driver, step by step, for the function
// in one slot of bus 0.
type driver struct {
	*guesttest.Program
	slot uint32
	bar  uint32
}

// Where the guest keeps its rings, four pages a queue, and its buffers.
const (
	rings    = guesttest.Scratch
	buffers  = guesttest.Scratch + 0x10_0000
	ecam     = 0xE000_0000
	lapic    = 0xFEE0_0000
	lapicIRR = lapic + 0x200
	vector   = 0x41 // of queue 0; the next queue has the next one

	common = 0x0000
	isr    = 0x2000
	device = 0x4000
	notify = 0x6000
	msixAt = 0x8000
)

func (d driver) config(off uint32) uint32 { return ecam + d.slot<<15 + off }

func (d driver) ring(q uint32) (desc, avail, used uint32) {
	base := rings + q*0x4000
	return base, base + 0x1000, base + 0x2000
}

// findCapabilities checks the identity of the function by both ways into
// configuration space, and the chain of its capabilities.
func (d driver) findCapabilities() (msix uint32) {
	d.Out32(0xCF8, 1<<31|d.slot<<11)
	d.In32(0xCFC)
	d.Expect(0x1042_1AF4)
	d.In16(0xCFE)
	d.Expect(0x1042)
	d.Read32(d.config(0))
	d.Expect(0x1042_1AF4)
	d.Read8(d.config(0x34))
	msix = 0x40
	d.Expect(msix)
	d.Read16(d.config(msix))
	off := msix + 12
	d.Expect(off<<8 | 0x11)
	// COMMON, NOTIFY, ISR, DEVICE, PCI_CFG with their lengths.
	for i, length := range []uint32{16, 20, 16, 16, 20} {
		next := off + length
		if i == 4 {
			next = 0
		}
		d.Read32(d.config(off))
		d.Expect(uint32(i+1)<<24 | length<<16 | next<<8 | 0x09)
		off = next
	}
	return msix
}

// start takes the device through its status machine, with MSI-X and nq queues
// of 8 descriptors.
func (d driver) start(msix uint32, nq uint32) {
	d.Write16(d.config(4), 0x0406) // memory decoding, bus master, no INTx
	d.Write16(d.config(msix+2), 0x8000)
	for q := range nq {
		entry := d.bar + msixAt + 16*(q+1)
		d.Write32(entry, lapic)
		d.Write32(entry+4, 0)
		d.Write32(entry+8, vector+q)
		d.Write32(entry+12, 0)
	}
	d.startQueues(nq)
}

// startQueues is start after the interrupts have been set up.
func (d driver) startQueues(nq uint32) {
	d.Write32(lapic+0xF0, 0x1FF) // local APIC on
	c := d.bar + common
	d.Write8(c+0x14, 0)
	d.Poll8(c+0x14, 0)
	d.Write8(c+0x14, 1)
	d.Write8(c+0x14, 3)
	d.Write32(c+0x08, 1)
	d.Write32(c+0x0C, 1) // VIRTIO_F_VERSION_1
	d.Write32(c+0x08, 0)
	d.Write32(c+0x0C, 1<<9) // VIRTIO_BLK_F_FLUSH
	d.Write8(c+0x14, 0xB)
	d.Read8(c + 0x14)
	d.Expect(0xB)
	// B12: with FLUSH negotiated the write cache is on before DRIVER_OK, or the
	// driver would never flush.
	d.Read8(d.bar + device + 0x20)
	d.Expect(1)
	d.Read16(c + 0x12)
	d.Expect(nq)
	for q := range nq {
		desc, avail, used := d.ring(q)
		d.Write16(c+0x16, uint16(q))
		d.Write16(c+0x18, 8)
		d.Write16(c+0x1A, uint16(q+1)) // its MSI-X vector, if that is on
		d.Read16(c + 0x1A)
		d.Expect(q + 1)
		d.Write64(c+0x20, uint64(desc))
		d.Write64(c+0x28, uint64(avail))
		d.Write64(c+0x30, uint64(used))
		d.Write16(c+0x1C, 1)
	}
	d.Write8(c+0x14, 0xF)
}

// request puts the n-th request (from 0) on queue q and waits for it: a header,
// size bytes at buffers+0x1000, the status byte. wantLen is the length the
// device shall report.
func (d driver) request(q, n, kind uint32, sector uint64, size uint32, deviceWrites bool, wantLen uint32) {
	desc, avail, used := d.ring(q)
	header, data, status := uint32(buffers), uint32(buffers+0x1000), uint32(buffers+0x8000)
	d.Write32(header, kind)
	d.Write32(header+4, 0)
	d.Write64(header+8, sector)
	d.Write8(status, 0xEE)
	descriptor := func(i, addr, length uint32, flags, next uint16) {
		d.Write64(desc+16*i, uint64(addr))
		d.Write32(desc+16*i+8, length)
		d.Write16(desc+16*i+12, flags)
		d.Write16(desc+16*i+14, next)
	}
	const flagNext, flagWrite = 1, 2
	dataFlags := uint16(flagNext)
	if deviceWrites {
		dataFlags |= flagWrite
	}
	descriptor(0, header, 16, flagNext, 1)
	descriptor(1, data, size, dataFlags, 2)
	descriptor(2, status, 1, flagWrite, 0)
	if size == 0 {
		descriptor(0, header, 16, flagNext, 2)
	}
	d.Write16(avail+4+2*(n%8), 0)
	d.Write16(avail+2, uint16(n+1))
	d.Write16(d.bar+notify+4*q, uint16(q))
	d.Poll(used, 0xFFFF_0000, (n+1)<<16)
	d.Read32(used + 4 + 8*(n%8))
	d.Expect(0)
	d.Read32(used + 4 + 8*(n%8) + 4)
	d.Expect(wantLen)
	d.Read8(status)
	d.Expect(0)
	// The interrupt has been sent after the used ring was written.
	v := vector + q
	d.Poll(lapicIRR+v/32*16, 1<<(v%32), 1<<(v%32))
}

// TestBlockDevice drives a disk from its configuration space to its interrupts
// without a kernel: what Linux does, in a few hundred instructions.
func TestBlockDevice(t *testing.T) {
	const queues = 3
	for _, disks := range []int{1, 4, vmm.MaxDisks} {
		t.Run(fmt.Sprintf("disks=%d", disks), func(t *testing.T) {
			var p guesttest.Program
			var mem []*memDisk
			var cfg []vmm.Disk
			for i := range disks {
				d := &memDisk{b: make([]byte, 64<<10)}
				copy(d.b[512:], "the second sector")
				mem = append(mem, d)
				cfg = append(cfg, vmm.Disk{Name: fmt.Sprintf("disk%d", i), Disk: d, Queues: queues, Serial: "calf-serial"})
			}
			d := driver{Program: &p, slot: uint32(disks), bar: 0xC000_0000 + uint32(disks-1)*0x1_0000}
			msix := d.findCapabilities()
			d.start(msix, queues)
			data := uint32(buffers + 0x1000)
			// IN: what the host put there.
			d.request(0, 0, 0, 1, 512, true, 513)
			d.Read32(data)
			d.Expect(0x2065_6874) // "the "
			// OUT on another queue, then FLUSH.
			d.Write32(data, 0x666C_6163) // "calf"
			d.request(1, 0, 1, 3, 512, false, 1)
			d.request(1, 1, 4, 0, 0, false, 1)
			// GET_ID on the third.
			d.request(2, 0, 8, 0, 20, true, 21)
			d.Read32(data)
			d.Expect(0x666C_6163)
			p.Print("ok")
			p.PowerOff()
			outcome, console := run(t, &p, nil, cfg...)
			if outcome != vmm.PowerOff || console != "ok" {
				t.Fatalf("the guest ended with %v, console %q", outcome, console)
			}
			last := mem[disks-1]
			if got := last.b[3*512 : 3*512+4]; string(got) != "calf" {
				t.Errorf("sector 3 holds %q, want %q", got, "calf")
			}
			if last.flushes != 1 {
				t.Errorf("%d flushes reached the disk, want 1", last.flushes)
			}
			for i, m := range mem[:disks-1] {
				if !bytes.Equal(m.b[3*512:4*512], make([]byte, 512)) || m.flushes != 0 {
					t.Errorf("disk %d was touched", i)
				}
			}
		})
	}
}

// TestBlockDeviceRelocated moves the device's registers to another address and
// drives it there: doorbells follow the BAR (P13).
func TestBlockDeviceRelocated(t *testing.T) {
	var p guesttest.Program
	disk := &memDisk{b: make([]byte, 64<<10)}
	d := driver{Program: &p, slot: 1, bar: 0xC000_0000}
	msix := d.findCapabilities()
	d.start(msix, 1)
	d.request(0, 0, 1, 0, 512, false, 1)
	d.Write16(d.config(4), 0) // decoding off
	d.Read32(d.bar)
	d.Expect(0xFFFF_FFFF)
	d.Write32(d.config(0x10), 0xFFFF_FFFF) // size it
	d.Read32(d.config(0x10))
	d.Expect(0xFFFF_0004)
	d.bar = 0xC100_0000
	d.Write32(d.config(0x10), d.bar)
	_, avail, used := d.ring(0)
	d.Write32(avail, 0)
	d.Write32(used, 0)
	d.start(msix, 1)
	d.Write32(buffers+0x1000, 0x666C_6163)
	d.request(0, 0, 1, 2, 512, false, 1)
	p.Print("ok")
	p.PowerOff()
	outcome, console := run(t, &p, nil, vmm.Disk{Name: "disk", Disk: disk, Queues: 1})
	if outcome != vmm.PowerOff || console != "ok" {
		t.Fatalf("the guest ended with %v, console %q", outcome, console)
	}
	if got := disk.b[1024:1028]; string(got) != "calf" {
		t.Errorf("sector 2 holds %q, want %q", got, "calf")
	}
}

// TestManyQueues sends a request through each of as many queues as a disk can
// have; each has an interrupt of its own.
func TestManyQueues(t *testing.T) {
	const queues = 64
	var p guesttest.Program
	d := driver{Program: &p, slot: 1, bar: 0xC000_0000}
	d.start(d.findCapabilities(), queues)
	disk := &memDisk{b: make([]byte, queues*512)}
	for q := range uint32(queues) {
		d.Write32(buffers+0x1000, q+1)
		d.request(q, 0, 1, uint64(q), 512, false, 1)
	}
	p.Print("ok")
	p.PowerOff()
	outcome, console := run(t, &p, nil, vmm.Disk{Name: "disk", Disk: disk, Queues: queues})
	if outcome != vmm.PowerOff || console != "ok" {
		t.Fatalf("the guest ended with %v, console %q", outcome, console)
	}
	for q := range queues {
		if got := disk.b[q*512]; got != byte(q+1) {
			t.Errorf("sector %d holds %d, want %d", q, got, q+1)
		}
	}
}

// TestINTx drives devices without MSI-X: the pin of each reaches the I/O APIC at
// the input that the ACPI tables name, until the guest has read why.
func TestINTx(t *testing.T) {
	const disks = 9 // the first and the last share a line
	for _, slot := range []uint32{1, 2, 9} {
		var p guesttest.Program
		d := driver{Program: &p, slot: slot, bar: 0xC000_0000 + (slot-1)*0x1_0000}
		d.findCapabilities()
		d.Read8(d.config(0x3D))
		d.Expect(1) // INTA
		d.Write16(d.config(4), 0x0006)
		entry := 0x10 + 2*(16+slot%8)
		d.Write32(0xFEC0_0000, entry+1)
		d.Write32(0xFEC0_0010, 0) // to the first processor
		d.Write32(0xFEC0_0000, entry)
		d.Write32(0xFEC0_0010, 0xA000|vector) // level-triggered, active low
		d.startQueues(1)
		d.Read32(lapicIRR + vector/32*16)
		d.Expect(0)
		d.request(0, 0, 8, 0, 20, true, 21) // which waits for the interrupt
		d.Read16(d.config(6))
		d.Expect(0x18) // Interrupt Status
		d.Read8(d.bar + isr)
		d.Expect(1)
		d.Read16(d.config(6))
		d.Expect(0x10)
		d.Read8(d.bar + isr)
		d.Expect(0)
		p.Print("ok")
		p.PowerOff()
		cfg := make([]vmm.Disk, disks)
		for i := range cfg {
			cfg[i] = vmm.Disk{Name: "disk", Disk: &memDisk{b: make([]byte, 4096)}, Queues: 1}
		}
		outcome, console := run(t, &p, nil, cfg...)
		if outcome != vmm.PowerOff || console != "ok" {
			t.Errorf("slot %d: the guest ended with %v, console %q", slot, outcome, console)
		}
	}
}

// TestResizeDisk lets a disk grow while its guest runs: the guest finds the new
// capacity, and a block beyond the old end. What it did before is counted.
func TestResizeDisk(t *testing.T) {
	needKVM(t)
	const before, after = 64 << 10, 128 << 10
	var p guesttest.Program
	d := driver{Program: &p, slot: 2, bar: 0xC001_0000}
	d.start(d.findCapabilities(), 1)
	d.request(0, 0, 1, 0, 512, false, 1)
	p.Print("ready")
	d.Poll(d.bar+device, 0xFFFF_FFFF, after/512)
	d.request(0, 1, 1, after/512-1, 512, false, 1)
	p.Print("ok")
	p.PowerOff()
	disk := &memDisk{b: make([]byte, before)}
	out := &output{}
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), AllowEmulation: true, Console: vmm.Console{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []*memDisk{{b: make([]byte, before)}, disk} {
		if err := m.AddDisk(vmm.Disk{Name: "disk", Disk: d, Queues: 1}); err != nil {
			t.Fatal(err)
		}
	}
	go func() {
		out.waitFor(t, "ready")
		if stats, err := m.DiskStats(1); err != nil || len(stats) != 1 || stats[0].Writes != 1 || stats[0].BytesWritten != 512 {
			t.Errorf("%+v, %v", stats, err)
		}
		if stats, err := m.DiskStats(2); !errors.Is(err, vmm.ErrConfig) {
			t.Errorf("of a disk that is not there: %+v, %v", stats, err)
		}
		if err := m.ResizeDisk(1, after); !errors.Is(err, blk.ErrConfig) {
			t.Errorf("a device larger than its disk: %v", err)
		}
		disk.mu.Lock()
		disk.b = make([]byte, after)
		disk.mu.Unlock()
		if err := m.ResizeDisk(1, after); err != nil {
			t.Error(err)
		}
		if err := m.ResizeDisk(2, after); !errors.Is(err, vmm.ErrConfig) {
			t.Errorf("a disk that is not there: %v", err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	outcome, err := m.Run(ctx)
	if err := errors.Join(err, m.Close()); err != nil || outcome != vmm.PowerOff || out.String() != "readyok" {
		t.Errorf("the guest ended with %v, %v, console %q", outcome, err, out.String())
	}
	if err := m.ResizeDisk(1, before); !errors.Is(err, vmm.ErrNoGuest) {
		t.Errorf("a disk whose guest is gone: %v", err)
	}
}

// TestStoppedDisk lets a disk fail that is to stop then: the guest waits until
// the disk is sound and the machine is told so, and notices nothing.
func TestStoppedDisk(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	d := driver{Program: &p, slot: 1, bar: 0xC000_0000}
	d.start(d.findCapabilities(), 1)
	d.request(0, 0, 1, 2, 512, false, 1)
	p.Print("ok")
	p.PowerOff()
	cause := errors.New("the cable is out")
	disk := &memDisk{b: make([]byte, 64<<10), broken: cause}
	out := &output{}
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), AllowEmulation: true, Console: vmm.Console{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	m.ResumeDisks() // of which there are none
	stopped := make(chan error, 1)
	err = m.AddDisk(vmm.Disk{Name: "root", Disk: disk, Queues: 1, OnError: blk.ErrorStop, Stopped: func(err error) { stopped <- err }})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if err := <-stopped; !errors.Is(err, cause) || out.String() != "" {
			t.Errorf("stopped with %v, console %q", err, out.String())
		}
		disk.mu.Lock()
		disk.broken = nil
		disk.mu.Unlock()
		m.ResumeDisks()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	outcome, err := m.Run(ctx)
	if err := errors.Join(err, m.Close()); err != nil || outcome != vmm.PowerOff || out.String() != "ok" {
		t.Errorf("the guest ended with %v, %v, console %q", outcome, err, out.String())
	}
	m.ResumeDisks() // whose guest is gone
}

package virtiotest

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/pci"
)

// Offsets in the common configuration structure.
const (
	DeviceFeatureSelect = 0x00
	DeviceFeature       = 0x04
	DriverFeatureSelect = 0x08
	DriverFeature       = 0x0c
	ConfigVector        = 0x10
	NumQueues           = 0x12
	Status              = 0x14
	Generation          = 0x15
	QueueSelect         = 0x16
	QueueSize           = 0x18
	QueueVector         = 0x1a
	QueueEnable         = 0x1c
	QueueNotifyOff      = 0x1e
	QueueDesc           = 0x20
	QueueDriver         = 0x28
	QueueDevice         = 0x30
	QueueReset          = 0x3a
)

// Cap is a virtio capability.
type Cap struct {
	Pos    int // in configuration space
	Len    uint8
	Offset uint32 // in the BAR
	Length uint32
}

// Driver drives one virtio PCI function.
type Driver struct {
	M   *Machine
	F   pci.Function
	BAR guest.GPA

	Common, Notify, ISR, Device, PCI Cap
	NotifyMultiplier                 uint32
	MSIX                             int // offset of the capability
	Table, PBA                       guest.GPA
	Vectors                          int

	Features uint64 // as negotiated
	Rings    []*Ring
}

// Probe puts f's BAR at bar, finds its capabilities and enables memory space.
func Probe(m *Machine, f *pci.Transport, bar guest.GPA) (*Driver, error) {
	if err := f.AssignBAR(0, bar); err != nil {
		return nil, err
	}
	d := &Driver{M: m, F: f, BAR: bar}
	if id := d.Config(0, 4); id&0xffff != 0x1af4 || id>>16 < 0x1040 {
		return nil, fmt.Errorf("virtiotest: no modern virtio function: ID %#x", id)
	}
	for pos := int(d.Config(0x34, 1)); pos != 0; pos = int(d.Config(pos+1, 1)) {
		switch d.Config(pos, 1) {
		case 0x11:
			d.MSIX = pos
			d.Vectors = int(d.Config(pos+2, 2)&0x7ff) + 1
			d.Table = bar + guest.GPA(d.Config(pos+4, 4)&^7)
			d.PBA = bar + guest.GPA(d.Config(pos+8, 4)&^7)
		case 0x09:
			d.virtioCap(pos)
		}
	}
	d.SetConfig(4, 2, 1<<1|1<<2)
	return d, nil
}

func (d *Driver) virtioCap(pos int) {
	c := Cap{
		Pos:    pos,
		Len:    uint8(d.Config(pos+2, 1)),
		Offset: uint32(d.Config(pos+8, 4)),
		Length: uint32(d.Config(pos+12, 4)),
	}
	switch d.Config(pos+3, 1) {
	case 1:
		d.Common = c
	case 2:
		d.Notify = c
		d.NotifyMultiplier = uint32(d.Config(pos+16, 4))
	case 3:
		d.ISR = c
	case 4:
		d.Device = c
	case 5:
		d.PCI = c
	}
}

// Config reads n bytes of configuration space.
func (d *Driver) Config(off, n int) uint64 {
	var p [8]byte
	d.F.ReadConfig(uint16(off), p[:n])
	return binary.LittleEndian.Uint64(p[:])
}

// SetConfig writes the low n bytes of v to configuration space.
func (d *Driver) SetConfig(off, n int, v uint64) {
	p := binary.LittleEndian.AppendUint64(nil, v)
	d.F.WriteConfig(uint16(off), p[:n])
}

// Get reads a register of the common configuration.
func (d *Driver) Get(off guest.GPA, n int) uint64 {
	return d.M.Read(d.BAR+guest.GPA(d.Common.Offset)+off, n)
}

// Set writes a register of the common configuration.
func (d *Driver) Set(off guest.GPA, n int, v uint64) {
	d.M.Write(d.BAR+guest.GPA(d.Common.Offset)+off, n, v)
}

// DeviceConfig reads n bytes of the device configuration.
func (d *Driver) DeviceConfig(off guest.GPA, n int) uint64 {
	return d.M.Read(d.BAR+guest.GPA(d.Device.Offset)+off, n)
}

// Reset resets the device and waits until the status reads 0.
func (d *Driver) Reset() error {
	d.Set(Status, 1, 0)
	d.Rings = nil
	for end := time.Now().Add(10 * time.Second); d.Get(Status, 1) != 0; {
		if time.Now().After(end) {
			return fmt.Errorf("virtiotest: status still reads %#x after a reset", d.Get(Status, 1))
		}
		time.Sleep(100 * time.Microsecond)
	}
	return nil
}

// Offered reads the feature bits the device offers.
func (d *Driver) Offered() uint64 {
	var f uint64
	for i := range uint64(2) {
		d.Set(DeviceFeatureSelect, 4, i)
		f |= d.Get(DeviceFeature, 4) << (32 * i)
	}
	return f
}

// Accept writes the driver's feature bits.
func (d *Driver) Accept(features uint64) {
	for i := range uint64(2) {
		d.Set(DriverFeatureSelect, 4, i)
		d.Set(DriverFeature, 4, features>>(32*i)&0xffff_ffff)
	}
}

// Negotiate resets the device and agrees on the offered features in mask.
func (d *Driver) Negotiate(mask uint64) error {
	if err := d.Reset(); err != nil {
		return err
	}
	d.Set(Status, 1, virtio.StatusAcknowledge)
	d.Set(Status, 1, virtio.StatusAcknowledge|virtio.StatusDriver)
	d.Features = d.Offered() & mask
	d.Accept(d.Features)
	const ok = virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK
	d.Set(Status, 1, ok)
	if s := d.Get(Status, 1); s != ok {
		return fmt.Errorf("virtiotest: status reads %#x after FEATURES_OK", s)
	}
	return nil
}

// EnableMSIX routes vector i to the machine's line base+i, for all vectors, in
// the order in which Linux does it.
func (d *Driver) EnableMSIX(base uint32) {
	ctrl := d.Config(d.MSIX+2, 2)
	d.SetConfig(d.MSIX+2, 2, ctrl|1<<15|1<<14)
	for i := range d.Vectors {
		d.Mask(i, true)
	}
	for i := range d.Vectors {
		e := d.entry(i)
		d.M.Write(e, 4, 0xfee0_0000)
		d.M.Write(e+4, 4, 0)
		d.M.Write(e+8, 4, uint64(base)+uint64(i))
	}
	d.SetConfig(d.MSIX+2, 2, ctrl|1<<15)
	for i := range d.Vectors {
		d.Mask(i, false)
	}
}

func (d *Driver) entry(vector int) guest.GPA { return d.Table + guest.GPA(16*vector) }

// Mask masks or unmasks a vector.
func (d *Driver) Mask(vector int, masked bool) {
	v := uint64(0)
	if masked {
		v = 1
	}
	d.M.Write(d.entry(vector)+12, 4, v)
}

// Pending reads the pending bit of a vector.
func (d *Driver) Pending(vector int) bool {
	return d.M.Read(d.PBA+guest.GPA(vector/64*8), 8)>>(vector%64)&1 != 0
}

// SetupQueue makes a ring of size descriptors for queue i with MSI-X vector
// i+1, and enables it.
func (d *Driver) SetupQueue(i, size int) (*Ring, error) {
	r := NewRing(d.M, size, d.Features)
	return r, d.Enable(i, r, uint64(i+1))
}

// Enable writes the geometry of r to the registers of queue i and enables it.
func (d *Driver) Enable(i int, r *Ring, vector uint64) error {
	d.Set(QueueSelect, 2, uint64(i))
	d.Set(QueueSize, 2, uint64(r.Size))
	for _, a := range []struct{ reg, addr guest.GPA }{
		{QueueDesc, r.Desc}, {QueueDriver, r.Avail}, {QueueDevice, r.Used},
	} {
		d.Set(a.reg, 4, uint64(a.addr)&0xffff_ffff)
		d.Set(a.reg+4, 4, uint64(a.addr)>>32)
	}
	d.Set(QueueVector, 2, vector)
	d.Set(QueueEnable, 2, 1)
	if d.Get(QueueEnable, 2) != 1 {
		return fmt.Errorf("virtiotest: queue %d was not enabled", i)
	}
	r.Index = i
	r.notifyOff = d.BAR + guest.GPA(d.Notify.Offset) + guest.GPA(d.Get(QueueNotifyOff, 2)*uint64(d.NotifyMultiplier))
	return nil
}

// DriverOK sets DRIVER_OK.
func (d *Driver) DriverOK() {
	d.Set(Status, 1, d.Get(Status, 1)|virtio.StatusDriverOK)
}

// Start negotiates the offered features in mask, enables n queues of size
// descriptors and MSI-X with lines from base, and sets DRIVER_OK.
func (d *Driver) Start(mask uint64, n, size int, base uint32) error {
	if err := d.Negotiate(mask); err != nil {
		return err
	}
	d.EnableMSIX(base)
	d.Set(ConfigVector, 2, 0)
	for i := range n {
		r, err := d.SetupQueue(i, size)
		if err != nil {
			return err
		}
		d.Rings = append(d.Rings, r)
	}
	d.DriverOK()
	return nil
}

package blk

import "encoding/binary"

// Offsets in struct virtio_blk_config (section 5.2.4).
const (
	cfgCapacity  = 0x00 // sectors, 64 bits
	cfgSegMax    = 0x0c // 32 bits
	cfgBlkSize   = 0x14 // 32 bits
	cfgNumQueues = 0x22 // 16 bits

	configSize = 0x60
)

// initSpace fills in the fields of the features offered. The others are zero.
func (d *Device) initSpace() {
	le := binary.LittleEndian
	le.PutUint64(d.space[cfgCapacity:], d.capacity)
	// A request has a header and a status beside its segments.
	le.PutUint32(d.space[cfgSegMax:], uint32(d.cfg.QueueSize)-2)
	le.PutUint32(d.space[cfgBlkSize:], d.cfg.BlockSize)
	le.PutUint16(d.space[cfgNumQueues:], uint16(len(d.queues)))
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint64, p []byte) {
	clear(p)
	if off < configSize {
		copy(p, d.space[off:])
	}
}

// WriteConfig implements virtio.Device. Nothing is writable.
func (d *Device) WriteConfig(uint64, []byte) {}

package blk

import "encoding/binary"

// Offsets in struct virtio_blk_config (section 5.2.4).
const (
	cfgCapacity         = 0x00 // sectors, 64 bits
	cfgSegMax           = 0x0c // 32 bits
	cfgBlkSize          = 0x14 // 32 bits
	cfgNumQueues        = 0x22 // 16 bits
	cfgMaxDiscard       = 0x24 // sectors, 32 bits
	cfgMaxDiscardSeg    = 0x28 // 32 bits
	cfgDiscardAlignment = 0x2c // sectors, 32 bits
	cfgMaxZeroes        = 0x30 // sectors, 32 bits
	cfgMaxZeroesSeg     = 0x34 // 32 bits
	cfgZeroesMayUnmap   = 0x38 // 8 bits

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
	if d.discard != nil {
		le.PutUint32(d.space[cfgMaxDiscard:], discardLimits.sectors)
		le.PutUint32(d.space[cfgMaxDiscardSeg:], discardLimits.segments)
		align := max(d.discard.DiscardGranularity(), int64(d.cfg.BlockSize)) / SectorSize
		le.PutUint32(d.space[cfgDiscardAlignment:], uint32(min(align, int64(discardLimits.sectors)))) //nolint:gosec // G115: neither is negative
	}
	if d.zero != nil {
		le.PutUint32(d.space[cfgMaxZeroes:], zeroLimits.sectors)
		le.PutUint32(d.space[cfgMaxZeroesSeg:], zeroLimits.segments)
		if d.punch {
			d.space[cfgZeroesMayUnmap] = 1 // B8
		}
	}
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

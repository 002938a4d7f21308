package blk

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// Offsets in struct virtio_blk_config (section 5.2.4).
const (
	cfgCapacity         = 0x00 // sectors, 64 bits
	cfgSegMax           = 0x0c // 32 bits
	cfgBlkSize          = 0x14 // 32 bits
	cfgPhysicalExp      = 0x18 // logical blocks as a power of 2, 8 bits
	cfgMinIO            = 0x1a // logical blocks, 16 bits
	cfgOptimalIO        = 0x1c // logical blocks, 32 bits
	cfgWriteback        = 0x20 // 8 bits
	cfgNumQueues        = 0x22 // 16 bits
	cfgMaxDiscard       = 0x24 // sectors, 32 bits
	cfgMaxDiscardSeg    = 0x28 // 32 bits
	cfgDiscardAlignment = 0x2c // sectors, 32 bits
	cfgMaxZeroes        = 0x30 // sectors, 32 bits
	cfgMaxZeroesSeg     = 0x34 // 32 bits
	cfgZeroesMayUnmap   = 0x38 // 8 bits

	configSize = 0x60
)

// initSpace fills in the fields of the features offered that never change. The
// others are zero.
func (d *Device) initSpace() {
	le := binary.LittleEndian
	// A request has a header and a status beside its segments.
	le.PutUint32(d.space[cfgSegMax:], uint32(d.cfg.QueueSize)-2)
	le.PutUint32(d.space[cfgBlkSize:], d.cfg.BlockSize)
	le.PutUint16(d.space[cfgNumQueues:], uint16(len(d.queues))) //nolint:gosec // G115: at most maxQueues
	if disk, ok := d.cfg.Disk.(Hinter); ok {
		d.features |= 1 << featureTopology
		d.initTopology(disk.IOHints())
	}
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

// initTopology fills in the hints about the sizes of requests.
func (d *Device) initTopology(physical, minIO, optimal int64) {
	block := int64(d.cfg.BlockSize)
	if physical > block && physical&(physical-1) == 0 {
		d.space[cfgPhysicalExp] = byte(bits.Len64(uint64(physical/block)) - 1) //nolint:gosec // G115: positive
	}
	minIO = min(max(minIO/block, 0), math.MaxUint16)
	optimal = min(max(optimal/block, 0), math.MaxUint32)
	binary.LittleEndian.PutUint16(d.space[cfgMinIO:], uint16(minIO))
	binary.LittleEndian.PutUint32(d.space[cfgOptimalIO:], uint32(optimal))
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint64, p []byte) {
	space := d.space
	binary.LittleEndian.PutUint64(space[cfgCapacity:], d.capacity.Load())
	if !d.writeThrough.Load() {
		space[cfgWriteback] = 1
	}
	clear(p)
	if off < configSize {
		copy(p, space[off:])
	}
}

// WriteConfig implements virtio.Device. Only writeback is writable, by a driver
// that has taken CONFIG_WCE. Turning the cache off owes a flush of what is in it:
// the driver will not flush any more (B11). The workers pay for it before they
// answer another request, for here a vCPU waits.
func (d *Device) WriteConfig(off uint64, p []byte) {
	if d.negotiated&(1<<featureConfigWCE) == 0 || off > cfgWriteback || cfgWriteback-off >= uint64(len(p)) {
		return
	}
	through := p[cfgWriteback-off] == 0
	if d.writeThrough.Swap(through) != through && through {
		d.owed.Add(1)
		d.kickWorkers()
	}
}

// payFlush makes up for a flush that WriteConfig owes. It reports false if the
// device has stopped instead. Where errors are reported, what fails is whatever
// has to be stable: the flush is owed until one succeeds, and a write that comes
// meanwhile does not complete without one.
func (d *Device) payFlush() bool {
	if d.owed.Load() == d.paid.Load() {
		return true
	}
	d.payMu.Lock()
	defer d.payMu.Unlock()
	owed := d.owed.Load()
	if owed == d.paid.Load() {
		return true // another worker was faster
	}
	if err := d.flush(); err != nil {
		return d.diskFailed("flush", 0, err) != noStatus
	}
	d.paid.Store(owed)
	return true
}

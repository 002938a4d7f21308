// Package blk is the virtio block device of VIRTIO 1.2, section 5.2: its
// configuration space, its requests, and a worker per queue that serves them
// from a Disk. Raw is the Disk for plain files and block devices.
//
// A request's data moves straight between the Disk and guest memory. Serving a
// request allocates nothing.
package blk

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/virtio"
)

const (
	// SectorSize is the unit of the protocol's offsets and of the capacity,
	// in bytes, whatever the block size is.
	SectorSize = 512

	// MaxSerial is the length of the longest serial number, in bytes.
	MaxSerial = 20

	deviceID = 2

	maxQueues        = 64
	minQueueSize     = 4 // leaves room for data beside header and status
	defaultQueueSize = 256
)

// Feature bits of a block device, as bit numbers (section 5.2.3).
const (
	featureSegMax      = 2  // VIRTIO_BLK_F_SEG_MAX
	featureRO          = 5  // VIRTIO_BLK_F_RO
	featureBlkSize     = 6  // VIRTIO_BLK_F_BLK_SIZE
	featureFlush       = 9  // VIRTIO_BLK_F_FLUSH
	featureTopology    = 10 // VIRTIO_BLK_F_TOPOLOGY
	featureConfigWCE   = 11 // VIRTIO_BLK_F_CONFIG_WCE
	featureMQ          = 12 // VIRTIO_BLK_F_MQ
	featureDiscard     = 13 // VIRTIO_BLK_F_DISCARD
	featureWriteZeroes = 14 // VIRTIO_BLK_F_WRITE_ZEROES
)

// Config is what a Device is made of. Only Disk is required.
type Config struct {
	Disk Disk
	// Queues is the number of request queues, 1 to 64. 0 means 1.
	Queues int
	// QueueSize is the most descriptors of a queue: a power of 2 from 4 to
	// 32768. 0 means 256.
	QueueSize uint16
	// BlockSize is the logical block size in bytes that the guest sees: a
	// power of 2 from 512 to 64 KiB that divides the size of the disk.
	// 0 means what the disk says if it is a BlockSizer, else 512.
	BlockSize uint32
	// WriteThrough makes a write stable before it completes, as long as the
	// guest does not turn the write cache on itself. Without it the guest
	// starts with the cache on and flushes.
	WriteThrough bool
	// Unsafe acknowledges flushes without doing them. A crash of the host, or of
	// this process, then takes more than the guest expects with it.
	Unsafe bool
	// ByteRate bounds the bytes per second that the guest reads, writes and
	// zeroes, and OpRate its requests of any kind, over all queues together.
	ByteRate, OpRate Rate
	// NoDiscard keeps the guest from giving up space of the disk: it is offered
	// no discards, and ranges it zeroes stay allocated.
	NoDiscard bool
	// OnError says what becomes of a request for which the disk fails.
	OnError ErrorPolicy
	// Stopped, if it is set, is called with the disk's error whenever ErrorStop
	// has stopped the device, in a goroutine of its own.
	Stopped func(err error)
	// Lost, if it is set, is called with the disk's error when the first write or
	// flush is answered with one, by a worker: what the guest wrote may not be
	// there, and it need not have noticed.
	Lost func(err error)
	// Serial is what the guest reads as the serial number, at most MaxSerial
	// bytes.
	Serial string
	// Name is how log lines call the disk.
	Name string
	// Logger receives the disk's errors, at most a line in a few seconds. Nil
	// means none.
	Logger *slog.Logger
}

// ErrorPolicy is what a device does when its disk fails. Either way the error is
// logged.
type ErrorPolicy int

const (
	// ErrorReport answers the request with an I/O error. The guest decides.
	ErrorReport ErrorPolicy = iota
	// ErrorStop answers neither that request nor any other until Resume. The
	// guest waits, and knows of nothing if the cause is gone by then. Where the
	// system has lost what was written, it never is: such a flush stays failed
	// (B13), and every Resume ends in another stop.
	ErrorStop
)

// ErrConfig is what every error of New wraps.
var ErrConfig = errors.New("blk: impossible configuration")

// Device is a virtio block device. It is a virtio.Device; a transport drives
// it. Stats, Resume and Pause are safe for concurrent use with all else.
type Device struct {
	cfg      Config
	features uint64
	capacity atomic.Uint64 // sectors; written by Resize, read by the workers
	discard  Discarder     // nil if discards are not offered
	zero     ZeroWriter
	punch    bool // a WRITE_ZEROES may deallocate (B8)
	space    [configSize]byte
	serial   [MaxSerial]byte
	log      *slog.Logger
	limit    virtio.LogLimit

	rates rates

	lost   sync.Once    // the call of Config.Lost
	halted atomic.Bool  // by ErrorStop; read by the workers before each request
	paused atomic.Int32 // calls of Pause that have not been ended; likewise

	negotiated uint64 // features; written only while there are no workers

	// writeThrough says that a write is stable when it completes (B11). Set by
	// the driver through the configuration space, read by the workers.
	writeThrough atomic.Bool

	// owed counts how often the cache has been turned off, and paid for how many
	// of these what was in it is stable since. The workers compare them before
	// each request; paid changes under payMu, which is held across the flush.
	owed, paid atomic.Uint64
	payMu      sync.Mutex

	queues []queue // the slice itself is constant
}

// queue is one request queue of a Device, over all its starts.
type queue struct {
	counters counters

	mu     sync.Mutex
	worker *worker           // guarded by mu; nil while the queue is stopped
	past   virtio.QueueStats // guarded by mu; of workers that have ended
}

var _ virtio.Device = (*Device)(nil)

// New returns a device that serves cfg.Disk. The disk stays the caller's, who
// closes it when the device's transport is closed.
func New(cfg Config) (*Device, error) {
	if err := cfg.fillIn(); err != nil {
		return nil, err
	}
	d := &Device{
		cfg:      cfg,
		log:      cfg.Logger,
		queues:   make([]queue, cfg.Queues),
		features: 1<<featureSegMax | 1<<featureBlkSize | 1<<featureFlush | 1<<featureConfigWCE,
	}
	d.setSize(cfg.Disk.Size())
	copy(d.serial[:], cfg.Serial)
	if cfg.Queues > 1 {
		d.features |= 1 << featureMQ
	}
	if cfg.Disk.ReadOnly() {
		d.features |= 1 << featureRO
	} else {
		d.initRanges()
	}
	d.rates.init(cfg.ByteRate, cfg.OpRate)
	d.initSpace()
	d.Negotiated(0)
	return d, nil
}

// fillIn puts the defaults in place and checks the rest.
func (c *Config) fillIn() error {
	if c.Disk == nil {
		return fmt.Errorf("%w: no disk", ErrConfig)
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.QueueSize == 0 {
		c.QueueSize = defaultQueueSize
	}
	if c.BlockSize == 0 {
		c.BlockSize = SectorSize
		if disk, ok := c.Disk.(BlockSizer); ok {
			c.BlockSize = uint32(disk.BlockSize()) //nolint:gosec // G115: checked below
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch size := c.Disk.Size(); {
	case c.Queues < 1 || c.Queues > maxQueues:
		return fmt.Errorf("%w: %d queues; a device has 1 to %d", ErrConfig, c.Queues, maxQueues)
	case c.QueueSize < minQueueSize || c.QueueSize > virtio.MaxQueueSize || bits.OnesCount16(c.QueueSize) != 1:
		return fmt.Errorf("%w: queue size %d; it is a power of 2 from %d to %d", ErrConfig, c.QueueSize, minQueueSize, virtio.MaxQueueSize)
	case c.BlockSize < SectorSize || c.BlockSize > 64<<10 || bits.OnesCount32(c.BlockSize) != 1:
		return fmt.Errorf("%w: block size %d; it is a power of 2 from 512 to 65536", ErrConfig, c.BlockSize)
	case c.OnError != ErrorReport && c.OnError != ErrorStop:
		return fmt.Errorf("%w: error policy %d; it is ErrorReport or ErrorStop", ErrConfig, c.OnError)
	case len(c.Serial) > MaxSerial:
		return fmt.Errorf("%w: serial number %q is longer than %d bytes", ErrConfig, c.Serial, MaxSerial)
	case size < 0 || size%int64(c.BlockSize) != 0:
		return fmt.Errorf("%w: disk %s has %d bytes, which is no multiple of its block size %d", ErrConfig, c.Name, size, c.BlockSize)
	}
	return nil
}

// Resize makes the device as large as size, in bytes, which is a multiple of the
// block size and at most the size of the disk: a disk grows before its device
// does, and shrinks after. Requests beyond the end fail from then on, but those
// under way may still reach the disk.
//
// It changes the configuration space, so a transport has to be told: with
// virtio/pci it is called in Transport.UpdateConfig.
func (d *Device) Resize(size int64) error {
	switch {
	case size < 0 || size%int64(d.cfg.BlockSize) != 0:
		return fmt.Errorf("%w: disk %s cannot have %d bytes, which is no multiple of its block size %d", ErrConfig, d.cfg.Name, size, d.cfg.BlockSize)
	case size > d.cfg.Disk.Size():
		return fmt.Errorf("%w: disk %s cannot have %d bytes, its image has %d", ErrConfig, d.cfg.Name, size, d.cfg.Disk.Size())
	}
	d.setSize(size)
	return nil
}

func (d *Device) setSize(size int64) { d.capacity.Store(uint64(size / SectorSize)) } //nolint:gosec // G115: not negative

// DeviceID implements virtio.Device.
func (d *Device) DeviceID() uint16 { return deviceID }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return d.features }

// Queues implements virtio.Device.
func (d *Device) Queues() (n int, maxSize uint16) { return len(d.queues), d.cfg.QueueSize }

// Negotiated implements virtio.Device.
func (d *Device) Negotiated(features uint64) {
	d.negotiated = features
	// B11(i), B12: a driver that has not taken FLUSH never flushes.
	d.writeThrough.Store(d.cfg.WriteThrough || features&(1<<featureFlush) == 0)
}

// Start implements virtio.Device.
func (d *Device) Start() error { return nil }

// StartQueue implements virtio.Device.
func (d *Device) StartQueue(i int, vq *virtio.Queue) {
	q := &d.queues[i]
	w := newWorker(d, q, vq)
	q.mu.Lock()
	q.worker = w
	q.mu.Unlock()
	go w.run()
}

// StopQueue implements virtio.Device.
func (d *Device) StopQueue(i int) {
	q := &d.queues[i]
	q.mu.Lock()
	w := q.worker
	q.mu.Unlock()
	if w == nil {
		return
	}
	w.stop()
	<-w.done
	q.mu.Lock()
	defer q.mu.Unlock()
	q.worker = nil
	q.past = addStats(q.past, w.ended())
}

// Stop implements virtio.Device.
func (d *Device) Stop() {
	for i := range d.queues {
		q := &d.queues[i]
		q.mu.Lock()
		if q.worker != nil {
			q.worker.stop() // all at once, so that their last requests overlap
		}
		q.mu.Unlock()
	}
	for i := range d.queues {
		d.StopQueue(i)
	}
	d.Negotiated(0)
}

// Resume lets a device go on that ErrorStop has stopped, beginning with the
// requests that failed. If it is not stopped, nothing happens.
func (d *Device) Resume() {
	d.halted.Store(false)
	d.kickWorkers()
}

// Pause lets no queue begin a request until resume is called, and returns once
// those that had begun have been answered. The driver notices nothing but the
// delay; a flush of the disk then covers everything that it has been told is
// written. Several pauses may overlap. resume may be called again, which does
// nothing.
func (d *Device) Pause() (resume func()) {
	d.paused.Add(1)
	for i := range d.queues {
		q := &d.queues[i]
		q.mu.Lock()
		w := q.worker
		q.mu.Unlock()
		if w != nil {
			// A batch that begins after this sees the pause.
			w.busy.Lock()
			w.busy.Unlock() //nolint:staticcheck // SA2001: it was held by the batch under way
		}
	}
	return sync.OnceFunc(func() {
		d.paused.Add(-1)
		d.kickWorkers()
	})
}

// kickWorkers makes every worker look at its queue, and at the device.
func (d *Device) kickWorkers() {
	for i := range d.queues {
		q := &d.queues[i]
		q.mu.Lock()
		if q.worker != nil {
			q.worker.vq.Kick()
		}
		q.mu.Unlock()
	}
}

// flush makes stable what the disk has been given.
func (d *Device) flush() error {
	if d.cfg.Unsafe {
		return nil
	}
	return d.cfg.Disk.Flush()
}

// diskFailed logs an error of the disk, unless there have been too many, and
// returns what the request is to be answered with.
func (d *Device) diskFailed(op string, sector uint64, err error) (code byte) {
	if dropped, ok := d.limit.Allow(); ok {
		d.log.Error("disk error", "disk", d.cfg.Name, "op", op, "sector", sector, "err", err, "held_back", dropped)
	}
	err = fmt.Errorf("disk %s: %s at sector %d: %w", d.cfg.Name, op, sector, err)
	if d.cfg.OnError == ErrorReport {
		if d.cfg.Lost != nil && op != "read" && op != "discard" {
			d.lost.Do(func() { d.cfg.Lost(err) })
		}
		return statusIOErr
	}
	if !d.halted.Swap(true) && d.cfg.Stopped != nil {
		go d.cfg.Stopped(err)
	}
	return noStatus
}

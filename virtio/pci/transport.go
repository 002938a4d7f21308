package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio"
)

// BARSize is the size in bytes, and the alignment, of the one memory BAR of a
// Transport.
const BARSize = 64 << 10

// Where things are in the BAR. The vector table and the pending bits share no
// 8 KiB block with anything else (P14).
const (
	commonBase = 0x0000
	isrBase    = 0x2000
	deviceBase = 0x4000
	notifyBase = 0x6000
	tableBase  = 0x8000
	pbaBase    = 0xa000

	commonLen = 0x3c // up to and with queue_reset (P1)
	isrLen    = 1
	deviceLen = 0x100
	regionLen = 0x2000 // most that any region may take

	notifyMultiplier = 4 // P6: an address of its own for every queue (K3)
)

// Virtio capabilities (virtio 4.1.4).
const (
	capVendor = 0x09

	capCommon = 1 // VIRTIO_PCI_CAP_COMMON_CFG
	capNotify = 2 // VIRTIO_PCI_CAP_NOTIFY_CFG
	capISR    = 3 // VIRTIO_PCI_CAP_ISR_CFG
	capDevice = 4 // VIRTIO_PCI_CAP_DEVICE_CFG
	capPCI    = 5 // VIRTIO_PCI_CAP_PCI_CFG

	capLen       = 16 // of struct virtio_pci_cap
	capBAR       = 4  // offsets in it
	capOffset    = 8
	capLength    = 12
	capPCIData   = 16
	capPCIWindow = 4 // bytes of pci_cfg_data
)

const (
	vendorVirtio = 0x1af4
	deviceBase10 = 0x1040 // PCI device ID of virtio device type 0
	subsysBase   = 0x0040 // subsystem IDs below are for transitional devices

	maxQueues = 64
	noVector  = 0xffff // VIRTIO_MSI_NO_VECTOR

	isrQueue  = 1
	isrConfig = 2

	ringFeatures = 1<<virtio.FeatureIndirectDesc | 1<<virtio.FeatureEventIdx |
		1<<virtio.FeatureVersion1 | 1<<virtio.FeatureRingReset
)

// Options adjust a Transport. The zero value is ready to use.
type Options struct {
	// Logger receives what goes wrong, at most a line in a few seconds where
	// a guest can be the cause. Nil means none.
	Logger *slog.Logger
	// Line is what the pin INTA is wired to, for drivers without MSI-X. Nil
	// means that there is no such pin; they then have to poll.
	Line Line
}

// Transport presents a virtio.Device as a PCI function: the modern, not the
// transitional, transport of virtio 4.1, with MSI-X and the pin INTA.
//
// All methods are safe for concurrent use. One lock, mu, guards every register
// and is held while Host and Device methods run. The exceptions are StopQueue
// and Stop of a device that has been started: they wait for the goroutines that
// work the queues, and run without mu in a goroutine that takes it afterwards to
// finish the reset. The goroutines that work the queues raise interrupts and
// report damage through atomics and a lock of their own, and never take mu; a
// kick takes none.
type Transport struct {
	host Host
	mem  *guest.Memory
	dev  virtio.Device
	log  *slog.Logger

	offered uint64 // features
	maxSize uint16 // of every queue
	msixCap int    // offsets of capabilities in configuration space
	pciCap  int
	limit   virtio.LogLimit

	msix         *msix
	intx         intx
	configVector atomic.Uint32
	needsReset   atomic.Bool // DEVICE_NEEDS_RESET, which is ours alone to set (P20)
	driverOK     atomic.Bool // the driver may be notified

	mu     sync.Mutex
	cfg    configSpace // guarded by mu, as is all below
	mapped guest.GPA   // where the BAR is mapped, or 0
	regs   registers
	queues []queueState // the slice itself is constant

	started     bool // Start has succeeded since the last reset
	held        bool // the device has no queues, although started: the function is no bus master
	holding     bool // a goroutine takes the queues back because of held
	configDirty bool // the device configuration has changed since it was read (P11)
	outdated    bool // it has changed since the driver came, who may have read it before (B14)

	resetting bool       // a reset waits for the device to be quiet
	quiet     *sync.Cond // on mu: resetting has become false
	quiescing int        // calls of quiesceLocked; while there are any, register writes have no effect
	closed    bool
	// queueStops counts the goroutines that wait for queues to be quiet. It grows
	// only while resetting is false.
	queueStops sync.WaitGroup
}

// registers are those of the common configuration that no queue has.
type registers struct {
	deviceFeatureSelect, driverFeatureSelect uint32
	driverFeatures                           uint64
	status                                   uint8
	generation                               uint8
	queueSelect                              uint16
}

// queueState is what the driver has written for one queue.
type queueState struct {
	bell   *virtio.Doorbell
	vector atomic.Uint32 // written under mu, read by whoever works the queue
	stopMu sync.Mutex    // held across StopQueue of a device that has been started, but never with mu

	size                 uint16
	desc, driver, device uint64
	q                    *virtio.Queue // not nil iff queue_enable is 1
	resetting            bool          // queue_reset reads 1
	bound                guest.GPA     // where bell is bound, or 0
}

var (
	_ Function           = (*Transport)(nil)
	_ MMIO               = (*Transport)(nil)
	_ virtio.QueueEvents = (*queueEvents)(nil)
)

// ErrDevice is what New returns, wrapped, for a device it cannot present.
var ErrDevice = errors.New("pci: unusable device")

// New returns the PCI function of dev, not decoding its BAR yet. The guest's
// memory is mem. The caller owns the transport and closes it, which stops dev.
func New(host Host, mem *guest.Memory, dev virtio.Device, opts Options) (*Transport, error) {
	n, maxSize := dev.Queues()
	switch {
	case n < 1 || n > maxQueues:
		return nil, fmt.Errorf("%w: %d queues; there are 1 to %d", ErrDevice, n, maxQueues)
	case maxSize == 0 || maxSize > virtio.MaxQueueSize || maxSize&(maxSize-1) != 0:
		return nil, fmt.Errorf("%w: queue size %d is no power of 2 up to %d", ErrDevice, maxSize, virtio.MaxQueueSize)
	case dev.Features()&ringFeatures != 0:
		return nil, fmt.Errorf("%w: it offers feature bits of the transport", ErrDevice)
	}
	t := &Transport{
		host: host, mem: mem, dev: dev, log: opts.Logger,
		offered: dev.Features() | ringFeatures,
		maxSize: maxSize,
		queues:  make([]queueState, n),
		intx:    intx{line: opts.Line},
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	t.quiet = sync.NewCond(&t.mu)
	var err error
	if t.msix, err = newMSIX(host, n+1); err != nil {
		return nil, err
	}
	for i := range t.queues {
		if t.queues[i].bell, err = virtio.NewDoorbell(); err != nil {
			return nil, errors.Join(err, t.release())
		}
	}
	t.initConfig()
	t.clearLocked()
	return t, nil
}

// initConfig lays out configuration space.
func (t *Transport) initConfig() {
	id := t.dev.DeviceID()
	t.cfg.init(identity{
		vendor:       vendorVirtio,
		device:       deviceBase10 + id,
		subsysVendor: vendorVirtio,
		subsysID:     subsysBase + id,
		revision:     1,
		class:        classOf(id),
	}, BARSize)

	if t.intx.line != nil {
		t.cfg.bytes[cfgIntPin] = pinINTA
	}
	le := binary.LittleEndian
	var body [10]byte
	le.PutUint16(body[0:], uint16(len(t.msix.vectors)-1))
	le.PutUint32(body[2:], tableBase) // in BAR 0
	le.PutUint32(body[6:], pbaBase)
	t.msixCap = t.cfg.addCap(capMSIX, body[:])
	le.PutUint16(t.cfg.writable[t.msixCap+msixCtrl:], msixEnable|msixFuncMask)

	notifyLen := uint32(len(t.queues) * notifyMultiplier)
	t.addVirtioCap(capCommon, commonBase, commonLen)
	t.addVirtioCap(capNotify, notifyBase, notifyLen, notifyMultiplier)
	t.addVirtioCap(capISR, isrBase, isrLen)
	t.addVirtioCap(capDevice, deviceBase, deviceLen)
	// P12: the window's bar, offset, length and data are for the driver.
	t.pciCap = t.addVirtioCap(capPCI, 0, 0, 0)
	t.cfg.writable[t.pciCap+capBAR] = 0xff
	fill(t.cfg.writable[t.pciCap+capOffset:t.pciCap+capPCIData+capPCIWindow], 0xff)
}

// addVirtioCap appends a struct virtio_pci_cap with the extra words after it
// and returns its offset.
func (t *Transport) addVirtioCap(kind byte, offset, length uint32, extra ...uint32) int {
	le := binary.LittleEndian
	b := make([]byte, capLen-2, capLen+8)
	b[0] = byte(capLen + 4*len(extra))
	b[1] = kind
	le.PutUint32(b[capOffset-2:], offset)
	le.PutUint32(b[capLength-2:], length)
	for _, w := range extra {
		b = le.AppendUint32(b, w)
	}
	return t.cfg.addCap(capVendor, b)
}

// classOf is the PCI class code of a virtio device type.
func classOf(id uint16) uint32 {
	switch id {
	case 1:
		return 0x020000 // Ethernet controller
	case 2:
		return 0x018000 // mass storage controller, other
	default:
		return 0xff0000 // unassigned
	}
}

// AssignBAR puts BAR i at addr, as firmware would. The function decodes it once
// the guest enables memory space. Only BAR 0 exists; its size is BARSize.
func (t *Transport) AssignBAR(i int, addr guest.GPA) error {
	if i != 0 {
		return fmt.Errorf("pci: there is no BAR %d, only BAR 0", i)
	}
	if addr%BARSize != 0 {
		return fmt.Errorf("pci: BAR 0 cannot be at %v, it is aligned to its size %#x", addr, BARSize)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cfg.setBAR(addr)
	t.syncDecodeLocked()
	return nil
}

// UpdateConfig calls change, which changes the configuration space of the
// device, and tells the driver, at once or as soon as it is ready (B14). A driver that reads while that happens sees
// the old or the new configuration, or that it must read again (P11). An error of
// change is returned, and means that nothing has changed. change must not call
// the transport.
func (t *Transport) UpdateConfig(change func() error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := change(); err != nil {
		return err
	}
	t.configDirty = true
	t.outdated = t.regs.status != 0
	t.notifyConfig()
	return nil
}

// Reset returns the function to its state at power-on, except that its BAR
// keeps its address. It returns once the device is quiet (P23). Register writes
// that come meanwhile have no effect.
func (t *Transport) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.quiesceLocked()
	if t.closed {
		return
	}
	binary.LittleEndian.PutUint16(t.cfg.bytes[cfgCommand:], 0)
	binary.LittleEndian.PutUint16(t.cfg.bytes[t.msixCap+msixCtrl:], uint16(len(t.msix.vectors)-1))
	clear(t.cfg.bytes[t.pciCap+capOffset : t.pciCap+capPCIData+capPCIWindow])
	t.cfg.bytes[t.pciCap+capBAR] = 0
	t.msix.reset()
	t.syncPinLocked()
	t.syncDecodeLocked()
}

// Close stops the device and takes the function off its host. Afterwards
// nothing touches guest memory or interrupts, and accesses have no effect.
// Closing again does nothing but wait for a Close that is under way.
func (t *Transport) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.quiesceLocked()
	}
	if t.closed {
		return nil // before this call, or by another while this one waited
	}
	t.closed = true
	t.syncDecodeLocked()
	return t.release()
}

// release frees what New has allocated.
func (t *Transport) release() error {
	var errs []error
	for i := range t.queues {
		if bell := t.queues[i].bell; bell != nil {
			errs = append(errs, bell.Close())
		}
	}
	return errors.Join(append(errs, t.msix.close())...)
}

// ReadConfig implements Function.
func (t *Transport) ReadConfig(off uint16, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if int(off) == t.pciCap+capPCIData {
		var data [capPCIWindow]byte
		if bar, n, ok := t.windowLocked(); ok && n == len(p) {
			t.readBARLocked(bar, data[:n])
		}
		copy(t.cfg.bytes[off:], data[:])
	}
	status := t.cfg.uint16(cfgStatus) &^ statusInterrupt
	if t.intx.pending() && !t.msix.enabled.Load() {
		status |= statusInterrupt
	}
	binary.LittleEndian.PutUint16(t.cfg.bytes[cfgStatus:], status)
	t.cfg.read(int(off), p)
}

// syncPinLocked lets the pin INTA be asserted iff nothing forbids it.
func (t *Transport) syncPinLocked() {
	t.intx.block(t.msix.enabled.Load() || t.cfg.uint16(cfgCommand)&commandINTxDisable != 0)
}

// WriteConfig implements Function.
func (t *Transport) WriteConfig(off uint16, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	t.cfg.write(int(off), p)
	lo, hi := int(off), int(off)+len(p)
	switch {
	case lo < cfgBAR0+8 && hi > cfgCommand:
		t.syncDecodeLocked()
		t.syncMasterLocked()
		t.syncPinLocked()
	case lo < t.msixCap+msixCtrl+2 && hi > t.msixCap+msixCtrl:
		t.complain("MSI-X", t.msix.setControl(t.cfg.uint16(t.msixCap+msixCtrl)))
		t.syncPinLocked()
	case lo == t.pciCap+capPCIData: // P12: with the width that the window is set to
		if bar, n, ok := t.windowLocked(); ok && n == len(p) {
			t.writeBARLocked(bar, t.cfg.bytes[off:int(off)+n])
		}
	}
}

// windowLocked returns the place in the BAR that the PCI configuration window
// is set to (P12). ok is false if that is not one whole register of a virtio
// structure.
func (t *Transport) windowLocked() (bar uint64, n int, ok bool) {
	off, length := uint64(t.cfg.uint32(t.pciCap+capOffset)), t.cfg.uint32(t.pciCap+capLength)
	if length != 1 && length != 2 && length != 4 {
		return 0, 0, false
	}
	if t.cfg.bytes[t.pciCap+capBAR] != 0 || off%uint64(length) != 0 {
		return 0, 0, false
	}
	// The vector table and the pending bits belong to no virtio capability.
	return off, int(length), off+uint64(length) <= tableBase
}

// syncDecodeLocked maps the BAR where configuration space now says, and binds
// the doorbells there (P13).
func (t *Transport) syncDecodeLocked() {
	want := guest.GPA(0)
	if t.cfg.memoryEnabled() && !t.closed {
		want = t.cfg.bar()
	}
	if _, ok := want.Add(BARSize); !ok {
		want = 0 // a guest that sizes the BAR while it is decoded
	}
	if want == t.mapped {
		return
	}
	if t.mapped != 0 {
		for i := range t.queues {
			t.unbindLocked(&t.queues[i])
		}
		t.host.UnmapMMIO(t.mapped, t)
		t.mapped = 0
	}
	if want == 0 {
		return
	}
	if err := t.host.MapMMIO(want, BARSize, t); err != nil {
		t.complain("map the BAR", err)
		return
	}
	t.mapped = want
	t.bindLocked()
}

// bindLocked binds the doorbell of every enabled queue that has none bound. A
// host that cannot is no error: the kicks then come through WriteMMIO (K4).
func (t *Transport) bindLocked() {
	if t.mapped == 0 || t.resetting {
		return
	}
	for i := range t.queues {
		s := &t.queues[i]
		if s.q == nil || s.resetting || s.bound != 0 {
			continue
		}
		addr := t.mapped + notifyBase + guest.GPA(i*notifyMultiplier)
		if err := t.host.BindDoorbell(addr, s.bell.FD()); err != nil {
			t.complain("bind a doorbell", err)
			continue
		}
		s.bound = addr
	}
}

func (t *Transport) unbindLocked(s *queueState) {
	if s.bound == 0 {
		return
	}
	if err := t.host.UnbindDoorbell(s.bound, s.bell.FD()); err != nil {
		t.complain("unbind a doorbell", err)
	}
	s.bound = 0
}

// complain logs err, if there is one, unless there have been too many.
func (t *Transport) complain(what string, err error) {
	if err == nil {
		return
	}
	if held, ok := t.limit.Allow(); ok {
		t.log.Warn("virtio-pci: "+what, "err", err, "held_back", held)
	}
}

// queueEvents is the Transport as its queues see it.
type queueEvents Transport

// UsedBuffers implements virtio.QueueEvents.
func (e *queueEvents) UsedBuffers(i int) {
	if !e.msix.enabled.Load() {
		e.intx.raise(isrQueue) // P10
		return
	}
	e.msix.trigger(uint16(e.queues[i].vector.Load()))
}

// QueueBroken implements virtio.QueueEvents.
func (e *queueEvents) QueueBroken(_ int, err *virtio.GuestError) {
	(*Transport)(e).damage(err)
}

// damage sets DEVICE_NEEDS_RESET because of err (P22). It does not take mu.
func (t *Transport) damage(err error) {
	t.complain("device needs a reset", err)
	t.needsReset.Store(true)
	t.notifyConfig()
}

// notifyConfig sends a configuration change notification if the driver is ready
// for one.
func (t *Transport) notifyConfig() {
	if !t.driverOK.Load() {
		return
	}
	t.intx.raise(isrConfig) // P10: before the notification
	if t.msix.enabled.Load() {
		t.msix.trigger(uint16(t.configVector.Load()))
	}
}

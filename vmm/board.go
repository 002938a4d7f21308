package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/virtio/pci"
	"github.com/calfvm/calf/virtio/rng"
	"github.com/calfvm/calf/vmm/internal/acpi"
	"github.com/calfvm/calf/vmm/internal/kvm"
)

// board is the machine of one boot, from power-on to its end. A reboot is a
// new board: nothing of an old guest can reach the next one but through the
// disks.
type board struct {
	m      *Machine
	vm     *kvm.VM
	mem    *guest.Memory
	irqs   *interrupts
	pio    pioBus
	mmio   mmioBus
	pci    *pciBus
	pm     *powerManager
	serial *serial
	entry  boot.Entry
	vcpus  []*vcpu
	blocks []block // in the order of m.disks; guarded by m.mu

	// coalescedMu serialises readers of the ring of coalesced writes.
	coalescedMu sync.Mutex

	once    sync.Once // of the end
	outcome Outcome   // written once, before ended is closed
	err     error     // likewise
	ended   chan struct{}

	bootOnce sync.Once
	booted   chan struct{} // closed when the guest has booted (Config.BootTimeout)

	// closers undo, last first, what newBoard did.
	closers []func() error
}

// newBoard builds the machine of cfg up to, but not including, its first
// instruction. On an error nothing is left of it.
func newBoard(m *Machine) (*board, error) {
	b := &board{m: m, ended: make(chan struct{}), booted: make(chan struct{})}
	steps := []struct {
		done string
		do   func() error
	}{
		{"mapped memory", b.mapMemory},
		{"created the VM", b.createVM},
		{"created the devices", b.createDevices},
		{"loaded the kernel", b.load},
		{"created the vCPUs", b.createVCPUs},
		{"created the virtio devices", b.createVirtio}, // of a guest that restarts
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return nil, errors.Join(err, b.close())
		}
		m.phase(step.done)
	}
	return b, nil
}

func (b *board) onClose(f func() error) { b.closers = append(b.closers, f) }

// close stops the vCPUs and frees everything. It may be called again.
func (b *board) close() error {
	b.stopVCPUs()
	b.m.in.attach(nil)
	var errs []error
	for len(b.closers) > 0 {
		last := len(b.closers) - 1
		f := b.closers[last]
		b.closers = b.closers[:last]
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// mapMemory maps the guest's RAM.
func (b *board) mapMemory() error {
	ram, unmap, err := mapRAM(b.m.cfg.Memory)
	if err != nil {
		return fmt.Errorf("%w: %d MiB of memory cannot be mapped on this host (%w); ask for less", ErrConfig, b.m.cfg.Memory>>20, err)
	}
	b.onClose(unmap)
	low := min(uint64(len(ram)), uint64(lowRAMMax))
	regions := []guest.Region{{Base: 0, Bytes: ram[:low:low]}}
	if low < uint64(len(ram)) {
		regions = append(regions, guest.Region{Base: highRAM, Bytes: ram[low:]})
	}
	b.mem, err = guest.NewMemory(regions...)
	return err
}

// createVM makes the VM and all that the kernel provides of it, over the
// guest's RAM, which stays mapped until the VM is closed.
func (b *board) createVM() error {
	vm, err := b.m.sys.CreateVM()
	if err != nil {
		return fmt.Errorf("%w: %w; another hypervisor may be using the processor", ErrNoKVM, err)
	}
	b.vm = vm
	b.onClose(vm.Close)
	for i, r := range b.mem.Regions() {
		if err := vm.SetUserMemoryRegion(uint32(i), uint64(r.Base), r.Bytes); err != nil {
			return fmt.Errorf("%w: KVM does not take %d MiB of memory at %v (%w); ask for less", ErrConfig, len(r.Bytes)>>20, r.Base, err)
		}
	}
	if err := vm.SetIdentityMapAddr(identityMapAddr); err != nil {
		return err
	}
	if err := vm.SetTSSAddr(tssAddr); err != nil {
		return err
	}
	if err := vm.CreateIRQChip(); err != nil {
		return err
	}
	if err := vm.CreatePIT2(); err != nil {
		return err
	}
	b.irqs, err = newInterrupts(vm)
	return err
}

// createDevices makes everything but the virtio devices.
func (b *board) createDevices() error {
	com1, err := newLine(b.vm, gsiCOM1)
	if err != nil {
		return err
	}
	b.onClose(com1.close)
	b.serial = &serial{in: &b.m.in, out: b.m.out, interrupt: com1.trigger, opened: b.markBooted}
	b.pm = &powerManager{vm: b.vm, end: b.end}
	b.pci = newPCIBus(func(gsi, level uint32) {
		if err := b.vm.IRQLine(gsi, level); err != nil {
			b.fail(err)
		}
	})
	reset := &resetControl{mem: b.mem, end: b.end}
	// The reset register lies within the address register of the PCI bus: the
	// range added first answers.
	b.pio.add(portReset, 1, reset)
	b.pio.add(portI8042Data, 1, reset)
	b.pio.add(portI8042Command, 1, reset)
	b.pio.add(portCOM1, 8, b.serial)
	b.pio.add(portPVPanic, 1, pvpanic{end: b.end})
	b.pio.add(portPM1Event, portPM1Control+2-portPM1Event, b.pm)
	b.pio.add(portPCIAddress, 8, b.pci)
	b.mmio.mapRange(ecamBase, ecamSize, b.pci)
	if b.m.sys.Extension(kvm.CapCoalescedPIO) == 0 {
		return nil // Each byte the guest writes then exits.
	}
	return b.vm.CoalescePIO(portCOM1)
}

// createVirtio puts the disks on the PCI bus, in order, and the devices of slot 0.
func (b *board) createVirtio() error {
	for _, d := range b.m.disks {
		if err := b.createDisk(d); err != nil {
			return err
		}
	}
	if _, err := b.plug(b.pci.freeFunction(), new(rng.Device)); err != nil {
		return fmt.Errorf("entropy device: %w", err)
	}
	if b.m.cfg.Vsock == nil {
		return nil
	}
	if _, err := b.plug(b.pci.freeFunction(), b.m.cfg.Vsock); err != nil {
		return fmt.Errorf("socket device: %w", err)
	}
	return nil
}

// createDisk puts a virtio block device for d on the PCI bus.
func (b *board) createDisk(d Disk) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}()
	dev, err := blk.New(blk.Config{
		Name:      d.Name,
		Disk:      d.Disk,
		Queues:    d.Queues,
		QueueSize: uint16(d.QueueSize), //nolint:gosec // G115: bounded by applyDefaults
		Serial:    d.Serial,
		Logger:    b.m.log,

		WriteThrough: d.WriteThrough,
		Unsafe:       d.Unsafe,
		NoDiscard:    d.NoDiscard,
		ByteRate:     d.ByteRate,
		OpRate:       d.OpRate,
		OnError:      d.OnError,
		Stopped:      d.Stopped,
		Lost:         d.Lost,
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	slot, err := b.pci.freeSlot()
	if err != nil {
		return err
	}
	fn, err := b.plug(slot, bootMarker{dev, b.markBooted})
	if err != nil {
		return err
	}
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	b.blocks = append(b.blocks, block{dev, fn})
	return nil
}

// plug makes dev the function devfn of the PCI bus.
func (b *board) plug(devfn int, dev virtio.Device) (*pci.Transport, error) {
	fn, err := pci.New(pciHost{b}, b.mem, dev, pci.Options{Logger: b.m.log, Line: b.pci.line(devfn)})
	if err != nil {
		return nil, err
	}
	b.onClose(fn.Close)
	if err := fn.AssignBAR(0, bar(devfn)); err != nil {
		return nil, err
	}
	b.pci.functions[devfn] = fn
	return fn, nil
}

// block is a disk as its guest sees it.
type block struct {
	dev *blk.Device
	fn  *pci.Transport
}

// bootMarker is a device that tells when a driver has started it.
type bootMarker struct {
	virtio.Device
	started func()
}

func (d bootMarker) Start() error {
	d.started()
	return d.Device.Start()
}

// load puts the ACPI tables and the kernel into memory.
func (b *board) load() error {
	var inta [slots]uint32
	for slot := range inta {
		inta[slot] = slotGSI(slot)
	}
	tables := acpi.Build(uint64(boot.ACPITables), acpi.Config{
		CPUs:          b.m.cfg.CPUs,
		LocalAPIC:     uint32(lapicAddr),
		IOAPIC:        uint32(ioapicAddr),
		ECAM:          uint32(ecamBase),
		PCIWindow:     uint32(pciWindow),
		PCIWindowSize: pciWinSize,
		INTA:          inta[:],
		SCI:           gsiSCI,
		PM1Event:      portPM1Event,
		PM1Control:    portPM1Control,
		SleepTypeS5:   sleepTypeS5,
		ResetPort:     portReset,
		ResetValue:    resetValue,
		Serial:        portCOM1,
		SerialIRQ:     gsiCOM1,
		PVPanic:       portPVPanic,
	})
	if room := int(boot.HighRAM - boot.ACPITables); len(tables) > room {
		return fmt.Errorf("BUG: %d bytes of ACPI tables, there is room for %d", len(tables), room)
	}
	if err := b.mem.Write(boot.ACPITables, tables); err != nil {
		return fmt.Errorf("%w: %d KiB of memory do not hold a PC; ask for more", ErrConfig, b.m.cfg.Memory>>10)
	}
	return b.loadKernel()
}

// ownCmdline is what the machine needs the kernel to know: where the console
// is, and that a panic ends in a warm reset at once (resetControl tells it from
// a reboot by that).
const ownCmdline = "console=ttyS0 panic=-1 reboot=panic_warm"

func (b *board) loadKernel() error {
	p, err := b.m.payload()
	if err != nil {
		return err
	}
	cfg := boot.Config{
		Kernel:   p.Kernel,
		Initrd:   p.Initrd,
		Cmdline:  ownCmdline,
		RSDP:     boot.ACPITables,
		Reserved: []boot.Range{{Base: ecamBase, Size: ecamSize}},
	}
	for _, more := range []string{p.Cmdline, b.m.cfg.Cmdline} {
		if more != "" {
			cfg.Cmdline += " " + more
		}
	}
	if b.entry, err = boot.Load(b.mem, cfg); err != nil {
		return fmt.Errorf("%w: kernel %q: %w", ErrConfig, p.Name, err)
	}
	return nil
}

func (b *board) createVCPUs() error {
	tscDeadline := b.m.sys.Extension(kvm.CapTSCDeadlineTimer) != 0
	for id := range b.m.cfg.CPUs {
		k, err := b.vm.CreateVCPU(id)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrConfig, err)
		}
		b.onClose(k.Close)
		c := &vcpu{id: id, kvm: k, board: b, done: make(chan struct{})}
		if err := c.setUp(cpuidFor(b.m.cpuid, id, b.m.cfg.CPUs, tscDeadline), b.entry); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		b.vcpus = append(b.vcpus, c)
	}
	return nil
}

// end ends the board: the first call decides how. It waits for nothing, so a
// vCPU may call it.
func (b *board) end(o Outcome) { b.finish(o, nil) }

func (b *board) fail(err error) { b.finish(Unknown, err) }

func (b *board) finish(o Outcome, err error) {
	b.once.Do(func() {
		b.outcome, b.err = o, err
		close(b.ended)
		// Whoever waits for room on the console must see the end as well.
		b.m.out.waive(true)
	})
}

func (b *board) hasEnded() bool {
	select {
	case <-b.ended:
		return true
	default:
		return false
	}
}

func (b *board) markBooted() {
	b.bootOnce.Do(func() {
		close(b.booted)
		b.m.phase("guest booted")
	})
}

// bootExpired ends a guest that has not booted.
func (b *board) bootExpired() {
	select {
	case <-b.booted:
	default:
		b.end(BootTimeout)
	}
}

// coalescedDelay bounds how long a byte may lie in the ring while no vCPU
// exits.
const coalescedDelay = 100 * time.Millisecond

// run starts the vCPUs and waits for the end, which stops them. What may end
// the guest does so from goroutines of its own: this one may have to wait for
// the console.
func (b *board) run(ctx context.Context) (Outcome, error) {
	b.m.in.attach(b.serial.arrived)
	if b.m.in.ready() {
		b.serial.arrived()
	}
	defer context.AfterFunc(ctx, func() { b.finish(Canceled, context.Cause(ctx)) })()
	if b.m.cfg.BootTimeout > 0 {
		defer time.AfterFunc(b.m.cfg.BootTimeout, b.bootExpired).Stop()
	}
	b.m.phase("starting the vCPUs")
	for _, c := range b.vcpus {
		c.started.Store(true)
		go c.loop()
	}
	ticker := time.NewTicker(coalescedDelay)
	defer ticker.Stop()
	for !b.hasEnded() {
		select {
		case <-b.ended:
		case <-ticker.C:
			b.drainCoalesced(b.vcpus[0].kvm)
		}
	}
	b.stopVCPUs()
	return b.outcome, b.err
}

// stopVCPUs ends the loops and waits for them. What the guest wrote last is
// then passed on.
func (b *board) stopVCPUs() {
	if len(b.vcpus) == 0 {
		return
	}
	b.m.out.waive(true)
	for _, c := range b.vcpus {
		c.stop()
	}
	for _, c := range b.vcpus {
		if c.started.Load() {
			<-c.done
		}
	}
	b.drainCoalesced(b.vcpus[0].kvm)
	b.m.out.waive(false)
	b.vcpus = nil
}

// drainCoalesced serves the port writes that the kernel collected, which came
// before whatever a vCPU exited for.
func (b *board) drainCoalesced(c *kvm.VCPU) {
	b.coalescedMu.Lock()
	defer b.coalescedMu.Unlock()
	c.Coalesced(b.pio.write)
}

// pciHost is the board as a PCI function sees it.
type pciHost struct{ b *board }

var _ pci.Host = pciHost{}

func (h pciHost) MapMMIO(base guest.GPA, size uint64, m pci.MMIO) error {
	h.b.mmio.mapRange(base, size, m)
	return nil
}

func (h pciHost) UnmapMMIO(base guest.GPA, m pci.MMIO) { h.b.mmio.unmap(base, m) }

func (h pciHost) BindDoorbell(addr guest.GPA, eventfd int) error {
	return h.b.vm.AssignIOEventFD(uint64(addr), eventfd)
}

func (h pciHost) UnbindDoorbell(addr guest.GPA, eventfd int) error {
	return h.b.vm.DeassignIOEventFD(uint64(addr), eventfd)
}

func (h pciHost) NewInterrupt() (pci.Interrupt, error) { return h.b.irqs.newMSI() }

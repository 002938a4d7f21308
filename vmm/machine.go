package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/virtio"
	"github.com/calfvm/calf/vmm/internal/kvm"
	"golang.org/x/sys/unix"
)

const (
	defaultMemory    = 512 << 20
	defaultQueueSize = 256
	pageSize         = 4096
)

// Machine is a virtual machine. AddDisk, Run and Close belong to one goroutine,
// and Run is called once; PowerButton, ResumeDisks, ResizeDisk and DiskStats may be
// called from any.
type Machine struct {
	cfg    Config
	log    *slog.Logger
	start  time.Time // from which the phases are measured
	sys    *kvm.System
	cpuid  []kvm.CPUIDEntry // what KVM supports
	kernel *os.File         // nil: Config.Boot knows
	initrd *os.File         // nil: none
	out    *consoleOutput
	in     consoleInput
	disks  []Disk

	mu      sync.Mutex // guards what follows
	board   *board     // of the guest that runs, or is to run next; nil between two
	pressed bool       // the power button was pressed while there was no board
}

// New builds a machine without disks. What it cannot be built for is an error
// that names the thing and the mend.
func New(cfg Config) (*Machine, error) {
	m := &Machine{cfg: cfg, log: cfg.Logger, start: cfg.Started}
	if m.start.IsZero() {
		m.start = time.Now()
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if err := m.setUp(); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Machine) setUp() error {
	if err := m.applyDefaults(); err != nil {
		return err
	}
	var err error
	if m.cfg.Kernel != "" {
		if m.kernel, err = openFile("kernel", m.cfg.Kernel); err != nil {
			return err
		}
	}
	if m.cfg.Initrd != "" {
		if m.initrd, err = openFile("initrd", m.cfg.Initrd); err != nil {
			return err
		}
	}
	if m.sys, err = openKVM(m.cfg.AllowEmulation); err != nil {
		return err
	}
	m.phase("opened KVM")
	if m.cpuid, err = m.sys.SupportedCPUID(); err != nil {
		return err
	}
	if err := m.checkLimits(); err != nil {
		return err
	}
	m.out = newConsoleOutput(m.cfg.Console.Out)
	m.board, err = newBoard(m)
	return err
}

func (m *Machine) applyDefaults() error {
	c := &m.cfg
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	switch {
	case c.CPUs < 0:
		return fmt.Errorf("%w: %d vCPUs; ask for at least one", ErrConfig, c.CPUs)
	case c.CPUs > MaxCPUs:
		return fmt.Errorf("%w: %d vCPUs; a machine has at most %d", ErrConfig, c.CPUs, MaxCPUs)
	case c.Memory%pageSize != 0:
		return fmt.Errorf("%w: %d bytes of memory are not a multiple of %d", ErrConfig, c.Memory, pageSize)
	case c.Kernel == "" && c.Boot == nil:
		return fmt.Errorf("%w: no kernel is given; set [boot] kernel in the file, or --kernel", ErrConfig)
	}
	return nil
}

// checkLimits holds the configuration against what this KVM allows.
func (m *Machine) checkLimits() error {
	if limit := m.sys.Extension(kvm.CapMaxVCPUs); m.cfg.CPUs > limit {
		return fmt.Errorf("%w: %d vCPUs; KVM on this host allows %d", ErrConfig, m.cfg.CPUs, limit)
	}
	bits := physicalBits(m.cpuid)
	if last := uint64(highRAM) + m.cfg.Memory; last < m.cfg.Memory || bits < 64 && last > 1<<bits {
		return fmt.Errorf("%w: %d MiB of memory; a guest on this processor has addresses of %d bits, which reach %d MiB",
			ErrConfig, m.cfg.Memory>>20, bits, (uint64(1)<<bits-uint64(highRAM))>>20)
	}
	return nil
}

// openFile opens a regular file that is to be loaded. Opening anything else,
// such as a named pipe, might wait for ever.
func openFile(what, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if pe, ok := errors.AsType[*fs.PathError](err); ok {
			err = pe.Err
		}
		return nil, fmt.Errorf("%w: %s %q: %w", ErrConfig, what, path, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %s %q: %w", ErrConfig, what, path, err), f.Close())
	}
	return f, nil
}

// payload returns what to boot now.
func (m *Machine) payload() (Payload, error) {
	p := Payload{Name: m.cfg.Kernel}
	var err error
	if m.kernel == nil {
		p, err = m.cfg.Boot()
	} else {
		p.Kernel, err = bootFile(m.kernel)
	}
	if err != nil {
		return Payload{}, fmt.Errorf("%w: kernel: %w", ErrConfig, err)
	}
	if m.initrd != nil {
		initrd, err := bootFile(m.initrd)
		if err != nil {
			return Payload{}, fmt.Errorf("%w: initrd: %w", ErrConfig, err)
		}
		p.Initrd = &initrd
	}
	if first := m.cfg.FirstInitrd; first != nil {
		files := []boot.File{*first}
		if p.Initrd != nil {
			files = append(files, *p.Initrd)
		}
		all := boot.Join(files...)
		p.Initrd = &all
	}
	return p, nil
}

func bootFile(f *os.File) (boot.File, error) {
	info, err := f.Stat()
	if err != nil {
		return boot.File{}, err
	}
	return boot.File{ReaderAt: f, Size: info.Size()}, nil
}

// AddDisk plugs a disk into the machine, before Run. The guest finds disks in
// the order in which they were added: vda, vdb, …. A disk belongs to the
// caller, who closes it after Close.
func (m *Machine) AddDisk(d Disk) error {
	if d.QueueSize < 0 || d.QueueSize > virtio.MaxQueueSize {
		return fmt.Errorf("%w: disk %s: a queue size of %d; ask for at most %d", ErrConfig, d.Name, d.QueueSize, virtio.MaxQueueSize)
	}
	if d.Queues == 0 {
		d.Queues = m.cfg.CPUs
	}
	if d.QueueSize == 0 {
		d.QueueSize = defaultQueueSize
	}
	if err := m.board.createDisk(d); err != nil {
		return err
	}
	m.disks = append(m.disks, d)
	return nil
}

// needed is what all machines of this process that run need of GOMAXPROCS.
var needed struct {
	mu sync.Mutex
	n  int // guarded by mu
}

// makeRoom raises GOMAXPROCS to the number of vCPUs and queues and a few more, of all
// machines that run, so that a vCPU in the guest never keeps a queue's worker from
// running. leave says that this one needs no more.
func (m *Machine) makeRoom() (leave func()) {
	n := m.cfg.CPUs + 2
	for _, d := range m.disks {
		n += d.Queues
	}
	needed.mu.Lock()
	defer needed.mu.Unlock()
	needed.n += n
	if needed.n > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(needed.n)
	}
	return func() {
		needed.mu.Lock()
		defer needed.mu.Unlock()
		needed.n -= n
	}
}

// phase logs how far the way to the first instruction has been gone.
func (m *Machine) phase(what string) {
	m.log.Debug(what, "since_start", time.Since(m.start).Round(time.Microsecond))
}

// Run runs the guest until it ends, and says how. An end of ctx ends the guest
// as a power cut would; the outcome is then Canceled and the error the cause of
// ctx. Any other error is the host's.
//
// Run raises GOMAXPROCS where vCPUs and queues need it.
func (m *Machine) Run(ctx context.Context) (Outcome, error) {
	defer m.makeRoom()()
	m.in.start(m.cfg.Console.In)
	for {
		outcome, err := m.board.run(ctx)
		m.log.Debug("guest ended", "outcome", outcome)
		err = errors.Join(err, m.unplug())
		if outcome != Reboot || m.cfg.NoReboot || err != nil {
			return outcome, err
		}
		m.start = time.Now()
		next, err := newBoard(m)
		if err != nil {
			return Unknown, fmt.Errorf("restart the guest: %w", err)
		}
		if err := m.plug(next); err != nil {
			return Unknown, err
		}
	}
}

// plug makes b the machine's board.
func (m *Machine) plug(b *board) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.board = b
	if !m.pressed {
		return nil
	}
	m.pressed = false
	return b.pm.pressButton()
}

// unplug frees the machine's board, if there is one.
func (m *Machine) unplug() error {
	m.mu.Lock()
	b := m.board
	m.board = nil
	m.mu.Unlock()
	if b == nil {
		return nil
	}
	return b.close()
}

// PowerButton asks the guest to power off, as the button of a PC would. A
// guest that does not listen goes on.
func (m *Machine) PowerButton() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.board == nil {
		m.pressed = true
		return nil
	}
	return m.board.pm.pressButton()
}

// ResumeDisks lets disks go on that have stopped because of an error
// (blk.ErrorStop), beginning with the requests that failed. It may be called from
// any goroutine.
func (m *Machine) ResumeDisks() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.board == nil {
		return
	}
	for _, b := range m.board.blocks {
		b.dev.Resume()
	}
}

// ResizeDisk tells the guest that disk i, counted from 0 as they were added, has
// size bytes now, and makes that the bound of its requests. The image has to have
// grown before; a disk that is to shrink is told first (see blk.Device.Resize). It
// may be called from any goroutine once Run has been. Between two boots it fails
// with ErrNoGuest.
func (m *Machine) ResizeDisk(i int, size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := m.block(i)
	if err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	return b.fn.UpdateConfig(func() error { return b.dev.Resize(size) })
}

// DiskStats returns what each queue of disk i, counted from 0 as they were added,
// has done since the guest booted. It may be called from any goroutine once Run has
// been. Between two boots it fails with ErrNoGuest.
func (m *Machine) DiskStats(i int) ([]blk.QueueStats, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := m.block(i)
	if err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	return b.dev.Stats(), nil
}

// block returns the device of disk i. mu is held.
func (m *Machine) block(i int) (block, error) {
	if i < 0 || i >= len(m.disks) {
		return block{}, fmt.Errorf("%w: there is no disk %d, only %d disks from 0 on", ErrConfig, i, len(m.disks))
	}
	if m.board == nil {
		return block{}, fmt.Errorf("disk %d: %w", i, ErrNoGuest)
	}
	return m.board.blocks[i], nil
}

// Close frees the machine, which must not be running, and waits until the
// console has taken what the guest wrote.
func (m *Machine) Close() error {
	errs := []error{m.unplug()}
	m.in.close()
	if m.out != nil {
		if err := m.out.close(); err != nil {
			errs = append(errs, fmt.Errorf("console: %w", err))
		}
		m.out = nil
	}
	if m.sys != nil {
		errs = append(errs, m.sys.Close())
		m.sys = nil
	}
	for _, f := range []**os.File{&m.kernel, &m.initrd} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

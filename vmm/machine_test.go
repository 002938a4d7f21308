package vmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	guestboot "github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/vmm"
)

// needKVM skips a test where /dev/kvm cannot be opened. It need not be backed
// by hardware: the guests are a few dozen instructions long.
func needKVM(tb testing.TB) {
	tb.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		tb.Skipf("needs /dev/kvm: %v", err)
	}
	if err := f.Close(); err != nil {
		tb.Fatal(err)
	}
}

// output is a console that tests read.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// waitFor waits until the console has shown s.
func (o *output) waitFor(tb testing.TB, s string) {
	tb.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !strings.Contains(o.String(), s) {
		if time.Now().After(deadline) {
			tb.Errorf("the console never showed %q; it shows %q", s, o.String())
			return
		}
		time.Sleep(time.Millisecond)
	}
}

var errStopped = errors.New("stopped by the test")

// run boots p and returns how it ended and what it wrote.
func run(tb testing.TB, p *guesttest.Program, change func(*vmm.Config), disks ...vmm.Disk) (vmm.Outcome, string) {
	tb.Helper()
	needKVM(tb)
	out := &output{}
	cfg := vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(tb), NoReboot: true, AllowEmulation: true, Console: vmm.Console{Out: out}}
	if change != nil {
		change(&cfg)
	}
	m, err := vmm.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	for _, d := range disks {
		if err := m.AddDisk(d); err != nil {
			tb.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), 20*time.Second, errors.New("the guest did not end"))
	defer cancel()
	outcome, err := m.Run(ctx)
	if err != nil {
		tb.Errorf("Run: %v", err)
	}
	if err := m.Close(); err != nil {
		tb.Errorf("Close: %v", err)
	}
	return outcome, out.String()
}

func TestOutcomes(t *testing.T) {
	tests := []struct {
		name  string
		build func(p *guesttest.Program)
		want  vmm.Outcome
	}{
		{"power-off", func(p *guesttest.Program) { p.PowerOff() }, vmm.PowerOff},
		{"reset register", func(p *guesttest.Program) { p.Reset() }, vmm.Reboot},
		{"keyboard controller", func(p *guesttest.Program) {
			p.In8(0x64)
			p.Expect(0) // ready for a command
			p.Out8(0x64, 0xFE)
			p.Halt()
		}, vmm.Reboot},
		{"warm reset is a panic", func(p *guesttest.Program) {
			p.Write16(0x472, 0x1234)
			p.Reset()
		}, vmm.Panic},
		{"panic notifier", func(p *guesttest.Program) {
			p.Out8(0x505, 1)
			p.Halt()
		}, vmm.Panic},
		{"triple fault", func(p *guesttest.Program) {
			p.Write64(guesttest.Scratch, 0)
			p.Raw(0x0F, 0x01, 0x1D) // lidt [Scratch], an empty table
			p.Raw(0x00, 0x00, 0x00, 0x02)
			p.Raw(0x31, 0xC0, 0xF7, 0xF0) // xor eax, eax; div eax
		}, vmm.TripleFault},
		{"a sleep type that is not S5 is none", func(p *guesttest.Program) {
			p.Out16(0x604, 3<<10|1<<13)
			p.PowerOff()
		}, vmm.PowerOff},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var p guesttest.Program
			p.Print("hello")
			tt.build(&p)
			got, console := run(t, &p, nil)
			if got != tt.want || console != "hello" {
				t.Errorf("the guest ended with %v, console %q; want %v, %q", got, console, tt.want, "hello")
			}
		})
	}
}

// TestReboot has a guest restart until its disk-less memory would tell it that
// it had run before: every boot must begin with fresh memory.
func TestReboot(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	p.Read32(guesttest.Scratch)
	p.Expect(0)
	p.Write32(guesttest.Scratch, 1)
	p.Print("boot\n")
	p.Reset()
	out := &output{}
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), AllowEmulation: true, Console: vmm.Console{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		out.waitFor(t, strings.Repeat("boot\n", 5))
		cancel(errStopped)
	}()
	if got, err := m.Run(ctx); got != vmm.Canceled || !errors.Is(err, errStopped) {
		t.Errorf("Run = %v, %v; want %v, %v", got, err, vmm.Canceled, errStopped)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if strings.Contains(out.String(), "!") {
		t.Errorf("a guest saw the memory of the one before it: %q", out.String())
	}
}

// TestBoot: where a function says what to boot, it is asked for every start.
func TestBoot(t *testing.T) {
	var first, second guesttest.Program
	first.Print("first ")
	first.Reset()
	second.Print("second")
	second.PowerOff()
	programs := []*guesttest.Program{&first, &second}
	outcome, console := run(t, new(guesttest.Program), func(c *vmm.Config) {
		c.Kernel, c.NoReboot = "", false
		c.Boot = func() (vmm.Payload, error) {
			if len(programs) == 0 {
				return vmm.Payload{}, errors.New("asked too often")
			}
			b := programs[0].ELF()
			programs = programs[1:]
			return vmm.Payload{Name: "disk", Kernel: guestboot.File{ReaderAt: bytes.NewReader(b), Size: int64(len(b))}}, nil
		}
	})
	if outcome != vmm.PowerOff || console != "first second" {
		t.Errorf("%v, console %q", outcome, console)
	}
}

// TestStop ends guests that never leave the processor, at every moment of
// their life: none may be missed (the kick protocol of package vmm).
func TestStop(t *testing.T) {
	needKVM(t)
	for name, build := range map[string]func(*guesttest.Program){
		"spinning": (*guesttest.Program).Spin,
		"halted":   (*guesttest.Program).Halt,
		"exiting":  func(p *guesttest.Program) { p.PollPort(0x64, 0xFF, 1) }, // which it never reads
	} {
		t.Run(name, func(t *testing.T) {
			var p guesttest.Program
			build(&p)
			kernel := p.Kernel(t)
			for i := range 40 {
				m, err := vmm.New(vmm.Config{CPUs: 1 + i%3, Memory: 64 << 20, Kernel: kernel, AllowEmulation: true})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*100*time.Microsecond)
				if got, err := m.Run(ctx); got != vmm.Canceled || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Run = %v, %v", got, err)
				}
				cancel()
				if err := m.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestBootTimeout(t *testing.T) {
	var p guesttest.Program
	p.Halt()
	if got, _ := run(t, &p, func(c *vmm.Config) { c.BootTimeout = 20 * time.Millisecond }); got != vmm.BootTimeout {
		t.Errorf("a guest that starts no process ended with %v, want %v", got, vmm.BootTimeout)
	}
	for name, boot := range map[string]func(p *guesttest.Program){
		"console": func(p *guesttest.Program) { p.Out8(0x3F9, 0x05) },
		"disk": func(p *guesttest.Program) {
			d := driver{Program: p, slot: 1, bar: 0xC000_0000}
			d.start(d.findCapabilities(), 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var p guesttest.Program
			p.Out8(0x3F9, 0x0F) // as a driver does that looks for the port
			p.Out8(0x3F9, 0)
			boot(&p)
			p.Halt()
			m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), BootTimeout: 200 * time.Millisecond, AllowEmulation: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := m.AddDisk(vmm.Disk{Name: "disk", Disk: &memDisk{b: make([]byte, 64<<10)}}); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 600*time.Millisecond)
			defer cancel()
			if got, err := m.Run(ctx); got != vmm.Canceled {
				t.Errorf("a guest that had booted ended with %v, %v; want %v", got, err, vmm.Canceled)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestProbeIsNoBoot: looking for the serial port is not opening it.
func TestProbeIsNoBoot(t *testing.T) {
	var p guesttest.Program
	p.Out8(0x3F9, 0x0F)
	p.Out8(0x3F9, 0)
	p.Halt()
	if got, _ := run(t, &p, func(c *vmm.Config) { c.BootTimeout = 100 * time.Millisecond }); got != vmm.BootTimeout {
		t.Errorf("the guest ended with %v, want %v", got, vmm.BootTimeout)
	}
}

func TestPowerButton(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	p.Out16(0x602, 1<<8) // enable
	p.Print("ready")
	p.PollPort(0x600, 1<<8, 1<<8)
	p.Out16(0x600, 1<<8) // acknowledge
	p.In16(0x600)
	p.Expect(0)
	p.PowerOff()
	out := &output{}
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), NoReboot: true, AllowEmulation: true, Console: vmm.Console{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		out.waitFor(t, "ready")
		if err := m.PowerButton(); err != nil {
			t.Error(err)
		}
	}()
	if got, err := m.Run(context.Background()); got != vmm.PowerOff || err != nil {
		t.Errorf("Run = %v, %v; want %v; console %q", got, err, vmm.PowerOff, out.String())
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestConsoleInput echoes what the host types.
func TestConsoleInput(t *testing.T) {
	r, w := io.Pipe()
	defer func() { _ = w.Close() }() // A pipe's Close returns no error.
	go func() {
		_, _ = w.Write([]byte("xyz")) // Fails only when the guest has ended.
	}()
	var p guesttest.Program
	for _, c := range "xyz" {
		p.PollPort(0x3FD, 1, 1) // line status: data ready
		p.In8(0x3F8)
		p.Expect(uint32(c))
		p.Out8(0x3F8, byte(c))
	}
	p.PowerOff()
	got, console := run(t, &p, func(c *vmm.Config) { c.Console.In = r })
	if got != vmm.PowerOff || console != "xyz" {
		t.Errorf("the guest ended with %v, console %q", got, console)
	}
}

// TestMemoryMap looks at both ends of RAM around the hole below 4 GiB.
func TestMemoryMap(t *testing.T) {
	var p guesttest.Program
	p.Write32(0xBFFF_FFFC, 0x1111_2222)
	p.Read32(0xBFFF_FFFC)
	p.Expect(0x1111_2222)
	p.Read32(0xD000_0000) // the PCI window, nothing there
	p.Expect(0xFFFF_FFFF)
	p.Read32(0xE000_0000) // the mapped configuration space: the host bridge
	p.Expect(0x0008_1B36)
	p.PowerOff()
	// 5 GiB of RAM that the test machine need not have.
	if got, console := run(t, &p, func(c *vmm.Config) { c.Memory = 5 << 30 }); got != vmm.PowerOff {
		t.Errorf("the guest ended with %v, console %q", got, console)
	}
}

// TestProcessors starts every other vCPU as a kernel does, by INIT and
// start-up interrupts, and has each count itself.
func TestProcessors(t *testing.T) {
	const (
		startPage = 8 // of the real-mode code, in pages
		counter   = 0x9000
		icr       = 0xFEE0_0300
		allOthers = 3 << 18
		initIPI   = 5<<8 | 1<<14
		startIPI  = 6<<8 | 1<<14
	)
	for _, cpus := range []int{1, 2, 16, 32} {
		t.Run(fmt.Sprintf("cpus=%d", cpus), func(t *testing.T) {
			var p guesttest.Program
			// lock inc dword [counter]; hlt; jmp -3
			for i, b := range []byte{0xF0, 0x66, 0xFF, 0x06, counter & 0xFF, counter >> 8, 0xF4, 0xEB, 0xFD} {
				p.Write8(startPage<<12+uint32(i), b)
			}
			p.Write32(0xFEE0_00F0, 0x1FF) // local APIC on
			p.Write32(icr, allOthers|initIPI)
			p.Write32(icr, allOthers|startIPI|startPage)
			p.Poll(counter, 0xFFFF_FFFF, uint32(cpus-1))
			p.PowerOff()
			if got, console := run(t, &p, func(c *vmm.Config) { c.CPUs = cpus }); got != vmm.PowerOff {
				t.Errorf("the guest ended with %v, console %q", got, console)
			}
		})
	}
}

func TestBadConfig(t *testing.T) {
	needKVM(t)
	dir := t.TempDir()
	var p guesttest.Program
	p.PowerOff()
	kernel := p.Kernel(t)
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not a kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*vmm.Config)
		want   string
	}{
		{"no kernel", func(c *vmm.Config) { c.Kernel = "" }, "no kernel is given"},
		{"no payload", func(c *vmm.Config) {
			c.Kernel, c.Boot = "", func() (vmm.Payload, error) { return vmm.Payload{}, errors.New("nothing there") }
		}, "nothing there"},
		{"a payload that is none", func(c *vmm.Config) {
			c.Kernel, c.Boot = "", func() (vmm.Payload, error) {
				return vmm.Payload{Name: "on the disk", Kernel: guestboot.File{ReaderAt: strings.NewReader("text"), Size: 4}}, nil
			}
		}, `kernel "on the disk"`},
		{"missing kernel", func(c *vmm.Config) { c.Kernel = filepath.Join(dir, "none") }, "no such file"},
		{"a directory", func(c *vmm.Config) { c.Kernel = dir }, "not a regular file"},
		{"not a kernel", func(c *vmm.Config) { c.Kernel = text }, "neither a bzImage (vmlinuz) nor an ELF file (vmlinux)"},
		{"missing initrd", func(c *vmm.Config) { c.Initrd = filepath.Join(dir, "none") }, "initrd"},
		{"empty initrd", func(c *vmm.Config) { c.Initrd = os.DevNull }, "not a regular file"},
		{"too many vCPUs", func(c *vmm.Config) { c.CPUs = 100_000 }, "100000 vCPUs"},
		{"negative vCPUs", func(c *vmm.Config) { c.CPUs = -1 }, "-1 vCPUs"},
		{"odd memory", func(c *vmm.Config) { c.Memory = 1<<20 + 1 }, "multiple of 4096"},
		{"tiny memory", func(c *vmm.Config) { c.Memory = 64 << 10 }, "64 KiB of memory"},
		{"too little memory", func(c *vmm.Config) { c.Memory = 2 << 20 }, "needs 17 MiB"},
		{"huge memory", func(c *vmm.Config) { c.Memory = 1 << 62 }, "memory"},
		{"endless memory", func(c *vmm.Config) { c.Memory = 1<<64 - 4096 }, "memory"},
		{"long command line", func(c *vmm.Config) { c.Cmdline = strings.Repeat("x", 1<<16) }, "command line"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := vmm.Config{Memory: 64 << 20, Kernel: kernel, AllowEmulation: true}
			tt.change(&cfg)
			m, err := vmm.New(cfg)
			if err == nil {
				_ = m.Close() // The failure is that there is a machine at all.
				t.Fatal("New accepted it")
			}
			if !errors.Is(err, vmm.ErrConfig) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("New: %v\nwant one line with %q", err, tt.want)
			}
		})
	}
}

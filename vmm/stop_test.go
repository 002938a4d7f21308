package vmm_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/vmm"
	"golang.org/x/sys/unix"
)

// stuckWriter takes nothing until it is released.
type stuckWriter chan struct{}

func (w stuckWriter) Write(p []byte) (int, error) {
	<-w
	return len(p), nil
}

// TestStopWithStuckConsole: a console that nobody reads makes the guest wait,
// and keeps nothing from ending it.
func TestStopWithStuckConsole(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	p.Raw(0x66, 0xBA, 0xF8, 0x03) // mov dx, 0x3F8
	p.Raw(0xEE, 0xEB, 0xFD)       // out dx, al; jmp -3
	kernel := p.Kernel(t)
	for name, test := range map[string]struct {
		change func(*vmm.Config)
		limit  time.Duration // of the context
		want   vmm.Outcome
	}{
		"context":      {func(*vmm.Config) {}, time.Second, vmm.Canceled},
		"boot timeout": {func(c *vmm.Config) { c.BootTimeout = time.Second }, time.Minute, vmm.BootTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			stuck := make(stuckWriter)
			cfg := vmm.Config{CPUs: 1, Memory: 64 << 20, Kernel: kernel, AllowEmulation: true, Console: vmm.Console{Out: stuck}}
			test.change(&cfg)
			m, err := vmm.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), test.limit)
			defer cancel()
			done := make(chan vmm.Outcome)
			go func() {
				outcome, _ := m.Run(ctx)
				done <- outcome
			}()
			select {
			case got := <-done:
				if got != test.want {
					t.Errorf("the guest ended with %v, want %v", got, test.want)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the guest runs on")
			}
			close(stuck)
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStopWithBlockedSignals runs TestStop in a process that was started with
// every signal blocked, as some daemons start theirs.
func TestStopWithBlockedSignals(t *testing.T) {
	needKVM(t)
	env, err := exec.LookPath("env")
	if err != nil || exec.Command(env, "--block-signal", "true").Run() != nil {
		t.Skip("needs env --block-signal of GNU coreutils")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, env, "--block-signal", self, "-test.run=^TestStop$/spinning")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("with signals blocked: %v\n%s", err, out)
	}
}

// TestPowerButtonWhileRebooting presses the button all the time while a guest
// restarts again and again: no press fails, and the last one is heard.
func TestPowerButtonWhileRebooting(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	p.Print("boot\n")
	p.Reset()
	out := &output{}
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), AllowEmulation: true, Console: vmm.Console{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := m.Run(ctx); !errors.Is(err, errStopped) {
			t.Errorf("Run: %v", err)
		}
	}()
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
		if err := m.PowerButton(); err != nil {
			t.Fatalf("PowerButton: %v", err)
		}
	}
	cancel(errStopped)
	<-done
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestEarlyPowerButton: a guest that clears the event before it enables it, as
// ACPICA does, still hears a press from before.
func TestEarlyPowerButton(t *testing.T) {
	var p guesttest.Program
	p.PollPort(0x600, 1<<8, 1<<8) // pressed, and nobody listens yet
	p.Out16(0x600, 1<<8)          // cleared
	p.In16(0x600)
	p.Expect(0)
	p.Out16(0x602, 1<<8) // enabled
	p.In16(0x600)
	p.Expect(1 << 8)
	p.Out16(0x600, 1<<8) // acknowledged
	p.Out16(0x602, 0)
	p.Out16(0x602, 1<<8)
	p.In16(0x600)
	p.Expect(0)
	p.PowerOff()
	needKVM(t)
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), NoReboot: true, AllowEmulation: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.PowerButton(); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Run(context.Background()); got != vmm.PowerOff || err != nil {
		t.Errorf("Run = %v, %v; want %v", got, err, vmm.PowerOff)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestNothingAfterTheEnd: a guest that has powered off executes no further
// instruction.
func TestNothingAfterTheEnd(t *testing.T) {
	for range 20 {
		var p guesttest.Program
		p.Print("a")
		p.Out16(0x604, 5<<10|1<<13)
		p.Print("b")
		p.Halt()
		if got, console := run(t, &p, nil); got != vmm.PowerOff || console != "a" {
			t.Fatalf("the guest ended with %v, console %q", got, console)
		}
	}
}

// TestNamedPipe: a kernel that is no file is refused and not waited for.
func TestNamedPipe(t *testing.T) {
	needKVM(t)
	pipe := t.TempDir() + "/pipe"
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := vmm.New(vmm.Config{Kernel: pipe, AllowEmulation: true}); !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("New: %v, want %v", err, vmm.ErrConfig)
	}
}

// TestTooManyDisks fills the bus.
func TestTooManyDisks(t *testing.T) {
	needKVM(t)
	var p guesttest.Program
	p.PowerOff()
	m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: p.Kernel(t), AllowEmulation: true})
	if err != nil {
		t.Fatal(err)
	}
	disk := &memDisk{b: make([]byte, 64<<10)}
	for i := range vmm.MaxDisks {
		if err := m.AddDisk(vmm.Disk{Name: "disk", Disk: disk}); err != nil {
			t.Fatalf("disk %d: %v", i, err)
		}
	}
	if err := m.AddDisk(vmm.Disk{Name: "disk", Disk: disk}); !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("one disk too many: %v, want %v", err, vmm.ErrConfig)
	}
	if got, err := m.Run(context.Background()); got != vmm.PowerOff || err != nil {
		t.Errorf("Run = %v, %v", got, err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

package vmm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"testing"

	"github.com/calfvm/calf/guest/guesttest"
	"github.com/calfvm/calf/vmm"
)

// BenchmarkConsole has a guest write as Linux's console driver does: the line
// status, then a byte. A byte costs one exit, that of the status.
func BenchmarkConsole(b *testing.B) {
	const bytesOut = 20_000
	var p guesttest.Program
	p.Raw(0xB9) // mov ecx, bytesOut
	p.Raw(binary.LittleEndian.AppendUint32(nil, bytesOut)...)
	p.Raw(
		0x66, 0xBA, 0xFD, 0x03, // loop: mov dx, 0x3FD
		0xEC,                   // in al, dx
		0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3F8
		0xB0, 'x', // mov al, 'x'
		0xEE,       // out dx, al
		0x49,       // dec ecx
		0x75, 0xF1, // jnz loop
	)
	p.PowerOff()
	needKVM(b)
	kernel := p.Kernel(b)
	b.SetBytes(bytesOut)
	for b.Loop() {
		m, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: kernel, AllowEmulation: true, Console: vmm.Console{Out: io.Discard}})
		if err != nil {
			b.Fatal(err)
		}
		if got, err := m.Run(context.Background()); got != vmm.PowerOff || err != nil {
			b.Fatalf("Run = %v, %v", got, err)
		}
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestConsoleBytes: every byte of such a guest arrives, in order.
func TestConsoleBytes(t *testing.T) {
	const bytesOut = 20_000
	var p guesttest.Program
	p.Raw(0xB9) // mov ecx, bytesOut
	p.Raw(binary.LittleEndian.AppendUint32(nil, bytesOut)...)
	p.Raw(
		0x66, 0xBA, 0xF8, 0x03, // loop: mov dx, 0x3F8
		0x88, 0xC8, // mov al, cl
		0xEE,       // out dx, al
		0x49,       // dec ecx
		0x75, 0xF6, // jnz loop
	)
	p.PowerOff()
	var want []byte
	for i := bytesOut; i > 0; i-- {
		want = append(want, byte(i))
	}
	if got, console := run(t, &p, nil); got != vmm.PowerOff || !bytes.Equal([]byte(console), want) {
		t.Errorf("the guest ended with %v and %d bytes, want %d", got, len(console), len(want))
	}
}

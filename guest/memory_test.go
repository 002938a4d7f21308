package guest_test

import (
	"errors"
	"math"
	"testing"

	"github.com/calfvm/calf/guest"
)

func TestGPAAdd(t *testing.T) {
	tests := []struct {
		a    guest.GPA
		n    uint64
		want guest.GPA
		ok   bool
	}{
		{0, 0, 0, true},
		{1, 2, 3, true},
		{math.MaxUint64, 0, math.MaxUint64, true},
		{math.MaxUint64, 1, 0, false},
		{1, math.MaxUint64, 0, false},
		{1 << 63, 1 << 63, 0, false},
	}
	for _, tt := range tests {
		if got, ok := tt.a.Add(tt.n); got != tt.want || ok != tt.ok {
			t.Errorf("%v.Add(%#x) = %v, %v; want %v, %v", tt.a, tt.n, got, ok, tt.want, tt.ok)
		}
	}
}

func TestMemoryBounds(t *testing.T) {
	low, high := make([]byte, 0x1000), make([]byte, 0x2000)
	m, err := guest.NewMemory(guest.Region{Base: 0x1000, Bytes: low}, guest.Region{Base: 0x4000, Bytes: high})
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Size(); got != 0x3000 {
		t.Errorf("Size = %#x, want 0x3000", got)
	}
	tests := []struct {
		addr guest.GPA
		n    uint64
		want *byte // first byte of the slice; nil: ErrNotRAM
	}{
		{0x1000, 1, &low[0]},
		{0x1000, 0x1000, &low[0]},
		{0x1FFF, 1, &low[0xFFF]},
		{0x4000, 0x2000, &high[0]},
		{0x5FFF, 1, &high[0x1FFF]},
		{0, 1, nil},
		{0xFFF, 2, nil},
		{0x1000, 0x1001, nil},
		{0x1FFF, 2, nil},
		{0x2000, 0, nil},
		{0x2000, 1, nil},
		{0x3FFF, 2, nil},
		{0x5FFF, 2, nil},
		{0x6000, 1, nil},
		{0x1001, math.MaxUint64, nil},
		{0x5FFF, math.MaxUint64 - 0x5FFE, nil},
		{math.MaxUint64, 1, nil},
		{math.MaxUint64, math.MaxUint64, nil},
	}
	for _, tt := range tests {
		b, err := m.Slice(tt.addr, tt.n)
		if tt.want == nil {
			if !errors.Is(err, guest.ErrNotRAM) || b != nil {
				t.Errorf("Slice(%v, %#x) = %d bytes, %v; want ErrNotRAM", tt.addr, tt.n, len(b), err)
			}
			continue
		}
		if err != nil || uint64(len(b)) != tt.n || uint64(cap(b)) != tt.n || &b[0] != tt.want {
			t.Errorf("Slice(%v, %#x) = %d bytes of capacity %d, %v", tt.addr, tt.n, len(b), cap(b), err)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = m.Slice(0x4000, 0x1000) }); n != 0 {
		t.Errorf("Slice allocates %v times", n)
	}
}

func TestMemoryCopies(t *testing.T) {
	m, err := guest.NewMemory(guest.Region{Base: 0, Bytes: make([]byte, 16)})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Write(4, []byte("calf")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if err := m.Read(4, got); err != nil || string(got) != "calf" {
		t.Errorf("Read = %q, %v", got, err)
	}
	if err := m.Write(14, []byte("calf")); !errors.Is(err, guest.ErrNotRAM) {
		t.Errorf("a write past the end: %v", err)
	}
	if err := m.Read(14, got); !errors.Is(err, guest.ErrNotRAM) || string(got) != "calf" {
		t.Errorf("a read past the end: %q, %v", got, err)
	}
}

func TestNewMemoryRefuses(t *testing.T) {
	page := make([]byte, 0x1000)
	for name, regions := range map[string][]guest.Region{
		"empty":      {{Base: 0}},
		"overlap":    {{Base: 0, Bytes: page}, {Base: 0xFFF, Bytes: page}},
		"descending": {{Base: 0x4000, Bytes: page}, {Base: 0, Bytes: page}},
		"wrap":       {{Base: math.MaxUint64 - 10, Bytes: page}},
	} {
		if _, err := guest.NewMemory(regions...); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

package vmm

import "testing"

// TestRAM: guest memory is zero, as long as asked for, aligned for huge pages,
// and ends where it should.
func TestRAM(t *testing.T) {
	for _, n := range []uint64{4096, 2 << 20, 5<<20 + 4096, 1 << 36} {
		ram, unmap, err := mapRAM(n)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if uint64(len(ram)) != n || uint64(cap(ram)) != n || padding(ram, hugePage) != 0 {
			t.Errorf("%d bytes: length %d, capacity %d, %d bytes short of alignment", n, len(ram), cap(ram), padding(ram, hugePage))
		}
		if ram[0] != 0 || ram[n-1] != 0 {
			t.Errorf("%d bytes: not zero", n)
		}
		ram[n-1] = 1
		if err := unmap(); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := mapRAM(1<<64 - 4096); err == nil {
		t.Error("nearly 2^64 bytes were mapped")
	}
}

package vmm

import (
	"runtime"
	"testing"
)

// Machines that run at the same time have room together.
func TestRoomForSeveralMachines(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	m := &Machine{cfg: Config{CPUs: before}}
	first := m.makeRoom()
	second := m.makeRoom()
	if got := runtime.GOMAXPROCS(0); got < 2*before {
		t.Errorf("GOMAXPROCS is %d for two machines of %d CPUs", got, before)
	}
	first()
	second()
	if needed.n != 0 {
		t.Errorf("machines that have ended need %d", needed.n)
	}
}

package vmm

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// hugePage is what a mapping must be aligned to for the host to back it, and
// the guest's own tables to be walked, in huge pages.
const hugePage = 2 << 20

// mapRAM maps n bytes of zeroed memory that the host fills in only where they
// are touched, in huge pages where it can.
func mapRAM(n uint64) (ram []byte, unmap func() error, err error) {
	if n > math.MaxInt-hugePage {
		return nil, nil, unix.ENOMEM
	}
	all, err := unix.Mmap(-1, 0, int(n+hugePage), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, nil, err
	}
	skip := padding(all, hugePage)
	ram = all[skip : skip+int(n) : skip+int(n)]
	// Both are advice: without huge pages the guest is slower, and with guest
	// memory in a core dump the dump is larger.
	_ = unix.Madvise(ram, unix.MADV_HUGEPAGE)
	_ = unix.Madvise(ram, unix.MADV_DONTDUMP)
	return ram, func() error {
		if err := unix.Munmap(all); err != nil {
			return fmt.Errorf("unmap guest memory: %w", err)
		}
		return nil
	}, nil
}

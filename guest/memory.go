package guest

import (
	"errors"
	"fmt"
	"math"
)

// GPA is a guest-physical address in bytes. It usually comes from the guest:
// arithmetic on it goes through Add, never through raw integers.
type GPA uint64

// Add returns a+n. ok is true iff the sum did not overflow.
func (a GPA) Add(n uint64) (end GPA, ok bool) {
	if n > math.MaxUint64-uint64(a) {
		return 0, false
	}
	return a + GPA(n), true
}

func (a GPA) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// ErrNotRAM is returned for a range that is not wholly inside one region of
// guest RAM: holes, device windows and addresses past the end.
var ErrNotRAM = errors.New("guest: range is not guest RAM")

// Region is a contiguous range [Base, Base+len(Bytes)) of guest RAM and the
// host bytes behind it.
type Region struct {
	Base  GPA
	Bytes []byte
}

// End is the first address after the region.
func (r Region) End() GPA { return r.Base + GPA(len(r.Bytes)) }

// Memory is the RAM of one guest: a few regions in ascending order with holes
// between them. It resolves only RAM, never a device window, so a device that
// reaches guest memory through it cannot be turned on another device.
//
// A Memory is immutable and safe for concurrent use. The bytes behind it are
// shared with the running guest, which may change any of them at any time:
// read a value once into a local, validate the local, use the local.
type Memory struct {
	regions []Region
}

// NewMemory returns the memory made of regions, which must be non-empty,
// ascending and disjoint.
func NewMemory(regions ...Region) (*Memory, error) {
	var end GPA
	for i, r := range regions {
		last, ok := r.Base.Add(uint64(len(r.Bytes)))
		switch {
		case len(r.Bytes) == 0:
			return nil, fmt.Errorf("guest: region %d at %v is empty", i, r.Base)
		case !ok:
			return nil, fmt.Errorf("guest: region %d at %v wraps around", i, r.Base)
		case i > 0 && r.Base < end:
			return nil, fmt.Errorf("guest: region %d at %v overlaps the one before it, which ends at %v", i, r.Base, end)
		}
		end = last
	}
	return &Memory{regions: regions}, nil
}

// Regions returns the regions in ascending order. The caller must not change
// the slice.
func (m *Memory) Regions() []Region { return m.regions }

// Size is the number of bytes of RAM.
func (m *Memory) Size() uint64 {
	var n uint64
	for _, r := range m.regions {
		n += uint64(len(r.Bytes))
	}
	return n
}

// Slice returns the host bytes of [addr, addr+n), without copying. The range
// must lie inside one region, else the error is ErrNotRAM. The capacity of the
// slice is n. Slice does not allocate.
func (m *Memory) Slice(addr GPA, n uint64) ([]byte, error) {
	for i := range m.regions {
		r := &m.regions[i]
		if addr < r.Base {
			break
		}
		// off cannot overflow, and comparing n with what is left cannot
		// either: the guest chooses both.
		off, size := uint64(addr-r.Base), uint64(len(r.Bytes))
		if off < size {
			if n > size-off {
				break
			}
			return r.Bytes[off : off+n : off+n], nil
		}
	}
	return nil, ErrNotRAM
}

// Read copies len(p) bytes at addr out of guest memory.
func (m *Memory) Read(addr GPA, p []byte) error {
	b, err := m.Slice(addr, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, b)
	return nil
}

// Write copies p into guest memory at addr.
func (m *Memory) Write(addr GPA, p []byte) error {
	b, err := m.Slice(addr, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(b, p)
	return nil
}

package config

import (
	"fmt"
	"regexp"
	"strconv"

	units "github.com/docker/go-units"
)

// Size is a number of bytes.
type Size uint64

// maxSize keeps sizes in the range that is exact in floating point, in which
// they are parsed: 8 PiB.
const maxSize = 1 << 53

// sizePattern is the form of a size: a number, then a unit. K, M, G and T are
// powers of 1024 with and without B or iB, in either case, as in qemu-img.
const sizePattern = `^[0-9]{1,16}(\.[0-9]{1,16})? ?([kKmMgGtT]([iI]?[bB])?|[bB])?$`

var sizeRegexp = regexp.MustCompile(sizePattern)

// ParseSize reads a size such as "512M", "1GiB" or "4096".
func ParseSize(s string) (Size, error) {
	if !sizeRegexp.MatchString(s) {
		return 0, fmt.Errorf("config: %q is not a size", s)
	}
	n, err := units.RAMInBytes(s)
	if err != nil || n < 0 || n > maxSize {
		return 0, fmt.Errorf("config: size %q is out of range", s)
	}
	return Size(n), nil
}

// String returns the size in the largest unit that expresses it exactly, in a
// form that ParseSize reads back.
func (s Size) String() string {
	for i, unit := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if factor := Size(1) << (40 - 10*i); s >= factor && s%factor == 0 {
			return strconv.FormatUint(uint64(s/factor), 10) + unit
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// MarshalText makes a size a string in TOML and JSON.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

package doctor

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// enoughMemory is that of a guest for which none is asked for.
const enoughMemory = 512 << 20

const (
	meminfo = "proc/meminfo"
	cgroup  = "sys/fs/cgroup/memory."
	thp     = "sys/kernel/mm/transparent_hugepage/enabled"
)

func (h Host) memory() Check {
	const name = "memory"
	kib, err := strconv.ParseUint(strings.TrimSuffix(h.field(meminfo, "MemAvailable"), " kB"), 10, 54)
	if err != nil {
		return warning(name, "/proc/meminfo does not say how much is free", "Mount /proc.")
	}
	free, of := kib<<10, "this host"
	if left, limited := h.cgroupMemory(); limited && left < free {
		free, of = left, "this container"
	}
	found := fmt.Sprintf("%s of %s are free", units.BytesSize(float64(free)), of)
	if free < enoughMemory {
		return warning(name, found+", less than a guest gets by default",
			"Free some, or give guests less with --memory 256M.")
	}
	return ok(name, "%s", found)
}

// cgroupMemory returns what this process's container may still take, if that is
// limited.
func (h Host) cgroupMemory() (left uint64, limited bool) {
	limit, err := strconv.ParseUint(h.read(cgroup+"max"), 10, 64)
	if err != nil {
		return 0, false // none, or "max"
	}
	used, err := strconv.ParseUint(h.read(cgroup+"current"), 10, 64)
	if err != nil {
		return 0, false
	}
	return limit - min(used, limit), true
}

// transparentHugePages checks for what guest memory is made of where it can be.
func (h Host) transparentHugePages() Check {
	const name = "huge pages"
	mode := h.read(thp)
	switch {
	case strings.Contains(mode, "[always]"), strings.Contains(mode, "[madvise]"):
		return ok(name, "transparent ones for guest memory (%s)", mode)
	case mode == "":
		return warning(name, "this kernel has no transparent ones; guests are slower",
			"Use a host kernel with CONFIG_TRANSPARENT_HUGEPAGE.")
	}
	return warning(name, fmt.Sprintf("transparent ones are off (%s); guests are slower", mode),
		"Turn them on: echo madvise | sudo tee /"+thp)
}

// reservedHugePages says what is reserved, which guests do not take.
func (h Host) reservedHugePages() Check {
	const name = "reserved huge pages"
	total, err := strconv.ParseUint(h.field(meminfo, "HugePages_Total"), 10, 64)
	if err != nil || total == 0 {
		return ok(name, "none; calf needs none")
	}
	return ok(name, "%d of %s, %s of them free; calf uses transparent ones only",
		total, h.field(meminfo, "Hugepagesize"), h.field(meminfo, "HugePages_Free"))
}

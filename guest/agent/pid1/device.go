package pid1

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/calfvm/calf/guest/boot/find"
)

// deviceOf returns the path of the device that root=, or a line of fstab, means; empty
// if it is not there.
func deviceOf(name string) string {
	for _, path := range []string{name, find.OwnName(name)} {
		if _, err := os.Stat(path); err == nil && strings.HasPrefix(path, "/dev/") {
			return path
		}
	}
	path, _ := search(func(_ string, p find.Partition) bool { return p.Is(name) })
	return path
}

// kindOf returns what kind of file system the device at path has, or empty.
func kindOf(path string) string {
	_, p := search(func(candidate string, _ find.Partition) bool { return candidate == path })
	return p.Kind
}

// search returns the first of all partitions and disks that is the one.
func search(is func(path string, p find.Partition) bool) (string, find.Partition) {
	for _, disk := range blockDevices() {
		if _, err := os.Stat(filepath.Join(sysBlock, disk, "partition")); err == nil {
			continue
		}
		for _, p := range partitions(devPath(disk)) {
			if path := partitionPath(devPath(disk), p.Number); is(path, p) {
				return path, p
			}
		}
	}
	return "", find.Partition{}
}

const sysBlock = "/sys/class/block"

// blockDevices are the names of the disks and partitions that have a size.
func blockDevices() []string {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		size, err := os.ReadFile(filepath.Join(sysBlock, e.Name(), "size"))
		if err == nil && strings.TrimSpace(string(size)) != "0" {
			names = append(names, e.Name())
		}
	}
	return names
}

// devPath is where a block device is that has the name in /sys.
func devPath(name string) string { return "/dev/" + strings.ReplaceAll(name, "!", "/") }

// partitions returns what is on a disk; nothing of one that cannot be read.
func partitions(path string) []find.Partition {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }() // it was read only
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	parts, err := find.Partitions(f, size)
	if err != nil {
		return nil
	}
	return parts
}

// partitionPath is the path of a partition of a disk: vda1, nvme0n1p1.
func partitionPath(disk string, number int) string {
	switch last := disk[len(disk)-1]; {
	case number == 0:
		return disk
	case last >= '0' && last <= '9':
		return disk + "p" + strconv.Itoa(number)
	}
	return disk + strconv.Itoa(number)
}

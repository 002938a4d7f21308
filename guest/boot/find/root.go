package find

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// firstDisk is what Linux calls the disk in a guest of calf that boots from it.
const firstDisk = "/dev/vda"

// dropped are the arguments of an image that do not hold in a guest of calf: its
// console is another one, and calf has to see a panic itself, which a crash kernel
// would keep from it.
var dropped = []string{"console", "earlycon", "earlyprintk", "panic", "reboot", "crashkernel", "BOOT_IMAGE", "initrd"}

// setArgs takes the arguments of an entry over, and finds the root.
func (f *Found) setArgs(parts []*volume, args []string) {
	for _, v := range parts {
		f.Partitions = append(f.Partitions, v.Partition)
	}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		switch {
		case key == "root":
			f.Root = "root=" + ownName(value)
		case !slices.Contains(dropped, key):
			f.Args = append(f.Args, arg)
		}
	}
	if f.Root != "" {
		f.RootPartition = named(f.Partitions, strings.TrimPrefix(f.Root, "root="))
	} else if root := looksLikeRoot(parts); root != nil {
		f.Root, f.RootPartition = "root=UUID="+root.UUID, &root.Partition
	}
	if f.RootPartition != nil && (len(f.Initrds) == 0 || f.Root == "root=UUID=") {
		f.Root = "root=" + f.RootPartition.kernelName()
	}
}

// otherDisks matches the names of a machine's first disk and its partitions where
// it is no virtio disk.
var otherDisks = regexp.MustCompile(`^/dev/(?:(?:sd|hd|vd|xvd)a(\d*)|nvme0n1(?:p(\d+))?|mmcblk0(?:p(\d+))?)$`)

// ownName is the name of a device in a guest of calf.
func ownName(value string) string {
	m := otherDisks.FindStringSubmatch(value)
	if m == nil {
		return value
	}
	return firstDisk + m[1] + m[2] + m[3]
}

// kernelName is a name of the partition that the kernel knows by itself, without
// the help of an initial RAM disk.
func (p *Partition) kernelName() string {
	switch {
	case p.PartUUID != "":
		return "PARTUUID=" + p.PartUUID
	case p.Number > 0:
		return fmt.Sprint(firstDisk, p.Number)
	}
	return firstDisk
}

// named returns the partition that a value of root= means, or nil.
func named(parts []Partition, value string) *Partition {
	for i, v := range parts {
		is := func(prefix, id string) bool { return id != "" && strings.EqualFold(value, prefix+id) }
		if is("UUID=", v.UUID) || is("PARTUUID=", v.PartUUID) || is("LABEL=", v.Label) || is("PARTLABEL=", v.PartLabel) ||
			is("/dev/disk/by-uuid/", v.UUID) || is("/dev/disk/by-partuuid/", v.PartUUID) || is("/dev/disk/by-label/", v.Label) ||
			is("/dev/disk/by-partlabel/", v.PartLabel) ||
			v.Number > 0 && value == fmt.Sprint(firstDisk, v.Number) || v.Number == 0 && value == firstDisk {
			return &parts[i]
		}
	}
	return nil
}

// looksLikeRoot returns the first volume that a system can be started from, or nil.
func looksLikeRoot(parts []*volume) *volume {
	for _, v := range parts {
		if v.has("etc/os-release") || v.has("sbin/init") || v.has("usr/lib/systemd/systemd") || v.has("bin/init") || v.has("bin/sh") {
			return v
		}
	}
	return nil
}

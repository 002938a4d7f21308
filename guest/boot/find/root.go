package find

import (
	"errors"
	"fmt"
	"io"
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

// RootKinds are the file systems that roots have, and that can be mounted without
// further ado.
var RootKinds = []string{"ext2", "ext3", "ext4", "xfs", "btrfs"}

// Root finds the root of the system on a disk of size bytes, whatever kernel is to boot
// it: what its boot loader names, else the first file system that looks like one, else,
// without a kernel, the only one that can be one. It is nil if that is not on the disk, or cannot be told.
func Root(disk io.ReaderAt, size int64) (*Partition, error) {
	parts, err := volumes(&meter{disk, maxRead}, size)
	if err != nil {
		return nil, err
	}
	var f Found
	e, err := search(parts)
	switch {
	case err == nil:
		f.setArgs(parts, e.args)
		return f.RootPartition, nil
	case !errors.Is(err, ErrNotFound):
		return nil, err
	}
	if f.setArgs(parts, nil); f.Root == "" {
		f.RootPartition = only(f.Partitions)
	}
	return f.RootPartition, nil
}

// only returns the only partition that can be a root, or nil.
func only(parts []Partition) (root *Partition) {
	for i, p := range parts {
		switch {
		case !slices.Contains(RootKinds, p.Kind):
		case root != nil:
			return nil
		default:
			root = &parts[i]
		}
	}
	return root
}

// setArgs takes the arguments of an entry over, and finds the root.
func (f *Found) setArgs(parts []*volume, args []string) {
	f.volumes = parts
	for _, v := range parts {
		f.Partitions = append(f.Partitions, v.Partition)
	}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		switch {
		case key == "root":
			f.Root = "root=" + OwnName(value)
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

// OwnName is the name of a device in a guest of calf: a first disk of another kind, such
// as /dev/sda, is the first virtio disk.
func OwnName(value string) string {
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

// named returns the partition of the first disk that a value of root= means, or nil.
func named(parts []Partition, value string) *Partition {
	for i, p := range parts {
		if p.Is(value) || p.Number > 0 && value == fmt.Sprint(firstDisk, p.Number) || p.Number == 0 && value == firstDisk {
			return &parts[i]
		}
	}
	return nil
}

// Is reports whether a value of root=, or the first field of a line of fstab, means the
// partition by one of the names that it has itself, such as UUID=… or
// /dev/disk/by-label/….
func (p *Partition) Is(value string) bool {
	tag, name, ok := strings.Cut(value, "=")
	if path, isPath := strings.CutPrefix(value, "/dev/disk/by-"); isPath {
		tag, name, ok = strings.Cut(path, "/")
	}
	if name = strings.Trim(name, `"`); !ok || name == "" {
		return false
	}
	switch strings.ToUpper(tag) {
	case "UUID":
		return strings.EqualFold(name, p.UUID)
	case "PARTUUID":
		return strings.EqualFold(name, p.PartUUID)
	case "LABEL":
		return name == p.Label
	case "PARTLABEL":
		return name == p.PartLabel
	}
	return false
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

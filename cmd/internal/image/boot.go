package image

import (
	"fmt"
	"io"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/guest/boot/find"
)

// BootInfo is what calf run would boot from an image.
type BootInfo struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
	// Title is the name of the boot loader's entry, Config the file that has it.
	Title  string     `json:"title,omitempty"`
	Config *bootFile  `json:"config,omitempty"`
	Kernel bootFile   `json:"kernel"`
	Initrd []bootFile `json:"initrd"`
	// Cmdline is what the image adds to calf's own; empty Root: nothing says it.
	Cmdline       string      `json:"cmdline"`
	Root          string      `json:"root,omitempty"`
	RootPartition *int        `json:"root-partition,omitempty"`
	Partitions    []partition `json:"partitions"`
}

// bootFile is a file in the image. Partition 0 is a disk without partitions.
type bootFile struct {
	Partition int    `json:"partition"`
	Path      string `json:"path"`
	Size      int64  `json:"size"`
}

// partition is a part of the disk, with what it holds.
type partition struct {
	Number    int    `json:"number"`
	Start     int64  `json:"start"`
	Size      int64  `json:"size"`
	Type      string `json:"type,omitempty"`
	UUID      string `json:"uuid,omitempty"`
	Label     string `json:"label,omitempty"`
	PartUUID  string `json:"partuuid,omitempty"`
	PartLabel string `json:"partlabel,omitempty"`
}

// InspectBoot finds out what calf run would boot from the image at path. It opens
// backing files as calf run does.
func InspectBoot(path string, o OpenOptions) (info *BootInfo, err error) {
	o.ReadOnly = true
	m, err := Open(path, o)
	if err != nil {
		return nil, err
	}
	defer closing(m, &err)
	r := blk.NewReader(m)
	found, err := find.Kernel(r, r.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	info = &BootInfo{
		Filename: path, Format: m.Format, Title: found.Title, Kernel: bootFileOf(found.Kernel), Initrd: []bootFile{},
		Cmdline: found.Cmdline(), Root: found.Root,
	}
	if found.Config != nil {
		info.Config = new(bootFileOf(found.Config))
	}
	for _, f := range found.Initrds {
		info.Initrd = append(info.Initrd, bootFileOf(f))
	}
	if found.RootPartition != nil {
		info.RootPartition = &found.RootPartition.Number
	}
	for _, p := range found.Partitions {
		info.Partitions = append(info.Partitions, partition{p.Number, p.Offset, p.Size, p.Kind, p.UUID, p.Label, p.PartUUID, p.PartLabel})
	}
	return info, nil
}

func bootFileOf(f *find.File) bootFile { return bootFile{f.Partition, f.Path, f.Size} }

func (f bootFile) String() string {
	return fmt.Sprintf("%s on %v (%s)", f.Path, find.Partition{Number: f.Partition}, humanSize(f.Size))
}

// Text writes the information for people.
func (i *BootInfo) Text(w io.Writer) error {
	p := printer{w: w}
	p.f("image: %s\n", i.Filename)
	if i.Title != "" {
		p.f("boots: %s\n", i.Title)
	}
	if i.Config != nil {
		p.f("configured by: %v\n", *i.Config)
	}
	p.f("kernel: %v\n", i.Kernel)
	for _, f := range i.Initrd {
		p.f("initrd: %v\n", f)
	}
	p.f("command line: %s\n", i.Cmdline)
	switch {
	case i.Root == "":
		p.f("root: not known; calf run needs --cmdline root=...\n")
	case i.RootPartition == nil:
		p.f("root: none of the partitions themselves\n")
	default:
		p.f("root: %v\n", find.Partition{Number: *i.RootPartition})
	}
	p.f("Partitions:\n%-8s%12s%12s  %-8s%s\n", "NUMBER", "START", "SIZE", "TYPE", "UUID")
	for _, part := range i.Partitions {
		p.f("%-8d%12s%12s  %-8s%s\n", part.Number, humanSize(part.Start), humanSize(part.Size), part.Type, part.UUID)
	}
	return p.err
}

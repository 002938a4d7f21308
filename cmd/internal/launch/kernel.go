package launch

import (
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/guest/boot"
	"github.com/calfvm/calf/guest/boot/find"
	"github.com/calfvm/calf/vmm"
)

// diskKernel boots what a boot loader would start from the first disk. It is found
// anew for each start of the guest, so that a reboot starts what the guest has left
// there. A nil one is of a guest whose kernel is given.
type diskKernel struct {
	cfg   *config.Config
	disk  blk.Disk
	log   *slog.Logger
	agent *handOver // nil: of a command, or none
}

// newDiskKernel opens the first disk of cfg, which is effective, for reading; nil if
// the disk does not matter.
func newDiskKernel(cfg *config.Config, log *slog.Logger, agent *handOver) (*diskKernel, error) {
	if cfg.Boot.Kernel != "" || len(cfg.Disks) == 0 {
		return nil, nil
	}
	disk, err := openDisk(cfg.Disks[0], true)
	if err != nil {
		return nil, err
	}
	return &diskKernel{cfg, disk, log, agent}, nil
}

// close closes the disk that newDiskKernel has opened.
func (k *diskKernel) close() error {
	if k == nil {
		return nil
	}
	return k.disk.(image).Close()
}

// use makes the first of the guest's own disks the one to boot from.
func (k *diskKernel) use(open disks) {
	if k != nil {
		k.disk = open[0].Disk
	}
}

// boot is the function that a machine asks what to boot, or nil.
func (k *diskKernel) boot() func() (vmm.Payload, error) {
	if k == nil {
		return nil
	}
	return k.payload
}

func (k *diskKernel) payload() (vmm.Payload, error) {
	f, err := findKernel(k.cfg, k.disk)
	if err != nil {
		return vmm.Payload{}, err
	}
	k.log.Info("found a kernel on the first disk", "kernel", f.Kernel, "title", f.Title, "cmdline", f.Cmdline())
	p := vmm.Payload{
		Name: f.Kernel.String(), Kernel: boot.File{ReaderAt: f.Kernel, Size: f.Kernel.Size}, Initrd: f.Initrd(), Cmdline: f.Cmdline(),
	}
	if len(k.cfg.Run.Command) > 0 {
		p.Cmdline = strings.TrimSpace(p.Cmdline + " " + rootArgs(f.RootPartition))
	} else if !k.agent.use(&p, f) {
		return p, nil
	}
	if err := addDrivers(&p, f); err != nil {
		k.log.Warn("the image's initial RAM disk has to have all drivers", "error", err)
	}
	return p, nil
}

// addDrivers adds what the root has of the drivers that an agent needs, so that it does
// not depend on what the image's initial RAM disk has been made for.
func addDrivers(p *vmm.Payload, f *find.Found) error {
	if f.RootPartition == nil {
		return nil
	}
	files, err := f.Modules(agent.Drivers(f.RootPartition.Kind)...)
	if err != nil || len(files) == 0 {
		return err
	}
	modules, err := agent.Modules(files)
	if err == nil {
		putFirst(p, modules)
	}
	return err
}

// putFirst puts an initial RAM disk before the one that there may be.
func putFirst(p *vmm.Payload, initrd boot.File) {
	files := []boot.File{initrd}
	if p.Initrd != nil {
		files = append(files, *p.Initrd)
	}
	all := boot.Join(files...)
	p.Initrd = &all
}

// rootArgs tells an agent in the guest where the root is, as far as that is known of
// the first disk.
func rootArgs(p *find.Partition) string {
	if p == nil {
		return ""
	}
	device := "/dev/vda"
	if p.Number > 0 {
		device += strconv.Itoa(p.Number)
	}
	return agent.RootArgs(device, p.Kind)
}

// rootOfGiven is rootArgs for a kernel that is given, unless the user names the root: a
// kernel under test, and the image that it is tried with.
func rootOfGiven(cfg *config.Config) (string, error) {
	if cfg.Boot.Kernel == "" || len(cfg.Disks) == 0 || namedRoot(cfg) != "" {
		return "", nil
	}
	disk, err := openDisk(cfg.Disks[0], true)
	if err != nil {
		return "", err
	}
	r := blk.NewReader(disk)
	root, err := find.Root(r, r.Size())
	if err != nil { // the kernel may know the root by itself
		root = nil
	}
	return rootArgs(root), disk.Close()
}

// namedRoot is the root that the user names, or empty.
func namedRoot(cfg *config.Config) (root string) {
	for arg := range strings.FieldsSeq(cfg.Boot.Cmdline) {
		if value, ok := strings.CutPrefix(arg, "root="); ok {
			root = value
		}
	}
	return root
}

// findKernel finds what to boot on a disk, which is the first one of cfg. A root
// that the user names is the one that counts.
func findKernel(cfg *config.Config, disk blk.Disk) (*find.Found, error) {
	r := blk.NewReader(disk)
	f, err := find.Kernel(r, r.Size())
	if err != nil {
		what := "give a kernel with --kernel or [boot] kernel, and with it what it needs: --initrd, and the root with --cmdline root=/dev/vda1 or the like"
		if !errors.Is(err, find.ErrNotFound) {
			what = "a kernel can be given with --kernel or [boot] kernel"
		}
		return nil, fmt.Errorf("disk %s: %w; %s", cfg.Disks[0].Path, err, what)
	}
	if root := namedRoot(cfg); root != "" {
		f.SetRoot(root)
		return f, nil
	}
	if f.Root == "" {
		return nil, fmt.Errorf("disk %s: %v has a kernel, but nothing says where its root is; give it with --cmdline root=/dev/vda1 or the like",
			cfg.Disks[0].Path, find.Partition{Number: f.Kernel.Partition})
	}
	return f, nil
}

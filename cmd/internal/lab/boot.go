package lab

import (
	"crypto/sha256"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

var (
	// outerInit is the first process of the outer machine.
	//
	//go:embed outer-init.sh
	outerInit string
	// guestInit is the first process of a guest.
	//
	//go:embed guest-init.sh
	guestInit string
)

// The modules that the machines load, where they are no part of the kernel.
// With button and evdev a guest hears its power button.
var (
	outerModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "ext4", "kvm_amd"}
	guestModules = []string{"virtio_pci", "virtio_blk", "ext4", "button", "evdev"}
	// extraModules are in the guest's /modules/extra, for scripts to load.
	extraModules = []string{"xfs", "virtio-rng", "vmw_vsock_virtio_transport"}
)

// rootTools are the programs on the outer machine's root disk, besides busybox.
var rootTools = []string{
	"dash", "qemu-img", "qemu-io", "qemu-nbd", "qemu-system-x86_64",
	"mke2fs", "e2fsck", "debugfs", "mkfs.xfs", "sfdisk", "fio",
}

// rootData are the data files that rootTools need, where they exist.
var rootData = []string{
	"/usr/share/seabios/bios-256k.bin",
	"/usr/share/seabios/bios.bin",
	"/usr/share/qemu/bios-256k.bin",
	"/usr/share/qemu/kvmvapic.bin",
	"/usr/share/qemu/linuxboot_dma.bin",
	"/usr/share/qemu/pvh.bin",
	"/usr/share/seabios/vgabios-stdvga.bin",
	"/etc/mke2fs.conf",
}

// bootFiles is what an outer machine boots from.
type bootFiles struct {
	kernel       Kernel // the newest of those on the root disk
	initrd, root string
}

// prepareBoot returns the files of the outer machine, made if need be.
func prepareBoot() (bootFiles, error) {
	kernels, err := Kernels()
	if err != nil {
		return bootFiles{}, err
	}
	// The newest has the KVM with the fewest faults, and from Linux 6.7 on it
	// aligns large mappings for huge pages, which saves a guest most of its
	// costly page faults.
	newest := kernels[len(kernels)-1]
	initrd, err := initrd("outer", newest, outerInit, outerModules, nil)
	if err != nil {
		return bootFiles{}, err
	}
	root, err := rootDisk(kernels)
	if err != nil {
		return bootFiles{}, err
	}
	return bootFiles{
		kernel: newest,
		initrd: initrd,
		root:   root,
	}, nil
}

// guestInitrd returns the initramfs of guests with the kernel k.
func guestInitrd(k Kernel) (string, error) {
	return initrd("guest", k, guestInit, guestModules, extraModules)
}

// initrd returns a cached initramfs for the kernel k with busybox, the named
// modules in /modules, the extra ones in /modules/extra, and init.
func initrd(name string, k Kernel, init string, modules, extra []string) (string, error) {
	t := make(tree)
	if err := t.busybox(); err != nil {
		return "", err
	}
	t.text("/init", init, 0o755)
	// The kernel opens it for the first process before anything is mounted.
	t.add("/dev/console", node{mode: os.ModeDevice | os.ModeCharDevice | 0o600, device: 5<<8 | 1})
	digest, err := t.digest()
	if err != nil {
		return "", err
	}
	return cached(name+"-"+k.Release, fmt.Sprint(2, digest, modules, extra), func(file string) error {
		if err := k.addModules(t, "/modules", modules...); err != nil {
			return err
		}
		if err := k.addModules(t, "/modules/extra", extra...); err != nil {
			return err
		}
		if err := k.linkModules(t, []string{"/modules", "/modules/extra"}, slices.Concat(modules, extra)); err != nil {
			return err
		}
		return t.initramfs(file)
	})
}

// rootDisk returns the cached root disk of outer machines.
func rootDisk(kernels []Kernel) (string, error) {
	t := make(tree)
	if err := t.busybox(); err != nil {
		return "", err
	}
	for _, name := range rootTools {
		host, err := tool(name)
		if err != nil {
			return "", err
		}
		if err := t.program("/usr/bin/"+name, host); err != nil {
			return "", err
		}
	}
	for _, file := range rootData {
		if _, err := os.Stat(file); err != nil {
			continue // distributions keep them in different places
		}
		if err := t.file(file, file); err != nil {
			return "", err
		}
	}
	for _, k := range kernels {
		dir := filepath.Join(insideCache, "kernels", k.Release)
		if err := t.file(dir+"/vmlinuz", k.Image); err != nil {
			return "", err
		}
		if err := t.file(dir+"/initrd", k.Initrd); err != nil {
			return "", err
		}
	}
	disks, err := Distribution()
	if err != nil {
		return "", err
	}
	for _, file := range []string{disks.Whole, disks.Boot} {
		if err := t.file(filepath.Join(insideCache, "images", filepath.Base(file)), file); err != nil {
			return "", err
		}
	}
	// The shell of busybox would run busybox's own commands in place of the
	// tools.
	t.link("/bin/sh", "/usr/bin/dash")
	t.dir(insideScratch)
	t.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644)
	t.link("/etc/mtab", "/proc/mounts")
	digest, err := t.digest()
	if err != nil {
		return "", err
	}
	return cached("root", digest, func(file string) error { return t.ext4(file, 2048) })
}

// cached returns the path of a file that depends on key alone, made by build
// unless an earlier run did.
func cached(name, key string, build func(file string) error) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "lab")
	sum := sha256.Sum256([]byte(key))
	file := filepath.Join(dir, fmt.Sprintf("%s.%x", name, sum[:8]))
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	fresh := filepath.Join(tmp, name)
	if err := build(fresh); err != nil {
		return "", fmt.Errorf("%s for the cache: %w", name, err)
	}
	if err := os.Rename(fresh, file); err != nil {
		return "", err
	}
	forgetOld(dir, name, file)
	return file, nil
}

// forgetOld removes what cached made under other keys, unless it is so young
// that another run may be about to use it. It is housekeeping: errors do not
// matter.
func forgetOld(dir, name, keep string) {
	old, _ := filepath.Glob(filepath.Join(dir, name+".*"))
	for _, file := range slices.DeleteFunc(old, func(f string) bool { return f == keep }) {
		if st, err := os.Stat(file); err == nil && time.Since(st.ModTime()) > 24*time.Hour {
			_ = os.Remove(file)
		}
	}
}

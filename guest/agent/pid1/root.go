package pid1

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Arguments of the kernel that are the agent's.
const (
	ArgRoot     = "calf.root="       // the device of the root
	ArgKind     = "calf.rootfstype=" // what kind of file system it has
	ArgReadOnly = "calf.ro"          // the device cannot be written
	ArgInit     = "calf.init"        // the image's init takes over, whatever the host says
)

// patience is how long a device may take to appear.
const patience = 30 * time.Second

// args are the arguments of the kernel, as far as the agent looks at them.
type args struct {
	device, kind, flags string
	readOnly            bool // the device cannot be written
	handOver            bool
	init                string // that of init=
	mountReadOnly       bool   // the image's init is to find its root so
}

func readArgs() (args, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return args{}, err
	}
	return parseArgs(string(line)), nil
}

// parseArgs finds the arguments in the kernel's line. Calf's own come before what a
// boot loader would have said, and of several of one name the last one holds.
func parseArgs(line string) args {
	var a, own args
	for arg := range strings.FieldsSeq(line) {
		switch name, value, _ := strings.Cut(arg, "="); name + "=" {
		case "root=":
			a.device = value
		case "rootfstype=":
			a.kind = value
		case "rootflags=":
			a.flags = value
		case ArgRoot:
			own.device = value
		case ArgKind:
			own.kind = value
		case ArgReadOnly + "=":
			a.readOnly = true
		case ArgInit + "=":
			a.handOver = true
		case "init=":
			a.init = value
		case "ro=", "rw=":
			a.mountReadOnly = name == "ro"
		}
	}
	if own.device != "" {
		a.device = own.device
	}
	if own.kind != "" {
		a.kind = own.kind
	}
	return a
}

// root is the file system that the guest is to run in.
type root struct {
	args
	path string // of its device
}

// findRoot loads the drivers of disks, and waits for the root's device.
func findRoot(a args, l loader) (*root, error) {
	_ = l.load("virtio_pci", "virtio_blk") // they may be part of the kernel; the device tells
	if a.device == "" {
		return nil, errors.New("the kernel's arguments do not say where the root is: give root= with --cmdline")
	}
	pause := time.Millisecond
	for start := time.Now(); time.Since(start) < patience; time.Sleep(pause) {
		if path := deviceOf(a.device); path != "" {
			if a.kind == "" || a.kind == "auto" {
				a.kind = kindOf(path)
			}
			return &root{a, path}, nil
		}
		pause = min(2*pause, 100*time.Millisecond)
	}
	return nil, fmt.Errorf("the device %s of the root has not appeared within %v; there are: %s", a.device, patience, strings.Join(blockDevices(), ", "))
}

// readOnlyFlag is MS_RDONLY if the root is to be mounted so, else 0.
func (r *root) readOnlyFlag() uintptr {
	if r.readOnly || r.handOver && r.mountReadOnly {
		return unix.MS_RDONLY
	}
	return 0
}

// mount mounts the root at newRoot.
func (r *root) mount(l loader) error {
	kinds := strings.Split(r.kind, ",")
	if r.kind == "" {
		kinds = []string{"ext4", "xfs", "btrfs", "f2fs", "squashfs", "erofs"}
	}
	flags, data := parseOptions(r.flags)
	flags = flags&^unix.MS_RDONLY | r.readOnlyFlag()
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, kind := range kinds {
		_ = l.load(driversOf(kind)...) // it may be part of the kernel; the mount tells
		err := unix.Mount(r.path, newRoot, typeOf(kind), flags, data)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s as %s: %w", r.path, kind, err))
	}
	return fmt.Errorf("the root cannot be mounted: %w", errors.Join(errs...))
}

// switchRoot makes newRoot the root, and frees the memory of the initramfs.
func switchRoot() error {
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if err := os.MkdirAll(newRoot+dir, 0o755); err != nil && !errors.Is(err, unix.EROFS) {
			return err
		}
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s to the root: %w; does the image have that directory?", dir, err)
		}
	}
	old, err := os.OpenRoot("/")
	if err != nil {
		return err
	}
	empty(old)
	if err := errors.Join(old.Close(), os.Chdir(newRoot)); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// empty removes the files of the initramfs, which is a tree in memory. What cannot
// be removed stays.
func empty(old *os.Root) {
	var own unix.Stat_t
	if unix.Stat("/", &own) != nil {
		return
	}
	_ = fs.WalkDir(old.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir
		}
		var st unix.Stat_t
		if unix.Lstat("/"+path, &st) == nil && st.Dev != own.Dev {
			return fs.SkipDir // another file system, above all the new root
		}
		if !d.IsDir() {
			_ = old.Remove(path)
		}
		return nil
	})
}

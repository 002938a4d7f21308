// Package find finds out what a boot loader would start from a disk: the kernel,
// its initial RAM disks, and the arguments that lead it to its root.
//
// The disk has a partition table (GPT or MBR) or one file system; ext2, ext3 and
// ext4 are read, others told apart. In each file system, the first of these says
// what to boot:
//
//   - grub.cfg, whose script is run as GRUB does, as far as it matters, with
//     grubenv and the entries of the Boot Loader Specification;
//   - extlinux.conf and syslinux.cfg;
//   - entries of the Boot Loader Specification by themselves;
//   - else the newest kernel in /boot, or in the root of a file system that is
//     one, with the initial RAM disk that goes with it by its name.
//
// Disks are not trusted: sizes and counts are bounded, and so is how much of a
// disk is read in all.
package find

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode"

	"github.com/calfvm/calf/guest/boot"
)

// Limits of what is taken from a disk.
const (
	maxKernel  = 256 << 20
	maxInitrd  = 1 << 30 // of all together
	maxConfig  = 1 << 20
	maxInitrds = 16
	// maxRead bounds all reading from a disk, loading included.
	maxRead = 4 << 30
)

// ErrNotFound is wrapped by the error for a disk that holds nothing to boot. The
// error says what there is instead.
var ErrNotFound = errors.New("no kernel was found on the disk")

// Found is what a boot loader would start.
type Found struct {
	// Title is the name of the boot loader's entry, or empty.
	Title string
	// Config is the file that says so; nil if there is none that does.
	Config  *File
	Kernel  *File
	Initrds []*File // loaded one after another
	// Root is the argument that says where the root is, such as root=UUID=…; empty
	// if nothing says it, and no file system looks like one.
	Root string
	// RootPartition is the one that Root means; nil if it is none of this disk.
	RootPartition *Partition
	// Args are the other arguments of the entry that hold for a guest of calf.
	Args       []string
	Partitions []Partition

	volumes []*volume
}

// File is a file on the disk. It is read when it is used: it is good as long as
// nobody writes to the disk.
type File struct {
	io.ReaderAt
	Path      string // from the root of its file system
	Partition int    // see Partition.Number
	Size      int64
}

func (f *File) String() string {
	return fmt.Sprintf("%v: %s", Partition{Number: f.Partition}, f.Path)
}

// SetRoot takes note of another root, which the kernel is told elsewhere: value is that
// of an argument root=.
func (f *Found) SetRoot(value string) {
	f.Root, f.RootPartition = "", named(f.Partitions, value)
}

// Cmdline is the root and the arguments as a kernel takes them.
func (f *Found) Cmdline() string {
	return strings.TrimSpace(f.Root + " " + strings.Join(f.Args, " "))
}

// Initrd returns all initial RAM disks as one, or nil if there is none. Each begins
// at a multiple of four bytes, which is where the kernel looks for it.
func (f *Found) Initrd() *boot.File {
	if len(f.Initrds) == 0 {
		return nil
	}
	files := make([]boot.File, len(f.Initrds))
	for i, r := range f.Initrds {
		files[i] = boot.File{ReaderAt: r, Size: r.Size}
	}
	all := boot.Join(files...)
	return &all
}

// entry is one choice of a boot loader: files of volumes, and arguments.
type entry struct {
	title   string
	config  *File
	kernel  *File
	initrds []*File
	args    []string
}

// Kernel finds what to boot on a disk of size bytes. The error says what is wrong
// with the disk, or wraps ErrNotFound.
func Kernel(disk io.ReaderAt, size int64) (*Found, error) {
	parts, err := volumes(&meter{disk, maxRead}, size)
	if err != nil {
		return nil, err
	}
	e, err := search(parts)
	if err != nil {
		return nil, err
	}
	f := &Found{Title: e.title, Config: e.config, Kernel: e.kernel, Initrds: e.initrds}
	f.setArgs(parts, e.args)
	return f, nil
}

// search returns what the first boot loader says that says something; else the
// newest kernel.
func search(parts []*volume) (*entry, error) {
	var wrong []error
	for _, loader := range []func([]*volume, *volume) (*entry, error){grub, syslinux, specification, newest} {
		for _, v := range parts {
			if v.files == nil {
				continue
			}
			e, err := loader(parts, v)
			if err == nil && e != nil {
				err = e.check()
			}
			switch {
			case errors.Is(err, errTooMuch):
				return nil, err
			case err != nil:
				wrong = append(wrong, err)
			case e != nil:
				return e, nil
			}
		}
	}
	var why []string
	for _, v := range parts {
		if v.files == nil {
			why = append(why, fmt.Sprintf("%v %v", v.Partition, v.why))
		} else {
			why = append(why, fmt.Sprintf("%v (%s) has none", v.Partition, v.Kind))
		}
	}
	for _, err := range wrong {
		why = append(why, err.Error())
	}
	return nil, fmt.Errorf("%w: %s", ErrNotFound, strings.Join(why, "; "))
}

// check reports what is wrong with the files of an entry.
func (e *entry) check() error {
	if e.kernel.Size > maxKernel {
		return fmt.Errorf("%v is %d MiB long, which is too much for a kernel", e.kernel, e.kernel.Size>>20)
	}
	if err := boot.Check(boot.File{ReaderAt: e.kernel, Size: e.kernel.Size}); err != nil {
		return fmt.Errorf("%v: %w", e.kernel, err)
	}
	left := int64(maxInitrd)
	for _, r := range e.initrds {
		if left -= min(r.Size, maxInitrd+1); left < 0 {
			return fmt.Errorf("%v and those before it are too large for initial RAM disks", r)
		}
	}
	for _, arg := range append(e.args, e.title) {
		if strings.ContainsFunc(arg, unicode.IsControl) {
			return fmt.Errorf("%v: what is said of %v has control characters", e.config, e.kernel)
		}
	}
	if len(e.initrds) > maxInitrds {
		return fmt.Errorf("%v has %d initial RAM disks, which is too many", e.config, len(e.initrds))
	}
	return nil
}

// clean turns a path of a boot loader into one of package fs.
func clean(name string) string {
	if name = strings.TrimPrefix(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

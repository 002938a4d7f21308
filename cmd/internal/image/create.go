package image

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/qcow2"
)

// CreateOptions describe a new image.
type CreateOptions struct {
	qcow2.CreateOptions // a raw image has Size and Preallocation
	// Unsafe takes the backing file for granted: it need not exist.
	Unsafe bool
}

// Create makes an image at path, where no file may exist. A backing file without
// a size gives it its own. It returns the line that qemu-img prints of it.
func Create(path, format string, o CreateOptions, sized bool) (string, error) {
	if format == Raw {
		if !sized {
			return "", errors.New("a raw image needs a size")
		}
		return fmt.Sprintf("Formatting '%s', fmt=raw size=%d", path, o.Size), createRaw(path, o.Size, o.Preallocation)
	}
	if o.BackingFile != "" {
		if err := o.completeBacking(path, &sized); err != nil {
			return "", err
		}
	}
	if !sized {
		return "", errors.New("the image needs a size, or a backing file that has one")
	}
	return o.formatting(path), qcow2.Create(path, o.CreateOptions)
}

// completeBacking checks the backing file, which counts from the directory of the
// image at path, and takes its size if there is no other.
func (o *CreateOptions) completeBacking(path string, sized *bool) error {
	if o.BackingFormat == "" {
		return fmt.Errorf("backing file %s: its format is missing: give it with -F %s or -F %s", o.BackingFile, QCOW2, Raw)
	}
	if o.Unsafe {
		return nil
	}
	size, err := diskSize(beside(path, o.BackingFile), o.BackingFormat)
	if err != nil {
		return fmt.Errorf("backing file: %w; -u makes the image without looking", err)
	}
	if !*sized {
		o.Size, *sized = size, true
	}
	return nil
}

// diskSize is the length of the disk in the image at path.
func diskSize(path, format string) (int64, error) {
	i, err := Inspect(path, format)
	if err != nil {
		return 0, err
	}
	return i.VirtualSize, nil
}

// formatting is the line that qemu-img prints of a new qcow2 image.
func (o *CreateOptions) formatting(path string) string {
	var b strings.Builder
	add := func(key string, value any) { fmt.Fprintf(&b, " %s=%v", key, value) }
	cluster, bits, compression := o.ClusterSize, o.RefcountBits, o.CompressionType
	if cluster == 0 {
		cluster = 64 << 10
	}
	if bits == 0 {
		bits = 16
	}
	if compression == "" {
		compression = "zlib"
	}
	add("cluster_size", cluster)
	add("extended_l2", onOff(o.ExtendedL2))
	if o.Preallocation != qcow2.PreallocateOff {
		add("preallocation", o.Preallocation)
	}
	add("compression_type", compression)
	add("size", o.Size)
	if o.BackingFile != "" {
		add("backing_file", o.BackingFile)
		add("backing_fmt", o.BackingFormat)
	}
	if o.DataFile != "" {
		add("data_file", o.DataFile)
		add("data_file_raw", onOff(o.DataFileRaw))
	}
	if o.Version == 2 {
		add("compat", "0.10")
	}
	add("lazy_refcounts", onOff(o.LazyRefcounts))
	add("refcount_bits", bits)
	return fmt.Sprintf("Formatting '%s', fmt=qcow2%s", path, b.String())
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// createRaw makes a raw image at path. On an error it leaves none.
func createRaw(path string, size int64, mode qcow2.Preallocation) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if err := preallocateRaw(f, 0, size, mode); err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Sync()
}

// preallocateRaw takes the room for the bytes [from, to) of f, beyond its end.
func preallocateRaw(f *os.File, from, to int64, mode qcow2.Preallocation) error {
	switch mode {
	case qcow2.PreallocateMetadata:
		return errors.New("a raw image has no metadata: use preallocation off, falloc or full")
	case qcow2.PreallocateFalloc:
		if to == from {
			return nil
		}
		if err := unix.Fallocate(int(f.Fd()), 0, from, to-from); err != nil {
			return fmt.Errorf("the host cannot reserve %d bytes: %w", to-from, err)
		}
	case qcow2.PreallocateFull:
		zeros := make([]byte, 1<<20)
		for ; from < to; from += int64(len(zeros)) {
			if _, err := f.WriteAt(zeros[:min(to-from, int64(len(zeros)))], from); err != nil {
				return err
			}
		}
	}
	return nil
}

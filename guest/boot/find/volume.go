package find

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"unicode"

	"github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/diskfs/go-diskfs/partition/mbr"
	"github.com/google/uuid"

	"github.com/calfvm/calf/guest/internal/ext4"
)

const (
	sectorSize    = 512
	maxPartitions = 128
)

// Partition is a part of a disk that may hold a file system.
type Partition struct {
	// Number counts from 1; 0 is the disk as a whole, which has no partitions.
	Number int
	// Offset and Size are in bytes.
	Offset, Size int64
	// Kind says what it holds: ext4, xfs, LVM and so on; empty: not known.
	Kind string
	// UUID and Label are the file system's; PartUUID and PartLabel, the
	// partition table's. Each may be empty.
	UUID, Label, PartUUID, PartLabel string
}

func (p Partition) String() string {
	if p.Number == 0 {
		return "the disk"
	}
	return fmt.Sprintf("partition %d", p.Number)
}

// volume is a partition that files can be looked for in.
type volume struct {
	Partition
	device string // what GRUB calls it
	files  fs.FS  // nil: they cannot be read
	why    error  // why not
}

// Partitions returns what is on a disk of size bytes, by its partition table and the
// superblocks in it.
func Partitions(disk io.ReaderAt, size int64) ([]Partition, error) {
	volumes, err := volumes(&meter{disk, maxRead}, size)
	var parts []Partition
	for _, v := range volumes {
		parts = append(parts, v.Partition)
	}
	return parts, err
}

// volumes returns the partitions of a disk.
func volumes(disk io.ReaderAt, size int64) ([]*volume, error) {
	parts, err := partitions(disk, size)
	if err != nil {
		return nil, err
	}
	for _, v := range parts {
		if err := v.open(io.NewSectionReader(disk, v.Offset, v.Size)); err != nil {
			return nil, fmt.Errorf("%v: %w", v.Partition, err)
		}
	}
	return parts, nil
}

// partitions returns what the partition table says that can be; the disk as a
// whole if it has none.
func partitions(disk io.ReaderAt, size int64) ([]*volume, error) {
	var parts []*volume
	add := func(scheme string, start, sectors uint64, p Partition) {
		end := uint64(size / sectorSize) //nolint:gosec // G115: not negative
		if len(parts) < maxPartitions && sectors > 0 && start > 0 && start < end {
			sectors = min(sectors, end-start)                                     // an image may have been cut off
			p.Offset, p.Size = int64(start)*sectorSize, int64(sectors)*sectorSize //nolint:gosec // G115: less than size
			parts = append(parts, &volume{Partition: p, device: fmt.Sprintf("hd0,%s%d", scheme, p.Number)})
		}
	}
	dev := device{io.NewSectionReader(disk, 0, size)}
	if err := checkGPT(disk, size); err != nil {
		return nil, err
	}
	table, gptErr := gpt.Read(dev, sectorSize, sectorSize)
	if gptErr == nil {
		for _, p := range table.Partitions {
			add("gpt", p.Start, p.End-p.Start+1, Partition{Number: p.Index, PartUUID: strings.ToLower(p.GUID), PartLabel: p.Name})
		}
	} else if table, err := mbr.Read(dev, sectorSize, sectorSize); err == nil {
		for _, p := range table.Partitions {
			if p.Type == mbr.GPTProtective {
				return nil, fmt.Errorf("its partition table is damaged: %w", gptErr)
			}
			add("msdos", uint64(p.Start), uint64(p.Size), Partition{Number: p.Index, PartUUID: strings.ToLower(p.UUID())})
		}
	}
	if len(parts) == 0 {
		parts = []*volume{{Partition: Partition{Size: size}, device: "hd0"}}
	}
	return parts, nil
}

// checkGPT refuses a table whose array of partitions is larger than any tool makes
// one, before memory is taken for it.
func checkGPT(disk io.ReaderAt, size int64) error {
	for _, off := range []int64{sectorSize, size/sectorSize*sectorSize - sectorSize} {
		var header [92]byte
		if _, err := disk.ReadAt(header[:], max(0, off)); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		count, entry := binary.LittleEndian.Uint32(header[80:]), binary.LittleEndian.Uint32(header[84:])
		if string(header[:8]) == "EFI PART" && (count > 1024 || entry > 4096) {
			return fmt.Errorf("its partition table is damaged: %d entries of %d bytes", count, entry)
		}
	}
	return nil
}

// device is a disk as go-diskfs wants one.
type device struct{ *io.SectionReader }

func (device) Close() error               { return nil }
func (device) Stat() (fs.FileInfo, error) { return nil, errors.ErrUnsupported }

// open finds out what the volume holds, and opens it if it can. The error is one of
// reading.
func (v *volume) open(r *io.SectionReader) error {
	files, err := ext4.New(r, r.Size())
	switch {
	case err == nil:
		v.Kind, v.UUID, v.Label, v.files = files.Kind(), files.UUID(), files.Label(), files
		if v.UUID == (uuid.UUID{}).String() {
			v.UUID = ""
		}
		if files.Unclean() {
			v.files = unclean{files}
		}
		return nil
	case !errors.Is(err, ext4.ErrNotExt):
		v.Kind, v.why = "ext4", fmt.Errorf("cannot be read: %w", err)
		return nil
	}
	if err := v.identify(r); err != nil {
		return err
	}
	switch empty, err := isEmpty(r); {
	case err != nil:
		return err
	case v.Kind != "":
		v.why = fmt.Errorf("holds %s, which calf cannot look into", v.Kind)
	case empty:
		v.why = errors.New("is empty")
	default:
		v.why = errors.New("holds nothing that calf knows")
	}
	return nil
}

// isEmpty reports whether there are only zeros where anything known begins.
func isEmpty(r io.ReaderAt) (bool, error) {
	var b [1 << 17]byte
	n, err := r.ReadAt(b[:], 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return len(bytes.Trim(b[:n], "\x00")) == 0, err
}

// unclean is a file system with a journal that has not been replayed: what it is
// wrong about may be right there.
type unclean struct{ *ext4.FS }

func (u unclean) Open(name string) (fs.File, error) {
	f, err := u.FS.Open(name)
	return f, u.explain(err)
}

func (u unclean) ReadDir(name string) ([]fs.DirEntry, error) {
	list, err := u.FS.ReadDir(name)
	return list, u.explain(err)
}

func (u unclean) explain(err error) error {
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%w (the file system was not unmounted, and its journal is not read)", err)
}

// meter is a reader that a broken disk cannot keep busy for ever.
type meter struct {
	r    io.ReaderAt
	left int64
}

// errTooMuch says that a meter has run out.
var errTooMuch = errors.New("looking into it takes too long: its file systems are damaged")

func (m *meter) ReadAt(p []byte, off int64) (int, error) {
	const least = 1024 // what the smallest read counts as
	if m.left -= max(least, int64(len(p))); m.left < 0 {
		return 0, errTooMuch
	}
	return m.r.ReadAt(p, off)
}

// readFile returns a small file of a volume.
func (v *volume) readFile(name string, limit int64) ([]byte, error) {
	f, err := v.openFile(name)
	if err != nil {
		return nil, err
	}
	if f.Size > limit {
		return nil, fmt.Errorf("%s is %d bytes long, which is too much for such a file", f, f.Size)
	}
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.NewSectionReader(f, 0, f.Size)); err != nil {
		return nil, fmt.Errorf("%s: %w", f, err)
	}
	return b.Bytes(), nil
}

// openFile opens a regular file of a volume by its path from the root.
func (v *volume) openFile(name string) (*File, error) {
	name = clean(name)
	if v.files == nil {
		return nil, fmt.Errorf("%v %w", v.Partition, v.why)
	}
	if strings.ContainsFunc(name, unicode.IsControl) {
		return nil, fmt.Errorf("%v: /%q is no name for such a file", v.Partition, name)
	}
	opened, err := v.files.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", v.Partition, err)
	}
	st, err := opened.Stat()
	if err != nil {
		return nil, fmt.Errorf("%v: %w", v.Partition, err)
	}
	r, ok := opened.(io.ReaderAt)
	if !ok {
		return nil, fmt.Errorf("%v: /%s is not a regular file", v.Partition, name)
	}
	return &File{ReaderAt: r, Path: "/" + name, Partition: v.Number, Size: st.Size()}, nil
}

// has reports whether the volume has a file or a directory.
func (v *volume) has(name string) bool {
	if v.files == nil {
		return false
	}
	_, err := fs.Stat(v.files, clean(name))
	return err == nil
}

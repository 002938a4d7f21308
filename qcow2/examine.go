package qcow2

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"os"
	"slices"
)

// Examination is what is to be known of an image before anybody trusts it. Of one
// with faults the rest is as far as it could be read.
type Examination struct {
	Info
	// FileSize is the length of the file in bytes.
	FileSize int64
	// L1Entries is how many entries the L1 table has, and L1Needed how many the
	// size of the disk takes.
	L1Entries, L1Needed uint64
	// SnapshotCount is how many internal snapshots the header counts, which may be
	// more than can be read.
	SnapshotCount int
	// Faults keep the image from being used. The first is what Inspect fails with.
	Faults []error
	// Oddities are what no sound program writes, although most would read over it.
	Oddities []string
	// Ignored are the optional features and header extensions that this package
	// does not know, by the names that the image gives them.
	Ignored []string
}

// Examine returns what the image at path says of itself, and what is wrong with
// that. It goes on after a fault, as far as what follows can be found, and opens
// nothing but the image, which it locks like a reader. An error means that the file
// cannot be read, or is no QCOW2 image of a version that is known.
func Examine(path string) (*Examination, error) { return examineFile(path, accessRead) }

// ExamineShared is Examine for an image that another process may be writing to: see
// Options.ForceShare.
func ExamineShared(path string) (*Examination, error) { return examineFile(path, accessForced) }

func examineFile(path string, a access) (*Examination, error) {
	f, err := openRegular(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if err := lockImage(f, path, a); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return examineAndClose(f, path)
}

// examineAndClose examines the image in f, which is locked.
func examineAndClose(f *os.File, path string) (*Examination, error) {
	m := &Image{path: path, file: newOSFile(f)}
	x, err := m.examine()
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, inFile(path, err)
	}
	for i, fault := range x.Faults {
		x.Faults[i] = inFile(path, fault)
	}
	return x, nil
}

func (m *Image) examine() (*Examination, error) {
	fileSize, err := m.file.Size()
	if err != nil {
		return nil, err
	}
	h, err := m.readHeader(fileSize)
	if err != nil {
		return nil, err
	}
	x := &Examination{FileSize: fileSize, L1Entries: uint64(h.l1Size), SnapshotCount: int(h.snapshots)}
	fault := func(err error) bool {
		if err != nil {
			x.Faults = append(x.Faults, err)
		}
		return err != nil
	}
	if fault(h.validateFields()) && (h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits) {
		x.Info = *h.info(extensions{})
		return x, nil
	}
	x.L1Needed = h.l1Entries(h.size)
	fault(h.validateRefTable(fileSize))
	fault(h.validateL1(fileSize))
	noSnapshots := fault(h.validateSnapshots(fileSize))
	first := make([]byte, min(int64(1)<<h.clusterBits, fileSize))
	if err := readFull(m.file, first, 0); err != nil {
		return nil, err
	}
	ext, err := parseExtensions(h, first)
	if !fault(err) {
		x.Oddities = h.oddities(ext)
	}
	x.Info, x.Ignored = *h.info(ext), h.ignored(ext)
	if h.backingOffset <= uint64(len(first)) {
		x.BackingFile, err = backingName(h, first)
		fault(err)
	}
	if !noSnapshots {
		x.Snapshots, err = h.listSnapshots(m.file)
		fault(err)
	}
	l := bitmapList{h: h, ext: ext, fileSize: fileSize}
	if !fault(l.load(m.file)) {
		x.Bitmaps = l.decode()
	}
	return x, nil
}

// oddities are what no sound program writes into header extensions.
func (h *header) oddities(ext extensions) []string {
	var odd []string
	say := func(is bool, format string, args ...any) {
		if is {
			odd = append(odd, fmt.Sprintf(format, args...))
		}
	}
	_, names := ext.sizes[extDataFile]
	_, encryption := ext.sizes[extEncryption]
	say(ext.twice, "there are two header extensions of one type, and programs may believe either")
	say(ext.end == 0, "the header extensions have no end")
	say(ext.sizes[extFeatureNames]%featureNameEntry != 0, "the table with the names of features ends inside a name")
	say(ext.backingFormat != "" && h.backingOffset == 0, "it has the format %q of a backing file, and no backing file", ext.backingFormat)
	say(names && !h.incompat(incompatDataFile), "it names the data file %s, and has the data itself", shown(ext.dataFile))
	say(encryption && h.crypt == 0, "it has a header for encryption, and is not encrypted")
	return odd
}

// ignored are the names of what a program may ignore that does not know it.
func (h *header) ignored(ext extensions) []string {
	names := ext.features.all(featureCompatible, h.compatible&^(1<<compatLazyRefcounts))
	names = append(names, ext.features.all(featureAutoclear, h.autoclear&^(1<<autoclearBitmaps|1<<autoclearRawData))...)
	known := []uint32{extBackingFormat, extFeatureNames, extBitmaps, extDataFile, extEncryption}
	for _, kind := range slices.Sorted(maps.Keys(ext.sizes)) {
		if !slices.Contains(known, kind) {
			names = append(names, fmt.Sprintf("header extension %#x", kind))
		}
	}
	return names
}

// all returns the names of the features of a type whose bits are set.
func (n featureNames) all(kind byte, set uint64) []string {
	var names []string
	for ; set != 0; set &= set - 1 {
		bit := uint(bits.TrailingZeros64(set))
		names = append(names, fmt.Sprintf("%s (bit %d)", n.of(kind, bit), bit))
	}
	return names
}

// Layer is a file in a chain of backing files.
type Layer struct {
	Path, Format string       // qcow2 or raw
	Size         int64        // of the disk, in bytes
	Allocated    int64        // room that the file takes on the host, in bytes
	Image        *Examination // nil for a raw file
}

// ExamineChain returns what is to be known of the image at path and of the files
// under it, the image first. They are found by the rule of Open, but of none more
// is read than Examine does. Beside an error are the layers above the one that it
// is about.
func ExamineChain(path string, opts Options) ([]Layer, error) {
	c := &chain{dirs: resolveDirs(opts.BackingDirs)}
	var layers []Layer
	f, err := openRegular(path, os.O_RDONLY)
	for format := "qcow2"; err == nil; {
		l, err := c.examine(f, path, format, opts)
		if err != nil {
			return layers, err
		}
		layers = append(layers, *l)
		if l.Image == nil || l.Image.BackingFile == "" {
			return layers, nil
		}
		name := l.Image.BackingFile
		if err := checkBacking(path, name, l.Image.BackingFormat, opts); err != nil {
			return layers, err
		}
		target := besideImage(path, name)
		if f, err = c.openTrusted("backing file", path, target, os.O_RDONLY); err != nil {
			return layers, err
		}
		path, format = target, l.Image.BackingFormat
	}
	return nil, err
}

// examine adds the open file f to the chain, looks at it, and closes it.
func (c *chain) examine(f *os.File, path, format string, opts Options) (*Layer, error) {
	l := &Layer{Path: path, Format: format}
	err := c.enter(f, path)
	if err == nil {
		err = lockImage(f, path, readAccess(opts.ForceShare))
	}
	hf := newOSFile(f)
	if err == nil {
		l.Allocated, err = hf.allocated()
	}
	if err == nil {
		l.Size, err = hf.Size()
	}
	if err != nil || format == "raw" {
		l.Size = (l.Size + diskUnit - 1) &^ (diskUnit - 1)
		return l, inFile(path, errors.Join(err, f.Close()))
	}
	if l.Image, err = examineAndClose(f, path); err != nil {
		return nil, err
	}
	l.Size = l.Image.Size
	return l, nil
}

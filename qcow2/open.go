package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// DefaultL2CacheBytes is the memory for L2 tables unless Options say otherwise.
// It maps 256 GiB of disk at the usual cluster size of 64 KiB.
const DefaultL2CacheBytes = 32 << 20

// Options say how to open an image. The zero value opens it for writing, with
// backing files allowed in its own directory only.
type Options struct {
	// ReadOnly opens the image for reading. Other readers may share it.
	ReadOnly bool
	// ForceShare opens the image and its backing files for reading beside a
	// process that writes to them. What that changes meanwhile may show in part,
	// and what it has not written yet does not show, so that the image may seem
	// broken.
	ForceShare bool
	// Snapshot, if not empty, is the ID or the name of an internal snapshot of
	// the image: the disk is what it was then, of the size it had, over the
	// same backing file, for reading only, whether ReadOnly is set or not. An
	// image without it is refused with ErrNoSnapshot.
	Snapshot string
	// Base, if not empty, is the path of one of the image's backing files, as it
	// is or as the image above it names it, which is opened for writing too: see
	// Image.Base. It takes an image that is open for writing.
	Base string
	// BackingSize is how long, in bytes, the backing file of the image counts as at
	// least: if it is shorter, or there is none, as if zeros were behind it. So what
	// is made zero there is marked, and does not show a longer backing file that the
	// image gets by SetBacking.
	BackingSize int64
	// NoBacking refuses any image that names a backing file.
	NoBacking bool
	// BackingDirs are directories, beside the one of the image that names
	// it, in which a backing file may lie, at any depth.
	BackingDirs []string
	// DataFile allows the image and its backing files an external data file,
	// which is opened if it lies where a backing file may. Without it an image
	// that has one is refused.
	DataFile bool
	// L2CacheBytes bounds the memory for L2 tables of the image and all its
	// backing files together; 0 means DefaultL2CacheBytes. Each keeps 16
	// slices of tables, of at most 4 KiB each, in any case. All tables of an
	// image take its size divided by ClusterSize/8 (twice that with extended
	// L2 entries), and a sixteenth of it more to keep them in order: with so
	// much, all of them stay in memory once they were read. Nothing is set
	// aside before it is needed.
	//
	// What else stays in memory is bounded for each image: its L1 table, at
	// most 32 MiB, and decompressed clusters, 4 MiB or two of them; for a
	// writable one its refcount table, at most 8 MiB, 1 MiB of refcount blocks,
	// and where its metadata is, some 16 bytes for each table.
	L2CacheBytes int64
	// Direct moves data between memory and the image, its data file and the
	// backing files of its format past the host's page cache (O_DIRECT). A host
	// file that does not allow that is refused.
	Direct bool
	// Volatile says that nobody needs the image if the host crashes while it is
	// open: nothing waits for stable storage, Close neither. A process that is
	// killed still leaves a sound image.
	Volatile bool
	// CompressionLevel is how hard WriteCompressed tries: from 1, the
	// fastest, to 9, the smallest; 0 means the default, 6.
	CompressionLevel int
}

// Open opens the image at path and its chain of backing files. The image is
// locked first, in QEMU's way, against other processes and other opens: a
// writer is alone, readers share. The caller has to Close it.
//
// Open writes nothing to the file but the clearing of feature bits that the
// format requires of a writer (autoclear), and the repair of an image whose dirty
// bit is set: a program that keeps reference counts lazily did not close it. If
// that leaves a fault, Open fails with ErrCorrupt and names it.
//
// The path is not used again once Open returns: a throw-away overlay may be
// unlinked while open.
func Open(path string, opts Options) (*Image, error) {
	return openChain(path, opts, &chain{})
}

// openChain opens the image at path as the first layer of c.
func openChain(path string, opts Options, c *chain) (*Image, error) {
	c.dirs = resolveDirs(opts.BackingDirs)
	opts.ReadOnly = opts.ReadOnly || opts.Snapshot != "" || opts.ForceShare
	if opts.Base != "" && opts.ReadOnly {
		return nil, inFile(path, invalidOption("an image that is open for reading only has no base that is open for writing"))
	}
	f, err := openRegular(path, openFlags(opts))
	if err != nil {
		return nil, err
	}
	m, err := openLocked(f, path, opts, c)
	if err == nil && opts.Base != "" && c.base == nil {
		err = &Error{Path: path, Kind: ErrInvalidOption, What: fmt.Sprintf("%s is not among its backing files", shown(opts.Base))}
		return nil, errors.Join(err, m.Close())
	}
	if err != nil {
		return nil, err
	}
	m.base, m.baseLayer = c.base, c.baseLayer
	return m, nil
}

// openFlags are how to open the file of an image.
func openFlags(opts Options) int {
	if opts.ReadOnly {
		return os.O_RDONLY
	}
	return os.O_RDWR
}

// openLocked locks f, then opens the image in it. It takes over f.
func openLocked(f *os.File, path string, opts Options, c *chain) (*Image, error) {
	if err := c.enter(f, path); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := lockImage(f, path, accessOf(opts)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	hf, err := newFile(f, path, opts)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return openFile(hf, path, opts, c)
}

// openFile opens the image in f, which is locked. It takes over f.
func openFile(f file, path string, opts Options, c *chain) (*Image, error) {
	m := &Image{path: path, file: f, data: f, dataPath: path, readOnly: opts.ReadOnly}
	if err := m.load(opts, c); err != nil {
		err = inFile(path, err)
		if m.backing != nil {
			err = errors.Join(err, m.backing.Close())
		}
		if m.data != f {
			err = errors.Join(err, m.data.Close())
		}
		return nil, errors.Join(err, f.Close())
	}
	if !m.readOnly {
		m.commits.start(m)
	}
	return m, nil
}

// load reads and checks everything that is read at open, in the order in which
// each step bounds the next: header, extensions, tables, backing files.
func (m *Image) load(opts Options, c *chain) error {
	fileSize, err := m.file.Size()
	if err != nil {
		return err
	}
	h, err := m.loadHeader(fileSize)
	if err != nil {
		return err
	}
	first := make([]byte, min(int64(1)<<h.clusterBits, fileSize))
	if err := readFull(m.file, first, 0); err != nil {
		return err
	}
	ext, err := parseExtensions(h, first)
	if err != nil {
		return err
	}
	if err := h.checkFeatures(ext.features); err != nil {
		return err
	}
	if !m.readOnly {
		if err := h.checkWritable(m.path); err != nil {
			return err
		}
		if h.incompat(incompatDirty) {
			if h, fileSize, err = m.mendDirty(); err != nil {
				return err
			}
		}
	}
	if opts.Snapshot != "" {
		if err := m.showSnapshot(h, opts.Snapshot, fileSize); err != nil {
			return err
		}
	}
	if err := m.loadTables(h, opts, c, fileSize); err != nil {
		return err
	}
	name, err := backingName(h, first)
	if err != nil {
		return err
	}
	if m.external {
		if err := m.openData(h, ext.dataFile, opts, c); err != nil {
			return err
		}
	}
	if name != "" {
		if m.backing, err = c.openBacking(m.path, name, ext.backingFormat, opts); err != nil {
			return err
		}
	}
	if opts.BackingSize > 0 && (m.backing == nil || m.backing.Size() < opts.BackingSize) {
		m.backing = &longBacking{m.backing, opts.BackingSize}
	}
	if err := m.loadBitmaps(h, ext.bitmaps, fileSize); err != nil {
		return err
	}
	return m.clearAutoclear(h)
}

func (m *Image) loadHeader(fileSize int64) (*header, error) {
	h, err := m.readHeader(fileSize)
	if err != nil {
		return nil, err
	}
	return h, h.validate(fileSize)
}

// readHeader reads the fixed part of the header and checks only what decoding
// it needs.
func (m *Image) readHeader(fileSize int64) (*header, error) {
	b := make([]byte, min(headerLengthOur, fileSize))
	if err := readFull(m.file, b, 0); err != nil {
		return nil, err
	}
	return parseHeader(b)
}

// mendDirty repairs an image that was not closed cleanly, as by a program that
// was killed and keeps its counts lazily. It returns the header and the length of
// the file afterwards.
func (m *Image) mendDirty() (*header, int64, error) {
	if err := repairDirty(m.file, m.path); err != nil {
		return nil, 0, err
	}
	fileSize, err := m.file.Size()
	if err != nil {
		return nil, 0, err
	}
	h, err := m.loadHeader(fileSize)
	return h, fileSize, err
}

// loadTables sets up the image from its validated header and reads the L1 table
// and the refcount table.
func (m *Image) loadTables(h *header, opts Options, c *chain, fileSize int64) error {
	m.geometry = newGeometry(h)
	m.setSize(int64(h.size)) //nolint:gosec // G115: validated
	m.zlib = h.compression == compressionDeflate
	m.features = h.incompatible
	m.l1Offset = int64(h.l1Offset) //nolint:gosec // G115: validated
	m.decoder = newDecoder(m.clusterSize)
	m.packer.held = map[uint64]*packed{}
	var err error
	if m.encoders, err = newEncoders(&m.geometry, m.zlib, opts.CompressionLevel); err != nil {
		return err
	}
	if c.budget == nil {
		if c.budget, err = newCacheBudget(opts.L2CacheBytes); err != nil {
			return err
		}
	}
	if err := c.budget.join(m); err != nil {
		return err
	}
	m.loads = map[uint64]*flight{}
	m.tables = map[uint64]*flight{}
	m.dirtyL1 = map[uint64]struct{}{}
	m.meta = metaSet{}
	m.epochs.now = firstEpoch
	entries := uint64(h.l1Size)
	if m.readOnly {
		// A reader uses no more, and a writer has to know all L2 tables.
		entries = h.l1Entries(h.size)
	}
	if m.l1, err = m.loadTable(h.l1Offset, int64(min(entries, uint64(h.l1Size)))*8); err != nil { //nolint:gosec // G115: validated
		return err
	}
	// What the table of a snapshot is too short for is not allocated.
	m.l1 = append(m.l1, make([]uint64, entries-uint64(len(m.l1)))...)
	if m.readOnly {
		return nil
	}
	return m.loadRefcounts(h, fileSize)
}

func (m *Image) loadRefcounts(h *header, fileSize int64) error {
	table, err := m.loadTable(h.refTableOffset, int64(h.refTableClusters)<<m.clusterBits)
	if err != nil {
		return err
	}
	lru, err := simplelru.NewLRU[uint64, *refSlice](refSlices, nil)
	if err != nil {
		return err
	}
	m.refs = &refcounts{
		img: m, table: table, offset: int64(h.refTableOffset), slices: lru, //nolint:gosec // G115: validated
		virgin: m.cluster(fileSize + m.clusterSize - 1),
	}
	m.covered = m.refs.covered()
	return m.claimTables(h, fileSize)
}

// loadTable reads n bytes of 8-byte entries at off; both have been checked.
func (m *Image) loadTable(off uint64, n int64) ([]uint64, error) {
	if n == 0 {
		return nil, nil // an empty table may be said to lie anywhere
	}
	b := make([]byte, n)
	if err := readFull(m.file, b, int64(off)); err != nil { //nolint:gosec // G115: validated
		return nil, err
	}
	return decodeTable(b), nil
}

// clearAutoclear clears the autoclear bits of an image opened for writing that
// stand for data which this engine does not keep up to date: all but those of
// persistent bitmaps and of raw external data, where there are such.
func (m *Image) clearAutoclear(h *header) error {
	var kept uint64
	if m.bitmaps.n > 0 {
		kept |= 1 << autoclearBitmaps
	}
	if m.raw {
		kept |= 1 << autoclearRawData
	}
	if m.readOnly || h.autoclear&^kept == 0 {
		return nil
	}
	if err := m.writeFeature(offAutoclear, h.autoclear&kept); err != nil {
		return err
	}
	return m.file.Fdatasync()
}

// writeFeature writes one of the feature fields of a version 3 header.
func (m *Image) writeFeature(off int64, v uint64) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	return writeFull(m.file, b[:], off)
}

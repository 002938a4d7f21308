package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Flags of a bitmap in the directory.
const (
	bitmapInUse = 1 << 0 // not saved since the disk changed
	bitmapAuto  = 1 << 1 // it follows the disk
	bitmapExtra = 1 << 2 // it may be used by who does not know its extra data

	knownBitmapFlags = bitmapInUse | bitmapAuto | bitmapExtra
)

// bitmapDirty is the one known type of bitmap, the only one that QEMU makes.
const bitmapDirty = 1

// maxBitmapEntries is how many entries the tables of an image's bitmaps may have
// together, as long as it is open for writing.
const maxBitmapEntries = 4 << 20

// Bitmap describes a persistent bitmap: which parts of the disk have changed since
// some time, as backup programs want to know it.
type Bitmap struct {
	Name string
	// Granularity is the number of bytes of the disk that each bit stands for.
	Granularity int64
	// Enabled says that the bitmap is to follow every change of the disk.
	Enabled bool
	// InUse says that the bitmap cannot be trusted: the disk has changed, or
	// may have, without it. Who uses bitmaps has to begin a new one.
	InUse bool
}

// bitmapDirectory says where the directory of the bitmaps is.
type bitmapDirectory struct {
	n             uint32 // bitmaps; 0 if there are none, or all are void
	offset, bytes uint64
}

// bitmapRow is an entry of the directory, as it is in the file.
type bitmapRow []byte

func (b bitmapRow) table() (off uint64, entries uint32) {
	return binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
}

func (b bitmapRow) setTable(off uint64, entries int) {
	binary.BigEndian.PutUint64(b, off)
	binary.BigEndian.PutUint32(b[8:], uint32(entries)) //nolint:gosec // G115: at most 4 Mi
}

func (b bitmapRow) flags() uint32 { return binary.BigEndian.Uint32(b[12:]) }

func (b bitmapRow) setFlags(flags uint32) { binary.BigEndian.PutUint32(b[12:], flags) }

func (b bitmapRow) extra() uint32 { return binary.BigEndian.Uint32(b[20:]) }

func (b bitmapRow) name() string {
	at := bitmapFixed + b.extra()
	return string(b[at : at+uint32(binary.BigEndian.Uint16(b[18:]))])
}

// newBitmapRow is the row of a bitmap without a table.
func newBitmapRow(name string, grainBits uint8, flags uint32) bitmapRow {
	b := make(bitmapRow, (bitmapFixed+len(name)+7)&^7)
	b.setFlags(flags)
	b[16], b[17] = bitmapDirty, grainBits
	binary.BigEndian.PutUint16(b[18:], uint16(len(name))) //nolint:gosec // G115: at most 1023
	copy(b[bitmapFixed:], name)
	return b
}

func (b bitmapRow) inUse() bool { return b.flags()&bitmapInUse != 0 }

// follows reports whether the bitmap is said to have followed the disk up to now.
func (b bitmapRow) follows() bool { return b.flags()&(bitmapAuto|bitmapInUse) == bitmapAuto }

func (b bitmapRow) decode() Bitmap {
	return Bitmap{
		Name:        b.name(),
		Granularity: 1 << min(b[17], 62),
		Enabled:     b.flags()&bitmapAuto != 0,
		InUse:       b.inUse(),
	}
}

// bitmapFault is corruptf for what is wrong with a bitmap.
func bitmapFault(format string, args ...any) error {
	return inactive(true, corruptf(format, args...))
}

// bitmapDirectory finds the directory of the bitmaps by the extension for it. The
// bitmaps of an image without the feature bit are void: a program that does not
// know them has written to the disk. Without the extension there are none.
func (h *header) bitmapDirectory(ext []byte, fileSize int64) (bitmapDirectory, error) {
	if ext == nil || h.autoclear>>autoclearBitmaps&1 == 0 {
		return bitmapDirectory{}, nil
	}
	if len(ext) != 24 {
		return bitmapDirectory{}, bitmapFault("the header extension for bitmaps has %d bytes instead of 24", len(ext))
	}
	be := binary.BigEndian
	d := bitmapDirectory{n: be.Uint32(ext), bytes: be.Uint64(ext[8:]), offset: be.Uint64(ext[16:])}
	if d.n == 0 || d.n > maxBitmaps || d.bytes == 0 || d.bytes > maxBitmapDirectory {
		return bitmapDirectory{}, bitmapFault("a directory of %d bitmaps in %d bytes is impossible", d.n, d.bytes)
	}
	return d, inactive(true, h.checkTable("directory of bitmaps", d.offset, d.bytes, fileSize))
}

// load reads the entries of the directory, in order and without gaps.
func (d bitmapDirectory) load(f file) ([]bitmapRow, error) {
	dir := make([]byte, d.bytes)
	if err := readFull(f, dir, int64(d.offset)); err != nil { //nolint:gosec // G115: checked by checkTable
		return nil, err
	}
	var rows []bitmapRow
	for i := range d.n {
		size := uint64(bitmapFixed)
		if uint64(len(dir)) >= size {
			be := binary.BigEndian
			size = (size + uint64(be.Uint16(dir[18:])) + uint64(be.Uint32(dir[20:])) + 7) &^ 7
		}
		if size > uint64(len(dir)) {
			return nil, bitmapFault("the directory of bitmaps ends inside bitmap %d of %d", i, d.n)
		}
		rows = append(rows, dir[:size:size])
		dir = dir[size:]
	}
	if len(dir) > 0 {
		return nil, bitmapFault("the directory of bitmaps has %d bytes behind the last of %d bitmaps", len(dir), d.n)
	}
	return rows, nil
}

// Bitmaps returns the persistent bitmaps of the image, read from the file. None
// are those that a program which does not know them has made void.
func (m *Image) Bitmaps() ([]Bitmap, error) {
	p, err := m.hold(0)
	if err != nil {
		return nil, err
	}
	defer p.leave()
	all, err := m.listBitmaps()
	return all, inFile(m.path, err)
}

func (m *Image) listBitmaps() ([]Bitmap, error) {
	l, err := m.readBitmaps()
	if err != nil {
		return nil, err
	}
	return l.decode(), nil
}

// bitmapList is what the file says of the bitmaps.
type bitmapList struct {
	h        *header
	ext      extensions
	dir      bitmapDirectory
	rows     []bitmapRow
	fileSize int64
}

func (m *Image) readBitmaps() (l bitmapList, err error) {
	if l.fileSize, err = m.file.Size(); err != nil {
		return l, err
	}
	if l.h, err = m.loadHeader(l.fileSize); err != nil {
		return l, err
	}
	if l.ext, err = m.loadExtensions(l.h); err != nil {
		return l, err
	}
	return l, l.load(m.file)
}

// load reads the directory in f, of an image whose header is known.
func (l *bitmapList) load(f file) (err error) {
	if l.dir, err = l.h.bitmapDirectory(l.ext.bitmaps, l.fileSize); err != nil {
		return err
	}
	l.rows, err = l.dir.load(f)
	return err
}

// decode returns the bitmaps in the list.
func (l *bitmapList) decode() []Bitmap {
	var all []Bitmap
	for _, row := range l.rows {
		all = append(all, row.decode())
	}
	return all
}

// find returns the index of the bitmap with the given name.
func (l *bitmapList) find(name string) (int, error) {
	const shown = 8
	var names []string
	for i, row := range l.rows {
		if row.name() == name {
			return i, nil
		}
		if i < shown {
			names = append(names, fmt.Sprintf("%.60q", row.name()))
		}
	}
	missing := &Error{Kind: ErrNoBitmap, What: fmt.Sprintf("the image has no persistent bitmap %.60q", name)}
	if len(names) > 0 {
		missing.Mend = "it has " + strings.Join(names, ", ")
	}
	if more := len(l.rows) - shown; more > 0 {
		missing.Mend += fmt.Sprintf(" and %d more", more)
	}
	return 0, missing
}

// loadExtensions reads the header extensions.
func (m *Image) loadExtensions(h *header) (extensions, error) {
	first := make([]byte, 1<<h.clusterBits)
	if err := readFull(m.file, first, 0); err != nil {
		return extensions{}, err
	}
	return parseExtensions(h, first)
}

// loadBitmaps finds the bitmaps of an image being opened for writing, and claims
// all they have in the file.
func (m *Image) loadBitmaps(h *header, ext []byte, fileSize int64) error {
	if m.readOnly {
		return nil
	}
	d, err := h.bitmapDirectory(ext, fileSize)
	if err != nil || d.n == 0 {
		return err
	}
	rows, err := d.load(m.file)
	if err != nil {
		return err
	}
	if err := m.meta.claim(&m.geometry, m.clustersOf(d.offset, d.bytes), metaBitmaps); err != nil {
		return err
	}
	m.bitmaps = d
	left := uint64(maxBitmapEntries)
	for i, row := range rows {
		if row.follows() {
			m.followed.Store(true)
		}
		off, entries := row.table()
		if uint64(entries) > left {
			return &Error{
				Kind: ErrUnsupported, What: fmt.Sprintf("the persistent bitmaps have more than %d parts", maxBitmapEntries),
				Mend: "remove those that nobody needs with: calf image bitmap -f qcow2 --remove " + shellWord(m.path) + " NAME",
			}
		}
		left -= uint64(entries)
		if entries == 0 {
			continue
		}
		if err := h.checkTable(fmt.Sprintf("table of bitmap %d", i), off, uint64(entries)*8, fileSize); err != nil {
			return err
		}
		if err := m.claimBitmap(off, uint64(entries)); err != nil {
			return err
		}
	}
	return nil
}

// decodeBitmap checks entry e of the table of a bitmap and returns the offset of
// its data: 0 if there is none, because its bits are all bitmapOnes or all zero.
func (g *geometry) decodeBitmap(e uint64) (uint64, error) {
	data := e & entryOffset
	if e&bitmapReserved != 0 || data != 0 && e&bitmapOnes != 0 || g.inCluster(int64(data)) != 0 {
		return 0, bitmapFault("the entry %#x of the table of a bitmap points to no data", e)
	}
	return data, nil
}

// claimBitmap claims the table at off of a bitmap and its data.
func (m *Image) claimBitmap(off, entries uint64) error {
	if err := m.meta.claim(&m.geometry, m.clustersOf(off, entries*8), metaBitmaps); err != nil {
		return err
	}
	const most = 1 << 16 // entries read at a time
	for ; entries > 0; off, entries = off+most*8, entries-min(most, entries) {
		table, err := m.loadTable(off, int64(min(most, entries))*8)
		if err != nil {
			return err
		}
		for _, e := range table {
			data, err := m.decodeBitmap(e)
			if err != nil {
				return err
			}
			if data == 0 {
				continue
			}
			if err := m.meta.claim(&m.geometry, extent{start: data >> m.clusterBits, n: 1}, metaBitmaps); err != nil {
				return err
			}
		}
	}
	return nil
}

// disownBitmaps marks the bitmaps that have followed the disk up to now as not to
// be trusted, on stable storage, before a request changes the disk. The caller has
// no pin.
func (m *Image) disownBitmaps() error {
	p, err := m.hold(0)
	if err != nil {
		return err
	}
	defer p.leave()
	return inFile(m.path, m.markBitmaps())
}

// markBitmaps is disownBitmaps for a caller that has a pin or runs exclusively.
func (m *Image) markBitmaps() error {
	m.bitmapsMu.Lock()
	defer m.bitmapsMu.Unlock()
	if !m.followed.Load() {
		return nil // by another request, meanwhile
	}
	if err := m.markAll(bitmapRow.follows); err != nil {
		return err
	}
	m.followed.Store(false)
	return nil
}

// markAll marks those bitmaps as in use of which which says so, on stable storage.
func (m *Image) markAll(which func(bitmapRow) bool) error {
	if err := m.usable(); err != nil {
		return err // the disk does not change any more
	}
	rows, err := m.bitmaps.load(m.file)
	if err != nil {
		return err
	}
	off := int64(m.bitmaps.offset) //nolint:gosec // G115: checked by checkTable
	for _, row := range rows {
		if which(row) {
			b := binary.BigEndian.AppendUint32(nil, row.flags()|bitmapInUse)
			if err := writeFull(m.file, b, off+12); err != nil {
				return err
			}
		}
		off += int64(len(row))
	}
	return m.datasync()
}

package qcow2

import (
	"context"
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// BitmapOptions describe a new persistent bitmap.
type BitmapOptions struct {
	// Granularity is the number of bytes of the disk that each bit stands for, a
	// power of two from 512 to 2 GiB. The default is QEMU's: the cluster size, but
	// at least 4 KiB and at most 64 KiB.
	Granularity int64
	// Disabled says that the bitmap is not to follow the disk.
	Disabled bool
}

// AddBitmap adds a persistent bitmap with the given name, 1 to 1023 bytes, which no
// other bitmap of the image may have. It says of no part of the disk that it has
// changed.
//
// A change of the bitmaps is on stable storage when its method returns without an
// error; no request is served meanwhile. Whatever happens, a crash too, the image
// has the bitmaps that it had or those that it is to have, and clusters leak at
// worst. Cancelling ctx leaves the bitmaps as they were. As writes do not set bits,
// the first one after the change marks all bitmaps that are enabled as in use.
//
// An image of version 2, which cannot have bitmaps that are kept, is refused with
// ErrUnsupported, as are a bitmap that takes more than 512 MiB, which QEMU would not
// load, more than 65535 of them, and one whose header has no room for them.
func (m *Image) AddBitmap(ctx context.Context, name string, opts BitmapOptions) error {
	return m.changeBitmaps(ctx, func(c *bitmapChange) error { return c.add(name, opts) })
}

// RemoveBitmap removes the persistent bitmap with the given name, whether it can be
// trusted or not. See AddBitmap for what happens on the way.
func (m *Image) RemoveBitmap(ctx context.Context, name string) error {
	return m.changeBitmaps(ctx, func(c *bitmapChange) error {
		i, err := c.find(name)
		if err != nil {
			return err
		}
		if err := c.dropTable(c.rows[i]); err != nil {
			return err
		}
		c.rows = slices.Delete(c.rows, i, i+1)
		return nil
	})
}

// ClearBitmap makes the bitmap say of no part of the disk that it has changed. One
// that is in use is refused with ErrBitmapInUse, as it is by all that follows.
func (m *Image) ClearBitmap(ctx context.Context, name string) error {
	return m.changeBitmap(ctx, name, func(c *bitmapChange, row bitmapRow, b *storedBitmap) error {
		if err := c.dropTable(row); err != nil {
			return err
		}
		return c.writeTable(row, make([]uint64, len(b.table)))
	})
}

// EnableBitmap makes the bitmap follow the disk.
func (m *Image) EnableBitmap(ctx context.Context, name string) error {
	return m.changeBitmap(ctx, name, func(_ *bitmapChange, row bitmapRow, _ *storedBitmap) error {
		row.setFlags(row.flags() | bitmapAuto)
		return nil
	})
}

// DisableBitmap makes the bitmap keep what it says, whatever happens to the disk.
func (m *Image) DisableBitmap(ctx context.Context, name string) error {
	return m.changeBitmap(ctx, name, func(_ *bitmapChange, row bitmapRow, _ *storedBitmap) error {
		row.setFlags(row.flags() &^ bitmapAuto)
		return nil
	})
}

// MergeBitmap adds to the bitmap to all that the bitmap name of the image from says has
// changed. Their granularities may differ. from may be m; another image has to have a
// disk of the same length, and to be open for reading only.
func (m *Image) MergeBitmap(ctx context.Context, to string, from *Image, name string) error {
	if from != m && (!from.readOnly || from.Size() != m.Size()) {
		return inFile(m.path, invalidOption("bitmaps are merged from an image that is open for reading only and has a disk of %d bytes", m.Size()))
	}
	return m.changeBitmap(ctx, to, func(c *bitmapChange, row bitmapRow, b *storedBitmap) error {
		if from != m {
			return c.merge(row, b, from.DirtyRanges(name))
		}
		source, err := m.loadBitmap(name)
		if err != nil {
			return err
		}
		return c.merge(row, b, source.ranges(func(i int, buf []byte) error { return m.readBits(source, i, buf) }))
	})
}

// bitmapChange changes the persistent bitmaps of an image. The new data, tables and
// directory are written where nothing points to; then the header is made to point to
// the directory, and what it replaces is let go. It runs exclusively, so what mu
// guards is read without it.
type bitmapChange struct {
	m   *Image
	ctx context.Context
	bitmapList
	next    bitmapDirectory // the new one, once it is written
	taken   []extent        // new clusters
	dropped []extent        // clusters that lose their reference
}

// changeBitmaps changes the bitmaps as plan says.
func (m *Image) changeBitmaps(ctx context.Context, plan func(*bitmapChange) error) error {
	return m.changeTables(func(*header) error {
		if m.version == 2 {
			return &Error{
				Kind: ErrUnsupported, What: "an image of version 2 cannot have persistent bitmaps",
				Mend: "make it version 3 with: qemu-img amend -f qcow2 -o compat=1.1 " + shellWord(m.path),
			}
		}
		l, err := m.readBitmaps()
		if err != nil {
			return err
		}
		c := &bitmapChange{m: m, ctx: ctx, bitmapList: l}
		if err = plan(c); err == nil {
			err = c.write()
		}
		if err == nil {
			err = c.put()
		}
		if err != nil {
			c.abandon()
		}
		return err
	})
}

// changeBitmap is changeBitmaps for one that can be used. plan gets its row, to
// change, and its table.
func (m *Image) changeBitmap(ctx context.Context, name string, plan func(*bitmapChange, bitmapRow, *storedBitmap) error) error {
	return m.changeBitmaps(ctx, func(c *bitmapChange) error {
		i, err := c.find(name)
		if err != nil {
			return err
		}
		b, err := m.loadBitmapOf(&c.bitmapList, i)
		if err != nil {
			return err
		}
		return plan(c, c.rows[i], b)
	})
}

// add adds the row and the table of a new bitmap.
func (c *bitmapChange) add(name string, opts BitmapOptions) error {
	m, grain := c.m, opts.Granularity
	if grain == 0 {
		grain = min(max(m.clusterSize, 4<<10), 64<<10)
	}
	shape := m.newBitmapShape(m.Size(), grain)
	switch _, err := c.find(name); {
	case name == "" || len(name) > maxBitmapName || strings.ContainsRune(name, 0):
		return invalidOption("the name of a bitmap has 1 to %d bytes, none of them zero", maxBitmapName)
	case err == nil:
		return invalidOption("the image has a persistent bitmap %q already", name)
	case grain < 1<<minBitmapGrainBits || grain > 1<<maxBitmapGrainBits || grain&(grain-1) != 0:
		return invalidOption("a granularity of %d bytes is no power of two from 512 to 2147483648", grain)
	case m.Size() == 0:
		return &Error{Kind: ErrUnsupported, What: "a disk of no bytes can have no persistent bitmaps"}
	}
	flags := uint32(bitmapAuto)
	if opts.Disabled {
		flags = 0
	}
	row := newBitmapRow(name, uint8(bits.TrailingZeros64(uint64(grain))), flags) //nolint:gosec // G115: 9..31
	if len(c.rows) == maxBitmaps || c.dir.bytes+uint64(len(row)) > maxBitmapDirectory {
		return &Error{
			Kind: ErrUnsupported, What: fmt.Sprintf("the image has %d persistent bitmaps and no room for more", len(c.rows)),
			Err: unix.EFBIG, Mend: "remove one",
		}
	}
	total := shape.entries()
	for _, other := range c.rows {
		_, n := other.table()
		total += int(n)
	}
	if err := m.checkBitmapRoom(&shape, total); err != nil {
		return err
	}
	c.rows = append(c.rows, row)
	return c.writeTable(row, make([]uint64, shape.entries()))
}

// checkBitmapRoom refuses a bitmap that QEMU would not load, or with which all
// bitmaps have so many entries in their tables that this package would not.
func (m *Image) checkBitmapRoom(shape *bitmapShape, entries int) error {
	switch {
	case int64(shape.entries())*m.clusterSize > maxBitmapData:
		return &Error{Kind: ErrUnsupported, What: "a persistent bitmap would take more than 512 MiB", Mend: "use one with a larger granularity"}
	case entries > maxBitmapEntries:
		return &Error{
			Kind: ErrUnsupported, What: fmt.Sprintf("the persistent bitmaps would have more than %d parts", maxBitmapEntries),
			Mend: "remove one, or use one with a larger granularity",
		}
	}
	return nil
}

// merge sets the bits of b, whose row is given, that stand for the dirty ranges. Data
// that gains no bits stays where it is.
func (c *bitmapChange) merge(row bitmapRow, b *storedBitmap, dirty iter.Seq2[Range, error]) error {
	w := c.newWriter(b, b.bitmapShape)
	for r, err := range dirty {
		if err != nil {
			return err
		}
		if err := w.set(r); err != nil {
			return err
		}
	}
	return w.finish(row)
}

// bitmapWriter makes the new table of a bitmap, and the new data of the entries whose
// bits change, one after the other.
type bitmapWriter struct {
	c     *bitmapChange
	old   *storedBitmap
	shape bitmapShape // the new one
	table []uint64
	at    int    // the entry whose bits are in buf, -1 if none are
	buf   []byte // of a cluster
}

// newWriter returns a writer of b with another shape. Bits that the new table has no
// entries for go.
func (c *bitmapChange) newWriter(b *storedBitmap, shape bitmapShape) *bitmapWriter {
	w := &bitmapWriter{c: c, old: b, shape: shape, table: make([]uint64, shape.entries()), at: -1, buf: make([]byte, c.m.clusterSize)}
	for _, e := range b.table[copy(w.table, b.table):] {
		c.dropData(e)
	}
	return w
}

// set sets the bits of a range. Ranges come in order.
func (w *bitmapWriter) set(r Range) error {
	s := &w.shape
	for r.Length > 0 {
		if i := int(r.Offset / s.piece); i != w.at {
			if err := w.seek(i); err != nil {
				return err
			}
		}
		in := r.Offset % s.piece
		n := min(r.Length, s.piece-in)
		setBits(w.buf, in/s.grain, ceilDiv(in+n, s.grain))
		r.Offset, r.Length = r.Offset+n, r.Length-n
	}
	return nil
}

// seek writes the bits in buf and reads those of entry i.
func (w *bitmapWriter) seek(i int) error {
	if err := w.flush(); err != nil {
		return err
	}
	w.at = i
	return w.c.m.readBits(w.old, i, w.buf)
}

// flush writes the bits in buf to a new cluster, unless all of them are alike.
func (w *bitmapWriter) flush() error {
	c, m := w.c, w.c.m
	if w.at < 0 {
		return nil
	}
	c.dropData(w.table[w.at])
	switch n := w.shape.bits(w.at); n {
	case nextBit(w.buf, 0, n, true):
		w.table[w.at] = 0
		return nil
	case nextBit(w.buf, 0, n, false):
		w.table[w.at] = bitmapOnes
		return nil
	}
	e, err := c.take(1)
	if err != nil {
		return err
	}
	w.table[w.at] = m.pointer(e.start)
	return writeFull(m.file, w.buf, m.offset(e.start))
}

// finish gives the bitmap of row the new table.
func (w *bitmapWriter) finish(row bitmapRow) error {
	if err := w.flush(); err != nil {
		return err
	}
	off, _ := row.table()
	w.c.dropped = append(w.c.dropped, w.c.m.clustersOf(off, uint64(len(w.old.table))*8))
	return w.c.writeTable(row, w.table)
}

// take takes n contiguous clusters for new data or tables.
func (c *bitmapChange) take(n uint64) (extent, error) {
	if err := c.ctx.Err(); err != nil {
		return extent{}, &Error{What: "the change of the persistent bitmaps was cancelled", Err: err}
	}
	m := c.m
	e, err := m.takeRun(n)
	if err != nil {
		return e, err
	}
	m.lock()
	m.meta.add(e, metaBitmaps)
	m.mu.Unlock()
	c.taken = appendExtent(c.taken, e)
	return e, nil
}

// writeTable gives the bitmap of row a new table.
func (c *bitmapChange) writeTable(row bitmapRow, table []uint64) error {
	e, err := c.take(c.m.clusters(uint64(len(table)) * 8))
	if err != nil {
		return err
	}
	row.setTable(c.m.pointer(e.start), len(table))
	return c.m.writeRun(e, encodeEntries(nil, table))
}

// dropTable drops the table of the bitmap of row and its data, whatever its kind.
func (c *bitmapChange) dropTable(row bitmapRow) error {
	off, entries := row.table() // checked by loadBitmaps
	table, err := c.m.loadTable(off, int64(entries)*8)
	if err != nil {
		return err
	}
	c.dropped = append(c.dropped, c.m.clustersOf(off, uint64(entries)*8))
	for _, e := range table {
		if _, err := c.m.decodeBitmap(e); err != nil {
			return err
		}
		c.dropData(e)
	}
	return nil
}

// dropData drops the data that entry e of a table, which is valid, points to.
func (c *bitmapChange) dropData(e uint64) {
	if data := e & entryOffset; data != 0 {
		c.dropped = appendExtent(c.dropped, extent{start: data >> c.m.clusterBits, n: 1})
	}
}

// write writes the new directory and makes all that is new durable.
func (c *bitmapChange) write() error {
	m := c.m
	d := bitmapDirectory{n: uint32(len(c.rows))} //nolint:gosec // G115: at most 65535
	if d.n > 0 {
		dir := slices.Concat(c.rows...)
		e, err := c.take(m.clusters(uint64(len(dir))))
		if err != nil {
			return err
		}
		d.offset, d.bytes = m.pointer(e.start), uint64(len(dir))
		if err := m.writeRun(e, dir); err != nil {
			return err
		}
	}
	c.next = d
	return m.commit() // which counts the new clusters
}

// put puts the new directory in the place of the old one, which is let go.
func (c *bitmapChange) put() error {
	m := c.m
	if err := c.pointTo(c.next); err != nil {
		return err
	}
	c.dropped = append(c.dropped, m.clustersOf(m.bitmaps.offset, m.bitmaps.bytes))
	for _, e := range c.dropped {
		m.lock()
		m.meta.remove(e)
		m.mu.Unlock()
		m.free(e)
	}
	m.bitmaps = c.next
	m.bitmapChanges++
	m.followed.Store(slices.ContainsFunc(c.rows, bitmapRow.follows))
	return nil
}

// abandon gives back the new clusters, unless the header may point to them.
func (c *bitmapChange) abandon() {
	m := c.m
	if m.usable() != nil {
		return
	}
	for _, e := range c.taken {
		m.lock()
		m.meta.remove(e)
		m.mu.Unlock()
		m.free(e)
	}
}

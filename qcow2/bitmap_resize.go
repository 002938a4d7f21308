package qcow2

import "context"

// checkBitmapSizes refuses a disk of size bytes that the persistent bitmaps cannot
// have. It runs exclusively.
func (m *Image) checkBitmapSizes(size int64) error {
	if m.bitmaps.n == 0 || size == m.Size() {
		return nil
	}
	if size == 0 {
		return &Error{
			Kind: ErrUnsupported, What: "a disk of no bytes can have no persistent bitmaps",
			Mend: "remove each of them with: calf image bitmap -f qcow2 --remove " + shellWord(m.path) + " NAME",
		}
	}
	l, err := m.readBitmaps()
	if err != nil {
		return err
	}
	entries := 0
	for i, row := range l.rows {
		shape := m.newBitmapShape(size, 1<<min(row[17], maxBitmapGrainBits))
		if row.inUse() {
			_, n := row.table()
			entries += int(n)
			continue
		}
		if _, err := m.loadBitmapOf(&l, i); err != nil {
			return err
		}
		entries += shape.entries()
		if err := m.checkBitmapRoom(&shape, entries); err != nil {
			return err
		}
	}
	return nil
}

// resizeBitmaps makes the persistent bitmaps for a disk of size bytes, durably. Those
// of the present one are in use from then on. It returns what puts the new ones in
// their place, nil if there is nothing to do. It runs exclusively.
func (m *Image) resizeBitmaps(ctx context.Context, size int64) (*bitmapChange, error) {
	if m.bitmaps.n == 0 || size == m.Size() {
		return nil, nil
	}
	l, err := m.readBitmaps()
	if err != nil {
		return nil, err
	}
	c := &bitmapChange{m: m, ctx: ctx, bitmapList: l}
	if err = c.resize(size); err == nil {
		err = c.write()
	}
	if err == nil {
		err = m.markAll(func(row bitmapRow) bool { return !row.inUse() })
	}
	if err != nil {
		c.abandon()
		return nil, err
	}
	return c, nil
}

// resize gives each bitmap that is not in use a table for a disk of size bytes. Only
// the entry with the last bits of either length may need other data.
func (c *bitmapChange) resize(size int64) error {
	for i, row := range c.rows {
		if row.inUse() {
			continue
		}
		b, err := c.m.loadBitmapOf(&c.bitmapList, i)
		if err != nil {
			return err
		}
		w := c.newWriter(b, c.m.newBitmapShape(size, b.grain))
		if last := min(len(w.table), len(b.table)) - 1; w.shape.bits(last) != b.bits(last) {
			if err := w.seek(last); err != nil {
				return err
			}
			clearTail(w.buf, w.shape.bits(last))
		}
		if err := w.finish(row); err != nil {
			return err
		}
	}
	return nil
}

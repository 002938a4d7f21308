package qcow2

import (
	"encoding/binary"
	"fmt"
)

// The extension for bitmaps: its head, as all extensions have it, and its data.
const (
	extensionHead   = 8
	bitmapExtension = 24
	sectorBytes     = 512 // of the host's disk, which writes them whole
)

// encode returns the data of the extension that leads to d.
func (d bitmapDirectory) encode() []byte {
	b := binary.BigEndian.AppendUint32(nil, d.n)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, d.bytes)
	return binary.BigEndian.AppendUint64(b, d.offset)
}

// pointTo makes the header point to the directory d, which is durable, or to none.
// After an error it may point to either; then the image takes no further writes.
//
// Where the extension is valid, one write of one sector changes it. Else the feature
// bit, without which it is void, is set last. Should the extension lie across two
// sectors, which no known program does to it, or go, the bit is cleared first: a
// power cut leaves an image without bitmaps then.
func (c *bitmapChange) pointTo(d bitmapDirectory) error {
	room, err := c.findRoom(d)
	if err != nil {
		return err
	}
	if err := c.rewriteExtension(d, room); err != nil {
		return c.m.fail(fmt.Errorf("changing the persistent bitmaps: %w", err))
	}
	return nil
}

func (c *bitmapChange) rewriteExtension(d bitmapDirectory, room *headerRoom) error {
	at := int64(c.ext.bitmapsAt) + extensionHead //nolint:gosec // G115: in the first cluster
	valid := c.dir.n > 0
	if valid && (d.n == 0 || at/sectorBytes != (at+bitmapExtension-1)/sectorBytes) {
		if err := c.setValid(false); err != nil {
			return err
		}
		valid = false
	}
	switch {
	case d.n == 0:
		return c.endExtensions()
	case room != nil:
		if err := c.appendExtension(d, room); err != nil {
			return err
		}
	default:
		if err := c.writeDurably(d.encode(), at); err != nil {
			return err
		}
	}
	if valid {
		return nil
	}
	return c.setValid(true)
}

// setValid sets or clears the feature bit for bitmaps.
func (c *bitmapChange) setValid(valid bool) error {
	bits := c.h.autoclear &^ (1 << autoclearBitmaps)
	if valid {
		bits |= 1 << autoclearBitmaps
	}
	return c.writeDurably(binary.BigEndian.AppendUint64(nil, bits), offAutoclear)
}

// endExtensions makes the void extension for bitmaps the end of all, if it is the
// last. Else it stays.
func (c *bitmapChange) endExtensions() error {
	if c.ext.end != c.ext.bitmapsAt+extensionHead+bitmapExtension {
		return nil
	}
	return c.writeDurably(make([]byte, extensionHead), int64(c.ext.bitmapsAt)) //nolint:gosec // G115: in the first cluster
}

// headerRoom says where an extension for bitmaps can be.
type headerRoom struct {
	at     uint64 // of the extension, where the end marker is
	name   []byte // of the backing file, which has to move; nil if it need not
	nameTo uint64
}

// findRoom finds room for the extension that leads to d behind all others, for which
// the name of the backing file may have to move. It returns nil if none is needed.
func (c *bitmapChange) findRoom(d bitmapDirectory) (*headerRoom, error) {
	h, cs := c.h, uint64(c.m.clusterSize) //nolint:gosec // G115: positive
	room := &headerRoom{at: c.ext.end}
	end := room.at + extensionHead + bitmapExtension + extensionHead
	full := &Error{
		Kind: ErrUnsupported, What: "the header has no room for persistent bitmaps",
		Mend: "make an image with larger clusters: calf image convert -f qcow2 -O qcow2 " + shellWord(c.m.path) + " NEW",
	}
	switch {
	case d.n == 0 || len(c.ext.bitmaps) == bitmapExtension:
		return nil, nil
	case c.ext.bitmaps != nil: // void, and of a length that nobody knows
		return nil, full
	case c.ext.end == 0 || end > cs:
		return nil, full
	case h.backingOffset == 0 || end <= h.backingOffset:
		return room, nil
	}
	room.nameTo = max(end, h.backingOffset+uint64(h.backingSize))
	if room.nameTo+uint64(h.backingSize) > cs {
		return nil, full
	}
	room.name = make([]byte, h.backingSize)
	return room, readFull(c.m.file, room.name, int64(h.backingOffset)) //nolint:gosec // G115: validated
}

// appendExtension puts the extension for bitmaps, which is void so far, behind all
// others. Its head, where the end marker was, comes last.
func (c *bitmapChange) appendExtension(d bitmapDirectory, room *headerRoom) error {
	if room.name != nil {
		if err := c.writeDurably(room.name, int64(room.nameTo)); err != nil { //nolint:gosec // G115: in the first cluster
			return err
		}
		if err := c.writeDurably(binary.BigEndian.AppendUint64(nil, room.nameTo), offBackingName); err != nil {
			return err
		}
	}
	b := appendExtension(nil, extBitmaps, d.encode())
	b = appendExtension(b, extEnd, nil)
	at := int64(room.at) //nolint:gosec // G115: in the first cluster
	if err := c.writeDurably(b[extensionHead:], at+extensionHead); err != nil {
		return err
	}
	return c.writeDurably(b[:extensionHead], at)
}

// writeDurably is one step of a change of the header, which is durable before the
// next.
func (c *bitmapChange) writeDurably(b []byte, off int64) error {
	if err := writeFull(c.m.file, b, off); err != nil {
		return err
	}
	return c.m.datasync()
}

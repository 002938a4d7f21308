package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/calfvm/calf/qcow2"
)

// mapEntry says what a range of a disk is, in qemu-img's words.
type mapEntry struct {
	start, length int64
	depth         int  // 0 is the image, 1 its backing file, and so on
	present       bool // in a layer at all
	zero, data    bool
	compressed    bool
	offset        int64  // in the file at path; qcow2.NoOffset if there is none
	path          string // not in JSON
}

func newMapEntry(m qcow2.Mapping) mapEntry {
	data := m.Kind == qcow2.MapData || m.Kind == qcow2.MapCompressed
	return mapEntry{
		start: m.Offset, length: m.Length, depth: m.Layer, present: m.Kind != qcow2.MapUnallocated,
		data: data, zero: !data || m.Hole, compressed: m.Kind == qcow2.MapCompressed,
		offset: m.HostOffset, path: m.Path,
	}
}

// json is the entry in the form that qemu-img gives it, white space and all: there
// are scripts that look for parts of it. Only newer versions say what is compressed.
func (e *mapEntry) json() string {
	s := fmt.Sprintf(`{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t, "compressed": %t`,
		e.start, e.length, e.depth, e.present, e.zero, e.data, e.compressed)
	if e.offset != qcow2.NoOffset {
		s += fmt.Sprintf(`, "offset": %d`, e.offset)
	}
	return s + "}"
}

// MapRange is the part of a disk to map.
type MapRange struct {
	Start int64
	Most  int64 // bytes; less than 0 means up to the end
}

// Map writes what the range of the image at path is, as a table of what has data or
// as JSON, in qemu-img's form of either.
func Map(ctx context.Context, w io.Writer, path string, o OpenOptions, r MapRange, asJSON bool) (err error) {
	m, err := Open(path, o)
	if err != nil {
		return err
	}
	defer closing(m, &err)
	out := bufio.NewWriter(w)
	if asJSON {
		err = m.mapJSON(ctx, out, r)
	} else {
		err = m.mapTable(ctx, out, r)
	}
	return errors.Join(err, out.Flush())
}

// entries calls f with each entry of the range, until it fails or ctx is done.
func (m *Image) entries(ctx context.Context, r MapRange, f func(mapEntry) error) error {
	n := max(m.Size()-r.Start, 0)
	if r.Most >= 0 {
		n = min(n, r.Most)
	}
	if n == 0 {
		return f(mapEntry{start: r.Start, offset: qcow2.NoOffset})
	}
	for mapping, err := range whileGoing(ctx, m.Map(r.Start, n)) {
		if err != nil {
			return err
		}
		if err := f(newMapEntry(mapping)); err != nil {
			return err
		}
	}
	return nil
}

// mapJSON writes an array with an entry in each line.
func (m *Image) mapJSON(ctx context.Context, w io.Writer, r MapRange) error {
	p := printer{w: w}
	before := "["
	err := m.entries(ctx, r, func(e mapEntry) error {
		p.f("%s%s", before, e.json())
		before = ",\n"
		return p.err
	})
	if err != nil {
		return err
	}
	p.f("]\n")
	return p.err
}

// mapTable writes a row for each entry with data.
func (m *Image) mapTable(ctx context.Context, w io.Writer, r MapRange) error {
	p := printer{w: w}
	p.f("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	return m.entries(ctx, r, func(e mapEntry) error {
		switch {
		case e.compressed:
			return fmt.Errorf("%s has compressed clusters, which this form cannot show: use --output=json", e.path)
		case e.data && !e.zero:
			p.f("%-16s%-16s%-16s%s\n", hex(e.start), hex(e.length), hex(e.offset), e.path)
		}
		return p.err
	})
}

// hex is n as C writes it, which gives zero no prefix.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// SetBacking makes the image at path name another backing file, or none if name is
// empty, of the given format, "qcow2" or "raw". The name is written as it is: a
// relative one counts from the directory of the image. Nothing but the image is
// opened, so what it shows then is up to the caller. It is for an image whose
// backing file has moved; where the contents differ, see Image.SetBacking.
func SetBacking(path, name, format string) error {
	f, err := openRegular(path, os.O_RDWR)
	if err != nil {
		return err
	}
	if err := lockImage(f, path, accessWrite); err != nil {
		return errors.Join(err, f.Close())
	}
	m := &Image{path: path, file: newOSFile(f)}
	return inFile(path, errors.Join(m.setUnopened(name, format), f.Close()))
}

// setUnopened is SetBacking for an image of which nothing but its file is open.
func (m *Image) setUnopened(name, format string) error {
	fileSize, err := m.file.Size()
	if err != nil {
		return err
	}
	h, err := m.loadHeader(fileSize)
	if err != nil {
		return err
	}
	ext, err := m.loadExtensions(h)
	if err != nil {
		return err
	}
	if err := errors.Join(h.checkFeatures(ext.features), h.checkWritable(m.path)); err != nil {
		return err
	}
	return m.setBacking(h, name, format)
}

// SetBacking makes the image name another backing file, or none, as the function
// SetBacking does. The image goes on to show the old one until it is closed, so it
// should hold all in which that differs from the new one. For that it is opened with
// Options.BackingSize.
//
// The new name is on stable storage when SetBacking returns without an error, and
// whatever happens, the image has the old one or the new one, each with its format.
// All else in the header stays, but for unknown autoclear bits. A name that does not
// fit the first cluster is refused with ErrInvalidOption, and one that does, but
// not beside the old one, with ErrUnsupported.
func (m *Image) SetBacking(name, format string) error {
	return m.changeTables(func(h *header) error { return m.setBacking(h, name, format) })
}

// setBacking writes the beginning of the first cluster anew. Its first sector, in
// one write, makes all of it valid. If what lies behind that sector is in use and
// differs, the header first leads to a copy of the new extensions and the new name
// further back.
func (m *Image) setBacking(h *header, name, format string) error {
	if err := h.checkBacking(name, format); err != nil {
		return err
	}
	old := make([]byte, 1<<h.clusterBits)
	if err := readFull(m.file, old, 0); err != nil {
		return err
	}
	next, ext := h.withBacking(old, name, format)
	if len(next) > len(old) {
		return invalidOption("the name of the backing file, %d bytes, is too long for the first cluster, of %d bytes", len(name), len(old))
	}
	used, end := h.usedFirst(old), len(bytes.TrimRight(old, "\x00"))
	if n := min(used, len(next)); n > sectorBytes && !bytes.Equal(old[sectorBytes:n], next[sectorBytes:n]) {
		detour, err := h.detour(old[:used], next, ext)
		if err == nil {
			err = m.putFirst(detour)
		}
		if err != nil {
			return err
		}
		end = max(end, len(detour))
	}
	if err := m.putFirst(next); err != nil || end <= len(next) {
		return err
	}
	// What is of no use any more goes, of this change and of others cut short.
	return writeFull(m.file, make([]byte, end-len(next)), int64(len(next)))
}

// detour returns the first cluster with a copy of ext, the extensions and the name
// at the end of next, behind all of it that is in use now or will be. The header
// leads there, and nothing behind the first sector of old changes.
func (h *header) detour(old, next, ext []byte) ([]byte, error) {
	from := int(h.length) + extensionHead
	to := from + (max(len(old), len(next), sectorBytes)-from+7)&^7
	if from > sectorBytes || to+len(ext) > 1<<h.clusterBits {
		return nil, &Error{
			Kind: ErrUnsupported, What: fmt.Sprintf("the first cluster, of %d bytes, has no room for another backing file beside the old one", 1<<h.clusterBits),
			Mend: "use a shorter name",
		}
	}
	b := slices.Concat(old, make([]byte, to-len(old)), ext)
	copy(b, next[:h.length])
	be := binary.BigEndian
	if at := be.Uint64(b[offBackingName:]); at > 0 {
		be.PutUint64(b[offBackingName:], at+uint64(len(b)-len(next))) //nolint:gosec // G115: positive
	}
	be.PutUint32(b[h.length:], extSkip)
	be.PutUint32(b[h.length+4:], uint32(to-from)) //nolint:gosec // G115: at most a cluster
	return b, nil
}

// putFirst writes b to the beginning of the file: all but the first sector changes
// nothing that is in use.
func (m *Image) putFirst(b []byte) error {
	err := error(nil)
	if len(b) > sectorBytes {
		if err = writeFull(m.file, b[sectorBytes:], sectorBytes); err == nil {
			err = m.datasync()
		}
	}
	if err == nil {
		err = writeFull(m.file, b[:min(len(b), sectorBytes)], 0)
	}
	if err == nil {
		err = m.datasync()
	}
	if err != nil {
		return m.fail(fmt.Errorf("changing the backing file: %w", err))
	}
	return nil
}

// checkBacking refuses a backing file that an image with the header cannot have.
func (h *header) checkBacking(name, format string) error {
	switch {
	case name == "":
		return nil
	case len(name) > maxBackingName:
		return invalidOption("the name of the backing file, %d bytes, is longer than %d", len(name), maxBackingName)
	case strings.ContainsRune(name, 0) || hasProtocol(name):
		return invalidOption("the backing file %q is not the plain name of a file", name)
	case format != "qcow2" && format != "raw":
		return invalidOption("the format %q of the backing file is not one of qcow2 and raw", format)
	case h.incompat(incompatDataFile) && h.autoclear>>autoclearRawData&1 != 0:
		return invalidOption("an image with a raw data file cannot have a backing file")
	}
	return nil
}

// withBacking returns the beginning of first, which is the first cluster, up to its
// last byte in use, with another backing file. ext is the part of it behind the
// header: the extensions and the name.
func (h *header) withBacking(first []byte, name, format string) (b, ext []byte) {
	be := binary.BigEndian
	if name != "" {
		ext = appendExtension(ext, extBackingFormat, []byte(format))
	}
	for kind, data := range h.extensions(first) {
		if kind != extBackingFormat && kind != extSkip {
			ext = appendExtension(ext, kind, data)
		}
	}
	ext = append(appendExtension(ext, extEnd, nil), name...)
	b = slices.Concat(first[:h.length], ext)
	be.PutUint64(b[offBackingName:], 0)
	be.PutUint32(b[offBackingName+8:], uint32(len(name))) //nolint:gosec // G115: checked
	if name != "" {
		be.PutUint64(b[offBackingName:], uint64(len(b)-len(name))) //nolint:gosec // G115: positive
	}
	if h.version > 2 {
		const known = 1<<autoclearBitmaps | 1<<autoclearRawData
		be.PutUint64(b[offAutoclear:], h.autoclear&known)
	}
	return b, ext
}

// usedFirst is the length of the part of the first cluster that is in use.
func (h *header) usedFirst(first []byte) int {
	end := int(h.length)
	for _, data := range h.extensions(first) {
		end += extensionHead + (len(data)+7)&^7
	}
	end += extensionHead // the end marker
	if h.backingOffset != 0 {
		end = max(end, int(h.backingOffset)+int(h.backingSize)) //nolint:gosec // G115: validated
	}
	return min(end, len(first))
}

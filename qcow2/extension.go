package qcow2

import (
	"encoding/binary"
	"fmt"
	"iter"
	"strings"
)

// Header extension types. Unknown ones are skipped; they survive because the
// engine rewrites single fields of the header and never the header as a whole.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extDataFile      = 0x44415441
	extEncryption    = 0x0537be77
	extSkip          = 0x63616c66 // what lies in the way while SetBacking is at work
)

// Types of feature in the feature name table.
const (
	featureIncompatible = 0
	featureCompatible   = 1
	featureAutoclear    = 2
	featureNameEntry    = 48 // bytes
)

// maxExtensionTypes is how many types of extensions in an image are remembered.
const maxExtensionTypes = 64

// maxBackingFormat is the longest name of a format that QEMU accepts, in bytes.
const maxBackingFormat = 15

// featureNames maps a type and a bit number to the name that the image gives it.
type featureNames map[[2]byte]string

func (n featureNames) of(kind byte, bit uint) string {
	if s := n[[2]byte{kind, byte(bit)}]; s != "" { //nolint:gosec // G115: 0..63
		return fmt.Sprintf("feature %q", s)
	}
	return "unknown feature"
}

// extensions is what the engine uses of the header extensions.
type extensions struct {
	backingFormat string // empty if the image does not say
	features      featureNames
	bitmaps       []byte // nil if there is none
	bitmapsAt     uint64 // where the extension for them begins in the file
	end           uint64 // where the end marker is, 0 if there is none
	dataFile      string // name of the external data file, empty if the image does not say

	sizes map[uint32]int // of the data of each, by type, of the first maxExtensionTypes
	twice bool           // two have the same type
}

// parseExtensions decodes the extensions in b, the first cluster of the image,
// whose fixed header h has been validated. A missing end marker is tolerated at
// the end of the area.
func parseExtensions(h *header, b []byte) (extensions, error) {
	x := extensions{features: featureNames{}, sizes: map[uint32]int{}}
	end := uint64(len(b))
	if h.backingOffset != 0 {
		end = min(end, h.backingOffset)
	}
	off := uint64(h.length)
	for off+8 <= end {
		kind := binary.BigEndian.Uint32(b[off:])
		n := uint64(binary.BigEndian.Uint32(b[off+4:]))
		if kind == extEnd {
			x.end = off
			break
		}
		off += 8
		if n > end-off {
			return x, headerFault("header extension %#x of %d bytes is too large", kind, n)
		}
		data := b[off : off+n]
		if _, again := x.sizes[kind]; again {
			x.twice = true
		} else if len(x.sizes) < maxExtensionTypes {
			x.sizes[kind] = len(data)
		}
		switch kind {
		case extBackingFormat:
			if n > maxBackingFormat {
				return x, headerFault("the name of the backing file's format, %d bytes, is too long", n)
			}
			x.backingFormat = string(data)
		case extFeatureNames:
			x.features.add(data)
		case extBitmaps:
			x.bitmaps, x.bitmapsAt = data, off-8
		case extDataFile:
			x.dataFile = string(data)
		}
		off += (n + 7) &^ 7
	}
	return x, nil
}

// extensions returns the types and data of the extensions in b, the first cluster,
// which parseExtensions has accepted.
func (h *header) extensions(b []byte) iter.Seq2[uint32, []byte] {
	return func(yield func(uint32, []byte) bool) {
		if h.backingOffset != 0 {
			b = b[:h.backingOffset]
		}
		for b = b[min(int(h.length), len(b)):]; len(b) >= extensionHead; {
			kind, n := binary.BigEndian.Uint32(b), int(binary.BigEndian.Uint32(b[4:]))
			if kind == extEnd || !yield(kind, b[extensionHead:][:min(n, len(b)-extensionHead)]) {
				return
			}
			b = b[min(extensionHead+(n+7)&^7, len(b)):]
		}
	}
}

func (n featureNames) add(table []byte) {
	for ; len(table) >= featureNameEntry; table = table[featureNameEntry:] {
		name, _, _ := strings.Cut(string(table[2:featureNameEntry]), "\x00")
		n[[2]byte{table[0], table[1]}] = name
	}
}

// backingName returns the name of the backing file, empty if there is none. b
// is the first cluster.
func backingName(h *header, b []byte) (string, error) {
	if h.backingOffset == 0 || h.backingSize == 0 {
		return "", nil
	}
	end := h.backingOffset + uint64(h.backingSize)
	if end > uint64(len(b)) {
		return "", headerFault("the backing file name is cut off by the end of the file")
	}
	name := string(b[h.backingOffset:end])
	if strings.ContainsRune(name, 0) {
		return "", headerFault("the backing file name contains a zero byte")
	}
	return name, nil
}

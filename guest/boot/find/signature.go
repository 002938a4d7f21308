package find

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// signature is what is to be found at an offset of something of a kind, and where
// the name of what has it lies.
type signature struct {
	kind  string
	at    int64
	magic string
	id    int64 // of the UUID, or of the serial number of a FAT; 0: it has none that is used
	label int64
	size  int // of the label, in bytes
}

// signatures tells apart what an image of Linux may hold. A swap area has its
// signature at the end of a page.
var signatures = []signature{
	{"xfs", 0, "XFSB", 32, 108, 12},
	{"btrfs", 0x10040, "_BHRfS_M", 0x10020, 0x1012B, 256},
	{"an encrypted volume (LUKS)", 0, "LUKS\xBA\xBE", 0, 0, 0},
	{"an LVM physical volume", 512, "LABELONE", 0, 0, 0},
	{"an LVM physical volume", 0, "LABELONE", 0, 0, 0},
	{"a member of a RAID (md)", 4096, "\xFC\x4E\x2B\xA9", 0, 0, 0},
	{"bcachefs", 4096 + 24, "\xC6\x85\x73\xF6\x4E\x1A\x45\xCA", 0, 0, 0},
	{"f2fs", 1024, "\x10\x20\xF5\xF2", 0, 0, 0},
	{"erofs", 1024, "\xE2\xE1\xF5\xE0", 0, 0, 0},
	{"squashfs", 0, "hsqs", 0, 0, 0},
	{"iso9660", 0x8001, "CD001", 0, 0, 0},
	{"swap", 4086, "SWAPSPACE2", 0, 0, 0},
	{"ntfs", 3, "NTFS    ", 0, 0, 0},
	{"exfat", 3, "EXFAT   ", 0, 0, 0},
	{"fat", 0x36, "FAT1", 0x27, 0x2B, 11},
	{"fat", 0x52, "FAT32", 0x43, 0x47, 11},
}

// identify says what is there by its signature, and what its name is; nothing if
// nothing is known to be.
func (p *Partition) identify(r io.ReaderAt) error {
	for _, s := range signatures {
		switch magic, err := readAt(r, s.at, len(s.magic)); {
		case err != nil:
			return err
		case string(magic) == s.magic:
			p.Kind = s.kind
			return s.name(r, p)
		}
	}
	return nil
}

// name reads the name of what has the signature.
func (s signature) name(r io.ReaderAt, p *Partition) error {
	if s.id == 0 {
		return nil
	}
	id, err := readAt(r, s.id, len(uuid.UUID{}))
	if err != nil {
		return err
	}
	label, err := readAt(r, s.label, s.size)
	if err != nil {
		return err
	}
	if s.kind == "fat" {
		serial := binary.LittleEndian.Uint32(id)
		p.UUID = fmt.Sprintf("%04X-%04X", serial>>16, serial&0xFFFF)
	} else {
		p.UUID = uuid.UUID(id).String()
	}
	label, _, _ = bytes.Cut(label, []byte{0})
	if p.Label = strings.TrimRight(string(label), " "); !utf8.Valid(label) || s.kind == "fat" && p.Label == "NO NAME" {
		p.Label = ""
	}
	return nil
}

// readAt reads n bytes; those after the end are zeros.
func readAt(r io.ReaderAt, at int64, n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := r.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

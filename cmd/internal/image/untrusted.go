package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/qcow2"
)

// Trust is what speaks against using an image from a stranger.
type Trust struct {
	Reasons []Doubt `json:"reasons"` // not to use it
	Notes   []Doubt `json:"notes"`   // to know of
}

// Doubt is one of them.
type Doubt struct {
	Kind string `json:"kind"` // a word for programs
	What string `json:"what"` // a sentence for people
}

// DoubtOptions say what is too much.
type DoubtOptions struct {
	// MaxSize is how large the disk may be, in bytes.
	MaxSize int64
	// Named says that the format is what the name of the image says.
	Named bool
}

const (
	// mostSnapshots is how many internal snapshots an image may have.
	mostSnapshots = 1000
	// spareL1 is how many entries the L1 table may have beside those in use: a
	// cluster of the largest size, as after a disk has shrunk.
	spareL1 = 2 << 20 / 8
	// thin is how many times longer than the file a disk is to be noted.
	thin = 1000
)

func (t *Trust) reason(is bool, kind, format string, args ...any) {
	if is {
		t.Reasons = append(t.Reasons, Doubt{kind, fmt.Sprintf(format, args...)})
	}
}

func (t *Trust) note(is bool, kind, format string, args ...any) {
	if is {
		t.Notes = append(t.Notes, Doubt{kind, fmt.Sprintf(format, args...)})
	}
}

// ExamineUntrusted is Examine for an image from a stranger: Trust is set, also if
// the file is no image at all. It reads the header and the lists that this leads to;
// a check reads the rest.
func ExamineUntrusted(path string, o OpenOptions, d DoubtOptions) (*Info, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	t := &Trust{Reasons: []Doubt{}, Notes: []Doubt{}}
	if st.Mode()&os.ModeSymlink != 0 {
		t.reason(true, "symbolic-link", "it is a symbolic link, and may lead to another file tomorrow")
		if st, err = os.Stat(path); err != nil {
			return nil, err
		}
	}
	t.reason(!st.Mode().IsRegular(), "special-file", "it is not a regular file")
	i, err := Examine(path, o)
	if errors.Is(err, qcow2.ErrLocked) || errors.Is(err, blk.ErrLocked) {
		return nil, err
	}
	if err != nil {
		t.reason(true, "unreadable", "%v", err)
		return &Info{Filename: path, Format: o.Format, Trust: t}, nil
	}
	i.Trust = t
	t.reason(i.VirtualSize > d.MaxSize, "size", "its disk of %s is larger than %s", humanSize(i.VirtualSize), humanSize(d.MaxSize))
	t.note(d.Named, "format", "its format was not given, and %s is what its name says: give it with -f wherever it is used", i.Format)
	if i.image == nil {
		t.rawContent(i.begin)
	} else {
		t.header(i)
	}
	return i, nil
}

// rawContent notes what a program that guesses formats would take a raw image for.
func (t *Trust) rawContent(begin []byte) {
	for _, f := range []struct{ name, magic string }{
		{"QCOW", "QFI\xfb"},
		{"VMDK", "KDMV"},
		{"VMDK", "COWD"},
		{"VMDK", "# Disk DescriptorFile"},
		{"VHDX", "vhdxfile"},
		{"VHD", "conectix"},
		{"VDI", "<<< "},
		{"QED", "QED\x00"},
		{"LUKS", "LUKS\xba\xbe"},
	} {
		t.note(bytes.HasPrefix(begin, []byte(f.magic)), "content",
			"it is a raw image that begins like one of format %s: a program that guesses formats takes it for that", f.name)
	}
}

// header doubts what a qcow2 image says of itself.
func (t *Trust) header(i *Info) {
	q := i.image
	for _, fault := range i.Faults {
		t.reason(true, "fault", "%s", fault)
	}
	t.reason(q.BackingFile != "", "backing-file", "it lies over the file %q, which who uses it reads: no path in it is to be trusted", q.BackingFile)
	t.reason(q.ExternalData, "data-file", "its data is in the file %q, which who uses it reads and writes", q.DataFile)
	t.reason(q.Encryption != "", "encryption", "it is encrypted (%s)", q.Encryption)
	t.reason(q.Corrupt, "corrupt", "it is marked corrupt")
	t.reason(q.Dirty, "dirty", "it was not closed cleanly: who writes to it has to repair it first")
	for _, name := range q.UnknownFeatures {
		t.reason(true, "feature", "it needs a feature that is not known: %s", name)
	}
	for _, what := range q.Oddities {
		t.reason(true, "header", "%s", what)
	}
	t.reason(q.L1Entries > q.L1Needed+spareL1, "tables", "its L1 table has %d entries, where its disk takes %d", q.L1Entries, q.L1Needed)
	t.reason(q.SnapshotCount > mostSnapshots, "snapshots", "it has %d internal snapshots", q.SnapshotCount)
	t.note(q.SnapshotCount > 0 && q.SnapshotCount <= mostSnapshots, "snapshots", "it has %d internal snapshots, which hold what is not on its disk", q.SnapshotCount)
	t.note(len(q.Bitmaps) > 0, "bitmaps", "it has %d persistent bitmaps", len(q.Bitmaps))
	for _, name := range q.Ignored {
		t.note(true, "feature", "it has what is not known and may be ignored: %s", name)
	}
	t.note(q.FileSize > 0 && q.Size/thin > q.FileSize, "size", "its disk is %d times as long as its file", q.Size/max(q.FileSize, 1))
	t.note(q.FileSize > 0 && i.ActualSize == 0, "size", "its file of %d bytes takes no room on the host", q.FileSize)
}

// text writes the doubts for people.
func (t *Trust) text(p *printer) {
	if len(t.Reasons) == 0 {
		p.f("No reason was found not to use the image; calf image check looks at the rest of it.\n")
	} else {
		p.f("Reasons not to use the image:\n")
	}
	list := func(doubts []Doubt) {
		for _, d := range doubts {
			p.f("    %s: %s\n", d.Kind, printable(d.What))
		}
	}
	list(t.Reasons)
	if len(t.Notes) > 0 {
		p.f("To know of:\n")
		list(t.Notes)
	}
}

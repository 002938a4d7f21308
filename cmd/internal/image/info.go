package image

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/qcow2"
)

// Info is what an image says of itself. Its keys are qemu-img's.
type Info struct {
	Filename      string      `json:"filename"`
	Format        string      `json:"format"`
	VirtualSize   int64       `json:"virtual-size"`
	ActualSize    int64       `json:"actual-size"`
	ClusterSize   int64       `json:"cluster-size,omitempty"`
	Encrypted     bool        `json:"encrypted,omitempty"`
	Backing       string      `json:"backing-filename,omitempty"`
	FullBacking   string      `json:"full-backing-filename,omitempty"`
	BackingFormat string      `json:"backing-filename-format,omitempty"`
	Snapshots     []Snapshot  `json:"snapshots,omitempty"`
	Specific      *formatInfo `json:"format-specific,omitempty"`
	Dirty         bool        `json:"dirty-flag"`
	// Faults are what is wrong with the image, of which the rest is then only what
	// could be read. qemu-img has no such key.
	Faults []string `json:"faults,omitempty"`
	// Trust says whether to use the image, if that was asked. It has no such key
	// either.
	Trust *Trust `json:"untrusted,omitempty"`

	image *qcow2.Examination // nil for a raw image
	begin []byte             // of the file, for a raw image
}

// Snapshot is an internal snapshot of an image.
type Snapshot struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	VMStateSize  int64  `json:"vm-state-size"`
	DateSec      int64  `json:"date-sec"`
	DateNsec     int    `json:"date-nsec"`
	VMClockSec   int64  `json:"vm-clock-sec"`
	VMClockNsec  int64  `json:"vm-clock-nsec"`
	Instructions *int64 `json:"icount,omitempty"`
}

type formatInfo struct {
	Type string    `json:"type"`
	Data qcow2Info `json:"data"`
}

// qcow2Info is what only qcow2 images have. Those of version 2 lack the pointers.
type qcow2Info struct {
	Compat          string   `json:"compat"`
	CompressionType string   `json:"compression-type"`
	LazyRefcounts   *bool    `json:"lazy-refcounts,omitempty"`
	RefcountBits    int      `json:"refcount-bits"`
	Corrupt         *bool    `json:"corrupt,omitempty"`
	ExtendedL2      *bool    `json:"extended-l2,omitempty"`
	DataFile        string   `json:"data-file,omitempty"`
	DataFileRaw     *bool    `json:"data-file-raw,omitempty"`
	Bitmaps         []bitmap `json:"bitmaps,omitempty"`
	Encrypt         *encrypt `json:"encrypt,omitempty"`
}

type encrypt struct {
	Format string `json:"format"`
}

type bitmap struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"`
}

// Inspect returns what is to be known of the image at path, which must be sound. It
// opens nothing else.
func Inspect(path, format string) (*Info, error) {
	i, err := Examine(path, OpenOptions{Format: format})
	if err != nil {
		return nil, err
	}
	return i, i.Fault()
}

// Fault is the first fault of the image, nil if it has none.
func (i *Info) Fault() error {
	if i.image == nil || len(i.image.Faults) == 0 {
		return nil
	}
	return i.image.Faults[0]
}

// Examine returns what can be known of the image at path, of the format in o, which
// may be broken, and be shared with a writer as o says. It opens nothing else.
func Examine(path string, o OpenOptions) (*Info, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	l := qcow2.Layer{Path: path, Format: o.Format, Allocated: st.Sys().(*syscall.Stat_t).Blocks * 512}
	if o.Format == Raw {
		return examineRaw(l, o)
	}
	look := qcow2.Examine
	if o.ForceShare {
		look = qcow2.ExamineShared
	}
	if l.Image, err = look(path); err != nil {
		return nil, err
	}
	return newInfo(l), nil
}

// examineRaw adds to l what it lacks.
func examineRaw(l qcow2.Layer, o OpenOptions) (_ *Info, err error) {
	d, err := blk.OpenRaw(l.Path, blk.RawOptions{ReadOnly: true, ForceShare: o.ForceShare})
	if err != nil {
		return nil, err
	}
	defer closing(d, &err)
	l.Size = d.Size()
	i := newInfo(l)
	i.begin = make([]byte, min(sectorBytes, l.Size))
	return i, d.ReadvAt([][]byte{i.begin}, 0)
}

func newInfo(l qcow2.Layer) *Info {
	i := &Info{Filename: l.Path, Format: l.Format, VirtualSize: l.Size, ActualSize: l.Allocated}
	q := l.Image
	if q == nil {
		return i
	}
	i.image = q
	i.VirtualSize, i.ClusterSize, i.Dirty, i.Encrypted = q.Size, q.ClusterSize, q.Dirty, q.Encryption != ""
	i.Backing, i.BackingFormat = q.BackingFile, q.BackingFormat
	if i.Backing != "" {
		i.FullBacking = beside(l.Path, i.Backing)
	}
	for _, s := range q.Snapshots {
		shown := Snapshot{
			ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize,
			DateSec: s.Date.Unix(), DateNsec: s.Date.Nanosecond(),
			VMClockSec: int64(s.VMClock / time.Second), VMClockNsec: int64(s.VMClock % time.Second),
		}
		if s.Instructions >= 0 {
			shown.Instructions = &s.Instructions
		}
		i.Snapshots = append(i.Snapshots, shown)
	}
	for _, fault := range q.Faults {
		i.Faults = append(i.Faults, fault.Error())
	}
	i.Specific = &formatInfo{Type: QCOW2, Data: specific(&q.Info)}
	return i
}

// beside is the path of a file that the image at path names.
func beside(path, name string) string {
	if filepath.IsAbs(name) || strings.Contains(name, ":") {
		return name
	}
	return filepath.Join(filepath.Dir(path), name)
}

func specific(q *qcow2.Info) qcow2Info {
	d := qcow2Info{Compat: "0.10", CompressionType: q.CompressionType, RefcountBits: q.RefcountBits}
	if q.Encryption != "" {
		d.Encrypt = &encrypt{q.Encryption}
	}
	if q.Version == 2 {
		return d
	}
	d.Compat, d.LazyRefcounts, d.Corrupt, d.ExtendedL2 = "1.1", &q.LazyRefcounts, &q.Corrupt, &q.ExtendedL2
	if q.ExternalData {
		d.DataFile, d.DataFileRaw = q.DataFile, &q.DataFileRaw
	}
	for _, b := range q.Bitmaps {
		flags := []string{}
		if b.InUse {
			flags = append(flags, "in-use")
		}
		if b.Enabled {
			flags = append(flags, "auto")
		}
		d.Bitmaps = append(d.Bitmaps, bitmap{b.Name, b.Granularity, flags})
	}
	return d
}

// Chain returns what is to be known of the image at path and of each that lies
// under it, which are found by the rule of Open. Beside an error are those above the
// one that it is about.
func Chain(path string, o OpenOptions) ([]*Info, error) {
	if o.Format == Raw {
		i, err := Examine(path, o)
		if err != nil {
			return nil, err
		}
		return []*Info{i}, nil
	}
	layers, err := qcow2.ExamineChain(path, qcow2.Options{ForceShare: o.ForceShare, BackingDirs: o.BackingDirs})
	var chain []*Info
	for _, l := range layers {
		chain = append(chain, newInfo(l))
	}
	return chain, err
}

// Text writes the image for people, in qemu-img's lines.
func (i *Info) Text(w io.Writer) error {
	p := printer{w: w}
	i.lines(&p)
	if i.Trust != nil {
		i.Trust.text(&p)
	}
	return p.err
}

func (i *Info) lines(p *printer) {
	p.f("image: %s\nfile format: %s\n", i.Filename, i.Format)
	p.f("virtual size: %s (%d bytes)\n", humanSize(i.VirtualSize), i.VirtualSize)
	p.f("disk size: %s\n", humanSize(i.ActualSize))
	if i.Encrypted {
		p.f("encrypted: yes\n")
	}
	if i.image == nil {
		return
	}
	p.f("cluster_size: %d\n", i.ClusterSize)
	if i.Dirty {
		p.f("cleanly shut down: no\n")
	}
	if i.Backing != "" {
		p.f("backing file: %s", printable(i.Backing))
		if i.FullBacking != i.Backing {
			p.f(" (actual path: %s)", printable(i.FullBacking))
		}
		p.f("\n")
	}
	if i.BackingFormat != "" {
		p.f("backing file format: %s\n", printable(i.BackingFormat))
	}
	if len(i.image.Snapshots) > 0 {
		p.snapshots(i.image.Snapshots)
	}
	p.specific(i.Specific.Data)
	for _, name := range i.image.UnknownFeatures {
		p.f("    unknown: %s\n", printable(name))
	}
}

// printable is a text from an image that nobody trusts, quoted if a terminal might
// obey it.
func printable(s string) string {
	for _, r := range s {
		if r == utf8.RuneError || !strconv.IsPrint(r) {
			return strconv.Quote(s)
		}
	}
	return s
}

func (p *printer) specific(d qcow2Info) {
	p.f("Format specific information:\n    compat: %s\n    compression type: %s\n", d.Compat, d.CompressionType)
	p.flag("lazy refcounts", d.LazyRefcounts)
	if len(d.Bitmaps) > 0 {
		p.f("    bitmaps:\n")
	}
	for i, b := range d.Bitmaps {
		p.f("        [%d]:\n            flags:\n", i)
		for k, flag := range b.Flags {
			p.f("                [%d]: %s\n", k, flag)
		}
		p.f("            name: %s\n            granularity: %d\n", printable(b.Name), b.Granularity)
	}
	p.f("    refcount bits: %d\n", d.RefcountBits)
	if d.DataFile != "" {
		p.f("    data file: %s\n", printable(d.DataFile))
	}
	p.flag("data file raw", d.DataFileRaw)
	p.flag("corrupt", d.Corrupt)
	p.flag("extended l2", d.ExtendedL2)
}

func (p *printer) flag(name string, v *bool) {
	if v != nil {
		p.f("    %s: %t\n", name, *v)
	}
}

// snapshots writes a table of snapshots.
func (p *printer) snapshots(all []qcow2.Snapshot) {
	p.f("Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range all {
		clock := fmt.Sprintf("%02d:%02d:%02d.%03d", s.VMClock/time.Hour, s.VMClock/time.Minute%60, s.VMClock/time.Second%60, s.VMClock/time.Millisecond%1000)
		count := ""
		if s.Instructions >= 0 {
			count = strconv.FormatInt(s.Instructions, 10)
		}
		p.f("%-9s %-16s %8s%20s%13s%11s\n", printable(s.ID), printable(s.Name), humanSize(s.VMStateSize),
			s.Date.Local().Format("2006-01-02 15:04:05"), clock, count)
	}
}

// humanSize is a size with a unit and up to three digits, as qemu-img shows it: a
// thousand of a unit is less than one of the next.
func humanSize(n int64) string {
	_, bits := math.Frexp(float64(n) * 1024 / 1000)
	unit := max(0, bits-1) / 10
	return fmt.Sprintf("%.3g %s", math.Ldexp(float64(n), -10*unit), []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}[unit])
}

// Tree draws a chain of images, each under the one that lies over it, with their
// data files.
func Tree(w io.Writer, chain []*Info) error {
	p := printer{w: w}
	for depth, i := range chain {
		indent := strings.Repeat("   ", max(depth-1, 0))
		if depth > 0 {
			p.f("%s└─ ", indent)
			indent += "   "
		}
		p.f("%s: %s\n", printable(i.Filename), i.facts())
		if i.Specific == nil || i.Specific.Data.DataFile == "" {
			continue
		}
		branch := "├─"
		if depth == len(chain)-1 {
			branch = "└─"
		}
		name := beside(i.Filename, i.Specific.Data.DataFile)
		state := "missing"
		if st, err := os.Stat(name); err == nil {
			state = humanSize(st.Sys().(*syscall.Stat_t).Blocks*512) + " on disk"
		}
		p.f("%s%s data in %s: %s\n", indent, branch, printable(name), state)
	}
	return p.err
}

// facts are in a line what tells one image of a chain from another.
func (i *Info) facts() string {
	all := []string{humanSize(i.VirtualSize) + " " + i.Format, humanSize(i.ActualSize) + " on disk"}
	add := func(is bool, format string, args ...any) {
		if is {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	if q := i.image; q != nil {
		add(true, "clusters of %s", humanSize(q.ClusterSize))
		add(q.ExtendedL2, "subclusters")
		add(q.CompressionType != "zlib", "%s", q.CompressionType)
		add(q.Version == 2, "version 2")
		add(len(q.Snapshots) > 0, "%d %s", len(q.Snapshots), plural("snapshot", len(q.Snapshots)))
		add(len(q.Bitmaps) > 0, "%d %s", len(q.Bitmaps), plural("bitmap", len(q.Bitmaps)))
		add(i.Encrypted, "encrypted")
		add(q.Dirty, "not closed cleanly")
		add(q.Corrupt, "marked corrupt")
		add(len(q.Faults) > 0, "broken")
	}
	return strings.Join(all, ", ")
}

func plural(word string, n int) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

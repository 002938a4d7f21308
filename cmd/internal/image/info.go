package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"

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

	image *qcow2.Info // nil for a raw image
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
}

type bitmap struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"`
}

// Inspect returns what is to be known of the image at path. It opens nothing else.
func Inspect(path, format string) (*Info, error) {
	return inspect(path, OpenOptions{Format: format})
}

// InspectShared is Inspect for an image that another process may be writing to.
func InspectShared(path, format string) (*Info, error) {
	return inspect(path, OpenOptions{Format: format, ForceShare: true})
}

// inspect looks at the image at path, of the format in o, with the sharing in o.
func inspect(path string, o OpenOptions) (*Info, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	i := &Info{Filename: path, Format: o.Format, ActualSize: st.Sys().(*syscall.Stat_t).Blocks * 512}
	if o.Format == Raw {
		d, err := blk.OpenRaw(path, blk.RawOptions{ReadOnly: true, ForceShare: o.ForceShare})
		if err != nil {
			return nil, err
		}
		i.VirtualSize = d.Size()
		return i, d.Close()
	}
	look := qcow2.Inspect
	if o.ForceShare {
		look = qcow2.InspectShared
	}
	q, err := look(path)
	if err != nil {
		return nil, err
	}
	i.image = q
	i.VirtualSize, i.ClusterSize, i.Dirty, i.Encrypted = q.Size, q.ClusterSize, q.Dirty, q.Encryption != ""
	i.Backing, i.BackingFormat = q.BackingFile, q.BackingFormat
	if i.Backing != "" {
		i.FullBacking = beside(path, i.Backing)
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
	i.Specific = &formatInfo{Type: QCOW2, Data: specific(q)}
	return i, nil
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
// under it, as the images name them.
func Chain(path string, o OpenOptions) ([]*Info, error) {
	const most = 64
	var chain []*Info
	for path != "" {
		if len(chain) == most {
			return nil, errors.New("the chain of backing files is longer than 64, or goes in circles")
		}
		i, err := inspect(path, o)
		if err != nil {
			return nil, err
		}
		chain = append(chain, i)
		path, o.Format = i.FullBacking, i.BackingFormat
		if path != "" && o.Format != QCOW2 && o.Format != Raw {
			return nil, errors.New(i.Filename + ": it does not say that its backing file is qcow2 or raw, and formats are not guessed")
		}
	}
	return chain, nil
}

// Text writes the image for people, in qemu-img's lines.
func (i *Info) Text(w io.Writer) error {
	p := printer{w: w}
	p.f("image: %s\nfile format: %s\n", i.Filename, i.Format)
	p.f("virtual size: %s (%d bytes)\n", humanSize(i.VirtualSize), i.VirtualSize)
	p.f("disk size: %s\n", humanSize(i.ActualSize))
	if i.Encrypted {
		p.f("encrypted: yes\n")
	}
	if i.image == nil {
		return p.err
	}
	p.f("cluster_size: %d\n", i.ClusterSize)
	if i.Dirty {
		p.f("cleanly shut down: no\n")
	}
	if i.Backing != "" {
		p.f("backing file: %s", i.Backing)
		if i.FullBacking != i.Backing {
			p.f(" (actual path: %s)", i.FullBacking)
		}
		p.f("\n")
	}
	if i.BackingFormat != "" {
		p.f("backing file format: %s\n", i.BackingFormat)
	}
	if len(i.image.Snapshots) > 0 {
		p.snapshots(i.image.Snapshots)
	}
	p.specific(i.Specific.Data)
	for _, name := range i.image.UnknownFeatures {
		p.f("    unknown: %s\n", name)
	}
	return p.err
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
		p.f("            name: %s\n            granularity: %d\n", b.Name, b.Granularity)
	}
	p.f("    refcount bits: %d\n", d.RefcountBits)
	if d.DataFile != "" {
		p.f("    data file: %s\n", d.DataFile)
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
		p.f("%-9s %-16s %8s%20s%13s%11s\n", s.ID, s.Name, humanSize(s.VMStateSize),
			s.Date.Local().Format("2006-01-02 15:04:05"), clock, count)
	}
}

// humanSize is a size with a unit and up to three digits, as qemu-img shows it.
func humanSize(n int64) string {
	return units.CustomSize("%.3g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"})
}

// Tree draws a chain of images, each under the one that lies over it.
func Tree(w io.Writer, chain []*Info) error {
	p := printer{w: w}
	for depth, i := range chain {
		if depth > 0 {
			p.f("%s└─ ", strings.Repeat("   ", depth-1))
		}
		p.f("%s (%s, %s, %s on disk)\n", i.Filename, i.Format, humanSize(i.VirtualSize), humanSize(i.ActualSize))
	}
	return p.err
}

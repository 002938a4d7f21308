package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/nbd"
	"github.com/calfvm/calf/qcow2"
)

// ServeOptions say what to serve over NBD, where and to whom.
type ServeOptions struct {
	Exports []ServedImage
	// Socket is the path of a Unix socket. Without it the server listens on TCP.
	Socket string
	// Bind is a loopback address, 127.0.0.1 if it is empty, and Port a port there;
	// 0 means any that is free.
	Bind string
	Port uint16

	MaxConnections int  // as in nbd.Config
	Persistent     bool // goes on when the last client has gone
	PIDFile        string
	Log            *slog.Logger
	// Ready is called once clients can connect, with the address of each export.
	Ready func(uris []string) error
}

// ServedImage is an image to serve.
type ServedImage struct {
	Name, Description string
	Path              string
	Open              OpenOptions
	// NoDiscard keeps the room of what clients trim or make zero.
	NoDiscard bool
	// Bitmaps are the names of persistent bitmaps that clients may read, as
	// metadata contexts. They need an image that nobody writes to.
	Bitmaps []string
}

const (
	// DefaultPort is that of NBD.
	DefaultPort = 10809
	// serveMemory is about how much memory a server has, for requests and for the
	// tables of its images. The collector of garbage sees to it.
	serveMemory = 160 << 20
)

// Serve serves images over NBD until ctx is done, or the last client has gone
// unless it is to go on. It says what it has done.
func Serve(ctx context.Context, o ServeOptions) (stats nbd.Stats, err error) {
	debug.SetMemoryLimit(serveMemory)
	var images served
	defer closing(&images, &err)
	cfg := nbd.Config{MaxConnections: o.MaxConnections, UntilIdle: !o.Persistent, Log: o.Log}
	for _, s := range o.Exports {
		s.Open.L2CacheBytes = qcow2.DefaultL2CacheBytes / int64(len(o.Exports))
		img, err := Open(s.Path, s.Open)
		if err != nil {
			return stats, err
		}
		images = append(images, img)
		export, err := s.export(img)
		if err != nil {
			return stats, err
		}
		cfg.Exports = append(cfg.Exports, export)
	}
	server, err := nbd.New(cfg)
	if err != nil {
		return stats, err
	}
	ln, err := o.listen()
	if err != nil {
		return stats, err
	}
	defer func() { _ = ln.Close() }() // The server has done it, if it came so far.
	if o.PIDFile != "" {
		if err := writePID(o.PIDFile); err != nil {
			return stats, err
		}
		defer func() { err = errors.Join(err, os.Remove(o.PIDFile)) }()
	}
	if err := o.Ready(o.uris(ln.Addr())); err != nil {
		return stats, err
	}
	err = server.Serve(ctx, ln)
	return server.Stats(), err
}

// writePID writes the process ID to the file at path, which is new or has such a
// number: who names an image there by mistake does not lose it.
func writePID(path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer closing(f, &err)
	const longest = 20 // digits
	old, err := io.ReadAll(io.LimitReader(f, longest+2))
	if err != nil {
		return err
	}
	if _, notNumber := strconv.Atoi(strings.TrimSpace(string(old))); len(old) > 0 && notNumber != nil {
		return fmt.Errorf("%s is there already, and has no process ID in it", path)
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.WriteAt(fmt.Appendln(nil, os.Getpid()), 0)
	return err
}

// served are the open images of a server.
type served []*Image

// Close closes the images, the last one first.
func (s *served) Close() error {
	var errs []error
	for _, img := range slices.Backward(*s) {
		errs = append(errs, img.Close())
	}
	return errors.Join(errs...)
}

// export is the image, opened as img, for a server.
func (s ServedImage) export(img *Image) (nbd.Export, error) {
	e := nbd.Export{
		Name: s.Name, Description: s.Description, NoDiscard: s.NoDiscard,
		Disk: servedDisk{img}, ReadOnly: s.Open.ReadOnly,
	}
	for _, name := range s.Bitmaps {
		if img.QCOW2 == nil || !img.ReadOnly() {
			return e, fmt.Errorf("%s: bitmaps are served of qcow2 images that are served read-only", s.Path)
		}
		for _, err := range img.QCOW2.DirtyRanges(name) {
			if err != nil {
				return e, err
			}
			break // It can be read.
		}
		e.Contexts = append(e.Contexts, nbd.Context{Name: "qemu:dirty-bitmap:" + name, Extents: servedDisk{img}.dirty(name)})
	}
	return e, nil
}

// servedDisk is an image as a server has use for it.
type servedDisk struct{ *Image }

var (
	_ nbd.Mapper = servedDisk{}
	_ blk.Hinter = servedDisk{}
)

// IOHints implements blk.Hinter.
func (d servedDisk) IOHints() (physicalBlock, minIO, optimalIO int64) {
	if d.QCOW2 != nil {
		return d.QCOW2.IOHints()
	}
	return 0, 0, 0
}

// Extents implements nbd.Mapper.
func (d servedDisk) Extents(off, n int64) iter.Seq2[nbd.Extent, error] {
	return func(yield func(nbd.Extent, error) bool) {
		for m, err := range d.Map(off, n) {
			e := nbd.Extent{Length: m.Length}
			switch {
			case m.Kind == qcow2.MapUnallocated || m.Kind == qcow2.MapZero:
				e.Status = nbd.StateHole | nbd.StateZero
			case m.Hole:
				e.Status = nbd.StateZero
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// dirty is what a persistent bitmap says of ranges, in the terms of
// qemu:dirty-bitmap: 1 of those that have changed.
func (d servedDisk) dirty(name string) func(off, n int64) iter.Seq2[nbd.Extent, error] {
	return func(off, n int64) iter.Seq2[nbd.Extent, error] {
		return func(yield func(nbd.Extent, error) bool) {
			end := off + n
			for r, err := range d.QCOW2.DirtyRanges(name) {
				first, last := max(r.Offset, off), min(r.Offset+r.Length, end)
				switch {
				case err != nil:
					yield(nbd.Extent{}, err)
					return
				case first >= end:
					yield(nbd.Extent{Length: end - off}, nil)
					return
				case last <= off:
					continue
				case first > off && !yield(nbd.Extent{Length: first - off}, nil):
					return
				case !yield(nbd.Extent{Length: last - first, Status: 1}, nil) || last == end:
					return
				}
				off = last
			}
			yield(nbd.Extent{Length: end - off}, nil)
		}
	}
}

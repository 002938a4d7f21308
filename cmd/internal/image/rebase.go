package image

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/calfvm/calf/cmd/internal/progress"
	"github.com/calfvm/calf/qcow2"
)

// RebaseOptions say how to put an overlay over another backing file.
type RebaseOptions struct {
	Open OpenOptions // for the overlay, with the files under it
	// Backing is the new backing file, as the overlay is to name it: a relative
	// name counts from the overlay's directory. Empty is none.
	Backing, BackingFormat string
	BackingCache           string // to read it with
	Compress               bool   // what is copied
}

// check refuses what no rebase can do for the image at path.
func (o *RebaseOptions) check(path string) error {
	format, err := FormatOf(path, o.Open.Format)
	switch {
	case err != nil:
		return err
	case format == Raw:
		return fmt.Errorf("%s: a raw image has no backing file", path)
	case o.Backing == "":
		return nil
	case o.BackingFormat == "":
		return fmt.Errorf("backing file %s: its format is missing: give it with -F %s or -F %s", o.Backing, QCOW2, Raw)
	}
	if o.BackingFormat, err = FormatOf(o.Backing, o.BackingFormat); err != nil {
		return err
	}
	if sameFile(beside(path, o.Backing), path) {
		return fmt.Errorf("%s cannot lie over itself", path)
	}
	return nil
}

// RebaseUnsafe makes the overlay at path name another backing file, and changes
// nothing else: it shows whatever that has. No other file is opened.
func RebaseUnsafe(path string, o RebaseOptions) error {
	if err := o.check(path); err != nil {
		return err
	}
	return qcow2.SetBacking(path, o.Backing, o.BackingFormat)
}

// Rebase puts the overlay at path over another backing file so that it shows what it
// did: all in which that differs from the present one is copied into the overlay
// first. Until then it lies over the present one, so that whatever happens it shows
// the same. The disks of internal snapshots are not looked at, so an overlay with
// any is refused.
func Rebase(ctx context.Context, path string, o RebaseOptions, meter *progress.Meter) (err error) {
	if err := o.check(path); err != nil {
		return err
	}
	var under source = nothing{}
	if o.Backing != "" {
		backing, err := o.openBacking(path)
		if err != nil {
			return err
		}
		defer closing(backing, &err)
		under = backing
	}
	info, err := qcow2.Inspect(path)
	if err != nil {
		return err
	}
	o.Open.BackingSize = under.Size()
	over, err := Open(path, o.Open)
	if err != nil {
		return err
	}
	defer closing(over, &err)
	if err := withoutSnapshots(over); err != nil {
		return err
	}
	to := hidingSink{diskSink{over}, over}
	if o.Compress {
		to.sink = packedSink{diskSink{over}, over.QCOW2}
	}
	zero := makeZero
	if info.Version == 2 {
		zero = compare // it has no flag for zeros, which take room
	}
	c := &copying{
		from: over, to: to, base: under, shared: -1, plan: rebasing(over, under, zero),
		sparse: to.grain(), workers: defaultWorkers(), meter: meter,
	}
	c.expect()
	if err := c.disk(ctx); err != nil {
		return err
	}
	return over.QCOW2.SetBacking(o.Backing, o.BackingFormat)
}

// openBacking opens the new backing file of the overlay at path, which must not lie
// over that.
func (o *RebaseOptions) openBacking(path string) (*Image, error) {
	name := beside(path, o.Backing)
	read := OpenOptions{Format: o.BackingFormat, ReadOnly: true, Cache: o.BackingCache, BackingDirs: o.Open.BackingDirs}
	backing, err := Open(name, read)
	if err != nil {
		return nil, fmt.Errorf("the new backing file: %w", err)
	}
	chain, err := Chain(name, read)
	for _, i := range chain {
		if sameFile(i.Filename, path) {
			err = fmt.Errorf("%s lies over %s, which therefore cannot lie over it", name, path)
		}
	}
	if err != nil {
		return nil, errors.Join(err, backing.Close())
	}
	return backing, nil
}

// withoutSnapshots refuses an overlay with internal snapshots.
func withoutSnapshots(over *Image) error {
	all, err := over.QCOW2.Snapshots()
	if err == nil && len(all) > 0 {
		err = fmt.Errorf("%s has internal snapshots, which would show the new backing file: delete them first, or use -u if both backing files have the same contents", over.Path)
	}
	return err
}

// nothing is what lies under an image without a backing file.
type nothing struct{}

func (nothing) ReadvAt([][]byte, int64) error { return nil }
func (nothing) Size() int64                   { return 0 }
func (nothing) Map(int64, int64) iter.Seq2[qcow2.Mapping, error] {
	return func(func(qcow2.Mapping, error) bool) {}
}

// hidingSink makes zeros in an overlay that hide whatever will be under it, though
// what is under it now may read as zero.
type hidingSink struct {
	sink
	over Disk
}

func (s hidingSink) zero(off, n int64) error { return s.over.PunchHole(off, n) }

// grain spares the overlay to fill up what is written.
func (s hidingSink) grain() int64 { return max(s.sink.grain(), s.over.DiscardGranularity()) }

// rebasing says what to do with each range of the overlay over to let it lie over
// under. What it has itself stays, as does what both backing files read as zero, or
// have at the same place of the same file. zero is for what becomes zero.
func rebasing(over, under source, zero action) iter.Seq2[task, error] {
	return func(yield func(task, error) bool) {
		for old, err := range over.Map(0, over.Size()) {
			if err != nil {
				yield(task{}, err)
				return
			}
			end := old.Offset + old.Length
			if old.Layer == 0 && old.Kind != qcow2.MapUnallocated {
				if !yield(task{keep, old.Offset, end}, nil) {
					return
				}
				continue
			}
			for next, err := range mapPadded(under, old.Offset, old.Length) {
				if err != nil {
					yield(task{}, err)
					return
				}
				if !yield(task{rebasingAction(old, next, zero), next.Offset, next.Offset + next.Length}, nil) {
					return
				}
			}
		}
	}
}

// rebasingAction is what to do with a part, next, of the range old.
func rebasingAction(old, next qcow2.Mapping, zero action) action {
	same := old.Kind == qcow2.MapData && next.Kind == qcow2.MapData && old.Path == next.Path &&
		next.HostOffset-old.HostOffset == next.Offset-old.Offset
	switch {
	case same || isHole(&old) && isHole(&next):
		return keep
	case isHole(&old):
		return zero
	}
	return compare
}

// isHole reports whether the range is known to read as zero.
func isHole(m *qcow2.Mapping) bool {
	return m.Kind == qcow2.MapZero || m.Kind == qcow2.MapUnallocated || m.Hole
}

// mapPadded maps the n bytes at off of d, behind whose end there are zeros.
func mapPadded(d source, off, n int64) iter.Seq2[qcow2.Mapping, error] {
	return func(yield func(qcow2.Mapping, error) bool) {
		have := max(0, min(n, d.Size()-off))
		if have > 0 {
			for m, err := range d.Map(off, have) {
				if !yield(m, err) || err != nil {
					return
				}
			}
		}
		if have < n {
			yield(qcow2.Mapping{Offset: off + have, Length: n - have}, nil)
		}
	}
}

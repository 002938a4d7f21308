package qcow2

import (
	"context"
	"errors"
	"os"
)

// RepairLeaks lowers the counts of clusters that are counted more often than
// they are used, and gives those that nobody uses back to the host. It returns
// the check before and after. Then it clears the marks of a dirty and of a
// corrupt image, which opens for writing again.
//
// The flags that say which clusters are shared follow the counts, and are mended
// with them. An image with any other corruption is left as it is, because what
// looks unused may be what a broken pointer led to; then both results are the
// same. Whatever cuts a repair short, the image is no worse than before.
func RepairLeaks(ctx context.Context, path string, opts CheckOptions) (before, after *CheckResult, err error) {
	f, err := openRegular(path, os.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	if err := lockImage(f, path, true); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	of := newOSFile(f)
	before, after, err = repairIn(ctx, of, path, opts)
	return before, after, errors.Join(inFile(path, err), of.Close())
}

// repairIn repairs the image in f, which is locked for writing.
func repairIn(ctx context.Context, f file, path string, opts CheckOptions) (before, after *CheckResult, err error) {
	x, err := newChecker(ctx, f, path, opts)
	if err != nil {
		return nil, nil, err
	}
	if err := x.check(); err != nil {
		return nil, nil, err
	}
	if x.result.Corruptions > x.flags {
		return &x.result, &x.result, nil
	}
	const marks = 1<<incompatDirty | 1<<incompatCorrupt
	if x.result.Clean() && x.features&marks == 0 {
		return &x.result, &x.result, nil
	}
	if err := x.mend(marks); err != nil {
		return &x.result, nil, err
	}
	after, err = checkIn(ctx, f, path, opts)
	return &x.result, after, err
}

// mend lowers the counts, then corrects the COPIED flags, then clears the given
// feature bits. Each barrier makes
// the step before it durable: void data is marked so before anything changes, and
// the image counts as sound after its counts are.
func (x *checker) mend(marks uint64) error {
	const kept = 1 << autoclearBitmaps // their clusters were counted
	if void := x.h.autoclear &^ kept; void != 0 {
		if err := x.writeFeature(offAutoclear, x.h.autoclear&kept); err != nil {
			return err
		}
		if err := x.datasync(); err != nil {
			return err
		}
	}
	unused, err := x.lowerLeaks()
	if err == nil {
		err = x.refs.writeDirty()
	}
	if err == nil {
		err = x.datasync()
	}
	if err == nil {
		err = x.mendFlags()
	}
	if err != nil {
		return err
	}
	for _, e := range unused {
		x.punch(e)
	}
	if x.features&marks == 0 {
		return nil
	}
	if err := x.writeFeature(offIncompatible, x.features&^marks); err != nil {
		return err
	}
	return x.datasync()
}

// lowerLeaks sets each count that is too high to the number of references, in
// memory and as far as memory is short in the file. It returns the clusters that
// have none. No other count changes, so none becomes too low at any instant.
func (x *checker) lowerLeaks() ([]extent, error) {
	var unused []extent
	end := x.cluster(x.fileSize + x.clusterSize - 1)
	for c := uint64(0); c < end; c++ {
		if c%tallyChunk == 0 {
			if err := x.ctx.Err(); err != nil {
				return nil, err
			}
		}
		s, err := x.refs.slice(c)
		if err != nil {
			return nil, err
		}
		if s == nil {
			c |= 1<<x.refs.perSlice() - 1
			continue
		}
		used := uint64(x.used.chunk(c).at(c))
		i := c & (1<<x.refs.perSlice() - 1)
		if count(s.b, x.refcountOrder, i) <= used {
			continue
		}
		setCount(s.b, x.refcountOrder, i, used)
		s.dirty = true
		if used == 0 {
			unused = appendExtent(unused, extent{start: c, n: 1})
		}
	}
	return unused, nil
}

// mendFlags makes the COPIED flags of the disk's tables agree with the counts,
// which are right by now. Each entry is valid with either flag, so a write may be
// cut anywhere.
func (x *checker) mendFlags() error {
	for i, e := range x.l1 {
		if e == 0 {
			continue
		}
		table, err := x.loadTable(e&entryOffset, x.clusterSize)
		if err != nil {
			return err
		}
		if err := x.mendTable(table, e&entryOffset); err != nil {
			return err
		}
		if err := x.mendTable(x.l1[i:i+1], x.h.l1Offset+uint64(i)*8); err != nil {
			return err
		}
	}
	return x.datasync()
}

// mendTable corrects the COPIED flags of the entries at offset off of a table,
// and writes them if any was wrong.
func (x *checker) mendTable(entries []uint64, off uint64) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	changed := false
	for i, e := range entries {
		if e&entryOffset == 0 || e&entryCompressed != 0 {
			continue
		}
		n, err := x.stored(e & entryOffset >> x.clusterBits)
		if err != nil {
			return err
		}
		if (n == 1) != (e&entryCopied != 0) {
			entries[i] ^= entryCopied
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return writeFull(x.file, encodeEntries(nil, entries), int64(off)) //nolint:gosec // G115: checked
}

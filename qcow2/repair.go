package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// RepairMode tells how far a repair goes.
type RepairMode uint8

const (
	// RepairLeaks lowers the counts of clusters that are counted more often
	// than they are used. An image with any corruption but wrong COPIED flags
	// is left as it is.
	RepairLeaks RepairMode = iota
	// RepairAll mends corruptions as well: it raises counts that are too low,
	// makes a new structure of counts if the old one is lost, and corrects
	// entries of the mapping tables and of the snapshot table whose faults
	// leave no doubt what they mean.
	RepairAll
)

// repairPasses bounds how often a repair begins anew. Each pass but the last
// does something, and no more than five kinds of it can follow each other.
const repairPasses = 8

// Repair checks the image at path, mends what the mode allows, and checks again,
// until nothing is left that it can mend. It returns the first check and the
// last; if there was nothing to do, they are the same. An image that is clean at
// the end loses the marks of a dirty and of a corrupt image, and opens for
// writing again.
//
// The data that the guest sees never changes. What cannot be mended is left and
// reported; if a pointer is broken, no count is lowered, because what looks unused
// may be what the pointer led to. Snapshots that the snapshot table
// has no room for, and extra data of theirs longer than the format allows, are
// dropped. Whatever cuts a repair short, the image is no worse than before.
//
// The image is locked like a writer's. It is written to only if there is
// something to mend. opts limit each check. Canceling ctx ends the repair.
func Repair(ctx context.Context, path string, mode RepairMode, opts CheckOptions) (before, after *CheckResult, err error) {
	if opts.ForceShare {
		return nil, nil, &Error{Path: path, Kind: ErrInvalidOption, What: "an image that others may use cannot be repaired"}
	}
	f, err := openRegular(path, os.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	if err := lockImage(f, path, accessWrite); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	hf, err := newFile(f, path, Options{Direct: opts.Direct})
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	before, after, err = repairIn(ctx, hf, path, mode, opts)
	return before, after, errors.Join(inFile(path, err), hf.Close())
}

// repairIn repairs the image in f, which is locked for writing.
func repairIn(ctx context.Context, f file, path string, mode RepairMode, opts CheckOptions) (before, after *CheckResult, err error) {
	distrust := false
	for range repairPasses {
		x, err := newChecker(ctx, f, path, opts)
		if err == nil {
			err = x.check()
		}
		if err != nil {
			return before, nil, err
		}
		distrust = distrust || x.broken() > 0
		x.distrust = distrust
		if before == nil {
			before = &x.result
		}
		again, err := x.mend(mode)
		if err != nil {
			return before, nil, err
		}
		if !again {
			return before, &x.result, nil
		}
	}
	after, err = checkIn(ctx, f, path, opts)
	return before, after, err
}

// repairDirty repairs the image in f, whose dirty bit is set and which is locked
// for writing. It fails unless the image is sound afterwards.
func repairDirty(f file, path string) error {
	_, after, err := repairIn(context.Background(), f, path, RepairAll, CheckOptions{})
	if err != nil || after.Clean() {
		return err
	}
	return &Error{
		Kind: ErrCorrupt,
		What: fmt.Sprintf("the image was not closed cleanly, and its repair leaves %d corruptions and %d leaks, the first of them: %s",
			after.Corruptions, after.Leaks, after.Findings[0].What),
		Mend: "copy what can be read of it, opened for reading only",
	}
}

// mend does one pass of a repair. It reports whether it has done something after
// which the image must be checked again.
func (x *checker) mend(mode RepairMode) (again bool, err error) {
	if x.result.Clean() {
		return false, x.clearMarks()
	}
	if mode == RepairLeaks && x.result.Corruptions > x.flags {
		return false, nil
	}
	if err := x.clearVoid(); err != nil {
		return false, err
	}
	if mode == RepairLeaks {
		return x.mendCounts()
	}
	if x.zeroes > 0 {
		changed, err := x.mendZeroes()
		if changed || err != nil {
			return changed, err
		}
		x.mendable -= x.zeroes // the tables are not theirs alone
		x.distrust = true
	}
	return x.mendTables()
}

// mendTables mends the counts, and then what gets another place, which has to be
// counted first: the snapshot table, and data in clusters of tables.
func (x *checker) mendTables() (again bool, err error) {
	x.sortOutside()
	if err := x.placeSnapshotTable(); err != nil {
		return false, err
	}
	strays, err := x.placeStrays()
	if err != nil {
		return false, err
	}
	if x.rebuild {
		again, err = x.rebuildCounts()
		if err != nil || !again {
			return false, err
		}
	} else if again, err = x.mendCounts(); err != nil {
		return false, err
	}
	if x.snaps != nil {
		return true, x.writeSnapshotTable()
	}
	if len(strays) > 0 {
		return true, x.writeStrays(strays)
	}
	return again, nil
}

// clearVoid clears the autoclear bits of data that a writer makes void, and makes
// that durable before anything else changes.
func (x *checker) clearVoid() error {
	// The clusters of bitmaps were counted, and external data does not change.
	const kept = 1<<autoclearBitmaps | 1<<autoclearRawData
	if x.h.autoclear&^kept == 0 {
		return nil
	}
	if err := x.writeFeature(offAutoclear, x.h.autoclear&kept); err != nil {
		return err
	}
	return x.datasync()
}

// clearMarks clears the marks of a dirty and of a corrupt image, of one that is
// sound.
func (x *checker) clearMarks() error {
	const marks = 1<<incompatDirty | 1<<incompatCorrupt
	if x.features&marks == 0 {
		return nil
	}
	if err := x.clearVoid(); err != nil {
		return err
	}
	if err := x.writeFeature(offIncompatible, x.features&^marks); err != nil {
		return err
	}
	return x.datasync()
}

// mendCounts makes the counts agree with the references, then the COPIED flags
// with the counts, each durable before the next. It reports whether anything
// changed.
//
// No count gets further from the number of references at any instant, and each
// flag is valid either way, so a cut leaves the image no worse.
func (x *checker) mendCounts() (bool, error) {
	unused, changed, err := x.setCounts()
	if err != nil {
		return false, err
	}
	if changed {
		if err := x.refs.writeDirty(); err != nil {
			return false, err
		}
		if err := x.datasync(); err != nil {
			return false, err
		}
	}
	flags, err := x.mendFlags()
	if err != nil {
		return false, err
	}
	for _, e := range unused {
		x.punch(x.file, x.holeOf(e))
	}
	return changed || flags, nil
}

// setCounts sets each count to its target, in memory and as far as memory is
// short in the file. It returns clusters that nobody uses any more: all of them,
// as far as memory allows.
func (x *checker) setCounts() (unused []extent, changed bool, err error) {
	err = x.eachCluster(func(s *refSlice, c uint64) error {
		want, err := x.target(c)
		if err != nil || s == nil || x.countIn(s, c) == want {
			return err
		}
		setCount(s.b, x.refcountOrder, c&(1<<x.refs.perSlice()-1), want)
		s.dirty, changed = true, true
		if want == 0 && x.used.spend(extentCost) == nil {
			unused = appendExtent(unused, extent{start: c, n: 1})
		}
		return nil
	})
	return unused, changed, err
}

// mendFlags makes the COPIED flags of the disk's tables agree with the counts,
// which are right by now, and clears what the entries of compressed clusters must
// not have. Each entry is valid with and without, so a write may be cut anywhere.
func (x *checker) mendFlags() (changed bool, err error) {
	for _, c := range x.sortedTables() {
		active := x.tables[c].active
		done, err := x.mendTable(c, func(e []uint64) (bool, error) { return x.mendEntry(e, active) })
		if err != nil {
			return false, err
		}
		changed = changed || done
	}
	for i, e := range x.l1 {
		if x.inCluster(int64(e&entryOffset)) != 0 || x.tables[e&entryOffset>>x.clusterBits].refs == 0 {
			continue // none, or broken
		}
		flag, err := x.mendL1(i)
		if err != nil {
			return false, err
		}
		changed = changed || flag
	}
	if !changed {
		return false, nil
	}
	return true, x.datasync()
}

// mendL1 corrects the COPIED flag of L1 entry i, unless its cluster is something
// else, too.
func (x *checker) mendL1(i int) (changed bool, err error) {
	at := x.h.l1Offset + uint64(i)*8 //nolint:gosec // G115: an index
	e, err := x.withCopied(x.l1[i])
	if err != nil || e == x.l1[i] || x.used.at(at>>x.clusterBits) != 1 {
		return false, err
	}
	return true, writeFull(x.file, encodeEntries(nil, []uint64{e}), int64(at)) //nolint:gosec // G115: checked
}

// mendEntry corrects the flags of the L2 entry e, of one or two words. In tables
// that only snapshots have, COPIED flags say nothing.
func (x *checker) mendEntry(e []uint64, active bool) (changed bool, err error) {
	old := e[0]
	switch {
	case old&entryCompressed != 0:
		changed = old&entryCopied != 0 || len(e) == 2 && e[1] != 0
		e[0] = old &^ entryCopied
		clear(e[1:])
		return changed, nil
	case old&entryOffset == 0 || !active:
		return false, nil
	case x.external:
		e[0] |= entryCopied // what is not counted is not shared
	default:
		e[0], err = x.withCopied(old)
	}
	return e[0] != old, err
}

// withCopied returns the entry e with the COPIED flag that the count of its
// cluster demands. A cluster whose references are more than it can count is
// shared.
func (x *checker) withCopied(e uint64) (uint64, error) {
	c := e & entryOffset >> x.clusterBits
	n, known, err := x.stored(c)
	switch {
	case err != nil || !known:
		return e, err
	case n == 1 && x.used.at(c) == 1:
		return e | entryCopied, nil
	}
	return e &^ entryCopied, nil
}

// mendZeroes takes from the entries of all L2 tables the clusters that hold no
// data and lie where no cluster can be. The guest sees the same without them.
func (x *checker) mendZeroes() (changed bool, err error) {
	for _, c := range x.sortedTables() {
		done, err := x.mendTable(c, func(e []uint64) (bool, error) { return x.mendZero(e), nil })
		if err != nil {
			return false, err
		}
		changed = changed || done
	}
	if !changed {
		return false, nil
	}
	return true, x.datasync()
}

// mendZero makes the entry e do without its cluster, if that lies where none can
// be and holds no data.
func (x *checker) mendZero(e []uint64) bool {
	raw := l2Entry{e: e[0]}
	if len(e) == 2 {
		raw.bitmap = e[1]
	}
	if e[0]&entryCompressed != 0 || x.inCluster(int64(e[0]&entryOffset)) == 0 || !x.dataless(raw) {
		return false
	}
	e[0] = entryZero
	if len(e) == 2 {
		e[0] = 0 // what is zero, the other word says
	}
	return true
}

// mendTable lets mend change the entries of the L2 table in cluster c and writes
// it if any changed; but not if the cluster is something else, too, which then
// would change as well.
func (x *checker) mendTable(c uint64, mend func(e []uint64) (bool, error)) (changed bool, err error) {
	if err := x.ctx.Err(); err != nil {
		return false, err
	}
	if x.used.at(c) != x.tables[c].refs {
		return false, nil
	}
	table, err := x.loadTable(x.pointer(c), x.clusterSize)
	if err != nil {
		return false, err
	}
	for i := 0; i < len(table); i += x.words() {
		done, err := mend(table[i : i+x.words()])
		if err != nil {
			return false, err
		}
		changed = changed || done
	}
	if !changed {
		return false, nil
	}
	return true, writeFull(x.file, encodeEntries(nil, table), x.offset(c))
}

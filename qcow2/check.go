package qcow2

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// FindingKind tells what Check has found.
type FindingKind uint8

const (
	// Leak is a host cluster that is counted more often than it is used. It
	// costs room and nothing else.
	Leak FindingKind = iota
	// Corruption is anything that breaks the format, and may cost data.
	Corruption
)

func (k FindingKind) String() string { return [...]string{"leak", "corruption"}[k] }

// Finding is one fault of an image.
type Finding struct {
	Kind   FindingKind
	Offset int64 // in the file, of what is concerned
	What   string
}

// maxFindings is how many findings a result keeps. All are counted.
const maxFindings = 1000

// CheckResult is what Check found. Its counts are those of qemu-img check, but
// where a table of the image is lost or serves two purposes.
type CheckResult struct {
	Leaks, Corruptions int64
	// Findings are the first of them, at most 1000.
	Findings []Finding
	// ImageEnd is the end in the file of the last cluster in use, in bytes.
	ImageEnd int64
	// Of the clusters of the disk, Total exist and Allocated have data of
	// their own, among which Fragmented do not follow their neighbour in the
	// file and Compressed are compressed.
	Total, Allocated, Fragmented, Compressed int64
}

// Clean reports whether nothing was found.
func (r *CheckResult) Clean() bool { return r.Leaks == 0 && r.Corruptions == 0 }

// CheckOptions limit a check. The zero value is the default.
type CheckOptions struct {
	// MemoryBytes bounds the memory for the tables of the image and for
	// counting references; default 1 GiB, enough for a dozen terabytes of
	// data in clusters of 64 KiB. An image that needs more is refused with
	// ErrUnsupported.
	MemoryBytes int64
	// ForceShare checks the image beside a process that writes to it, whose
	// changes under way look like faults. A repair refuses it.
	ForceShare bool
	// Direct reads and writes the image past the host's page cache, as by
	// Options.Direct.
	Direct bool
}

const defaultCheckMemory = 1 << 30

// Check counts the references to each cluster of the image at path, from the
// disk, the internal snapshots and the bitmaps, and compares them with the
// reference counts. It opens nothing but the image, not even an external data
// file, locks it like a reader, and writes nothing. A table that is not where a
// table can be is a finding, too. An error means that the image could not be
// checked, not that something was found. Canceling ctx ends the check.
//
// An image that is found clean opens for writing, unless it is marked corrupt or
// has a feature that Open refuses.
func Check(ctx context.Context, path string, opts CheckOptions) (*CheckResult, error) {
	f, err := openRegular(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if err := lockImage(f, path, readAccess(opts.ForceShare)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	hf, err := newFile(f, path, Options{Direct: opts.Direct})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r, err := checkIn(ctx, hf, path, opts)
	return r, errors.Join(inFile(path, err), hf.Close())
}

// checkIn checks the image in f, which is locked.
func checkIn(ctx context.Context, f file, path string, opts CheckOptions) (*CheckResult, error) {
	x, err := newChecker(ctx, f, path, opts)
	if err != nil {
		return nil, err
	}
	return &x.result, x.check()
}

// checker is a check under way, of one goroutine.
type checker struct {
	*Image        // its geometry, tables, file and refcounts only
	ctx           context.Context
	h             *header
	fileSize      int64
	result        CheckResult
	used          tally
	tables        map[uint64]tableUse // L2 tables by host cluster
	refTable      []uint64            // as in the file; refs.table is without the entries that lead to no block
	bitmapsExt    []byte              // the header extension, nil if there is none
	bitmapEntries int64               // of all bitmaps' tables
	outside       []extent            // what broken pointers lead to, beyond the end of the file
	next          int64               // where the cluster would be that follows the last of a table

	// What a repair can do about the findings:
	mendable int64 // corruptions that one of its steps mends
	flags    int64 // among them wrong COPIED flags
	zeroes   int64 // among them zero clusters that are reserved where none can be
	strays   int64 // among them clusters of tables that have other data, too
	rebuild  bool  // whether the counts need a new structure
	snaps    *snapshotPlan
	// distrust means that a pointer is broken, or was when the repair began: it
	// may lead into a file that has grown since. What looks unused may be what
	// it should lead to.
	distrust bool
}

// tableUse is what is known of an L2 table.
type tableUse struct {
	refs   uint32 // from L1 tables
	active bool   // one of them is the disk's
}

func newChecker(ctx context.Context, f file, path string, opts CheckOptions) (*checker, error) {
	x := &checker{
		Image: &Image{path: path, file: f, data: f},
		ctx:   ctx, tables: map[uint64]tableUse{},
	}
	x.used = newTally(opts.MemoryBytes, x.loadCounts)
	var err error
	if x.fileSize, err = f.Size(); err != nil {
		return nil, err
	}
	if x.h, err = x.readHeader(x.fileSize); err != nil {
		return nil, err
	}
	if err := x.h.validateFields(); err != nil {
		return nil, err
	}
	first := make([]byte, min(int64(1)<<x.h.clusterBits, x.fileSize))
	if err := readFull(f, first, 0); err != nil {
		return nil, err
	}
	ext, err := parseExtensions(x.h, first)
	if err != nil {
		return nil, err
	}
	if err := x.h.checkFeatures(ext.features); err != nil {
		return nil, err
	}
	x.bitmapsExt = ext.bitmaps
	x.geometry = newGeometry(x.h)
	x.features = x.h.incompatible
	x.size.Store(int64(x.h.size)) //nolint:gosec // G115: validated
	if err := x.loadL1(); err != nil {
		return nil, err
	}
	return x, x.loadRefTable()
}

// loadL1 reads the L1 table, if it is where a table can be.
func (x *checker) loadL1() error {
	h := x.h
	if err := h.validateL1(x.fileSize); err != nil {
		x.foundError(h.l1Offset, err)
	}
	n := uint64(h.l1Size) * 8
	if n == 0 || n > maxL1Bytes || h.checkTable("L1 table", h.l1Offset, n, x.fileSize) != nil {
		return nil
	}
	if err := x.used.spend(2 * int64(n)); err != nil {
		return err
	}
	var err error
	x.l1, err = x.loadTable(h.l1Offset, int64(n))
	return err
}

// loadRefTable reads the reference count table, if it is where a table can be,
// and forgets the entries that lead to no block.
func (x *checker) loadRefTable() error {
	lru, err := simplelru.NewLRU[uint64, *refSlice](refSlices, nil)
	if err != nil {
		return err
	}
	x.refs = &refcounts{img: x.Image, slices: lru}
	h := x.h
	if err := h.validateRefTable(x.fileSize); err != nil {
		x.foundError(h.refTableOffset, err)
		x.mendable++
		x.rebuild = true
		return nil
	}
	n := int64(h.refTableClusters) << x.clusterBits
	if err := x.used.spend(4 * n); err != nil {
		return err
	}
	if x.refTable, err = x.loadTable(h.refTableOffset, n); err != nil {
		return err
	}
	x.refs.offset = int64(h.refTableOffset) //nolint:gosec // G115: validated
	x.refs.table = append([]uint64(nil), x.refTable...)
	for i, e := range x.refTable {
		off, err := x.decodeRefTable(e, i)
		if err != nil || off >= x.fileSize {
			x.refs.table[i] = 0
		}
	}
	return nil
}

// check does all of it: first every L1 table, so that each L2 table is read once
// however many snapshots share it.
func (x *checker) check() error {
	x.result.Total = (x.Size() + x.clusterSize - 1) >> x.clusterBits
	h := x.h
	for _, step := range []func() error{
		func() error { return x.refer(0, 1, 1, "header") },
		func() error { return x.referL1(x.l1, h.l1Offset) },
		x.checkSnapshots,
		func() error {
			return x.refer(h.refTableOffset, uint64(len(x.refTable))*8, 1, "reference count table")
		},
		x.checkBitmaps,
		x.checkTables,
		x.checkBlocks,
		x.compare,
		x.checkOwners,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// found notes a fault of what lies at off.
func (x *checker) found(kind FindingKind, off uint64, format string, args ...any) {
	if kind == Leak {
		x.result.Leaks++
	} else {
		x.result.Corruptions++
	}
	if len(x.result.Findings) < maxFindings {
		x.result.Findings = append(x.result.Findings, Finding{Kind: kind, Offset: int64(off), What: fmt.Sprintf(format, args...)}) //nolint:gosec // G115: masked or checked
	}
}

// foundError notes the corruption that err tells of.
func (x *checker) foundError(off uint64, err error) {
	what := err.Error()
	if e, ok := errors.AsType[*Error](err); ok {
		what = e.What
	}
	x.found(Corruption, off, "%s", what)
}

// broken is the number of corruptions that no repair mends.
func (x *checker) broken() int64 { return x.result.Corruptions - x.mendable }

// refer counts times references to each cluster of the n bytes at off. The end
// of the last may lie beyond the end of the file, by less than a cluster.
func (x *checker) refer(off, n uint64, times uint32, what string) error {
	if n == 0 {
		return nil
	}
	end := uint64(x.fileSize + x.clusterSize) //nolint:gosec // G115: positive
	if off >= end || n > end-1-off {
		x.found(Corruption, off, "the %s at %#x lies beyond the end of the file", what, off)
		x.outside = append(x.outside, x.clustersOf(off, n))
		return x.used.spend(extentCost)
	}
	for c := off >> x.clusterBits; c <= (off+n-1)>>x.clusterBits; c++ {
		if err := x.used.add(c, times); err != nil {
			return err
		}
	}
	return nil
}

// checkOwners checks that no two tables are one, as Open does before it lets
// anyone write, and that no table is anything else: Open lets nobody write there.
// It needs tables that are all where they can be, and counts that are right.
func (x *checker) checkOwners() error {
	if x.broken() > 0 || x.rebuild || x.snaps != nil {
		return nil
	}
	const runCost = 32 // bytes of a run in the set, of which there are fewer than entries
	if err := x.used.spend(runCost * (int64(len(x.l1)+len(x.refTable)+len(x.tables)) + min(x.bitmapEntries, maxBitmapEntries))); err != nil {
		return err
	}
	err := x.claimTables(x.h, x.fileSize)
	if err == nil {
		err = x.loadBitmaps(x.h, x.bitmapsExt, x.fileSize)
	}
	switch {
	case errors.Is(err, ErrCorrupt):
		x.foundError(0, err)
		return nil
	case errors.Is(err, ErrUnsupported):
		return nil // more bitmaps than Open takes
	}
	if err != nil || x.result.Corruptions > x.flags {
		return err
	}
	for _, leaf := range x.meta.leaves {
		for _, run := range leaf {
			for c := run.start(); c < run.end(); c++ {
				if x.used.at(c) != max(x.tables[c].refs, 1) {
					x.strays++
					x.mendable++
					x.found(Corruption, x.pointer(c), "the cluster at %#x holds the %s, and something else points to it, too", x.pointer(c), run.kind())
				}
			}
		}
	}
	return nil
}

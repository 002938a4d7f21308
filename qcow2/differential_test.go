package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The dimensions in which images differ, each with its values.
const (
	dimCreator = iota
	dimCompat
	dimCluster
	dimRefcount
	dimExtended
	dimCompression
	dimLazy
	dimPrealloc
	dimData
	dimBase
	dimStart
	dimTail
	dims
)

var dimValues = [dims][]string{
	dimCreator:     {"qemu", "calf"},
	dimCompat:      {"1.1", "0.10"},
	dimCluster:     {"512", "4096", "16384", "65536", "2097152"},
	dimRefcount:    {"16", "1", "8", "32", "64"},
	dimExtended:    {"off", "on"},
	dimCompression: {"zlib", "zstd"},
	dimLazy:        {"off", "on"},
	dimPrealloc:    {"off", "metadata", "falloc", "full"},
	dimData:        {"none", "own", "raw"}, // external data file
	dimBase:        {"none", "raw-shorter", "qcow2-same", "qcow2-longer"},
	dimStart:       {"empty", "packed", "snapshot"},
	dimTail:        {"0", "512"}, // bytes of the disk beyond whole clusters
}

// diffRow is a combination: an index for each dimension.
type diffRow [dims]uint8

func (w *diffRow) value(dim int) string { return dimValues[dim][w[dim]] }

func (w *diffRow) is(dim int, values ...string) bool { return slices.Contains(values, w.value(dim)) }

func (w *diffRow) number(dim int) int64 {
	n, err := strconv.ParseInt(w.value(dim), 10, 64)
	if err != nil {
		panic("BUG: the dimension has no numbers")
	}
	return n
}

func (w *diffRow) String() string {
	var s []string
	for dim := range dims {
		s = append(s, w.value(dim))
	}
	return strings.Join(s, "_")
}

// valid reports whether the format allows the combination.
func (w *diffRow) valid() bool {
	data, base, extended := !w.is(dimData, "none"), !w.is(dimBase, "none"), w.is(dimExtended, "on")
	switch {
	case w.is(dimCompat, "0.10") && (extended || data || !w.is(dimRefcount, "16") || w.is(dimCompression, "zstd") || w.is(dimLazy, "on")),
		extended && w.is(dimCluster, "512", "4096"),
		data && !w.is(dimStart, "empty"), // neither snapshots nor compressed clusters
		base && w.is(dimData, "raw"),
		base && !extended && !w.is(dimPrealloc, "off"),
		// What has its place cannot be written compressed, and counts may not
		// overflow with a snapshot.
		w.is(dimStart, "packed") && !w.is(dimPrealloc, "off"),
		w.is(dimStart, "snapshot") && w.is(dimRefcount, "1"):
		return false
	}
	return true
}

// pairs calls visit with each pair of values that the row has, as a number.
func (w *diffRow) pairs(visit func(int)) {
	const most = 8 // values of a dimension
	for a := range dims {
		for b := range a {
			visit(((a*most+int(w[a]))*dims+b)*most + int(w[b]))
		}
	}
}

// allRows returns every valid combination.
func allRows() []diffRow {
	rows := []diffRow{{}}
	for dim, values := range dimValues {
		var next []diffRow
		for _, w := range rows {
			for v := range values {
				w[dim] = uint8(v)
				// The dimensions to come have their first values, which
				// rule nothing out.
				if w.valid() {
					next = append(next, w)
				}
			}
		}
		rows = next
	}
	return rows
}

// pairRows returns some of the rows, such that every pair of values that is in
// any of them is in one of those returned.
func pairRows(all []diffRow, r *rand.Rand) []diffRow {
	open := map[int]bool{}
	for i := range all {
		all[i].pairs(func(p int) { open[p] = true })
	}
	var rows []diffRow
	for len(open) > 0 {
		var best diffRow
		most := 0
		for tries := 0; tries < 300 || most == 0; tries++ {
			w, n := all[r.IntN(len(all))], 0
			w.pairs(func(p int) { n += b2int(open[p]) })
			if n > most {
				best, most = w, n
			}
		}
		best.pairs(func(p int) { delete(open, p) })
		rows = append(rows, best)
	}
	return rows
}

// rounds is how often long tests do their random work: CALF_ROUNDS times, once
// by default.
func rounds(t testing.TB) int {
	t.Helper()
	s := os.Getenv("CALF_ROUNDS")
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("CALF_ROUNDS is %q, which is no number of rounds", s)
	}
	return n
}

// TestDifferential makes images of every kind, by turns with QEMU and with this
// engine, and lets both write to them by turns. After each turn both read what
// the model has, and both find nothing to complain of.
//
// The rows have every pair of values of the options, always the same ones; what
// is written is random. With CALF_ROUNDS=n there are n rounds, from the second
// one on of combinations picked at random.
func TestDifferential(t *testing.T) {
	all := allRows()
	rows := pairRows(all, rand.New(rand.NewPCG(1, 2)))
	r := newSeed(t)
	for range (rounds(t) - 1) * len(rows) {
		rows = append(rows, all[r.IntN(len(all))])
	}
	for i, w := range rows {
		if testing.Short() && i%4 != 0 {
			continue
		}
		t.Run(w.String(), func(t *testing.T) {
			d := newDiff(t, w)
			d.run()
		})
	}
}

// diff is an image that two programs write to.
type diff struct {
	*testing.T
	diffRow
	r         *rand.Rand
	dir, path string
	model     []byte
	cluster   int64
	fresh     []bool // clusters that nobody has written to; see qemuTurn
}

func newDiff(t *testing.T, w diffRow) *diff {
	d := &diff{T: t, diffRow: w, r: newSeed(t), dir: t.TempDir(), cluster: w.number(dimCluster)}
	d.path = filepath.Join(d.dir, "disk.qcow2")
	clusters := min(max(2<<20/d.cluster, 3), 256)
	d.model = make([]byte, clusters*d.cluster+w.number(dimTail))
	d.fresh = make([]bool, clusters)
	for i := range d.fresh {
		d.fresh[i] = w.is(dimPrealloc, "off")
	}
	return d
}

func (d *diff) run() {
	format, name, _ := strings.Cut(d.value(dimBase), "-")
	size := map[string]int{"shorter": len(d.model)/2 + 512, "same": len(d.model), "longer": len(d.model) + 1<<20}[name]
	if size > 0 {
		copy(d.model, makeBase(d, d.r, d.dir, format, int64(size)))
	}
	if d.is(dimCreator, "qemu") {
		d.qemuCreate(format)
	} else {
		d.calfCreate(format)
	}
	d.judge()
	if d.is(dimStart, "packed") {
		d.qemuPack()
	}
	d.qemuTurn()
	d.judge()
	var kept []byte
	if d.is(dimStart, "snapshot") {
		d.snapshot("-c", func(m *Image) error { _, err := m.CreateSnapshot(d.Context(), "s"); return err })
		kept = slices.Clone(d.model)
	}
	for _, resize := range []func(){d.calfResize, d.qemuResize} {
		ourWrite(d, d.r, d.path, d.model, 40)
		clear(d.fresh)
		d.judge()
		d.qemuTurn()
		resize()
	}
	d.judge()
	if kept != nil {
		d.snapshot("-a", func(m *Image) error { return m.ApplySnapshot(d.Context(), "s") })
		d.model = kept
		d.judge()
		got := make([]byte, len(kept))
		m := open(d, d.path, Options{Snapshot: "s"})
		if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, kept) {
			d.Errorf("the snapshot differs (%v)", err)
		}
		closeImage(d, m)
		d.snapshot("-d", func(m *Image) error { return m.DeleteSnapshot(d.Context(), "s") })
		d.judge()
	}
}

// snapshot lets either program do the same to the snapshot.
func (d *diff) snapshot(option string, ours func(m *Image) error) {
	// QEMU 7.2 cannot always zero what a disk with subclusters gains over a
	// backing file when a snapshot of another size is applied.
	cannot := option == "-a" && d.is(dimExtended, "on") && !d.is(dimBase, "none")
	if d.r.IntN(2) == 0 && !cannot {
		qemu(d, "qemu-img", "snapshot", option, "s", d.path)
		return
	}
	m := open(d, d.path, Options{})
	if err := ours(m); err != nil {
		d.Fatal(err)
	}
	closeImage(d, m)
}

func (d *diff) qemuCreate(baseFormat string) {
	options := []string{
		"compat=" + d.value(dimCompat), "cluster_size=" + d.value(dimCluster),
		"refcount_bits=" + d.value(dimRefcount), "preallocation=" + d.value(dimPrealloc),
	}
	if d.is(dimCompat, "1.1") {
		options = append(options, "extended_l2="+d.value(dimExtended), "lazy_refcounts="+d.value(dimLazy),
			"compression_type="+d.value(dimCompression))
	}
	if !d.is(dimData, "none") {
		options = append(options, "data_file="+filepath.Join(d.dir, "data.raw"), "data_file_raw="+onOff(d.is(dimData, "raw")))
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.Join(options, ",")}
	if !d.is(dimBase, "none") {
		args = append(args, "-F", baseFormat, "-b", "base."+baseFormat)
	}
	qemu(d, "qemu-img", append(args, d.path, fmt.Sprint(len(d.model)))...)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func (d *diff) calfCreate(baseFormat string) {
	opts := CreateOptions{
		Size: int64(len(d.model)), ClusterSize: d.cluster, Version: 3, RefcountBits: int(d.number(dimRefcount)),
		ExtendedL2: d.is(dimExtended, "on"), LazyRefcounts: d.is(dimLazy, "on"), CompressionType: d.value(dimCompression),
		Preallocation: map[string]Preallocation{
			"off": PreallocateOff, "metadata": PreallocateMetadata, "falloc": PreallocateFalloc, "full": PreallocateFull,
		}[d.value(dimPrealloc)],
	}
	if d.is(dimCompat, "0.10") {
		opts.Version = 2
	}
	if !d.is(dimData, "none") {
		// QEMU takes a relative name from its own working directory.
		opts.DataFile, opts.DataFileRaw = filepath.Join(d.dir, "data.raw"), d.is(dimData, "raw")
	}
	if !d.is(dimBase, "none") {
		opts.BackingFile, opts.BackingFormat = "base."+baseFormat, baseFormat
	}
	if err := Create(d.path, opts); err != nil {
		d.Fatal(err)
	}
}

// calfResize and qemuResize change the size of the disk. Neither program does that
// to one of version 2 with a snapshot. QEMU does not grow one of version 2 over a
// backing file, and shows what it finds beyond the end in the last cluster, or
// fails there if it is compressed; so it gets disks that end with a cluster.
func (d *diff) calfResize() {
	if d.is(dimCompat, "0.10") && d.is(dimStart, "snapshot") {
		return
	}
	size := d.anySize()
	size -= size % int(d.cluster)
	m := open(d, d.path, Options{DataFile: true})
	opts := ResizeOptions{Shrink: size < len(d.model)}
	if !opts.Shrink {
		opts.Preallocation = Preallocation(d.r.IntN(int(PreallocateFull) + 1))
	}
	if err := m.Resize(d.Context(), int64(size), opts); err != nil {
		d.Fatal(err)
	}
	closeImage(d, m)
	d.resized(size)
}

func (d *diff) qemuResize() {
	size := d.anySize()
	if d.is(dimCompat, "0.10") && (d.is(dimStart, "snapshot") || !d.is(dimBase, "none") && size > len(d.model)) {
		return
	}
	args := []string{"resize", "-q", "-f", "qcow2"}
	if size < len(d.model) {
		args = append(args, "--shrink")
	}
	qemu(d, "qemu-img", append(args, d.path, fmt.Sprint(size))...)
	d.resized(size)
}

func (d *diff) anySize() int { return (len(d.model)/2 + d.r.IntN(len(d.model))) &^ 511 }

func (d *diff) resized(size int) {
	d.model = append(d.model[:min(size, len(d.model))], make([]byte, max(size-len(d.model), 0))...)
}

// qemuPack lets QEMU write some clusters compressed that have no place yet, which
// is known of those that nobody has written to. It gets a process of its own:
// QEMU goes on filling a host cluster with compressed data after the discard of
// what it held has freed it, and overwrites what took it since.
func (d *diff) qemuPack() {
	args := []string{"-f", "qcow2"}
	for c := range d.fresh {
		if d.fresh[c] && d.r.IntN(4) == 0 {
			v := byte(d.r.Uint32())
			args = append(args, "-c", fmt.Sprintf("write -c -P %d %d %d", v, int64(c)*d.cluster, d.cluster))
			d.fill(int64(c)*d.cluster, d.cluster, v)
		}
	}
	qemu(d, "qemu-io", append(args, d.path)...)
}

// fill notes that a range has been written.
func (d *diff) fill(off, n int64, v byte) {
	for i := off; i < off+n; i++ {
		d.model[i] = v
		d.fresh[min(i/d.cluster, int64(len(d.fresh)-1))] = false
	}
}

// qemuTurn lets QEMU write, make zero and discard.
func (d *diff) qemuTurn() {
	args := []string{"-f", "qcow2", "-d", "unmap"}
	for range 12 {
		off, n := randomRange(d.r, int64(len(d.model)), int64(len(d.model)/10))
		off, n = off&^511, max(n&^511, 512)
		v := byte(d.r.Uint32())
		command := fmt.Sprintf("write -P %d %d %d", v, off, n)
		switch how := d.r.IntN(8); {
		case how < 2:
			v, command = 0, fmt.Sprintf("write -z%s %d %d", [...]string{"", " -u"}[how], off, n)
		case how == 2:
			command = fmt.Sprintf("discard %d %d", off, n)
			if off, n = d.discarded(off, n); n <= 0 {
				continue
			}
			v = 0
		}
		args = append(args, "-c", command)
		d.fill(off, n, v)
	}
	if out := qemu(d, "qemu-io", append(args, d.path)...); strings.Contains(out, "failed") {
		d.Fatalf("qemu-io: %s", out)
	}
}

// discarded returns the part of a range that a discard by QEMU makes zero. What
// one does to a version 2 image over a backing file it does not promise.
func (d *diff) discarded(off, n int64) (int64, int64) {
	if d.is(dimCompat, "0.10") && !d.is(dimBase, "none") {
		return off, 0
	}
	end := off + n
	if off = (off + d.cluster - 1) / d.cluster * d.cluster; end < int64(len(d.model)) {
		end = end / d.cluster * d.cluster
	}
	return off, end - off
}

// judge compares the image with the model and checks it, by both tools.
func (d *diff) judge() {
	d.Helper()
	m, err := Open(d.path, Options{DataFile: true})
	if err != nil {
		d.Fatal(err)
	}
	closeImage(d, m)
	compare(d, d.dir, d.path, d.model)
	if d.is(dimData, "raw") {
		b, err := os.ReadFile(filepath.Join(d.dir, "data.raw"))
		// QEMU makes it end with a cluster.
		if err != nil || len(b) < len(d.model) || string(b[:len(d.model)]) != string(d.model) {
			d.Errorf("the raw data file differs from the disk (%v)", err)
		}
	}
	qemu(d, "qemu-img", "check", "-q", d.path)
	if v := check(d, d.path); !v.Clean() {
		d.Fatalf("%+v", v.Findings)
	}
}

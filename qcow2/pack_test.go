package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// fillCluster fills b with one of: zeros, bytes that do not compress, and bytes
// that do, more or less.
func fillCluster(r *rand.Rand, b []byte) {
	clear(b)
	if how := r.IntN(8); how > 0 {
		fillRandom(r, b[:len(b)*how/7/(1+r.IntN(3))])
	}
}

// writeClusters writes all of model, each cluster compressed, from several
// goroutines.
func writeClusters(t *testing.T, m *Image, model []byte) {
	t.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				off := next.Add(m.clusterSize) - m.clusterSize
				if off >= m.Size() {
					return
				}
				if err := m.WriteCompressed(model[off:min(off+m.clusterSize, m.Size())], off); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestWriteCompressed lets QEMU judge images whose clusters were written
// compressed, by several goroutines, twice: some with a snapshot of the first time,
// and each with another level of compression.
func TestWriteCompressed(t *testing.T) {
	for level, c := range []struct {
		options string
		size    int
		snap    bool
	}{
		{"cluster_size=512,refcount_bits=1", 61440, false},
		{"cluster_size=512,refcount_bits=16,compression_type=zstd", 61440, true},
		{"cluster_size=4k,refcount_bits=2,compression_type=zstd", 1<<19 + 512, false},
		{"cluster_size=4k,refcount_bits=4", 1 << 19, false},
		{"cluster_size=64k,refcount_bits=8,compression_type=zstd", 2<<20 + 512, false},
		{"cluster_size=64k,compat=0.10", 2 << 20, true},
		{"cluster_size=64k,refcount_bits=32", 2<<20 + 1024, false},
		{"cluster_size=64k,extended_l2=on,compression_type=zstd", 2 << 20, true},
		{"cluster_size=2M,refcount_bits=64", 7 << 20, true},
		{"cluster_size=2M,refcount_bits=1,compression_type=zstd", 5 << 20, false},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.options, path, fmt.Sprint(c.size))
			opts := Options{CompressionLevel: level}
			first := packAll(t, r, path, opts)
			if c.snap {
				qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			}
			model := packAll(t, r, path, opts)
			qemu(t, "qemu-img", "check", "-q", path)
			compare(t, dir, path, model)
			result, err := Check(t.Context(), path, CheckOptions{})
			if err != nil || !result.Clean() || result.Compressed == 0 {
				t.Errorf("check: %+v, %v", result, err)
			}
			m := open(t, path, Options{ReadOnly: true})
			got := make([]byte, m.Size())
			must(t, m.ReadvAt([][]byte{got}, 0))
			if !bytes.Equal(got, model) {
				t.Error("wrong contents once opened again")
			}
			closeImage(t, m)
			if c.snap {
				qemu(t, "qemu-img", "snapshot", "-a", "s", path)
				compare(t, dir, path, first)
			}
		})
	}
}

// packAll writes all clusters of the image at path compressed and returns what the
// disk has.
func packAll(t *testing.T, r *rand.Rand, path string, opts Options) []byte {
	t.Helper()
	m := open(t, path, opts)
	model := make([]byte, m.Size())
	for off := int64(0); off < m.Size(); off += m.clusterSize {
		fillCluster(r, model[off:min(off+m.clusterSize, m.Size())])
	}
	writeClusters(t, m, model)
	got := make([]byte, m.Size())
	must(t, m.ReadvAt([][]byte{got}, 0))
	if !bytes.Equal(got, model) {
		t.Error("wrong contents while open")
	}
	closeImage(t, m)
	return model
}

// TestCompressedBesideQEMU compresses text, programs, noise and zeros beside
// qemu-img. QEMU reads ours, which is not larger; but for zstd in small clusters,
// where libzstd finds more at its default level.
func TestCompressedBesideQEMU(t *testing.T) {
	dir := t.TempDir()
	var data []byte
	sources, err := filepath.Glob("*.go")
	must(t, err)
	for _, name := range sources {
		b, err := os.ReadFile(name)
		must(t, err)
		data = append(data, b...)
	}
	program, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	data = append(data, program[:4<<20]...)
	noise := make([]byte, 1<<20)
	fillRandom(newSeed(t), noise)
	data = append(append(data, noise...), make([]byte, 1<<20)...)
	data = data[:len(data)&^511]
	writeFile(t, dir+"/raw", data)
	for _, format := range []string{"zlib", "zstd"} {
		for _, size := range []int64{4096, 1 << 16, 2 << 20} {
			options := fmt.Sprintf("compression_type=%s,cluster_size=%d", format, size)
			t.Run(options, func(t *testing.T) {
				theirs, ours := filepath.Join(t.TempDir(), "theirs"), filepath.Join(t.TempDir(), "ours")
				qemu(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, dir+"/raw", theirs)
				must(t, Create(ours, CreateOptions{Size: int64(len(data)), CompressionType: format, ClusterSize: size}))
				m := open(t, ours, Options{})
				writeClusters(t, m, data)
				closeImage(t, m)
				qemu(t, "qemu-img", "check", "-q", ours)
				compare(t, dir, ours, data)
				a, err := os.Stat(theirs)
				must(t, err)
				b, err := os.Stat(ours)
				must(t, err)
				most := a.Size()
				if format == "zstd" && size < 1<<15 {
					most += most / 32
				}
				if b.Size() > most {
					t.Errorf("the image takes %d bytes, QEMU's %d", b.Size(), a.Size())
				}
			})
		}
	}
}

// TestCompressedWindow shows that no deflate data refers to what lies more than 4096
// bytes back: what repeats beyond that is stored as it is.
func TestCompressedWindow(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 2 << 16}), Options{})
	r := newSeed(t)
	var noise []byte // all bytes in it are as frequent
	for range 17 {
		for _, b := range r.Perm(256) {
			noise = append(noise, byte(b)) //nolint:gosec // G115: less than 256
		}
	}
	for i, period := range []int{4096, 4352} {
		must(t, m.WriteCompressed(bytes.Repeat(noise[:period], 16)[:1<<16], int64(i)<<16))
		compressed := entryOf(t, m, int64(i)<<16)&entryCompressed != 0
		if want := period == 4096; compressed != want {
			t.Errorf("period %d: compressed is %t", period, compressed)
		}
	}
}

// TestEncodeDoesNotAllocate compresses clusters of all kinds.
func TestEncodeDoesNotAllocate(t *testing.T) {
	r := newSeed(t)
	for _, format := range []string{"zlib", "zstd"} {
		m := open(t, create(t, CreateOptions{Size: 1 << 20, CompressionType: format}), Options{})
		x, err := m.encoders.get()
		must(t, err)
		b := make([]byte, 1<<16)
		if n := testing.AllocsPerRun(40, func() {
			fillCluster(r, b)
			x.encode(b, m.clusterSize)
		}); n >= 1 {
			t.Errorf("%s: %v allocations", format, n)
		}
	}
}

// TestCompressedOverBacking shows that a cluster of zeros hides the backing file,
// in version 2 too, which has no flag for it.
func TestCompressedOverBacking(t *testing.T) {
	for _, version := range []int{2, 3} {
		dir := t.TempDir()
		writeFile(t, dir+"/base.raw", bytes.Repeat([]byte{7}, 300032))
		path := dir + "/disk.qcow2"
		must(t, Create(path, CreateOptions{Size: 300032, Version: version, BackingFile: "base.raw", BackingFormat: "raw"}))
		m := open(t, path, Options{})
		model := bytes.Repeat([]byte{7}, 300032)
		for _, off := range []int64{65536, 262144} {
			clear(model[off:min(off+65536, m.Size())])
			must(t, m.WriteCompressed(model[off:min(off+65536, m.Size())], off))
		}
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", path)
		compare(t, dir, path, model)
		if fi, err := os.Stat(path); err != nil || fi.Size() > 7<<16 {
			t.Errorf("version %d: zeros took room: %d bytes, %v", version, fi.Size(), err)
		}
	}
}

// TestPackDensely shows that compressed clusters share host clusters, as far as
// the width of the reference counts allows.
func TestPackDensely(t *testing.T) {
	for bits, most := range map[int]int64{1: 64, 2: 22, 16: 3} {
		m := open(t, create(t, CreateOptions{Size: 64 << 16, RefcountBits: bits}), Options{})
		model := bytes.Repeat([]byte("calf"), 64<<14)
		before := m.Stats().Allocated
		writeClusters(t, m, model)
		if n := int64(m.Stats().Allocated-before) - 1; n > most { //nolint:gosec // G115: small
			t.Errorf("%d bits: %d host clusters, want at most %d", bits, n, most)
		}
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", m.path)
	}
}

// TestPackSpare writes compressed clusters with others in between, so that no two of
// their host clusters are neighbours. Of each group the third fits into what the first
// left of its own, and into nothing else.
func TestPackSpare(t *testing.T) {
	const groups = 10
	m := open(t, create(t, CreateOptions{Size: 8 * groups << 16}), Options{})
	r := newSeed(t)
	before, off := m.Stats().Allocated, int64(0)
	for range groups {
		for _, size := range []int{40000, 60000, 20000, 60000} {
			b := make([]byte, 1<<16)
			fillRandom(r, b[:size])
			must(t, m.WriteCompressed(b, off))
			fillRandom(r, b)
			must(t, m.WritevAt([][]byte{b}, off+1<<16))
			off += 2 << 16
		}
	}
	if n := m.Stats().Allocated - before - 4*groups; n > 3*groups+2 {
		t.Errorf("%d host clusters, want 3 for each of %d groups", n, groups)
	}
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", m.path)
}

func TestWriteCompressedRefusals(t *testing.T) {
	path := create(t, CreateOptions{Size: 100352})
	m := open(t, path, Options{})
	b := make([]byte, 1<<16)
	for _, c := range []struct{ n, off int64 }{{1 << 16, 512}, {512, 0}, {1 << 16, 1 << 16}, {100352 - 1<<16 + 1, 1 << 16}, {512, -512}} {
		if err := m.WriteCompressed(b[:c.n], c.off); !errors.Is(err, ErrRange) {
			t.Errorf("%d bytes at %d: %v", c.n, c.off, err)
		}
	}
	must(t, m.WriteCompressed(b[:100352-1<<16], 1<<16))
	m.external = true
	if err := m.WriteCompressed(bytes.Repeat([]byte{1}, 1<<16), 0); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an image with a data file: %v", err)
	}
	m.external = false
	closeImage(t, m)
	if err := m.WriteCompressed(bytes.Repeat([]byte{1}, 1<<16), 0); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed image: %v", err)
	}
	m = open(t, path, Options{ReadOnly: true})
	if err := m.WriteCompressed(b, 0); !errors.Is(err, ErrReadOnly) {
		t.Errorf("an image open for reading: %v", err)
	}
	closeImage(t, m)
	for _, level := range []int{-1, 10} {
		if _, err := Open(path, Options{CompressionLevel: level}); !errors.Is(err, ErrInvalidOption) {
			t.Errorf("level %d: %v", level, err)
		}
	}
}

// TestPackModel mixes compressed writes with others, discards and flushes from
// several goroutines, of which each owns every n-th cluster.
func TestPackModel(t *testing.T) {
	rounds, ops := 3, 150
	if brief() {
		rounds, ops = 2, 60
	}
	for _, options := range []string{
		"cluster_size=512,refcount_bits=2", "cluster_size=4k,compression_type=zstd", "cluster_size=4k,refcount_bits=4", "cluster_size=16k,extended_l2=on",
	} {
		t.Run(options, func(t *testing.T) {
			r := newSeed(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "2M")
			model := make([]byte, 2<<20)
			for range rounds {
				m := open(t, path, Options{L2CacheBytes: 1})
				packRound(t, m, r, model, ops)
				must(t, m.Flush())
				if m.subBits == 0 { // which checkFile knows
					checkFile(t, m, path)
				}
				closeImage(t, m)
			}
			qemu(t, "qemu-img", "check", "-q", path)
			compare(t, dir, path, model)
		})
	}
}

func packRound(t *testing.T, m *Image, r *rand.Rand, model []byte, ops int) {
	t.Helper()
	const workers = 4
	var wg sync.WaitGroup
	for g := range workers {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			clusters := len(model) / int(m.clusterSize)
			for range ops {
				at := int64(r.IntN(min(clusters, 64)/workers)*workers+g) * m.clusterSize
				mine := model[at : at+m.clusterSize]
				if err := packStep(m, r, mine, at); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// packStep does something random to the cluster at off, whose contents are mine.
func packStep(m *Image, r *rand.Rand, mine []byte, off int64) error {
	switch r.IntN(8) {
	case 0:
		return m.Flush()
	case 1:
		got := make([]byte, len(mine))
		_, err := m.ReadAt(got, off)
		if err == nil && !bytes.Equal(got, mine) {
			err = fmt.Errorf("the cluster at %d differs", off)
		}
		return err
	case 2:
		clear(mine)
		return eraser(m, r.IntN(3))(off, int64(len(mine)))
	case 3:
		part := mine[r.IntN(len(mine)):]
		fillRandom(r, part)
		_, err := m.WriteAt(part, off+int64(len(mine)-len(part)))
		return err
	}
	fillCluster(r, mine)
	return m.WriteCompressed(mine, off)
}

// TestPackTogether lets goroutines write the same few clusters at once, each write
// with one value, while the disk changes its size beyond them. Each cluster then
// has the value of one of the writes to it.
func TestPackTogether(t *testing.T) {
	const clusters, workers = 3, 6
	run := crashImage(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096, RefcountBits: 8}, nil)
	run.f.rec = false
	m := run.open(t, run.f, false)
	var wg sync.WaitGroup
	for g := range workers {
		r := rand.New(rand.NewPCG(newSeed(t).Uint64(), 0))
		wg.Go(func() {
			for range 60 {
				off := r.Int64N(clusters) * 4096
				b := bytes.Repeat([]byte{byte(1 + g)}, 4096)
				var err error
				switch r.IntN(8) {
				case 0:
					err = m.WritevAt([][]byte{b}, off)
				case 1:
					err = m.Discard(off, 4096)
				case 2:
					err = m.Flush()
				case 3:
					if err = m.WriteCompressed(b, 60<<10); errors.Is(err, ErrRange) {
						err = nil // the disk is short at the time
					}
				default:
					err = m.WriteCompressed(b, off)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 10 {
			if err := m.Resize(t.Context(), [...]int64{32 << 10, 64 << 10}[i%2], ResizeOptions{Shrink: true}); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	got := make([]byte, clusters*4096)
	must(t, m.ReadvAt([][]byte{got}, 0))
	for c := range clusters {
		b := got[c*4096:][:4096]
		if b[0] > workers || !bytes.Equal(b, bytes.Repeat(b[:1], 4096)) {
			t.Errorf("cluster %d is a mixture", c)
		}
	}
	closeImage(t, m)
	if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Errorf("after Close: %+v", v)
	}
}

// TestPackHeld shows that a host cluster into which more may be packed is not
// taken for free when its only reference goes.
func TestPackHeld(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	b := func(v byte) []byte { return bytes.Repeat([]byte{v}, 4096) }
	check := func(what string) {
		t.Helper()
		must(t, m.Flush())
		if v := checkImage(run.f.data); len(v.corruptions) > 0 {
			t.Fatalf("%s: %v", what, v.corruptions)
		}
	}
	must(t, m.WriteCompressed(b(1), 0))
	check("one compressed cluster")
	must(t, m.WritevAt([][]byte{b(2)}, 0))
	for range 4 {
		check("none")
	}
	// One is held up on its way into that host cluster, while others fill it.
	var first atomic.Bool
	gate := newGate(m, func(write bool, _, n int64) bool { return write && n < 512 && first.CompareAndSwap(false, true) })
	done := make(chan error)
	go func() { done <- m.WriteCompressed(b(3), 4096) }()
	<-gate.held
	for i := range int64(400) {
		must(t, m.WriteCompressed(b(byte(i)|1), 8192+i%8*4096))
	}
	for range 4 {
		check("one held up")
	}
	close(gate.open)
	must(t, <-done)
	for i := range int64(8) {
		must(t, m.WritevAt([][]byte{b(9)}, 8192+i*4096))
		check("the last of all")
	}
	got := make([]byte, 4096)
	if _, err := m.ReadAt(got, 4096); err != nil || !bytes.Equal(got, b(3)) {
		t.Errorf("the one that was held up reads as %x..., %v", got[:4], err)
	}
	closeImage(t, m)
	if v := checkImage(run.f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Error(v)
	}
}

// TestPackReuse reads a compressed cluster, replaces it, and has another one of
// the same length put where it was: the reader must not get the old one.
func TestPackReuse(t *testing.T) {
	r := newSeed(t)
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096, RefcountBits: 1}, nil)
	run.f.rec = false
	m := run.open(t, run.f, false)
	b, got := make([]byte, 4096), make([]byte, 4096)
	seen := map[place]bool{}
	again := 0
	for i := range 60 {
		fillRandom(r, b[:1000])
		off := int64(i%3) * 4096
		must(t, m.WriteCompressed(b, off))
		if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("round %d: wrong contents, %v", i, err)
		}
		s, err := m.find(off, 1, 0)
		must(t, err)
		s.pin.leave()
		at := place{s.host, s.size}
		if seen[at] {
			again++
		}
		seen[at] = true
		must(t, m.Flush())
		must(t, m.Flush())
		if i%20 == 19 {
			m.lock()
			m.sealPacker() // as before what runs exclusively
			m.mu.Unlock()
		}
	}
	if again == 0 {
		t.Error("no place was used again")
	}
	closeImage(t, m)
}

// farFile is a file with a gap that nothing is stored for, from near to far.
type farFile struct {
	memFile
	far  int64
	high memFile
}

func (f *farFile) part(off int64) (*memFile, int64) {
	if off >= f.far {
		return &f.high, off - f.far
	}
	return &f.memFile, off
}

func (f *farFile) ReadvAt(iov [][]byte, off int64) error {
	p, off := f.part(off)
	return p.ReadvAt(iov, off)
}

func (f *farFile) WritevAt(iov [][]byte, off int64) error {
	p, off := f.part(off)
	return p.WritevAt(iov, off)
}

// TestPackTooFar lets the file be so long that the entry of a compressed cluster
// cannot point to its free clusters: only compressed writes fail, by name.
func TestPackTooFar(t *testing.T) {
	b, err := os.ReadFile(create(t, CreateOptions{Size: 64 << 20, ClusterSize: 2 << 20, RefcountBits: 1}))
	must(t, err)
	f := &farFile{memFile: memFile{data: b}, far: 512 << 40}
	m, err := openFile(f, "memory", Options{}, &chain{})
	must(t, err)
	model := make([]byte, 4<<20)
	for i := range model {
		model[i] = byte(i >> 9)
	}
	must(t, m.WriteCompressed(model[:2<<20], 0)) // and so there is an L2 table
	m.lock()
	m.pool = pool{}
	m.sealPacker()
	m.pool = pool{}
	m.refs.cursor = m.cluster(f.far)
	m.mu.Unlock()
	err = m.WriteCompressed(model[2<<20:], 2<<20)
	if !errors.Is(err, syscall.EFBIG) || !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "compressed") {
		t.Errorf("a compressed write: %v", err)
	}
	must(t, m.WritevAt([][]byte{model[2<<20:]}, 2<<20))
	must(t, m.Flush())
	closeImage(t, m)
	m, err = openFile(f, "memory", Options{ReadOnly: true}, &chain{})
	must(t, err)
	got := make([]byte, 4<<20)
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Errorf("wrong contents, %v", err)
	}
	s, err := m.find(2<<20, 1, 0)
	if err != nil || s.host < f.far {
		t.Errorf("the normal cluster is at %#x, %v", s.host, err)
	}
	s.pin.leave()
}

// TestPackAbandon fails a compressed write: the host clusters that were meant for
// it are free again.
func TestPackAbandon(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	must(t, m.WritevAt([][]byte{{1}}, 0)) // so that there is an L2 table
	free := func() (n uint64) {
		for _, e := range append(m.pool.recycled, m.pool.fresh...) {
			n += e.n
		}
		return n
	}
	before := free()
	run.f.setFail(func(op string) error {
		if op == "write" {
			return syscall.ENOSPC
		}
		return nil
	})
	if err := m.WriteCompressed(bytes.Repeat([]byte{1}, 4096), 4096); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	run.f.setFail(nil)
	m.sealPacker()
	if n := free(); n != before || len(m.packer.held) > 0 {
		t.Errorf("%d clusters are free, %d were, %d held", n, before, len(m.packer.held))
	}
	must(t, m.WriteCompressed(bytes.Repeat([]byte{1}, 4096), 4096))
	closeImage(t, m)
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Each test here is named for a bug that cost the users of Cloud Hypervisor (CH)
// or QEMU their data or their secrets, and says what broke there and which rule
// of this engine keeps it from happening here. Bugs whose test stands elsewhere:
//
//	CH 8624              TestRegressionCH8624, in erase_test.go
//	CH 39e253ff9         TestRegressionCHUnmapShowsBacking, in erase_test.go
//	CH 220455caa         TestChain: an image that is its own backing file
//	CH a667d8505, 8178   TestCorruption: offsets of tables outside the file
//	CH, zero flag in v2  TestCorruption: "zero flag in version 2"
//	CH, crypt_method     TestCorruption: "LUKS", whose ciphertext the guest got
//	CH 53a9ae08c…        TestCorruption: names of backing files in impossible places
//	CVE-2014-0142…0147   TestCorruption: header fields that overflow
//
// Bugs that cannot happen here because the thing is not here: those of O_DIRECT
// (CH 8012, 8051 and the lost updates of unaligned writers), which this engine
// does not use; of autodetected formats (CVE-2026-27211, CH 7728), because there
// is no detection; of detect-zeroes (QEMU 10.0.11) and of the cache-clean timer
// (QEMU's patch of 2025), because nothing looks for zeros and nothing evicts
// behind the lock.

// inMemory returns an empty image in memory, open for writing, over a backing
// file with the contents under if there are any.
func inMemory(t *testing.T, opts CreateOptions, under []byte) (*crashRun, *Image) {
	t.Helper()
	run := crashImage(t, opts, under)
	run.f.rec = false
	m := run.open(t, run.f, false)
	t.Cleanup(func() { _ = m.Close() })
	return run, m
}

// afterKill opens what the file has at this instant, as if the process had been
// killed.
func afterKill(t *testing.T, run *crashRun, f *memFile) *Image {
	t.Helper()
	f.mu.Lock()
	b := append([]byte(nil), f.data...)
	f.mu.Unlock()
	m := run.open(t, &memFile{data: b}, true)
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// has checks that the disk has want at off.
func has(t *testing.T, m *Image, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk has other bytes at %d (%v)", off, err)
	}
}

func write(t *testing.T, m *Image, off int64, b []byte) {
	t.Helper()
	if _, err := m.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// sound closes the image and checks it: not even a leak is left.
func sound(t *testing.T, m *Image, f *memFile) {
	t.Helper()
	closeImage(t, m)
	if v := checkImage(f.data); len(v.corruptions) > 0 || v.leaks > 0 {
		t.Errorf("%+v", v)
	}
}

// waits checks that nothing comes through the channel yet.
func waits(t *testing.T, done <-chan error, what string) {
	t.Helper()
	select {
	case err := <-done:
		t.Fatalf("%s did not wait: %v", what, err)
	case <-time.After(20 * time.Millisecond):
	}
}

func all(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }

// holdUp holds up the first operation that pick picks. It comes through held, and
// goes on when release is called, at the end of the test at the latest.
func holdUp(t *testing.T, m *Image, pick func(write bool, off, n int64) bool) (held <-chan struct{}, release func()) {
	t.Helper()
	var first atomic.Bool
	gate := newGate(m, func(write bool, off, n int64) bool { return pick(write, off, n) && first.CompareAndSwap(false, true) })
	release = sync.OnceFunc(func() { close(gate.open) })
	t.Cleanup(release)
	return gate.held, release
}

// holdData is holdUp of the first write of n bytes.
func holdData(t *testing.T, m *Image, n int64) (held <-chan struct{}, release func()) {
	t.Helper()
	return holdUp(t, m, func(write bool, _, size int64) bool { return write && size == n })
}

// TestRegressionCH7660: each queue had a clone of the metadata, and they overwrote
// each other's tables. Here an image is one object, and a second one of the same
// file is refused by the lock.
func TestRegressionCH7660(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	m := open(t, path, Options{})
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second writer: %v", err)
	}
	closeImage(t, m)
}

// TestRegressionCH8276: a table was written at a file position that a callback had
// moved (and 7746: dup shares it). Here all input and output is positional: the
// file's own position never moves.
func TestRegressionCH8276(t *testing.T) {
	m := open(t, create(t, CreateOptions{Size: 1 << 20, ClusterSize: 512}), Options{})
	f := m.file.(*osFile).f
	start, err := f.Seek(0, io.SeekCurrent)
	must(t, err)
	write(t, m, 0, all(1, 1<<20))
	must(t, m.Discard(0, 1<<19))
	must(t, m.Flush())
	must(t, readAll(m))
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != start {
		t.Errorf("the position is %d after %d (%v)", at, start, err)
	}
}

// failEach does work on a copy of the image again and again, with the n-th change
// of the file failing for want of room, until none is left to fail. Whatever
// failed, the image is sound, also for the one who opens it next and allocates,
// and has what kept says.
func failEach(t *testing.T, start []byte, path string, kept func(t *testing.T, m *Image), work func(m *Image) error) {
	t.Helper()
	for at := 1; ; at++ {
		f := &memFile{data: append([]byte(nil), start...)}
		m, err := openFile(f, path, Options{}, &chain{})
		must(t, err)
		n := 0
		f.setFail(func(op string) error {
			if op != "read" && op != "sync" && op != "size" {
				if n++; n == at {
					return syscall.ENOSPC
				}
			}
			return nil
		})
		err = errors.Join(work(m), m.Flush())
		f.setFail(nil)
		if at == 1 && !errors.Is(err, syscall.ENOSPC) { // later ones may be favours, like holes
			t.Fatalf("the failure was hidden: %v", err)
		}
		kept(t, m)
		closeImage(t, m)
		if v := checkImage(f.data); len(v.corruptions) > 0 {
			t.Fatalf("failure %d: %v", at, v.corruptions)
		}
		m, err = openFile(f, path, Options{}, &chain{})
		must(t, err)
		for off := m.Size() / 2; off < m.Size(); off += m.clusterSize {
			write(t, m, off, []byte("next"))
		}
		kept(t, m)
		closeImage(t, m)
		if n < at {
			return
		}
	}
}

// TestRegressionCH8748 (8721, 8637): a new L2 table was published before its count
// was raised, and without room it stayed at zero: the next open gave the live
// table away. Here the count is durable before the pointer, and a table that
// fails is never published.
func TestRegressionCH8748(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 256 << 10, ClusterSize: 512}, nil)
	write(t, m, 0, all(1, 5000))
	closeImage(t, m)
	failEach(t, run.f.data, run.path, func(t *testing.T, m *Image) { has(t, m, 0, all(1, 5000)) },
		func(m *Image) error { _, err := m.WriteAt(all(2, 3000), 100<<10); return err })
}

// TestRegressionCH8606: the old L2 table was freed before the new one was
// allocated, and live tables were overwritten. Here a table that a snapshot shares
// is given up only when its copy is whole in the file.
func TestRegressionCH8606(t *testing.T) {
	path := create(t, CreateOptions{Size: 256 << 10, ClusterSize: 512})
	m := open(t, path, Options{})
	write(t, m, 0, all(1, 100<<10))
	closeImage(t, m)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	start, err := os.ReadFile(path)
	must(t, err)
	failEach(t, start, path, func(t *testing.T, m *Image) { has(t, m, 4096, all(1, 90<<10)) },
		func(m *Image) error { _, err := m.WriteAt(all(2, 3000), 0); return err })
}

// TestRegressionCH8597 (9e2e85a48, efad6578d): clusters that were given up never
// came back, and a disk with many flushes doubled its file. Here each comes back,
// and the file stays near the size of the data.
func TestRegressionCH8597(t *testing.T) {
	const size = 512 << 10
	r := newSeed(t)
	for _, opts := range []CreateOptions{
		{Size: size, ClusterSize: 4096}, {Size: size, ClusterSize: 512}, {Size: size, ClusterSize: 4096, Version: 2},
	} {
		run, m := inMemory(t, opts, nil)
		for range 300 {
			off, n := randomRange(r, size, 20000)
			switch c := off &^ (m.clusterSize - 1); r.IntN(3) {
			case 0:
				must(t, m.Discard(off, n))
			case 1:
				must(t, m.WriteCompressed(all(byte(n), int(m.clusterSize)), c))
			default:
				write(t, m, off, all(byte(n), int(n)))
			}
			must(t, m.Flush())
		}
		if n, most := len(run.f.data), size*13/10; n > most {
			t.Errorf("%+v: the file has %d bytes, more than %d", opts, n, most)
		}
		sound(t, m, run.f)
	}
}

// TestRegressionCH8621: an ext4 on an overlay broke under eight queues with warm
// tables. Here eight goroutines write parts of clusters over a backing file, read
// what they wrote, discard and flush, and nothing is lost.
func TestRegressionCH8621(t *testing.T) {
	r := newSeed(t)
	under := make([]byte, 1<<20)
	fillRandom(r, under)
	run, m := inMemory(t, CreateOptions{Size: 1 << 20}, under)
	model := bytes.Clone(under)
	modelRound(t, m, r, model, 150)
	has(t, m, 0, model)
	sound(t, m, run.f)
}

// TestRegressionCH8358: guest data went to the first 64 KiB of the image. Here no
// entry at offset 0 is taken for a place, and the header is never given away,
// whatever its count.
func TestRegressionCH8358(t *testing.T) {
	good, l2 := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, l2, 8, entryCopied) // and offset 0
	put(good, 0x20000, 2, 0)
	h := newHostileRun(t, good, nil)
	header := bytes.Clone(good[:offIncompatible])
	must(t, h.open(Options{}))
	if _, err := h.m.WriteAt(h.buf, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("write: %v", err)
	}
	_ = h.m.Close()
	if !bytes.Equal(h.f.data[:offIncompatible], header) {
		t.Error("the header changed")
	}
}

// TestRegressionCHSnapshotDestroyed: writes went in place whatever the counts, into
// clusters and tables of internal snapshots. Here a cluster counted more than once
// is copied before it is written.
func TestRegressionCHSnapshotDestroyed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: 1 << 20, ClusterSize: 4096}))
	m := open(t, path, Options{})
	write(t, m, 0, all(1, 1<<20))
	closeImage(t, m)
	qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	m = open(t, path, Options{})
	write(t, m, 1000, all(2, 100))
	must(t, errors.Join(m.Discard(8192, 8192), m.WriteZeroes(20000, 9000), m.WriteCompressed(all(3, 4096), 40960)))
	closeImage(t, m)
	qemu(t, "qemu-img", "check", "-q", path)
	qemu(t, "qemu-img", "snapshot", "-a", "s", path)
	compare(t, dir, path, all(1, 1<<20))
}

// TestRegressionCHEvictionLosesTable: a table that could not be written when it was
// evicted was dropped. Here what is dirty is not evicted, and a flush that failed
// keeps it for the next.
func TestRegressionCHEvictionLosesTable(t *testing.T) {
	const size, slice = 4 << 20, 32 << 10 // what the disk and a slice map; the cache holds fewer slices
	run := crashImage(t, CreateOptions{Size: size, ClusterSize: 512, Version: 2}, nil)
	m, err := run.openIn(run.f, Options{L2CacheBytes: 1})
	must(t, err)
	want := all(1, size)
	write(t, m, 0, want)
	must(t, m.Flush())
	for off := int64(0); off < 5*slice; off += slice {
		must(t, m.Discard(off, 512))
		clear(want[off : off+512])
	}
	run.f.setFail(func(op string) error {
		if op == "write" {
			return syscall.ENOSPC
		}
		return nil
	})
	if err := m.Flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("flush: %v", err)
	}
	has(t, m, 5*slice, want[5*slice:]) // takes all of the cache that it can get
	has(t, m, 0, want)
	run.f.setFail(nil)
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 0, want)
	sound(t, m, run.f)
}

// TestRegressionCHFlushBeforeData: the flush of another queue committed the entry
// of a cluster whose data was not written yet, and a crash then showed zeros
// instead of the backing file. Here an entry is published after its data.
func TestRegressionCHFlushBeforeData(t *testing.T) {
	under := all(7, 64<<10)
	run, m := inMemory(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096}, under)
	write(t, m, 0, []byte("x")) // so that the L2 table exists
	held, release := holdData(t, m, 4096)
	done := make(chan error, 1)
	go func() { _, err := m.WriteAt(all(8, 4096), 8192); done <- err }()
	<-held
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 8192, under[:4096])
	release()
	must(t, <-done)
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 8192, all(8, 4096))
	sound(t, m, run.f)
}

// TestRegressionCHRefcountTableOverrun: as many entries of the count table were read
// and written back as the size of the disk asked for, over the blocks and the L1
// table behind it. Here the header says how long it is, and it grows by moving.
func TestRegressionCHRefcountTableOverrun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "100G")
	for i := range int64(3) {
		m := open(t, path, Options{})
		write(t, m, i<<30, all(byte(i+1), 10000))
		write(t, m, m.Size()-(i+1)*4096, all(byte(i+1), 4096))
		closeImage(t, m)
	}
	qemu(t, "qemu-img", "check", "-q", path)
	m := open(t, path, Options{ReadOnly: true})
	for i := range int64(3) {
		has(t, m, i<<30, all(byte(i+1), 10000))
		has(t, m, m.Size()-(i+1)*4096, all(byte(i+1), 4096))
	}
}

// TestRegressionCHRefcountWidth: the first count was read as 16 bits whatever the
// width, and sound images were rebuilt at each open. Here opening and closing an
// image leaves it as it is, for every width.
func TestRegressionCHRefcountWidth(t *testing.T) {
	for bits := 1; bits <= 64; bits *= 2 {
		b, _ := hostileImage(t, CreateOptions{Size: 1 << 20, RefcountBits: bits})
		f := &memFile{data: bytes.Clone(b)}
		m, err := openFile(f, "memory", Options{}, &chain{})
		must(t, err)
		closeImage(t, m)
		if !bytes.Equal(f.data, b) {
			t.Errorf("%d bits: opening and closing changed the image", bits)
		}
	}
}

// TestRegressionCHRepairCompressed: a rebuild of the counts took the size in a
// compressed entry for a part of its address. Here check and repair decode such an
// entry like a read does.
func TestRegressionCHRepairCompressed(t *testing.T) {
	run := compressedRun(t, 256<<10, 4096)
	f := &memFile{data: bytes.Clone(run.start)}
	table := binary.BigEndian.Uint64(f.data[offRefTable:])
	block := binary.BigEndian.Uint64(f.data[table:])
	clear(f.data[block : block+4096])
	_, after, err := repairIn(t.Context(), f, run.path, RepairAll, CheckOptions{})
	if err != nil || !after.Clean() {
		t.Fatalf("repair: %+v, %v", after, err)
	}
	m := run.open(t, f, false)
	want := make([]byte, m.Size())
	_, err = run.open(t, &memFile{data: run.start}, true).ReadAt(want, 0)
	must(t, err)
	has(t, m, 0, want)
	sound(t, m, f)
}

// TestRegressionCHOpenBeforeLock: opening marked and repaired the image before it
// was locked, under the feet of its user. Here the lock comes first.
func TestRegressionCHOpenBeforeLock(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, LazyRefcounts: true})
	user := open(t, path, Options{})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte{1}, offIncompatible+7) // dirty, as if left so
	must(t, err)
	_, err = f.WriteAt([]byte{0x80}, offAutoclear)
	must(t, err)
	before, err := os.ReadFile(path)
	must(t, err)
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("open: %v", err)
	}
	if _, _, err := Repair(t.Context(), path, RepairAll, CheckOptions{}); !errors.Is(err, ErrLocked) {
		t.Errorf("repair: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image in use was changed (%v)", err)
	}
	closeImage(t, user)
}

// TestRegressionCHDirtyCleared (53ee9ebb7): the dirty bit went when the first of
// several users closed the image. Here a reader changes nothing.
func TestRegressionCHDirtyCleared(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, LazyRefcounts: true})
	b, err := os.ReadFile(path)
	must(t, err)
	put(b, offIncompatible, 8, 1<<incompatDirty)
	writeFile(t, path, b)
	one, two := open(t, path, Options{ReadOnly: true}), open(t, path, Options{ReadOnly: true})
	closeImage(t, one)
	closeImage(t, two)
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
		t.Errorf("a reader changed the image (%v)", err)
	}
}

// TestRegressionCHReservedLeak: a write to a cluster that a zero entry reserves took
// a new one and lost the old. Here it goes to the reserved one.
func TestRegressionCHReservedLeak(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096}, nil)
	write(t, m, 0, all(1, 256<<10))
	end := len(run.f.data)
	for i := range byte(10) {
		must(t, m.WriteZeroes(0, 256<<10))
		write(t, m, 0, all(i, 256<<10))
		must(t, m.Flush())
	}
	if len(run.f.data) != end {
		t.Errorf("the file grew from %d to %d bytes", end, len(run.f.data))
	}
	sound(t, m, run.f)
}

// TestRegressionCHCompressedLeak: the room of compressed clusters that were
// overwritten came back at the next open at the earliest. Here it comes back two
// flushes later.
func TestRegressionCHCompressedLeak(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096}, nil)
	r := newSeed(t)
	b := make([]byte, 4096)
	for range 30 {
		fillRandom(r, b[:2048])
		for off := int64(0); off < m.Size(); off += 4096 {
			must(t, m.WriteCompressed(b, off))
		}
		must(t, errors.Join(m.Flush(), m.Flush(), m.Flush()))
	}
	if n := len(run.f.data); n > 600<<10 {
		t.Errorf("the file has %d bytes", n)
	}
	sound(t, m, run.f)
}

// TestRegressionCHBackingOpened: with backing files disabled the chain was opened
// all the same, and refused afterwards. Here the refusal comes first: not even
// whether the file exists is looked at.
func TestRegressionCHBackingOpened(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, BackingFile: "missing", BackingFormat: "raw"})
	if _, err := Open(path, Options{NoBacking: true}); !errors.Is(err, ErrBackingRefused) {
		t.Errorf("got %v", err)
	}
}

// TestRegressionCHPunchFails (d7a7d7362, e737d61a0): where the host cannot punch
// holes the guest got an error and the cluster was lost, and where it could not
// write zeros the guest got none. Here a hole is a favour to the host, and zeros
// that have to be written are a write.
func TestRegressionCHPunchFails(t *testing.T) {
	for _, errno := range []syscall.Errno{unix.EOPNOTSUPP, unix.EIO} {
		run, m := inMemory(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096, Version: 2}, nil)
		write(t, m, 0, all(1, 128<<10))
		must(t, m.Flush())
		run.f.setFail(func(op string) error {
			if op == "punch" {
				return errno
			}
			return nil
		})
		end := len(run.f.data)
		must(t, m.Discard(0, 64<<10))
		has(t, m, 0, make([]byte, 64<<10))
		must(t, errors.Join(m.Flush(), m.Flush(), m.Flush()))
		write(t, m, 128<<10, []byte("reuses them"))
		write(t, m, 140<<10, all(2, 40<<10))
		has(t, m, 128<<10+11, make([]byte, 4096-11))
		if len(run.f.data) > end {
			t.Errorf("%v: the file grew from %d to %d bytes", errno, end, len(run.f.data))
		}
		run.f.setFail(func(op string) error {
			if op == "write" {
				return unix.EIO
			}
			return nil
		})
		if err := m.WriteZeroes(100<<10+5, 100); !errors.Is(err, unix.EIO) {
			t.Errorf("zeros that were not written: %v", err)
		}
		run.f.setFail(nil)
		sound(t, m, run.f)
	}
}

// TestRegressionCH2b61bda35: the zero bit of an entry was looked at before the
// compressed bit, but the offset of compressed data may be odd. Here compressed
// comes first.
func TestRegressionCH2b61bda35(t *testing.T) {
	run := compressedRun(t, 256<<10, 4096)
	m := run.open(t, &memFile{data: bytes.Clone(run.start)}, false)
	odd := 0
	for off := int64(0); off < m.Size(); off += 4096 {
		b := make([]byte, 4096)
		_, err := m.ReadAt(b, off)
		must(t, err)
		odd += int(entryOf(t, m, off) & 1)
		if seq, err := readStamp(b, uint64(off/sector)); err != nil || seq == 0 {
			t.Errorf("the cluster at %d reads as write %d, %v", off, seq, err)
		}
	}
	if odd == 0 {
		t.Fatal("no offset is odd")
	}
	must(t, m.WriteZeroes(0, m.Size()))
	has(t, m, 0, make([]byte, m.Size()))
	sound(t, m, m.file.(*memFile))
}

// TestRegressionCHShortExtensions: extensions of version 2 headers, and of those of
// 104 bytes, were not read, and the backing file's format was guessed from what
// the guest had written. (libvirt looked for those of version 3 where version 2
// has them.) Here they begin where the header ends.
func TestRegressionCHShortExtensions(t *testing.T) {
	for _, version := range []int{2, 3} {
		dir := t.TempDir()
		base := append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 4096)...)
		writeFile(t, filepath.Join(dir, "base"), base)
		path := filepath.Join(dir, "disk.qcow2")
		must(t, Create(path, CreateOptions{Size: 8192, Version: version, BackingFile: "base", BackingFormat: "raw"}))
		if version == 3 {
			b, err := os.ReadFile(path)
			must(t, err)
			put(b, 100, 4, headerLengthV3)
			copy(b[headerLengthV3:], b[headerLengthOur:binary.BigEndian.Uint64(b[8:])])
			writeFile(t, path, b)
		}
		has(t, open(t, path, Options{}), 0, base[:4096])
	}
}

// TestRegressionCHShortDecode: one read of the zstd decoder was taken for all of a
// cluster. Here it is read until the cluster is full.
func TestRegressionCHShortDecode(t *testing.T) {
	r := newSeed(t)
	for _, kind := range []string{"zlib", "zstd"} {
		path := create(t, CreateOptions{Size: 4 << 20, ClusterSize: 2 << 20, CompressionType: kind})
		b := make([]byte, 2<<20)
		fillRandom(r, b[:len(b)/2])
		m := open(t, path, Options{})
		must(t, m.WriteCompressed(b, 2<<20))
		closeImage(t, m)
		m = open(t, path, Options{})
		if entryOf(t, m, 2<<20)&entryCompressed == 0 {
			t.Error("the cluster is not compressed")
		}
		has(t, m, 2<<20, b)
	}
}

// TestRegressionCH8607: pausing and migrating a guest did not write metadata, and
// the copy of the file was old. Here a flush covers all that leads to the data.
func TestRegressionCH8607(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 1 << 20, ClusterSize: 512}, nil)
	want := make([]byte, 300<<10)
	fillRandom(newSeed(t), want)
	write(t, m, 1000, want)
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 1000, want)
}

// TestRegressionCHHeaderSizesMemory (55fa8ac90, 29720f07a, db3ca7bf1): lengths in
// the header sized allocations and loops. Here the largest tables that the format
// allows, in a small file, cost no more than they hold.
func TestRegressionCHHeaderSizesMemory(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, 36, 4, maxL1Bytes/8)
	put(good, 40, 8, 0x80000)
	good = append(good, make([]byte, 0x80000+1-min(len(good), 0x80000))...)
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	before := sample[0].Value.Uint64()
	m, err := openFile(&memFile{data: good}, "memory", Options{}, &chain{})
	must(t, err)
	closeImage(t, m)
	metrics.Read(sample)
	if n := sample[0].Value.Uint64() - before; n > 100<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

// TestRegressionCHShortBacking (c569a4cbd, 59b72c51c): what lies beyond the end of
// a short backing file was an error, and its name counted from the working
// directory. Here it reads as zeros, and the name counts from the image.
func TestRegressionCHShortBacking(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "base"), all(1, 5000))
	path := filepath.Join(dir, "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: 16384, ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"}))
	m := open(t, path, Options{})
	want := append(all(1, 5000), make([]byte, 16384-5000)...)
	has(t, m, 0, want)
	write(t, m, 6000, []byte("x"))
	want[6000] = 'x'
	has(t, m, 0, want)
}

// TestRegressionCHLostUpdate: two writers of parts of one sector lost each other's
// bytes, because each read the sector and wrote all of it. Here a write writes its
// bytes and no others, be the cluster new or not.
func TestRegressionCHLostUpdate(t *testing.T) {
	const size, piece = 64 << 10, 16
	m := open(t, create(t, CreateOptions{Size: size, ClusterSize: 512}), Options{})
	want := make([]byte, size)
	for round := range byte(2) {
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				for off := g * piece; off < size; off += 4 * piece {
					copy(want[off:], all(round*4+byte(g)+1, piece))
					if _, err := m.WriteAt(want[off:off+piece], int64(off)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		has(t, m, 0, want)
	}
	closeImage(t, m)
}

// TestRegressionQEMUReuseBeforeDurable: a write to a compressed cluster, or a
// discard of it, freed its host cluster at once; the next write took that, and
// after a crash the old entry led to broken or to foreign data, in an image that
// checks. Here a freed cluster waits until its removal is durable.
func TestRegressionQEMUReuseBeforeDurable(t *testing.T) {
	for name, give := range map[string]func(m *Image, off int64) error{
		"write":   func(m *Image, off int64) error { _, err := m.WriteAt(all(9, 512), off); return err },
		"discard": func(m *Image, off int64) error { return m.PunchHole(off, 4096) },
	} {
		t.Run(name, func(t *testing.T) {
			const size = 256 << 10
			run := compressedRun(t, size, 4096)
			f := &memFile{data: bytes.Clone(run.start)}
			m := run.open(t, f, false)
			want := make([]byte, size)
			_, err := m.ReadAt(want, 0)
			must(t, err)
			for off := int64(0); off < size/2; off += 4096 {
				must(t, give(m, off))
			}
			write(t, m, size/2, all(0xbb, size/2))
			has(t, afterKill(t, run, f), 0, want[:size/2]) // as nothing was flushed
			sound(t, m, f)
		})
	}
}

// TestRegressionQEMUDiscardDuringCOW (fixed in 10.0.11): a discard did not wait for
// a write that was filling the cluster, and the entry came back over what was
// freed. Here both claim the guest range.
func TestRegressionQEMUDiscardDuringCOW(t *testing.T) {
	under := all(7, 64<<10)
	for how := range 3 {
		run, m := inMemory(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096}, under)
		write(t, m, 0, []byte("x"))
		held, release := holdData(t, m, 4096)
		written, erased := make(chan error, 1), make(chan error, 1)
		go func() { _, err := m.WriteAt([]byte("in flight"), 8192+100); written <- err }()
		<-held
		go func() { erased <- eraser(m, how)(4096, 12288) }()
		waits(t, erased, "the discard")
		must(t, m.Flush())
		release()
		must(t, errors.Join(<-written, <-erased))
		has(t, m, 4096, make([]byte, 12288))
		must(t, m.Flush())
		has(t, afterKill(t, run, run.f), 4096, make([]byte, 12288))
		sound(t, m, run.f)
	}
}

// TestRegressionQEMUOverwriteDuringDiscard: an overwrite in place registers nothing,
// and a discard could free the cluster under it: the data then landed in whatever
// took its place. Here the overwrite pins its epoch, and the cluster waits.
func TestRegressionQEMUOverwriteDuringDiscard(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 256 << 10, ClusterSize: 4096, Version: 2}, nil)
	write(t, m, 0, all(1, 64<<10))
	must(t, m.Flush())
	host := int64(entryOf(t, m, 8192) & entryOffset)
	held, release := holdUp(t, m, func(write bool, off, _ int64) bool { return write && off == host })
	late := make(chan error, 1)
	go func() { _, err := m.WriteAt(all(0xee, 4096), 8192); late <- err }()
	<-held
	must(t, m.Discard(8192, 4096))
	for off := int64(64 << 10); off < m.Size(); off += 4096 {
		must(t, m.Flush())
		write(t, m, off, all(2, 4096))
		if int64(entryOf(t, m, off)&entryOffset) == host {
			t.Fatal("the cluster is reused under a write")
		}
	}
	release()
	must(t, <-late)
	has(t, m, 64<<10, all(2, 192<<10))
	has(t, m, 8192, make([]byte, 4096))
	sound(t, m, run.f)
}

// TestRegressionQEMUStaleContents: guest data of a new cluster is not ordered before
// its entry there, and a crash can show what a reused cluster held for another.
// Here the entry follows the data, and what is not written is made zero.
func TestRegressionQEMUStaleContents(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 64 << 10, ClusterSize: 4096, Version: 2}, nil)
	write(t, m, 0, all(0x55, 64<<10)) // the secret
	must(t, m.Flush())
	run.f.setFail(func(op string) error {
		if op == "punch" {
			return unix.EOPNOTSUPP
		}
		return nil
	})
	must(t, errors.Join(m.Discard(0, 64<<10), m.Flush(), m.Flush(), m.Flush()))
	held, release := holdData(t, m, 4096)
	done := make(chan error, 1)
	go func() { _, err := m.WriteAt([]byte("new"), 8192); done <- err }()
	<-held
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 8192, make([]byte, 4096))
	release()
	must(t, errors.Join(<-done, m.Flush()))
	has(t, afterKill(t, run, run.f), 8192, append([]byte("new"), make([]byte, 4093)...))
	sound(t, m, run.f)
}

// TestRegressionQEMUColdLookup: a table that has to be read is read under the lock
// of the image there, and all queues wait for it. Here a cold lookup holds up
// nobody but itself.
func TestRegressionQEMUColdLookup(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 64 << 10, ClusterSize: 512}, nil)
	write(t, m, 0, all(1, 64<<10))
	closeImage(t, m)
	m = run.open(t, run.f, false)
	has(t, m, 0, all(1, 512))
	held, release := holdUp(t, m, func(write bool, _, _ int64) bool { return !write })
	cold := make(chan error, 1)
	go func() { _, err := m.ReadAt(make([]byte, 512), 60<<10); cold <- err }()
	<-held
	write(t, m, 512, all(2, 1024)) // reads nothing, or would be held
	release()
	must(t, <-cold)
	has(t, m, 512, all(2, 1024))
	sound(t, m, run.f)
}

// TestRegressionQEMUFlushStorm: caches that depend on each other force a flush each
// time allocation and freeing alternate. Here neither asks for a barrier.
func TestRegressionQEMUFlushStorm(t *testing.T) {
	_, m := inMemory(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096, Version: 2}, nil)
	write(t, m, 0, all(1, 512<<10))
	must(t, m.Flush())
	before := m.Stats().Syncs
	for i := range int64(100) {
		must(t, m.Discard(i*4096, 4096))
		write(t, m, 512<<10+i*4096, all(2, 4096))
	}
	if n := m.Stats().Syncs - before; n > 4 {
		t.Errorf("%d barriers", n)
	}
}

// TestRegressionCVE20244467: looking at an image opened the files that it names.
// Here a check opens nothing but the image: it does not wait at this pipe.
func TestRegressionCVE20244467(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, BackingFile: "pipe", BackingFormat: "raw"})
	must(t, unix.Mkfifo(filepath.Join(filepath.Dir(path), "pipe"), 0o600))
	if v := check(t, path); !v.Clean() {
		t.Errorf("%+v", v)
	}
}

// TestRegressionCVE20155163 : an image that somebody else made named a file of the
// host, as its backing file or by a "json:" name, and got its contents. Here it lies in the image's directory or is refused.
func TestRegressionCVE20155163(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	writeFile(t, secret, []byte("secret"))
	up := filepath.Join("..", filepath.Base(filepath.Dir(secret)), "secret")
	for _, name := range []string{
		secret, up, "json:{\"driver\":\"file\",\"filename\":\"" + secret + "\"}", "file:" + secret, "nbd://localhost/x",
	} {
		path := create(t, CreateOptions{Size: 1 << 20, BackingFile: name, BackingFormat: "raw"})
		if _, err := Open(path, Options{}); !errors.Is(err, ErrBackingRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRegressionQEMUConcurrentEvictions: evicting tables beside their users broke
// images. Here readers and writers share a cache of the least size.
func TestRegressionQEMUConcurrentEvictions(t *testing.T) {
	const size = 2 << 20
	r := newSeed(t)
	run := crashImage(t, CreateOptions{Size: size, ClusterSize: 512}, nil)
	run.f.rec = false
	m, err := run.openIn(run.f, Options{L2CacheBytes: 1})
	must(t, err)
	want := make([]byte, size)
	fillRandom(r, want)
	write(t, m, 0, want)
	var wg sync.WaitGroup
	for range 4 {
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		wg.Go(func() {
			for i := range 200 {
				off := r.Int64N(size/512) * 512
				if _, err := m.WriteAt(want[off:off+512], off); err != nil {
					t.Error(err)
				}
				off = r.Int64N(size - 2000)
				got := make([]byte, 2000)
				if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, want[off:off+2000]) {
					t.Error(fmt.Errorf("read %d at %d differs: %w", i, off, err))
					return
				}
			}
		})
	}
	wg.Wait()
	sound(t, m, run.f)
}

// TestRegressionCHResizeNoRoom: the counts of a disk that grew while in use found no
// room once the file was as long as the old disk, until it was opened anew. Here
// the table of counts grows when it is full, whatever size the disk had.
func TestRegressionCHResizeNoRoom(t *testing.T) {
	run, m := inMemory(t, CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 64}, nil)
	want := make([]byte, 8<<20)
	fillRandom(newSeed(t), want)
	write(t, m, 0, want[:64<<10])
	for size := 128 << 10; size <= len(want); size *= 2 {
		must(t, m.Resize(t.Context(), int64(size), ResizeOptions{}))
		write(t, m, int64(size/2), want[size/2:size])
	}
	must(t, m.Flush())
	has(t, afterKill(t, run, run.f), 0, want)
	sound(t, m, run.f)
}

// TestRegressionCH8558: a resize wrote the header anew without the compression type,
// and without the extensions, among them the format of the backing file. Here
// fields are changed one by one, and what is not understood stays.
func TestRegressionCH8558(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "base"), all(1, 8192))
	path := filepath.Join(dir, "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: 8192, ClusterSize: 4096, CompressionType: "zstd", BackingFile: "base", BackingFormat: "raw"}))
	b, err := os.ReadFile(path)
	must(t, err)
	unknown := appendExtension(nil, 0x12345678, []byte("keep me"))
	copy(b[headerLengthOur:], append(unknown, b[headerLengthOur:4096-len(unknown)]...))
	put(b, 8, 8, binary.BigEndian.Uint64(b[8:])+uint64(len(unknown)))
	writeFile(t, path, b)
	m := open(t, path, Options{})
	must(t, m.WriteCompressed(append(all(2, 2048), all(3, 2048)...), 0))
	must(t, m.Resize(t.Context(), 64<<20, ResizeOptions{}))
	_, err = m.CreateSnapshot(t.Context(), "s")
	must(t, err)
	must(t, m.Resize(t.Context(), 8192, ResizeOptions{Shrink: true}))
	closeImage(t, m)
	after, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(after[headerLengthV3:4096], b[headerLengthV3:4096]) {
		t.Error("the header changed beyond its fields")
	}
	m = open(t, path, Options{})
	has(t, m, 0, append(all(2, 2048), all(3, 2048)...))
	has(t, m, 4096, all(1, 4096))
}

// TestRegressionCVE202432498: an image named a file of the host as its data file,
// and who converted it got that. Here a data file is opened on demand only, and
// only where a backing file may lie.
func TestRegressionCVE202432498(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, Create(path, CreateOptions{Size: 1 << 20, DataFile: secret}))
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "data file") {
		t.Errorf("not allowed: %v", err)
	}
	if _, err := Open(path, Options{DataFile: true}); !errors.Is(err, ErrBackingRefused) {
		t.Errorf("outside of the directory: %v", err)
	}
	must(t, os.Remove(secret))
	if v := check(t, path); !v.Clean() { // it needs the image alone
		t.Errorf("%+v", v)
	}
}

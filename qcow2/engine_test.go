package qcow2

import (
	"bytes"
	"encoding/binary"
	"flag"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var fixedSeed = flag.Uint64("seed", 0, "seed of every test; 0 is a new one each")

// newSeed returns a random source whose seed is in the test's log.
func newSeed(t testing.TB) *rand.Rand {
	t.Helper()
	seed := *fixedSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// qemu runs a QEMU tool and returns its output.
func qemu(t testing.TB, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s, the witness of this test, is not installed", name)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// create makes an image whose disk is exactly as large as opts say, as other
// programs may make it.
func create(t testing.TB, opts CreateOptions) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := Create(path, opts); err != nil {
		t.Fatal(err)
	}
	if opts.Size%diskUnit != 0 {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		put(b, 24, 8, uint64(opts.Size))
		writeFile(t, path, b)
	}
	return path
}

func open(t testing.TB, path string, opts Options) *Image {
	t.Helper()
	m, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func closeImage(t testing.TB, m *Image) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// fillRandom makes b random, without zeros.
func fillRandom(r *rand.Rand, b []byte) {
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, r.Uint64()|0x0101010101010101)
	}
	for i := range b {
		b[i] = byte(r.Uint32() | 1)
	}
}

// brief reports whether tests should do a part of their work: with -short, and
// under the race detector, which slows the testing of states down tenfold.
func brief() bool { return raceEnabled || testing.Short() }

// randomRange returns a range inside a disk of size bytes, small or large,
// aligned or not.
func randomRange(r *rand.Rand, size int64, most int64) (off, n int64) {
	n = 1 + r.Int64N(min(most, size))
	off = r.Int64N(size - n + 1)
	if r.IntN(2) == 0 {
		off &^= 511
	}
	return off, n
}

func TestWriteRead(t *testing.T) {
	for _, opts := range []CreateOptions{
		{Size: 10 << 20},
		{Size: 3<<20 + 777, ClusterSize: 512},
		{Size: 3<<20 + 512, ClusterSize: 4096, Version: 2},
		{Size: 3 << 20, ClusterSize: 512, RefcountBits: 64},
		{Size: 3 << 20, ClusterSize: 1024, RefcountBits: 1},
		{Size: 30 << 20, ClusterSize: 2 << 20, RefcountBits: 8},
	} {
		t.Run("", func(t *testing.T) {
			r := newSeed(t)
			path := create(t, opts)
			model := make([]byte, opts.Size)
			m := open(t, path, Options{})
			for i := range 300 {
				off, n := randomRange(r, opts.Size, 100000)
				if i%3 == 0 {
					got := make([]byte, n)
					if _, err := m.ReadAt(got, off); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, model[off:off+n]) {
						t.Fatalf("read %d at %d differs", n, off)
					}
					continue
				}
				fillRandom(r, model[off:off+n])
				if _, err := m.WriteAt(model[off:off+n], off); err != nil {
					t.Fatal(err)
				}
				if i%50 == 0 {
					if err := m.Flush(); err != nil {
						t.Fatal(err)
					}
				}
				if i%100 == 99 {
					closeImage(t, m)
					m = open(t, path, Options{})
				}
			}
			closeImage(t, m)
			qemu(t, "qemu-img", "check", path)
			m = open(t, path, Options{ReadOnly: true})
			got := make([]byte, opts.Size)
			if _, err := m.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, model) {
				t.Fatal("contents differ after closing")
			}
		})
	}
}

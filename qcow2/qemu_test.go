package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// patch overwrites n ranges of b with repeated bytes.
func patch(r *rand.Rand, b []byte, n int) {
	for range n {
		off, n := randomRange(r, int64(len(b)), int64(len(b)/8))
		copy(b[off:off+n], bytes.Repeat([]byte{byte(r.Uint32())}, int(n)))
	}
}

// makeBase makes the file base.format in dir and returns its contents.
func makeBase(t testing.TB, r *rand.Rand, dir, format string, size int64) []byte {
	t.Helper()
	b := make([]byte, size)
	patch(r, b, 20)
	path := filepath.Join(dir, "base."+format)
	if format == "raw" {
		writeFile(t, path, b)
		return b
	}
	raw := filepath.Join(dir, "base.tmp")
	writeFile(t, raw, b)
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
	return b
}

// qemuWrite applies writes, writes of zeroes and discards of n ranges to the
// image and to the model with qemu-io.
func qemuWrite(t testing.TB, r *rand.Rand, path string, model []byte, n int) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for range n {
		off, n := randomRange(r, int64(len(model)), int64(len(model)/10))
		off, n = off&^511, n&^511
		if n == 0 {
			continue
		}
		v := byte(r.Uint32())
		command := fmt.Sprintf("write -P %d %d %d", v, off, n)
		if r.IntN(4) == 0 {
			v, command = 0, fmt.Sprintf("write -z%s %d %d", [...]string{"", " -u"}[r.IntN(2)], off, n)
		}
		args = append(args, "-c", command)
		copy(model[off:off+n], bytes.Repeat([]byte{v}, int(n)))
	}
	out := qemu(t, "qemu-io", append(args, path)...)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io: %s", out)
	}
}

// ourWrite applies n random operations to the image and the model.
func ourWrite(t testing.TB, r *rand.Rand, path string, model []byte, n int) {
	t.Helper()
	m := open(t, path, Options{L2CacheBytes: 1, DataFile: true})
	for range n {
		off, n := randomRange(r, int64(len(model)), int64(len(model)/10))
		switch r.IntN(6) {
		case 5:
			packCluster(t, m, r, model, off)
		case 4:
			erase(t, m, model, r.IntN(3), off, n)
		case 0:
			got := make([]byte, n)
			if _, err := m.ReadAt(got, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, model[off:off+n]) {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		case 1:
			if err := m.Flush(); err != nil {
				t.Fatal(err)
			}
		default:
			fillRandom(r, model[off:off+n])
			cut := r.Int64N(n + 1)
			iov := [][]byte{model[off : off+cut], {}, model[off+cut : off+n]}
			if err := m.WritevAt(iov, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	got := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{got}, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Fatal("the disk differs from the model")
	}
	closeImage(t, m)
}

// packCluster writes the cluster of off compressed, where the image can have such.
func packCluster(t testing.TB, m *Image, r *rand.Rand, model []byte, off int64) {
	t.Helper()
	off -= m.inCluster(off)
	b := bytes.Clone(model[off:min(off+m.clusterSize, m.Size())])
	fillRandom(r, b[:len(b)/4])
	copy(b[len(b)/2:], b[:len(b)/4])
	switch err := m.WriteCompressed(b, off); {
	case err == nil:
		copy(model[off:], b)
	case m.data != m.file && errors.Is(err, ErrUnsupported), errors.Is(err, unix.EFBIG):
	default:
		t.Fatal(err)
	}
}

// compare lets QEMU compare the image with the model.
func compare(t testing.TB, dir, path string, model []byte) {
	t.Helper()
	raw := filepath.Join(dir, "model.raw")
	writeFile(t, raw, model)
	qemu(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)
}

// TestGrowRefcountTable writes enough small clusters for the reference count
// table to be replaced several times.
func TestGrowRefcountTable(t *testing.T) {
	r := newSeed(t)
	size := 40 << 20
	if brief() {
		size = 12 << 20
	}
	for _, bits := range []int{16, 64} {
		path := create(t, CreateOptions{Size: int64(size), ClusterSize: 512, RefcountBits: bits})
		model := make([]byte, size)
		fillRandom(r, model)
		m := open(t, path, Options{})
		for off := 0; off < len(model); off += 1 << 20 {
			if _, err := m.WriteAt(model[off:off+1<<20], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		closeImage(t, m)
		qemu(t, "qemu-img", "check", "-q", path)
		compare(t, t.TempDir(), path, model)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if most := int64(len(model)) * 11 / 10; fi.Size() > most {
			t.Errorf("the file has %d bytes, more than %d", fi.Size(), most)
		}
	}
}

// TestUnknownAutoclear shows that unknown autoclear bits go at a writable open
// and stay at one for reading, and that unknown extensions survive writes.
func TestUnknownAutoclear(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[offAutoclear:], []byte{0x80, 0, 0, 0, 0, 0, 0, 1})
	unknown := appendExtension(nil, 0x12345678, []byte("keep me"))
	copy(b[headerLengthOur:], append(unknown, b[headerLengthOur:1024]...))
	writeFile(t, path, b)
	field := func() byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[headerLengthOur:headerLengthOur+len(unknown)], unknown) {
			t.Fatal("the unknown extension is gone")
		}
		return b[offAutoclear] | b[offAutoclear+7]
	}
	closeImage(t, open(t, path, Options{ReadOnly: true}))
	if field() != 0x81 {
		t.Error("a reader changed the autoclear bits")
	}
	m := open(t, path, Options{})
	if field() != 0 {
		t.Error("a writer left the autoclear bits")
	}
	if _, err := m.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	closeImage(t, m)
	field()
}

// TestFarOffsets writes all over large disks that QEMU made, whose tables are
// many or must grow.
func TestFarOffsets(t *testing.T) {
	for _, c := range []struct{ options, size string }{
		{"cluster_size=512", "1G"},
		{"cluster_size=4k", "100G"},
		{"cluster_size=4k,refcount_bits=64", "100G"},
		{"cluster_size=64k", "16T"},
		{"cluster_size=2M", "60T"},
	} {
		t.Run(c.options, func(t *testing.T) {
			r := newSeed(t)
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.options, path, c.size)
			m := open(t, path, Options{})
			read := []string{"-f", "qcow2", "-r"}
			for i := range 60 {
				off := r.Int64N(m.Size()/4096) * 4096
				if i == 0 {
					off = m.Size() - 4096
				}
				v := byte(i + 1)
				if _, err := m.WriteAt(bytes.Repeat([]byte{v}, 4096), off); err != nil {
					t.Fatal(err)
				}
				read = append(read, "-c", fmt.Sprintf("read -P %d %d 4096", v, off))
			}
			closeImage(t, m)
			qemu(t, "qemu-img", "check", "-q", path)
			if out := qemu(t, "qemu-io", append(read, path)...); strings.Contains(out, "failed") {
				t.Error(out)
			}
		})
	}
}

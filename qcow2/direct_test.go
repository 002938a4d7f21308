package qcow2

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDirectFile compares random reads, writes and holes of a directFile with a
// byte slice, with the alignment of this host and of one with large blocks.
func TestDirectFile(t *testing.T) {
	for _, align := range []int64{0, 4096} {
		rng := newSeed(t)
		f := scratchDirect(t)
		if flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0); err != nil || flags&unix.O_DIRECT == 0 {
			t.Errorf("flags of the file %#x, %v; want O_DIRECT", flags, err)
		}
		if align != 0 {
			f.offset, f.memory = align, align
		}
		const size = 3 << 20 // more than goes through a buffer at once
		want := make([]byte, size+1<<20)
		rounds := 400
		if brief() {
			rounds = 100
		}
		for range rounds {
			off, n := rng.Int64N(size), 1+rng.Int64N(1<<rng.IntN(20))
			if rng.IntN(4) == 0 {
				off, n = off&^4095, (n+4095)&^4095
			}
			p := make([]byte, n)
			cut := rng.Int64N(n)
			switch rng.IntN(4) {
			case 0:
				if err := f.ReadvAt([][]byte{p[:cut], p[cut:]}, off); err != nil || !bytes.Equal(p, want[off:off+n]) {
					t.Fatalf("align %d: read of %d bytes at %d differs: %v", align, n, off, err)
				}
			case 1:
				off, n = off&^65535, 65536
				if err := f.Punch(off, n); err != nil {
					t.Fatal(err)
				}
				clear(want[off : off+n])
			default:
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				if err := f.WritevAt([][]byte{p[:cut], p[cut:]}, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
			}
		}
		got := make([]byte, len(want))
		if err := readFull(f, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("align %d: the file differs: %v", align, err)
		}
	}
}

// scratchDirect is an empty directFile.
func scratchDirect(t *testing.T) *directFile {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDirectFile(newOSFile(f))
	if errors.Is(err, unix.EINVAL) {
		t.Skip("the directory for temporary files has no direct I/O")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// TestDirectNeighbours writes the parts of one aligned unit from a goroutine
// each: no write is lost.
func TestDirectNeighbours(t *testing.T) {
	d := scratchDirect(t)
	d.offset, d.memory = 4096, 4096
	rounds := 300
	if brief() {
		rounds = 60
	}
	var all sync.WaitGroup
	for part := range int64(4) {
		all.Go(func() {
			off, got := part*1000, make([]byte, 1000)
			for i := range rounds {
				want := bytes.Repeat([]byte{byte(i)}, 1000)
				if err := errors.Join(writeFull(d, want, off), readFull(d, got, off)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("part %d reads as %#x after %#x was written: %v", part, got[0], want[0], err)
					return
				}
			}
		})
	}
	all.Wait()
}

// TestDirectRefused opens an image where there is no direct I/O.
func TestDirectRefused(t *testing.T) {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := newFile(f, "maps", Options{Direct: true}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "another cache mode") {
		t.Errorf("got %v, want ErrUnsupported with a way out", err)
	}
}

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestScratchesShareTheirBase has ten throw-away overlays read all of one base, as ten
// guests do that run side by side. The base is in the page cache once, and nothing of
// it is copied: neither into the overlays nor into the process.
func TestScratchesShareTheirBase(t *testing.T) {
	const (
		size      = 64 << 20
		overlays  = 10
		maxFile   = 1 << 20 // of each overlay, in the file system
		maxMemory = 2 << 20 // for each overlay
	)
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			want := makeBase(t, newSeed(t), dir, format, size)
			buf := make([]byte, 1<<20)
			before, readBefore := heap(), int64(0)
			var open []*Image
			for i := range overlays {
				m, err := OpenScratch(t.TempDir(), filepath.Join(dir, "base."+format), format, Options{})
				must(t, err)
				defer closeImage(t, m)
				open = append(open, m)
				for off := int64(0); off < m.Size(); off += int64(len(buf)) {
					if _, err := m.ReadAt(buf, off); err != nil || !bytes.Equal(buf, want[off:off+int64(len(buf))]) {
						t.Fatalf("overlay %d: wrong contents at %d (%v)", i, off, err)
					}
				}
				if i == 0 {
					readBefore = readFromDisks(t)
				}
			}
			if n := (heap() - before) / overlays; n > maxMemory {
				t.Errorf("an overlay takes %d bytes of memory", n)
			}
			if n := readFromDisks(t) - readBefore; n >= size {
				t.Errorf("%d bytes of a base of %d were read from the disk again", n, size)
			}
			for i, m := range open {
				var st unix.Stat_t
				must(t, unix.Fstat(m.file.(volatileFile).file.(*osFile).fd, &st))
				if st.Blocks*512 > maxFile {
					t.Errorf("overlay %d takes %d bytes of the disk", i, st.Blocks*512)
				}
			}
		})
	}
}

// heap is how much memory is in use.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// readFromDisks is how much this process has had read from disks, 0 on a host that does
// not count it.
func readFromDisks(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	must(t, err)
	_, after, ok := bytes.Cut(b, []byte("\nread_bytes: "))
	if !ok {
		t.Fatalf("no read_bytes in %q", b)
	}
	var n int64
	_, err = fmt.Sscan(string(after), &n)
	must(t, err)
	return n
}

package qcow2

import (
	"errors"
	"strings"
	"testing"
)

// FuzzExamine looks at images with a broken first cluster. Whatever Examine finds no
// fault with, and that names no other file, opens.
func FuzzExamine(f *testing.F) {
	images := fuzzImages(f)
	for i := range images {
		f.Add(uint8(i), images[i].data[:512])
	}
	f.Fuzz(func(t *testing.T, i uint8, first []byte) {
		b := append([]byte(nil), images[int(i)%len(images)].data...)
		copy(b[:4096], first)
		m := &Image{path: "fuzz", file: &memFile{data: b}}
		x, err := m.examine()
		if err != nil {
			return
		}
		for _, fault := range x.Faults {
			if fault == nil || fault.Error() == "" {
				t.Error("a fault without a word")
			}
		}
		if len(x.Faults) > 0 || x.Encryption != "" || len(x.UnknownFeatures) > 0 || x.BackingFile != "" || x.ExternalData {
			return
		}
		image, err := openFile(&memFile{data: b}, "fuzz", Options{ReadOnly: true}, &chain{})
		if err != nil {
			t.Fatalf("no fault was found, and it does not open: %v", err)
		}
		if image.Size() != x.Size || image.ClusterSize() != x.ClusterSize {
			t.Errorf("%d bytes in clusters of %d, examined as %+v", image.Size(), image.ClusterSize(), x.Info)
		}
		if err := image.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestExamine goes on after each of several faults, the first of which Inspect fails
// with.
func TestExamine(t *testing.T) {
	path := create(t, CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"})
	b := readFile(t, path)
	put(b, offRefTable, 8, 1<<50)
	put(b, offL1Offset, 8, 1<<50)
	put(b, offSnapshots, 4, 1<<31)
	writeFile(t, path, b)
	x, err := Examine(path)
	must(t, err)
	if len(x.Faults) != 3 || x.BackingFile != "base" || x.Size != 1<<20 || x.SnapshotCount != 1<<31 || x.FileSize != int64(len(b)) {
		t.Errorf("%+v", x)
	}
	for i, word := range []string{"reference count", "L1", "snapshot"} {
		if said := x.Faults[i].Error(); !strings.Contains(said, word) || !strings.Contains(said, path) || !errors.Is(x.Faults[i], ErrCorrupt) {
			t.Errorf("fault %d: %s", i, said)
		}
	}
	if _, err := Inspect(path); err == nil || err.Error() != x.Faults[0].Error() {
		t.Errorf("Inspect: %v", err)
	}
}

package qcow2

import (
	"errors"
	"strings"
	"testing"
)

// TestInFileCopies shows that an error which several requests share is not
// changed when each of them names its file.
func TestInFileCopies(t *testing.T) {
	shared := corruptf("a test")
	err := inFile("disk", shared)
	if shared.Path != "" || shared.Mend != "" {
		t.Errorf("the shared error became %+v", *shared)
	}
	if !errors.Is(err, ErrCorrupt) || !strings.HasPrefix(err.Error(), "disk: a test; ") {
		t.Errorf("got %v", err)
	}
}

// TestReaderL1 shows that a layer which is only read costs memory by the size of
// its disk, not by what its header says of the L1 table.
func TestReaderL1(t *testing.T) {
	good, _ := hostileImage(t, CreateOptions{Size: 1 << 20})
	put(good, 36, 4, maxL1Bytes/8)
	path := t.TempDir() + "/hostile.qcow2"
	writeFile(t, path, good)
	m := open(t, path, Options{ReadOnly: true})
	if len(m.l1) != 1 {
		t.Errorf("%d L1 entries in memory, want 1", len(m.l1))
	}
	if _, err := m.ReadAt(make([]byte, m.Size()), 0); err != nil {
		t.Error(err)
	}
}

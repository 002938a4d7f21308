package qcow2

import (
	"errors"
	"syscall"
	"testing"
)

// TestSearchKeeps fails a read in the middle of a search for free clusters. Those
// found before must be used, because no later search comes by them again.
func TestSearchKeeps(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 8 << 20, ClusterSize: 512, RefcountBits: 64}, nil)
	m := run.open(t, run.f, false)
	for i := range int64(200) {
		if _, err := m.WriteAt([]byte("x"), i*512); err != nil {
			t.Fatal(err)
		}
	}
	closeImage(t, m)
	f := &memFile{data: append([]byte(nil), run.f.data...)}
	m = run.open(t, f, false)
	f.setFail(func(op string) error {
		if op == "read" && m.refs.cursor >= 512 {
			return syscall.EIO
		}
		return nil
	})
	if err := m.refill(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("refill: %v", err)
	}
	f.setFail(nil)
	if !m.pool.has(1) {
		t.Errorf("nothing is left of the clusters below %d", m.refs.cursor)
	}
}

package image

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/calfvm/calf/qcow2"
)

// flushedBase is a base that says when it is flushed, which may fail.
type flushedBase struct {
	qcow2.Base
	flush func() error
}

func (b flushedBase) Flush() error { return b.flush() }

// TestMergeOrder makes sure that an overlay is emptied after its base is stable, and
// not at all if it is not.
func TestMergeOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	m, err := qcow2.Open(path, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, fails := range []error{nil, errors.New("the disk is gone")} {
		var order []string
		base := flushedBase{m, func() error { order = append(order, "flush"); return fails }}
		empty := func(context.Context) error { order = append(order, "empty"); return nil }
		err := merge(t.Context(), base, empty, &copying{from: m, to: diskSink{base}, base: base, sparse: 4096, workers: 1})
		if !errors.Is(err, fails) {
			t.Errorf("got error %v, want %v", err, fails)
		}
		want := 2
		if fails != nil {
			want = 1
		}
		if len(order) != want || order[0] != "flush" {
			t.Errorf("flush fails with %v: %v", fails, order)
		}
	}
}

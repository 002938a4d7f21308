package qcow2

import (
	"errors"
	"math/rand/v2"
	"testing"
	"unsafe"
)

// TestMetaSet compares a set with a map, for runs in any order and of any length.
func TestMetaSet(t *testing.T) {
	r := newSeed(t)
	var s metaSet
	model := map[uint64]metaKind{}
	const span = 20000
	for i := range 6000 {
		e := extent{start: r.Uint64N(span), n: 1}
		if r.IntN(4) == 0 {
			e.n += r.Uint64N(200)
		}
		k := metaKind(1 + r.IntN(int(metaSnapshots)))
		free := true
		for c := e.start; c < e.start+e.n; c++ {
			free = free && model[c] == metaNone
		}
		switch {
		case r.IntN(20) == 0:
			e.n *= 4
			s.remove(e)
			for c := e.start; c < e.start+e.n; c++ {
				delete(model, c)
			}
			continue
		case i%2 == 0:
			g := geometry{clusterBits: 16}
			if err := s.claim(&g, e, k); (err == nil) != free || err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("claim of %v, free: %v, says %v", e, free, err)
			}
		case free:
			s.add(e, k)
		}
		for c := e.start; free && c < e.start+e.n; c++ {
			model[c] = k
		}
	}
	for c := range uint64(span + 2000) {
		if got := s.at(c); got != model[c] {
			t.Fatalf("cluster %d holds the %v, want %v", c, got, model[c])
		}
	}
	for _, l := range s.leaves {
		if len(l) == 0 || len(l) > maxLeaf {
			t.Errorf("a leaf of %d runs", len(l))
		}
	}
}

// TestMetaSetLast uses the last cluster that a file can have.
func TestMetaSetLast(t *testing.T) {
	var s metaSet
	last := extent{start: 1<<54 - 100, n: 100}
	s.add(last, metaSnapshots)
	if s.at(last.start-1) != metaNone || s.at(last.start) != metaSnapshots || s.at(1<<54-1) != metaSnapshots || s.at(1<<54) != metaNone {
		t.Error("the last clusters of all are confused with others")
	}
}

// TestMetaSetMemory shows what a large image costs: many tables, each between
// data clusters, in the order of the file or in any.
func TestMetaSetMemory(t *testing.T) {
	const tables = 1 << 18
	inOrder := make([]uint64, tables)
	for i := range inOrder {
		inOrder[i] = uint64(i) * 8193
	}
	anyOrder := append([]uint64(nil), inOrder...)
	rand.Shuffle(tables, func(i, j int) { anyOrder[i], anyOrder[j] = anyOrder[j], anyOrder[i] })
	for most, list := range map[int][]uint64{9: inOrder, 16: anyOrder} {
		var s metaSet
		for _, c := range list {
			s.add(extent{start: c, n: 1}, metaL2)
		}
		bytes := cap(s.leaves) * int(unsafe.Sizeof(metaLeaf{}))
		for _, l := range s.leaves {
			bytes += cap(l) * int(unsafe.Sizeof(metaRun(0)))
		}
		t.Logf("%.1f bytes for each table", float64(bytes)/tables)
		if bytes > most*tables {
			t.Errorf("%d bytes for %d tables, want at most %d each", bytes, tables, most)
		}
	}
}

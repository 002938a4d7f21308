package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestStats counts what known operations do.
func TestStats(t *testing.T) {
	run := crashImage(t, CreateOptions{Size: 1 << 20, ClusterSize: 4096}, nil)
	m := run.open(t, run.f, false)
	last := Stats{}
	step := func(what string, want Stats) {
		t.Helper()
		now := m.Stats()
		got := Stats{
			Hits: now.Hits - last.Hits, Misses: now.Misses - last.Misses,
			Allocated: now.Allocated - last.Allocated, Freed: now.Freed - last.Freed, Punched: now.Punched - last.Punched,
			Flushes: now.Flushes - last.Flushes, Commits: now.Commits - last.Commits, Syncs: now.Syncs - last.Syncs,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", what, d)
		}
		last = now
	}
	b := make([]byte, 8192)
	write := func() { must(t, m.WritevAt([][]byte{b}, 4096)) }
	write()
	step("first write", Stats{Misses: 1, Allocated: 3}) // the table, two clusters
	write()
	write()
	step("overwrites", Stats{Hits: 2})
	must(t, m.Flush())
	step("flush", Stats{Flushes: 1, Commits: 1, Syncs: 2})
	must(t, m.Discard(4096, 4096))
	step("discard", Stats{Punched: 4096})
	must(t, m.ReadvAt([][]byte{b}, 4096))
	step("read of zeros and data", Stats{Hits: 2})
	must(t, m.Flush())
	must(t, m.Flush())
	step("flushes, one with pointers", Stats{Flushes: 2, Commits: 2, Syncs: 3})
	write()
	step("half reserved, half owned", Stats{Hits: 1})

	m.mu.RLock()
	done := make(chan struct{})
	go func() { m.lock(); m.mu.Unlock(); close(done) }()
	for m.mu.shards[0].TryRLock() { // until the writer waits
		m.mu.RUnlock()
	}
	m.mu.RUnlock()
	<-done
	if now := m.Stats(); now.LockWaits != last.LockWaits+1 || now.LockWaited <= last.LockWaited {
		t.Errorf("the wait was not counted: %+v after %+v", now, last)
	}
	closeImage(t, m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestMap compares with what QEMU says about a chain of images with all kinds
// of clusters.
func TestMap(t *testing.T) {
	r := newSeed(t)
	dir := t.TempDir()
	const size = 2 << 20
	raw, base := filepath.Join(dir, "raw"), filepath.Join(dir, "base.qcow2")
	b := make([]byte, size)
	patch(r, b[:1<<20], 10)
	writeFile(t, raw, b[:1<<20+512])
	qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "cluster_size=16k", raw, base)
	path := filepath.Join(dir, "disk.qcow2")
	must(t, Create(path, CreateOptions{Size: size, ClusterSize: 4096, BackingFile: "base.qcow2", BackingFormat: "qcow2"}))
	m := open(t, path, Options{L2CacheBytes: 1})
	for range 30 {
		off, n := randomRange(r, size, 50000)
		must(t, m.WritevAt([][]byte{bytes.Repeat([]byte{1}, int(n))}, off))
		off, n = randomRange(r, size, 20000)
		must(t, eraser(m, r.IntN(3))(off, n))
	}
	closeImage(t, m)
	var theirs []struct {
		Start, Length int64
		Depth         int
		Zero, Data    bool
		Offset        *int64
	}
	must(t, json.Unmarshal([]byte(qemu(t, "qemu-img", "map", "--output=json", "-f", "qcow2", path)), &theirs))
	m = open(t, path, Options{ReadOnly: true})
	next, i := int64(0), 0
	for got, err := range m.Map(0, size) {
		must(t, err)
		if got.Offset != next || got.Length <= 0 {
			t.Fatalf("%+v follows %d", got, next)
		}
		next = got.Offset + got.Length
		for at := got.Offset; at < next; at += 512 {
			for theirs[i].Start+theirs[i].Length <= at {
				i++
			}
			want := theirs[i]
			if data := got.Kind == MapData || got.Kind == MapCompressed; data != want.Data || data == want.Zero {
				t.Fatalf("at %d: %+v, QEMU says %+v", at, got, want)
			}
			if got.Layer != want.Depth {
				t.Fatalf("at %d: layer %d, QEMU says %d", at, got.Layer, want.Depth)
			}
			if (got.HostOffset == NoOffset) != (want.Offset == nil) {
				t.Fatalf("at %d: %+v, QEMU says %+v", at, got, want)
			}
			if want.Offset != nil && got.HostOffset-got.Offset != *want.Offset-want.Start {
				t.Fatalf("at %d: %+v, QEMU says %d", at, got, *want.Offset)
			}
		}
	}
	if next != size {
		t.Errorf("the map ends at %d", next)
	}
	for _, err := range m.Map(1, size) {
		if !errors.Is(err, ErrRange) {
			t.Errorf("beyond the end: %v", err)
		}
	}
	for got, err := range m.Map(0, size) {
		if err != nil || got.Offset != 0 {
			t.Errorf("the first of several: %+v, %v", got, err)
		}
		break
	}
}

package main

import (
	"context"
	"strings"
	"testing"
	"time"
)

func short(t *testing.T) config {
	return config{
		length: time.Second, image: t.TempDir() + "/disk.qcow2", goroutines: 4, size: 64 << 20,
		every: 300 * time.Millisecond, check: 400 * time.Millisecond,
	}
}

// TestSoak runs for a moment: it reports, checks, and finds nothing.
func TestSoak(t *testing.T) {
	var out strings.Builder
	if err := short(t).run(t.Context(), &out); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"requests/s", "checked: clean"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, &out)
		}
	}
	c := short(t)
	c.goroutines = 0
	if err := c.run(t.Context(), &out); err == nil {
		t.Error("no goroutines were accepted")
	}
}

// TestSoakFinds changes one block behind the workers' backs, and the bounds of the
// file.
func TestSoakFinds(t *testing.T) {
	var out strings.Builder
	s, err := newSoak(short(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.img.WriteAt([]byte("x"), 1000*block+17); err != nil {
		t.Fatal(err)
	}
	if err := s.inspect(&out); err == nil || !strings.Contains(err.Error(), "block 1000, version 1") {
		t.Errorf("inspect: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.run(ctx, &out); err == nil {
		t.Error("a wrong block was not reported at the end")
	}
	if s.bounded(100<<20, 110<<20+slack, 0) != nil || s.bounded(100<<20, 110<<20+slack+1, 0) == nil || s.bounded(0, 0, 2*s.size) == nil {
		t.Error("the bounds are wrong")
	}
}

package blk

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestHistogram compares the quantiles of a histogram with those of the
// durations themselves.
func TestHistogram(t *testing.T) {
	var empty Histogram
	if empty.Count() != 0 || empty.Quantile(0.5) != 0 {
		t.Errorf("an empty histogram has %d durations, the middle one %v", empty.Count(), empty.Quantile(0.5))
	}
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 100 {
		var h histogram
		all := make([]time.Duration, 1+r.IntN(200))
		for i := range all {
			all[i] = time.Duration(r.Uint64N(1 << r.IntN(histogramSize-1)))
			h.add(all[i])
		}
		slices.Sort(all)
		got := h.load()
		if got.Count() != uint64(len(all)) {
			t.Fatalf("%d durations, want %d", got.Count(), len(all))
		}
		for _, q := range []float64{-1, 0, 0.25, 0.5, 0.9, 0.999, 1, 2} {
			i := int(min(max(q, 0), 1) * float64(len(all)))
			below, above := all[max(i-1, 0)], all[min(i, len(all)-1)]
			if v := got.Quantile(q); v < below || v > 2*above {
				t.Errorf("quantile %v of %v is %v", q, all, v)
			}
		}
	}
	var h histogram
	for _, d := range []time.Duration{-time.Hour, 0, 1, time.Hour, 1 << 62} {
		h.add(d)
	}
	if got := h.load(); got[0] != 2 || got[1] != 1 || got[histogramSize-1] != 2 {
		t.Errorf("extremes are counted as %v", got)
	}
}

package blk

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// TestBucket lets a greedy user take random amounts out of buckets in made-up
// time: it must get all that the rate gives it, and never more than the burst
// and one request beyond.
func TestBucket(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		rate := Rate{PerSecond: 1 + r.Uint64N(1<<r.IntN(40)), Burst: r.Uint64N(1 << r.IntN(30))}
		var b bucket
		b.init(rate)
		const span = 10 * time.Second
		perfect := float64(rate.PerSecond) * span.Seconds()
		burst := float64(rate.PerSecond) * b.burst.Seconds()
		most := 1 + uint64(perfect/100) // of one request
		var taken float64
		for now := time.Duration(0); now < span; {
			if d := b.debt(now); d > 0 {
				if b.wait(now) < d {
					t.Fatalf("%+v: told to wait %v with a debt of %v", rate, b.wait(now), d)
				}
				now += d
				continue
			}
			n := 1 + r.Uint64N(most)
			b.take(now, n)
			taken += float64(n)
			now += time.Duration(r.IntN(1000))
		}
		if limit := (perfect+burst)*1.001 + float64(most) + 1; taken > limit {
			t.Errorf("%+v: %.0f taken in %v, at most %.0f allowed", rate, taken, span, limit)
		}
		if limit := perfect * 0.98; taken < limit-float64(most) {
			t.Errorf("%+v: %.0f taken in %v, at least %.0f should be possible", rate, taken, span, limit)
		}
	}
}

// TestBucketExtremes uses numbers at the ends of their types.
func TestBucketExtremes(t *testing.T) {
	for _, rate := range []Rate{{1, 0}, {1, 1}, {1, math.MaxUint64}, {math.MaxUint64, 0}, {math.MaxUint64, math.MaxUint64}} {
		var b bucket
		b.init(rate)
		for range 100 {
			b.take(time.Second, math.MaxUint64)
		}
		if d := b.debt(time.Second); d < 0 || d > maxDebt {
			t.Errorf("%+v: debt %v", rate, d)
		}
		if d := b.debt(2*time.Second + maxDebt); d != 0 {
			t.Errorf("%+v: debt %v after the longest wait", rate, d)
		}
	}
	var none bucket
	none.init(Rate{})
	none.take(0, math.MaxUint64)
	if none.debt(0) != 0 || none.wait(0) != 0 {
		t.Error("a bucket without a rate has run empty")
	}
}

// TestBucketLargeRequests checks that a guest does not exceed a low rate by few
// requests that are as large as can be, and that a burst is as large as was asked
// for.
func TestBucketLargeRequests(t *testing.T) {
	const rate, request = 1 << 10, 1 << 32
	var b bucket
	b.init(Rate{PerSecond: rate, Burst: request})
	if b.take(0, request); b.debt(0) != 0 {
		t.Errorf("debt %v after the burst", b.debt(0))
	}
	for range maxQueues {
		b.take(0, request)
	}
	if want := maxQueues * request / rate * time.Second; b.debt(0) != want {
		t.Errorf("debt %v after %d requests of 4 GiB at 1 KiB/s, want %v", b.debt(0), maxQueues, want)
	}
}

// TestBucketIdle checks that idling earns the burst and no more.
func TestBucketIdle(t *testing.T) {
	var b bucket
	b.init(Rate{PerSecond: 1000, Burst: 50})
	for _, now := range []time.Duration{0, time.Second, time.Hour} {
		b.take(now, 50)
		if d := b.debt(now); d != 0 {
			t.Errorf("after %v: in debt after the burst", now)
		}
		b.take(now, 10)
		if d := b.debt(now); d != 10*time.Millisecond {
			t.Errorf("after %v: debt %v, want 10ms", now, d)
		}
	}
}

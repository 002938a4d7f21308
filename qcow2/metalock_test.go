package qcow2

import (
	"sync"
	"testing"
)

// TestMetaLock lets readers in all shards and writers count under the lock: nobody
// is in with a writer, however it came in.
func TestMetaLock(t *testing.T) {
	defer func(n int) { lockShards = n }(lockShards)
	for lockShards = 1; lockShards <= maxLockShards; lockShards += 3 {
		var l metaLock
		var n, tried int
		var wg sync.WaitGroup
		for g := range 2 * maxLockShards {
			wg.Go(func() {
				for range 200 {
					l.RLockShard(g)
					before := n
					if n != before {
						t.Error("a writer beside a reader")
					}
					l.RUnlockShard(g)
				}
			})
			wg.Go(func() {
				for range 100 {
					if l.TryLock() {
						tried++
					} else {
						l.Lock()
					}
					n++
					l.Unlock()
				}
			})
		}
		wg.Wait()
		if n != 2*maxLockShards*100 {
			t.Errorf("%d shards: %d increments of %d, %d at once", lockShards, n, 2*maxLockShards*100, tried)
		}
		l.RLockShard(lockShards - 1)
		if l.TryLock() {
			t.Errorf("%d shards: taken beside a reader", lockShards)
		}
		l.RUnlockShard(lockShards - 1)
		if !l.TryLock() {
			t.Errorf("%d shards: a try that failed has kept a part", lockShards)
		}
		l.Unlock()
	}
}

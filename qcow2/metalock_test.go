package qcow2

import (
	"sync"
	"testing"
)

// TestMetaLock lets readers in all shards and writers count under the lock: nobody
// is in with a writer, however it came in.
func TestMetaLock(t *testing.T) {
	var l metaLock
	var n int
	var wg sync.WaitGroup
	for g := range 2 * lockShards {
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
				if !l.TryLock() {
					l.Lock()
				}
				n++
				l.Unlock()
			}
		})
	}
	wg.Wait()
	if n != 2*lockShards*100 {
		t.Errorf("%d increments were kept", n)
	}
	l.RLockShard(lockShards - 1)
	if l.TryLock() {
		t.Error("taken beside a reader")
	}
	l.RUnlockShard(lockShards - 1)
	if !l.TryLock() {
		t.Error("a try that failed has kept a part")
	}
	l.Unlock()
}

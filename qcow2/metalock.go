package qcow2

import "sync"

// lockShards is how many readers of a metaLock can come and go without sharing a
// cache line. More would make the exclusive side slower, which takes them all.
const lockShards = 8

// metaLock is a sync.RWMutex whose shared side is spread over shards, so that
// requests on different cores do not slow each other where all that they want is
// to look something up. Who takes the exclusive side takes all shards, in order.
type metaLock struct {
	shards [lockShards]struct {
		sync.RWMutex
		_ [104]byte // two cache lines, as processors fetch them in pairs
	}
}

// RLockShard takes the shared side in a shard, which may be any number; the caller
// gives it back with RUnlockShard.
func (l *metaLock) RLockShard(shard int)   { l.shards[shard%lockShards].RLock() }
func (l *metaLock) RUnlockShard(shard int) { l.shards[shard%lockShards].RUnlock() }

// RLock and RUnlock are for what is not hot.
func (l *metaLock) RLock()   { l.RLockShard(0) }
func (l *metaLock) RUnlock() { l.RUnlockShard(0) }

func (l *metaLock) Lock() {
	for i := range l.shards {
		l.shards[i].Lock()
	}
}

func (l *metaLock) Unlock() {
	for i := range l.shards {
		l.shards[i].Unlock()
	}
}

// TryLock is Lock if it need not wait. It reports whether it has the lock.
func (l *metaLock) TryLock() bool {
	for i := range l.shards {
		if !l.shards[i].TryLock() {
			for ; i > 0; i-- {
				l.shards[i-1].Unlock()
			}
			return false
		}
	}
	return true
}

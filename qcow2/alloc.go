package qcow2

import (
	"cmp"
	"slices"
)

// pool is the stock of host clusters that are free to use now: no reference, no
// pointer to them on stable storage, no I/O that could still reach them. It is
// guarded by Image.mu.
//
// Clusters that were in use before go first, so that the file does not grow
// while it has holes.
type pool struct {
	recycled []extent
	fresh    []extent // in file order, so that what is written together lies together
}

// has reports whether there are n contiguous clusters.
func (p *pool) has(n uint64) bool {
	long := func(e extent) bool { return e.n >= n }
	return slices.ContainsFunc(p.recycled, long) || slices.ContainsFunc(p.fresh, long)
}

// take removes up to n contiguous clusters. The result is empty if the pool is.
func (p *pool) take(n uint64) extent {
	list := &p.recycled
	if len(*list) == 0 {
		list = &p.fresh
	}
	if len(*list) == 0 {
		return extent{}
	}
	e := &(*list)[0]
	got := extent{start: e.start, n: min(n, e.n), virgin: e.virgin}
	e.start, e.n = e.start+got.n, e.n-got.n
	if e.n == 0 {
		*list = (*list)[1:]
	}
	return got
}

// takeRun removes n contiguous clusters. The result is empty if there are none.
func (p *pool) takeRun(n uint64) extent {
	for _, list := range []*[]extent{&p.recycled, &p.fresh} {
		i := slices.IndexFunc(*list, func(e extent) bool { return e.n >= n })
		if i < 0 {
			continue
		}
		e := &(*list)[i]
		got := extent{start: e.start, n: n, virgin: e.virgin}
		if e.start, e.n = e.start+n, e.n-n; e.n == 0 {
			*list = slices.Delete(*list, i, i+1)
		}
		return got
	}
	return extent{}
}

// sort puts the clusters that go first in file order.
func (p *pool) sort() {
	slices.SortFunc(p.recycled, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
}

// cut removes the clusters from end on.
func (p *pool) cut(end uint64) {
	for _, list := range []*[]extent{&p.recycled, &p.fresh} {
		for i := range *list {
			e := &(*list)[i]
			e.n = min(e.n, max(end, e.start)-e.start)
		}
		*list = slices.DeleteFunc(*list, func(e extent) bool { return e.n == 0 })
	}
}

// put adds clusters that the search for free ones has found.
func (p *pool) put(e extent) { p.fresh = appendExtent(p.fresh, e) }

// recycle adds clusters that have been in use, or whose use failed; part of them
// may have been written.
func (p *pool) recycle(e extent) {
	e.virgin = false
	p.recycled = appendExtent(p.recycled, e)
}

// appendExtent appends e to list, merging it with the last extent if it follows.
func appendExtent(list []extent, e extent) []extent {
	if k := len(list) - 1; k >= 0 && list[k].start+list[k].n == e.start && list[k].virgin == e.virgin {
		list[k].n += e.n
		return list
	}
	return append(list, e)
}

// claim is a run of guest clusters [guest, guest+n) whose host clusters one
// request changes outside the lock, in a way that others may not see half done.
// Until it is over, writes to the same guest clusters wait.
type claim struct {
	guest, n uint64
	done     chan struct{} // made by the first to wait, closed at the end
}

// allocation is a claim to guest clusters whose new host clusters are being
// filled. Until it is published, reads see the old contents.
type allocation struct {
	claim
	host extent
	// reused says that the host clusters are those that the L2 entries have
	// already, with room for what is not in them.
	reused bool
	// [from, to) are the guest bytes that are filled. It begins and ends with
	// subclusters, but for those that need no more than the request brings.
	from, to    int64
	first, last entry // what the first and the last guest cluster were
	slice       *slice
}

func (a *claim) end() uint64 { return a.guest + a.n }

// wait returns the channel that is closed when a is over. Image.mu is held
// exclusively.
func (a *claim) wait() <-chan struct{} {
	if a.done == nil {
		a.done = make(chan struct{})
	}
	return a.done
}

// inflight holds the claims of requests under way, ascending and disjoint. It is
// guarded by Image.mu.
type inflight struct {
	list []*claim
}

// overlapping returns the first claim that ends after guest cluster c, nil if
// there is none.
func (f *inflight) overlapping(c uint64) *claim {
	i := f.search(c)
	if i == len(f.list) {
		return nil
	}
	return f.list[i]
}

// search returns the index of the first claim that ends after c.
func (f *inflight) search(c uint64) int {
	i, _ := slices.BinarySearchFunc(f.list, c, func(a *claim, c uint64) int {
		if a.end() <= c {
			return -1
		}
		return 1
	})
	return i
}

func (f *inflight) add(a *claim) {
	f.list = slices.Insert(f.list, f.search(a.guest), a)
}

func (f *inflight) remove(a *claim) {
	i := f.search(a.guest)
	f.list = slices.Delete(f.list, i, i+1)
	if a.done != nil {
		close(a.done)
	}
}

// freeBatch is a set of host clusters that lost a reference, with the epoch in
// which that happened at the latest. Once the removal of the pointers is durable
// and the epoch is over, their counts are lowered, and those that reach zero are
// punched and return to the pool.
type freeBatch struct {
	epoch    uint64
	clusters []uint64
}

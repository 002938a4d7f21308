package qcow2

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"slices"
)

// cut is a way in which a power cut may leave a file. Of the events before
// index at of the log, those that a completed sync covers are in the file; of
// the others, keep tells which.
type cut struct {
	at   int
	keep keeping
	one  int    // the event of keepOne and dropOne
	size sizing // what becomes of the file's length
	seed uint64 // of what is random
}

type keeping uint8

const (
	keepAll keeping = iota // a killed process
	keepOne
	dropOne
	keepData // writes of guest data only
	keepMetadata
	keepPunches
	dropPunches
	keepSome  // each with even odds
	keepMost  // each but one in eight
	keepTorn  // each 512 bytes with even odds
	keepPages // each 4 KiB with even odds
	keepings  // how many there are
)

func (k keeping) String() string {
	return [...]string{
		"prefix", "one write alone", "one write lost", "data only", "metadata only", "holes only", "no holes",
		"some writes", "most writes", "torn at 512 bytes", "torn at 4 KiB",
	}[k]
}

// sizing is what becomes of the length of a file. File systems write it on their
// own time.
type sizing uint8

const (
	sizeFits  sizing = iota // as far as what was kept reaches
	sizeLate                // as at the last sync: what lies beyond is lost
	sizeTorn                // anywhere between
	sizeEarly               // as far as all that was written reaches
)

// state is the file as a power cut may leave it, and the external data file where
// there is one. Both are valid until the next.
type state struct {
	cut       int
	what      string
	data, ext []byte
}

// file returns a file with copies of what s has.
func (s state) file() *memFile {
	return (&memFile{data: bytes.Clone(s.data)}).withExt(bytes.Clone(s.ext))
}

// random says which cuts are chosen at random until there are enough.
var random = []keeping{keepSome, keepSome, keepMost, keepMost, keepTorn, keepPages}

// cuts returns n cuts, ascending: of all that are systematic a random part, if
// they are too many, else all, filled up with random ones.
func cuts(log []event, r *rand.Rand, n int) []cut {
	var all []cut
	var ends []int  // of the events that a power cut may lose in part
	var base [2]int // of the file and of its data file
	for k := range log {
		e := &log[k]
		if e.kind == evSyncEnd {
			base[b2int(e.ext)] = e.sync
		}
		if e.changes() {
			all = append(all, cut{at: k + 1})
			ends = append(ends, k+1)
			continue
		}
		if e.kind == evMark && e.note != "flush" {
			continue
		}
		all = append(all, systematic(log[:k+1], base)...)
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:min(n*2/3, len(all))]
	for len(all) < n && len(ends) > 0 {
		all = append(all, cut{
			at: ends[r.IntN(len(ends))], keep: random[r.IntN(len(random))], size: sizing(r.UintN(4)), seed: r.Uint64(),
		})
	}
	slices.SortStableFunc(all, func(a, b cut) int { return cmp.Compare(a.at, b.at) })
	return all
}

// systematic returns the cuts at the end of the log that lose or keep one event
// or one kind of events, none of those of a file before its base.
func systematic(log []event, base [2]int) []cut {
	var all []cut
	for i := min(base[0], base[1]); i < len(log); i++ {
		if log[i].changes() && i >= base[b2int(log[i].ext)] {
			all = append(all, cut{at: len(log), keep: keepOne, one: i}, cut{at: len(log), keep: dropOne, one: i})
		}
	}
	if len(all) < 4 {
		return all
	}
	for keep := keepData; keep <= dropPunches; keep++ {
		all = append(all, cut{at: len(log), keep: keep})
	}
	for _, size := range []sizing{sizeLate, sizeTorn} {
		all = append(all, cut{at: len(log), size: size, seed: uint64(len(log))})
	}
	return all
}

// states calls check with n of the states in which a power cut may leave the
// file, until it returns false, and returns how many it has seen.
func (run *crashRun) states(r *rand.Rand, n int, check func(state) bool) int {
	return run.statesAt(cuts(run.f.log, r, n), check)
}

// statesAt calls check with the state of each cut, ascending, until it returns
// false, and returns how many it has seen.
func (run *crashRun) statesAt(all []cut, check func(state) bool) int {
	// Everything of a file before log[base] is durable.
	durable := [2][]byte{bytes.Clone(run.start), bytes.Clone(run.startExt)}
	var base [2]int
	var files [2][]byte
	next := 0
	for i, c := range all {
		for ; next < c.at; next++ {
			if e := &run.f.log[next]; e.kind == evSyncEnd {
				k := b2int(e.ext)
				for ; base[k] < e.sync; base[k]++ {
					if p := &run.f.log[base[k]]; p.ext == e.ext {
						durable[k] = p.apply(durable[k])
					}
				}
			}
		}
		for k := range files {
			files[k] = append(files[k][:0], durable[k]...)
		}
		c.build(&files, run.f.log, base)
		s := state{cut: c.at, what: c.keep.String(), data: files[0]}
		if run.startExt != nil {
			s.ext = files[1]
		}
		if !check(s) {
			return i + 1
		}
	}
	return len(all)
}

// afterLost returns up to n of the cuts, those between the loss of a barrier and
// the second sync after it.
func afterLost(log []event, all []cut, n int) []cut {
	left := make([]int, len(log)+1) // by at, the syncs to come until the end
	for i, e := range log {
		left[i+1] = left[i]
		switch {
		case e.kind == evMark && e.note == barrierLost:
			left[i+1] = 2
		case e.kind == evSyncEnd:
			left[i+1] = max(left[i]-1, 0)
		}
	}
	all = slices.DeleteFunc(all, func(c cut) bool { return left[c.at] == 0 })
	if len(all) > n { // evenly
		for i := range n {
			all[i] = all[i*len(all)/n]
		}
		all = all[:n]
	}
	return all
}

// build adds to the files, which are durable, what c keeps of the events from
// their bases on. What becomes of the length concerns the image.
func (c *cut) build(files *[2][]byte, log []event, base [2]int) {
	r := rand.New(rand.NewPCG(c.seed, 0))
	late, early := int64(len(files[0])), int64(len(files[0]))
	for i := min(base[0], base[1]); i < c.at; i++ {
		e := &log[i]
		k := b2int(e.ext)
		if !e.changes() || i < base[k] {
			continue
		}
		if !e.ext && e.kind == evTruncate {
			late, early = min(late, e.off), max(early, e.off)
		} else if !e.ext {
			early = max(early, e.off+int64(len(e.data)))
		}
		files[k] = c.add(files[k], e, i, r)
	}
	switch n := int64(len(files[0])); {
	case c.size == sizeLate:
		files[0] = truncate(files[0], min(n, late))
	case c.size == sizeTorn && n > late:
		files[0] = truncate(files[0], late+r.Int64N(n-late)&^(sector-1))
	case c.size == sizeEarly:
		files[0] = truncate(files[0], max(n, early))
	}
}

// add adds what c keeps of event e, with index i in the log.
func (c *cut) add(data []byte, e *event, i int, r *rand.Rand) []byte {
	keep := true
	switch c.keep {
	case keepOne:
		keep = i == c.one
	case dropOne:
		keep = i != c.one
	case keepData:
		keep = e.kind == evWrite && stamped(e.data)
	case keepMetadata:
		keep = e.kind != evWrite || !stamped(e.data)
	case keepPunches:
		keep = e.kind == evPunch
	case dropPunches:
		keep = e.kind != evPunch
	case keepSome:
		keep = r.IntN(2) == 0
	case keepMost:
		keep = r.IntN(8) != 0
	case keepTorn, keepPages:
		if e.kind != evTruncate {
			return c.tear(data, e, r)
		}
		keep = r.IntN(2) == 0
	}
	if !keep {
		return data
	}
	return e.apply(data)
}

// tear adds some of the pieces of a write.
func (c *cut) tear(data []byte, e *event, r *rand.Rand) []byte {
	piece := int64(sector)
	if c.keep == keepPages {
		piece = 4096
	}
	for off, end := e.off, e.off+int64(len(e.data)); off < end; {
		next := min((off/piece+1)*piece, end)
		if r.IntN(2) == 0 {
			data = apply(data, e.data[off-e.off:next-e.off], off)
		}
		off = next
	}
	return data
}

package qcow2

import (
	"encoding/binary"
	"fmt"
)

// verdict is what checkImage finds.
type verdict struct {
	corruptions []string
	leaks       int
}

func (v *verdict) corrupt(format string, args ...any) {
	v.corruptions = append(v.corruptions, fmt.Sprintf(format, args...))
}

// checkImage is a checker for the tests, for images without snapshots and
// bitmaps: it counts the references to each host cluster with as little as
// possible of the engine's own code and compares them with the image's counts
// and COPIED flags.
func checkImage(b []byte) verdict {
	v, _ := inspect(b)
	return v
}

// referenced returns the number of references to each host cluster in use.
func referenced(b []byte) map[uint64]uint64 {
	_, refs := inspect(b)
	return refs
}

func inspect(b []byte) (v verdict, refs map[uint64]uint64) {
	be := binary.BigEndian
	at := func(off uint64) uint64 {
		if off+8 > uint64(len(b)) {
			return 0
		}
		return be.Uint64(b[off:])
	}
	bits := be.Uint32(b[20:])
	cs := uint64(1) << bits
	order := uint(4)
	if be.Uint32(b[4:]) == 3 {
		order = uint(be.Uint32(b[96:]))
	}
	refs = map[uint64]uint64{}
	ref := func(off, n uint64, what string) {
		if off+n > uint64(len(b))+cs {
			v.corrupt("%s at %#x is past the end of the file", what, off)
			return
		}
		for c := off >> bits; c<<bits < off+n; c++ {
			refs[c]++
		}
	}
	ref(0, cs, "header")
	l1, l1n := be.Uint64(b[40:]), uint64(be.Uint32(b[36:]))
	ref(l1, l1n*8, "L1 table")
	rt, rtn := be.Uint64(b[48:]), uint64(be.Uint32(b[56:]))<<bits
	ref(rt, rtn, "refcount table")
	for i := range rtn / 8 {
		if e := at(rt + 8*i); e != 0 {
			ref(e, cs, "refcount block")
		}
	}
	type owned struct{ entry, cluster uint64 }
	var owners []owned
	for i := range l1n {
		e := at(l1 + 8*i)
		if e == 0 {
			continue
		}
		table := e & entryOffset
		ref(table, cs, "L2 table")
		owners = append(owners, owned{e, table >> bits})
		for j := range cs / 8 {
			e := at(table + 8*j)
			off := e & entryOffset
			switch {
			case e&entryCompressed != 0:
				x := 62 - (uint64(bits) - 8)
				off := e & (1<<x - 1)
				n := (e>>x&(1<<(bits-8)-1)+1)*512 - off&511
				ref(off, min(n, uint64(len(b))-off), "compressed data")
			case off != 0:
				ref(off, cs, "data")
				owners = append(owners, owned{e, off >> bits})
			}
		}
	}
	perBlock := cs * 8 >> order
	counted := func(c uint64) uint64 {
		block := at(rt + c/perBlock*8)
		if c/perBlock >= rtn/8 || block == 0 || block+cs > uint64(len(b))+cs {
			return 0
		}
		whole := make([]byte, cs)
		if block < uint64(len(b)) {
			copy(whole, b[block:])
		}
		return count(whole, order, c%perBlock)
	}
	for _, o := range owners {
		if o.entry&entryCopied != 0 && refs[o.cluster] != 1 {
			v.corrupt("cluster %#x is COPIED and has %d references", o.cluster, refs[o.cluster])
		}
	}
	for c := range uint64(len(b))>>bits + 2 {
		switch have, want := counted(c), refs[c]; {
		case have < want:
			v.corrupt("cluster %#x has count %d and %d references", c, have, want)
		case have > want:
			v.leaks++
		}
	}
	return v, refs
}

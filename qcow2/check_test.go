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

// checkImage is a checker for the tests, for images without bitmaps: it counts
// the references to each host cluster with as little as possible of the engine's
// own code and compares them with the image's counts and COPIED flags.
func checkImage(b []byte) verdict {
	v, _ := inspect(b)
	return v
}

// referenced returns the number of references to each host cluster in use.
func referenced(b []byte) map[uint64]uint64 {
	_, refs := inspect(b)
	return refs
}

// inspector is an image being checked.
type inspector struct {
	verdict
	b     []byte
	bits  uint32
	order uint
	words uint64 // of 8 bytes in an L2 entry
	data  bool   // whether data is in a file of its own
	refs  map[uint64]uint64
	owned map[uint64]uint64 // COPIED entries by the cluster they point to
}

func inspect(b []byte) (verdict, map[uint64]uint64) {
	be := binary.BigEndian
	x := &inspector{b: b, bits: be.Uint32(b[20:]), order: 4, words: 1, refs: map[uint64]uint64{}, owned: map[uint64]uint64{}}
	if be.Uint32(b[4:]) == 3 {
		x.order = uint(be.Uint32(b[96:]))
		x.data = b[offIncompatible+7]>>incompatDataFile&1 != 0
		x.words += uint64(b[offIncompatible+7] >> incompatExtendedL2 & 1)
	}
	cs := uint64(1) << x.bits
	x.ref(0, cs, "header")
	rt, rtn := be.Uint64(b[48:]), uint64(be.Uint32(b[56:]))<<x.bits
	x.ref(rt, rtn, "refcount table")
	for i := range rtn / 8 {
		if e := x.at(rt + 8*i); e != 0 {
			x.ref(e, cs, "refcount block")
		}
	}
	x.tree(be.Uint64(b[40:]), uint64(be.Uint32(b[36:])), true)
	table := be.Uint64(b[64:])
	off := table
	for range be.Uint32(b[60:]) {
		if off+40 > uint64(len(b)) {
			x.corrupt("the snapshot table at %#x is past the end of the file", table)
			return x.verdict, x.refs
		}
		s := b[off:]
		x.tree(be.Uint64(s), uint64(be.Uint32(s[8:])), false)
		off += (40 + uint64(be.Uint16(s[12:])) + uint64(be.Uint16(s[14:])) + uint64(be.Uint32(s[36:])) + 7) &^ 7
	}
	x.ref(table, off-table, "snapshot table")
	x.persistent()
	x.compare(rt, rtn)
	return x.verdict, x.refs
}

// persistent follows the directory of the persistent bitmaps, unless they are void.
func (x *inspector) persistent() {
	be := binary.BigEndian
	if be.Uint32(x.b[4:]) != 3 || x.b[offAutoclear+7]&1 == 0 {
		return
	}
	for off := uint64(be.Uint32(x.b[100:])); off+8 <= 1<<x.bits && x.at(off) != 0; {
		kind, n := x.at(off)>>32, x.at(off)&0xffffffff
		off += 8
		if kind == extBitmaps {
			x.directory(x.at(off)>>32, x.at(off+8), x.at(off+16))
		}
		off += (n + 7) &^ 7
	}
}

// directory follows the directory of n bitmaps at off.
func (x *inspector) directory(n, size, off uint64) {
	x.ref(off, size, "directory of bitmaps")
	for range n {
		table, entries := x.at(off), x.at(off+8)>>32
		x.ref(table, entries*8, "table of a bitmap")
		for i := range min(entries, uint64(len(x.b))) {
			if data := x.at(table+8*i) & entryOffset; data != 0 {
				x.ref(data, 1<<x.bits, "data of a bitmap")
			}
		}
		off += (24 + x.at(off+16)>>32&0xffff + x.at(off+16)&0xffffffff + 7) &^ 7
	}
}

// at reads the 8 bytes at off.
func (x *inspector) at(off uint64) uint64 {
	if off+8 > uint64(len(x.b)) {
		return 0
	}
	return binary.BigEndian.Uint64(x.b[off:])
}

// ref counts a reference to the clusters of the n bytes at off.
func (x *inspector) ref(off, n uint64, what string) {
	if off+n > uint64(len(x.b))+1<<x.bits {
		x.corrupt("%s at %#x is past the end of the file", what, off)
		return
	}
	for c := off >> x.bits; c<<x.bits < off+n; c++ {
		x.refs[c]++
	}
}

// tree follows the L1 table at off, of n entries.
func (x *inspector) tree(off, n uint64, active bool) {
	cs := uint64(1) << x.bits
	x.ref(off, n*8, "L1 table")
	for i := range n {
		e := x.at(off + 8*i)
		if e == 0 {
			continue
		}
		table := e & entryOffset
		x.ref(table, cs, "L2 table")
		x.own(e, table, active)
		for j := uint64(0); j < cs/8; j += x.words {
			e := x.at(table + 8*j)
			if x.words == 2 {
				x.bitmaps(e, x.at(table+8*j+8))
			}
			switch host := e & entryOffset; {
			case e&entryCompressed != 0:
				width := 62 - (x.bits - 8)
				host := e & (1<<width - 1)
				n := (e>>width&(1<<(x.bits-8)-1)+1)*512 - host&511
				x.ref(host, min(n, uint64(len(x.b))-host), "compressed data")
			case host != 0 && !x.data:
				x.ref(host, cs, "data")
				x.own(e, host, active)
			}
		}
	}
}

// bitmaps checks the bitmaps of an extended entry: no subcluster is data and zero,
// and none is data where there is no cluster.
func (x *inspector) bitmaps(e, b uint64) {
	if e&entryCompressed == 0 && (b&(b>>32)&0xffffffff != 0 || e&entryOffset == 0 && b&0xffffffff != 0 && !x.data) {
		x.corrupt("the entry %#x has the bitmaps %#x", e, b)
	}
}

func (x *inspector) own(e, off uint64, active bool) {
	if active && e&entryCopied != 0 {
		x.owned[off>>x.bits] = e
	}
}

// compare compares the references with the counts of the table at rt, of n
// bytes.
func (x *inspector) compare(rt, n uint64) {
	for c, e := range x.owned {
		if x.refs[c] != 1 {
			x.corrupt("entry %#x is COPIED and its cluster has %d references", e, x.refs[c])
		}
	}
	cs := uint64(1) << x.bits
	perBlock := cs * 8 >> x.order
	block := make([]byte, cs)
	for c := range uint64(len(x.b))>>x.bits + 2 {
		if c%perBlock == 0 {
			clear(block)
			if off := x.at(rt + c/perBlock*8); c/perBlock < n/8 && off != 0 && off < uint64(len(x.b)) {
				copy(block, x.b[off:])
			}
		}
		switch have, want := count(block, x.order, c%perBlock), x.refs[c]; {
		case have < want:
			x.corrupt("cluster %#x has count %d and %d references", c, have, want)
		case have > want && c<<x.bits < uint64(len(x.b)): // what is beyond the file takes no room
			x.leaks++
		}
	}
}

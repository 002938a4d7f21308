package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// patient is an image to break and to repair under crashes.
type patient struct {
	b     []byte
	model []byte // what its guest sees
	l1    []uint64
	table []uint64 // of the counts
}

const patientCluster = 1024

// newPatient returns a sound image of two L2 tables, and if QEMU is to be had with
// a snapshot.
func newPatient(t *testing.T) *patient {
	t.Helper()
	r := newSeed(t)
	path := create(t, CreateOptions{Size: 256 << 10, ClusterSize: patientCluster})
	p := &patient{model: make([]byte, 256<<10)}
	m := open(t, path, Options{})
	write := func(off, n int) {
		fillRandom(r, p.model[off:off+n])
		must(t, m.WritevAt([][]byte{p.model[off : off+n]}, int64(off)))
	}
	write(0, 60<<10)
	write(150<<10, 20<<10)
	closeImage(t, m)
	if _, err := exec.LookPath("qemu-img"); err == nil {
		qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	}
	m = open(t, path, Options{})
	write(0, 30<<10)
	write(150<<10, 5<<10)
	p.l1, p.table = m.l1, m.refs.table
	closeImage(t, m)
	p.b = readFile(t, path)
	return p
}

// entry is where the L2 entry of guest cluster c is in the file.
func (p *patient) entry(c int64) int64 {
	const perTable = patientCluster / 8
	return int64(p.l1[c/perTable]&entryOffset) + c%perTable*8
}

// sees makes guest cluster c of the model what the file has at off.
func (p *patient) sees(c, off int64) {
	copy(p.model[c*patientCluster:(c+1)*patientCluster], p.b[off:])
}

// wounds are the ways to break it, by what a repair has to do.
var wounds = map[string]func(p *patient){
	"counts too high": func(p *patient) {
		for i := range int64(40) {
			p.b[int64(p.table[0])+i*2+1] += byte(i % 3)
		}
	},
	"counts too low": func(p *patient) { clear(p.b[p.table[0]+10 : p.table[0]+patientCluster]) },
	"table entry":    func(p *patient) { put(p.b, 0x400, 8, 0x600) },
	"no table":       func(p *patient) { put(p.b, offRefTable, 8, 0); put(p.b, offRefTable+8, 4, 0) },
	"no block":       func(p *patient) { put(p.b, 0x400, 8, 0) },
	"block shared": func(p *patient) {
		put(p.b, p.entry(3), 8, entryCopied|p.table[0])
		p.sees(3, int64(p.table[0]))
	},
	"table in the data": func(p *patient) {
		put(p.b, p.entry(3), 8, p.l1[1])
		p.sees(3, p.entry(128))
	},
	"table in the data, counted": func(p *patient) {
		put(p.b, p.entry(3), 8, p.l1[1]&^entryCopied)
		put(p.b, int64(p.at(40))+8, 8, p.l1[1]&^entryCopied)
		p.sees(3, p.entry(128))
		put(p.b, p.count(p.l1[1]), 2, 2)
		for c := range uint64(len(p.b) / patientCluster) {
			if at := p.count(c * patientCluster); p.b[at+1] == 0 {
				p.b[at+1] = 1 // what is free leaks, and is counted right once it is used
			}
		}
	},
	"reserved zeroes": func(p *patient) {
		for c := range int64(5) {
			put(p.b, p.entry(c), 8, 0x8000000000001201)
			clear(p.model[c*patientCluster:][:patientCluster])
		}
	},
	"snapshot table": func(p *patient) {
		table := int64(p.at(64))
		put(p.b, table+36, 4, 0)
	},
	"all at once": func(p *patient) {
		put(p.b, 0x400, 8, 0x600)
		put(p.b, p.entry(100), 8, 0x8000000000001201)
		put(p.b, p.entry(3), 8, p.l1[1])
		p.sees(3, p.entry(128))
		put(p.b, int64(p.at(64))+36, 4, 0)
	},
}

// count is where the count of the cluster that entry e points to is.
func (p *patient) count(e uint64) int64 {
	c := e & entryOffset / patientCluster
	return int64(p.table[c/512] + c%512*2)
}

func (p *patient) at(off uint64) uint64 { return (&inspector{b: p.b}).at(off) }

// TestRepairCrash cuts the power at every point of a repair, and fails each of
// its file operations. What the guest sees is the same in each state, if the
// image could be read before, there are no more corruptions than before, and
// another repair ends the work.
func TestRepairCrash(t *testing.T) {
	for name, wound := range wounds {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			if p.at(64) == 0 && (name == "snapshot table" || name == "all at once") {
				t.Skip("there is no snapshot without qemu-img")
			}
			wound(p)
			put(p.b, offIncompatible, 8, 1<<incompatDirty|1<<incompatCorrupt)
			put(p.b, offAutoclear, 8, 1<<63)
			p.crash(t, RepairAll)
		})
	}
	t.Run("snapshot table at the end of the file", func(t *testing.T) {
		s := specimenOf(t, "cluster_size=64k", 256<<10, "write -P 1 0 65536", "snapshot", "write -P 2 0 65536")
		entry := s.data[binary.BigEndian.Uint64(s.data[64:]):]
		s = s.withSnapshots(t, 1, snapshotEntry(entry, 8))
		(&patient{b: s.data, model: s.model}).crash(t, RepairAll)
	})
	t.Run("leaks", func(t *testing.T) {
		p := &patient{}
		p.b, p.model = leaky(t)
		p.crash(t, RepairLeaks)
	})
}

func (p *patient) crash(t *testing.T, mode RepairMode) {
	readable, faults := p.sameData(p.b) == nil, len(checkImage(p.b).corruptions)
	run := &crashRun{start: p.b, f: &memFile{data: append([]byte(nil), p.b...), rec: true}}
	ops := 0
	run.f.setFail(func(string) error { ops++; return nil })
	before, after, err := repairIn(t.Context(), run.f, "memory", mode, CheckOptions{})
	if err != nil || before.Clean() || !after.Clean() {
		t.Fatalf("%+v, then %+v (%v)", before, after, err)
	}
	states := 500
	if brief() {
		states = 100
	}
	n := run.states(newSeed(t), states, func(s state) bool {
		err := p.sound(t, mode, s.data)
		if err == nil && readable {
			err = p.sameData(s.data)
		}
		if v := checkImage(s.data); err == nil && len(v.corruptions) > faults {
			err = fmt.Errorf("more corruptions than the %d at first: %v", faults, v.corruptions)
		}
		if err != nil {
			t.Errorf("%s at %d: %v", s.what, s.cut, err)
			writeFile(t, filepath.Join(t.TempDir(), "state"), s.data)
		}
		return err == nil
	})
	t.Logf("%d states, %d operations", n, ops)
	for at := 1; at <= ops; at++ {
		f := &memFile{data: append([]byte(nil), p.b...)}
		n, hit := 0, ""
		f.setFail(func(op string) error {
			if n++; n == at {
				hit = op
				return syscall.EIO
			}
			return nil
		})
		// The host need not take back what it is offered.
		if _, _, err := repairIn(t.Context(), f, "memory", mode, CheckOptions{}); (err == nil) != (hit == "punch") {
			t.Errorf("operation %d, a %s, failed: %v", at, hit, err)
		}
		if err := p.sound(t, mode, f.data); err != nil {
			t.Errorf("after the failure of operation %d: %v", at, err)
		}
	}
}

// sound repairs a copy of data, which then opens for writing, has the model's
// data, and is sound in the eyes of the tests' own checker.
func (p *patient) sound(t *testing.T, mode RepairMode, data []byte) error {
	f := &memFile{data: append([]byte(nil), data...)}
	before, after, err := repairIn(t.Context(), f, "memory", mode, CheckOptions{})
	if err != nil || !after.Clean() {
		return fmt.Errorf("%+v, then %+v (%w)", before, after, err)
	}
	m, err := openFile(f, "memory", Options{}, &chain{})
	if err == nil {
		err = m.Close()
	}
	if err == nil {
		err = p.sameData(f.data)
	}
	if v := checkImage(f.data); err == nil && (len(v.corruptions) > 0 || v.leaks > 0) {
		err = fmt.Errorf("the tests' checker finds %v and %d leaks", v.corruptions, v.leaks)
	}
	return err
}

// sameData compares what the guest of the image in data sees with the model.
func (p *patient) sameData(data []byte) error {
	m, err := openFile(&memFile{data: data}, "memory", Options{ReadOnly: true}, &chain{})
	if err != nil {
		return err
	}
	got := make([]byte, m.Size())
	if err := m.ReadvAt([][]byte{got}, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, p.model) {
		return fmt.Errorf("the guest sees other data")
	}
	return m.Close()
}

// TestRepairKeeps shows that while a pointer is broken, no repair lets go of a
// cluster that it may have led to, not even one whose count is lost.
func TestRepairKeeps(t *testing.T) {
	for name, lose := range map[string]func(p *patient){
		"counted": func(*patient) {},
		"lost":    wounds["no table"],
	} {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			good := append([]byte(nil), p.b[p.entry(0):][:60*8]...)
			for c := range int64(60) {
				put(p.b, p.entry(c), 8, entryCopied|uint64(len(p.b)+patientCluster))
			}
			lose(p)
			f := &memFile{data: append([]byte(nil), p.b...)}
			_, after, err := repairIn(t.Context(), f, "memory", RepairAll, CheckOptions{})
			must(t, err)
			if after.Leaks == 0 {
				t.Errorf("after the repair: %+v", after)
			}
			if table := (&inspector{b: f.data}).at(offRefTable); name == "lost" && table < uint64(len(p.b)) {
				t.Errorf("the new table, at %#x, is where the lost data may be", table)
			}
			if seen := guestView(f.data)[0]; !bytes.Equal(seen, make([]byte, patientCluster)) {
				t.Error("the guest sees something where it saw zeros, beyond the end of the file")
			}
			copy(f.data[p.entry(0):], good)
			must(t, p.sound(t, RepairAll, f.data))
		})
	}
}

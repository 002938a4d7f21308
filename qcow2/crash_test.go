package qcow2

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
)

// crashStates is how many states TestCrash makes, of all workloads together. If it
// is not 0, this is the long run, in which TestFaults tries every fault.
var crashStates = flag.Int("states", 0, "states of TestCrash, with all faults of TestFaults; 0 is as many as the mode of testing allows")

// workloads are what crashes and faults are tried on.
var workloads = []workload{
	{name: "512", opts: CreateOptions{Size: 192 << 10, ClusterSize: 512}, queues: 1, ops: 120, mix: mixedMix},
	{name: "4K", opts: CreateOptions{Size: 256 << 10, ClusterSize: 4096, Version: 2}, queues: 1, ops: 100, mix: mixedMix},
	{name: "64K", opts: CreateOptions{Size: 512 << 10, RefcountBits: 8}, queues: 1, ops: 60, mix: mixedMix + " reopen"},
	{name: "short backing", opts: CreateOptions{Size: 128 << 10, ClusterSize: 4096}, under: 70 << 10, queues: 1, ops: 100, mix: mixedMix + " bitmap"},
	{name: "512 over compressed", opts: CreateOptions{Size: 96 << 10, ClusterSize: 512}, under: 64 << 10, packed: true, queues: 1, ops: 80, mix: mixedMix},
	// A refcount block counts 64 clusters here, and the first table all of 2 MiB.
	{name: "refcounts grow", opts: CreateOptions{Size: 512 << 10, ClusterSize: 512, RefcountBits: 64}, queues: 1, ops: 100, mix: growthMix},
	{name: "table grows", opts: CreateOptions{Size: 2<<20 + 64<<10, ClusterSize: 512, RefcountBits: 64}, prepare: snapshotted(1960 << 10), queues: 1, ops: 40, mix: "write flush flush", slow: true},
	{name: "narrow counts, queues", opts: CreateOptions{Size: 256 << 10, ClusterSize: 4096, RefcountBits: 1}, queues: 4, ops: 40, mix: mixedMix},
	{name: "overlay, queues", opts: CreateOptions{Size: 128 << 10, ClusterSize: 512}, under: 64 << 10, queues: 4, ops: 40, mix: mixedMix},
	{name: "compressed, reused", opts: CreateOptions{Size: 256 << 10, ClusterSize: 4096}, full: true, queues: 2, ops: 80, mix: mixedMix},
	{name: "storm", opts: CreateOptions{Size: 128 << 10, ClusterSize: 1024}, queues: 2, ops: 80, mix: stormMix + " reopen"},
	{name: "snapshot", opts: CreateOptions{Size: 128 << 10, ClusterSize: 1024}, prepare: snapshotted(64 << 10), queues: 1, ops: 80, mix: mixedMix},
	{name: "autoclear", opts: CreateOptions{Size: 64 << 10, ClusterSize: 4096}, prepare: unknownFeature, queues: 1, ops: 30, mix: mixedMix},
	{name: "packed", opts: CreateOptions{Size: 128 << 10, ClusterSize: 4096}, queues: 1, ops: 100, mix: packedMix},
	{name: "packed, queues", opts: CreateOptions{Size: 128 << 10, ClusterSize: 4096, RefcountBits: 4}, queues: 3, ops: 40, mix: packedMix},
	{name: "packed, 512", opts: CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 2}, queues: 1, ops: 100, mix: packedMix + " reopen"},
	{name: "resized", opts: CreateOptions{Size: 96 << 10, ClusterSize: 512}, queues: 2, ops: 50, mix: resizeMix + " bitmap bitmap"},
	{name: "resized, long backing", opts: CreateOptions{Size: 64 << 10, ClusterSize: 1024, RefcountBits: 64}, under: 96 << 10, queues: 1, ops: 80, mix: mixedMix + " resize resize"},
	{name: "resized, snapshot", opts: CreateOptions{Size: 64 << 10, ClusterSize: 512}, prepare: snapshotted(48 << 10), queues: 1, ops: 60, mix: "write write pack discard flush resize resize reopen"},
	{name: "subclusters", opts: CreateOptions{Size: 512 << 10, ClusterSize: 16 << 10, ExtendedL2: true}, queues: 2, ops: 60, mix: mixedMix + " discard"},
	{name: "subclusters, packed", opts: CreateOptions{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true}, queues: 2, ops: 60, mix: wholeMix},
	{name: "subclusters over backing", opts: CreateOptions{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true}, under: 130 << 10, queues: 1, ops: 80, mix: mixedMix + " reopen resize"},
	{name: "snapshots", opts: CreateOptions{Size: 96 << 10, ClusterSize: 512}, queues: 2, ops: 50, mix: snapMix + " bitmap"},
	{name: "snapshots, resized, packed", opts: CreateOptions{Size: 128 << 10, ClusterSize: 4096, RefcountBits: 32}, under: 50 << 10, queues: 1, ops: 70, mix: snapMix + " resize pack pack reopen"},
	{name: "snapshots of subclusters", opts: CreateOptions{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true}, prepare: snapshotted(64 << 10), queues: 1, ops: 60, mix: snapMix},
	{name: "data file", opts: CreateOptions{Size: 128 << 10, ClusterSize: 4096}, data: true, queues: 2, ops: 50, mix: mixedMix + " bitmap"},
	{name: "data file over backing", opts: CreateOptions{Size: 96 << 10, ClusterSize: 512}, under: 50 << 10, data: true, queues: 1, ops: 80, mix: mixedMix + " resize reopen"},
	{name: "raw data file", opts: CreateOptions{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true, DataFileRaw: true}, data: true, queues: 1, ops: 80, mix: mixedMix + " resize"},
	{name: "host full", opts: CreateOptions{Size: 128 << 10, ClusterSize: 512}, under: 32 << 10, queues: 2, ops: 60, mix: mixedMix, fails: 8},
}

// filled returns the preparation that writes the first n bytes of the disk.
func filled(n uint64) func(testing.TB, string) {
	return func(t testing.TB, path string) {
		m := open(t, path, Options{})
		must(t, m.WritevAt([][]byte{stamps(0, n/sector, 1)}, 0))
		closeImage(t, m)
	}
}

// snapshotted is filled with an internal snapshot taken then, so that every write
// to those bytes makes new clusters.
func snapshotted(n uint64) func(testing.TB, string) {
	return func(t testing.TB, path string) {
		filled(n)(t, path)
		qemu(t, "qemu-img", "snapshot", "-c", "s", path)
	}
}

// unknownFeature marks the image as having data of a feature that a writer which
// does not know it makes void.
func unknownFeature(t testing.TB, path string) {
	filled(32<<10)(t, path)
	b, err := os.ReadFile(path)
	must(t, err)
	b[offAutoclear] = 0x80
	writeFile(t, path, b)
}

// TestCrash cuts the power at many points of many workloads, in many ways, and
// applies every oracle to what is left.
func TestCrash(t *testing.T) {
	total := *crashStates
	switch {
	case total > 0:
	case testing.Short():
		total = 1200
	case raceEnabled:
		total = 5200
	default:
		total = 20000
	}
	var sum counts
	for _, w := range workloads {
		t.Run(w.name, func(t *testing.T) {
			r := newSeed(t)
			run := record(t, w, r, nil)
			o := newOracles(t, run, w, r)
			n := 1 + total/(len(workloads)-1)
			if w.slow {
				n = total / 50
			}
			run.states(r, n, func(s state) bool {
				if err := o.judge(s); err != nil {
					keep(t, s)
					t.Error(err)
				}
				return !t.Failed()
			})
			t.Log(o.counts)
			sum.add(o.counts)
		})
	}
	t.Log(sum)
}

// keep saves a state that an oracle has found wrong, if the environment names a
// directory for them.
func keep(t testing.TB, s state) {
	if dir := os.Getenv("CALF_STATES"); dir != "" {
		writeFile(t, filepath.Join(dir, "state.qcow2"), s.data)
	}
}

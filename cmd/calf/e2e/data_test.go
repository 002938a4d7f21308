package e2e

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// What one boot wrote and synced, the next one finds.
func TestPersistence(t *testing.T) {
	eachKernel(t, func(t *testing.T, k lab.Kernel) {
		im := newImages(t)
		root := im.overlay(im.baseQCOW2())
		first := guest{kernel: k, cpus: 2, disks: []string{root}, script: `
			dd if=/dev/urandom of=/data bs=64k count=100 2>/dev/null
			sync
			echo sum=$(cksum </data)
			poweroff -f`}.start(t)
		first.exits(0)
		im.check(root, checkClean)
		second := guest{kernel: k, cpus: 2, disks: []string{root}, script: `
			echo sum=$(cksum </data)
			poweroff -f`}.start(t)
		second.exits(0)
		if got, want := second.value("sum"), first.value("sum"); got != want {
			t.Errorf("the second boot reads %s, the first wrote %s", got, want)
		}
		im.check(root, checkClean)
	})
}

// A guest writes to a second disk, with every size and alignment and from all
// CPUs at once; the image holds what it should, byte for byte.
func TestContents(t *testing.T) {
	const (
		size   = 24 << 20
		blocks = size / 512
	)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	fill := rand.NewChaCha8([32]byte(binary.BigEndian.AppendUint64(make([]byte, 24), seed)))

	// The guest copies pieces of the source disk to the same places of the
	// target, each CPU its own part.
	source := make([]byte, size)
	_, _ = fill.Read(source) // never fails
	want := make([]byte, size)
	var script strings.Builder
	const cpus = 4
	for cpu := range cpus {
		script.WriteString("(\n")
		for range 15 {
			n := 1 + rng.IntN(300)
			at := cpu*blocks/cpus + rng.IntN(blocks/cpus-n)
			fmt.Fprintf(&script, "dd if=/dev/vdb of=/dev/vdc bs=512 iflag=direct oflag=direct skip=%d seek=%d count=%d\n", at, at, n)
			copy(want[at*512:(at+n)*512], source[at*512:])
		}
		script.WriteString(") 2>/dev/null &\n")
	}
	script.WriteString("wait\nsync\npoweroff -f\n")

	for _, clusterSize := range []string{"512", "64K", "2M"} {
		t.Run("cluster="+clusterSize, func(t *testing.T) {
			im := newImages(t)
			root := im.overlay(im.baseQCOW2())
			for name, data := range map[string][]byte{"source.raw": source, "want.raw": want} {
				if err := os.WriteFile(im.path(name), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			target := im.create("target.qcow2", fmt.Sprint(size), "-o", "cluster_size="+clusterSize)
			vm := guest{kernel: newestKernel(t), cpus: cpus, disks: []string{
				root, im.path("source.raw") + ",format=raw,readonly=true", target,
			}, script: script.String()}.start(t)
			vm.exits(0)
			im.check(target, checkClean)
			run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", im.path("want.raw"), target)
		})
	}
}

// A guest that powers off without syncing loses what it did not sync, and
// nothing else.
func TestPowerOffWithoutSync(t *testing.T) {
	im := newImages(t)
	root := im.overlay(im.baseQCOW2())
	vm := guest{kernel: newestKernel(t), cpus: 2, disks: []string{root}, script: `
		echo kept >/kept
		sync
		dd if=/dev/zero of=/lost bs=64k count=300 2>/dev/null &
		dd if=/dev/zero of=/lost2 bs=4k count=1000 oflag=direct 2>/dev/null
		poweroff -n -f`}.start(t)
	vm.exits(0)
	im.check(root, checkClean, checkLeaks)
	im.checkKept(t, root)
}

// A calf that is killed in the middle of writes leaves an image that is not
// corrupt and holds all that the guest had flushed, and boots again.
func TestKill(t *testing.T) {
	for round := range 2 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			im := newImages(t)
			root := im.overlay(im.baseQCOW2())
			vm := guest{kernel: newestKernel(t), cpus: 2, disks: []string{root}, script: `
				echo kept >/kept
				sync
				while :; do
					dd if=/dev/urandom of=/junk1 bs=4k count=500 conv=fsync 2>/dev/null
					rm /junk1
				done &
				n=0
				while :; do
					n=$((n + 1))
					dd if=/dev/urandom of=/junk2 bs=512 count=999 conv=fsync 2>/dev/null
					echo written $n
					rm /junk2
				done`}.start(t)
			vm.waitFor(fmt.Sprintf("written %d\n", 1+3*round))
			vm.kill()
			im.check(root, checkClean, checkLeaks)
			im.checkKept(t, root)
		})
	}
}

// checkKept boots from root, where fsck has to find nothing that its journal
// does not mend, and looks for what an earlier guest had synced.
func (im *images) checkKept(t *testing.T, root string) {
	t.Helper()
	raw := im.path("copy.raw")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", root, raw)
	// Status 1: the journal was replayed, or what is no error was mended.
	if out, status := try(t, "e2fsck", "-p", raw); status > 1 {
		t.Errorf("e2fsck: exit status %d\n%s", status, out)
	}
	vm := guest{kernel: newestKernel(t), cpus: 2, disks: []string{root}, script: `
		echo kept=$(cat /kept)
		echo again >/again
		sync
		poweroff -f`}.start(t)
	vm.exits(0)
	if got := vm.value("kept"); got != "kept" {
		t.Errorf("the file that was synced holds %q", got)
	}
	im.check(root, checkClean, checkLeaks)
}

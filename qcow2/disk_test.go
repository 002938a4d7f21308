package qcow2_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/qcow2"
)

var (
	_ blk.Disk       = (*qcow2.Image)(nil)
	_ blk.Discarder  = (*qcow2.Image)(nil)
	_ blk.Hinter     = (*qcow2.Image)(nil)
	_ blk.ZeroWriter = (*qcow2.Image)(nil)
	_ blk.Disk       = (*qcow2.Disk)(nil)
	_ blk.Discarder  = (*qcow2.Disk)(nil)
	_ blk.ZeroWriter = (*qcow2.Disk)(nil)
)

// TestDisk runs the conformance suite of what a block device serves.
func TestDisk(t *testing.T) {
	for _, cluster := range []int64{512, 4096, 64 << 10, 2 << 20} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			blktest.All(t, func(tb testing.TB) blk.Disk {
				path := filepath.Join(tb.TempDir(), "disk.qcow2")
				if err := qcow2.Create(path, qcow2.CreateOptions{Size: 2 << 20, ClusterSize: cluster}); err != nil {
					tb.Fatal(err)
				}
				m, err := qcow2.Open(path, qcow2.Options{})
				if err != nil {
					tb.Fatal(err)
				}
				tb.Cleanup(func() {
					if err := m.Close(); err != nil {
						tb.Error(err)
					}
				})
				return m
			})
		})
	}
}

// TestDirectDisk runs the suite past the page cache, as if the host asked for
// alignment to 4 KiB, which most metadata has not; the images are sound afterwards.
func TestDirectDisk(t *testing.T) {
	for _, cluster := range []int64{512, 64 << 10} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			blktest.All(t, func(tb testing.TB) blk.Disk {
				path := filepath.Join(tb.TempDir(), "disk.qcow2")
				if err := qcow2.Create(path, qcow2.CreateOptions{Size: 2 << 20, ClusterSize: cluster}); err != nil {
					tb.Fatal(err)
				}
				m, err := qcow2.Open(path, qcow2.Options{Direct: true})
				if errors.Is(err, qcow2.ErrUnsupported) {
					tb.Skip(err)
				}
				if err != nil {
					tb.Fatal(err)
				}
				qcow2.AlignDirect(m, 4096, 4096)
				tb.Cleanup(func() {
					if err := m.Close(); err != nil {
						tb.Error(err)
					}
					if r, err := qcow2.Check(context.Background(), path, qcow2.CheckOptions{}); err != nil || !r.Clean() {
						tb.Errorf("check of the image: %+v, %v", r, err)
					}
				})
				return m
			})
		})
	}
}

// killed is the variable that makes the test program the victim of TestKill.
const killed = "QCOW2_TEST_KILL"

// TestKill kills a process that writes and flushes, several times, and looks
// for what it had reported as flushed.
func TestKill(t *testing.T) {
	if path := os.Getenv(killed); path != "" {
		victim(path)
	}
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: 64 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for round := range 4 {
		last = max(last, killOnce(t, path, time.Duration(10+20*round)*time.Millisecond))
		if out, err := exec.Command("qemu-img", "check", path).CombinedOutput(); err != nil {
			e, ok := errors.AsType[*exec.ExitError](err)
			if !ok {
				t.Skip("qemu-img, the witness of this test, is not installed")
			}
			if e.ExitCode() != 3 {
				t.Fatalf("after a kill: %v\n%s", err, out)
			}
		}
		m, err := qcow2.Open(path, qcow2.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 8)
		for n := uint64(1); n <= last; n++ {
			if _, err := m.ReadAt(b, place(n)); err != nil || binary.LittleEndian.Uint64(b) != n {
				t.Fatalf("write %d of %d flushed ones reads as %x, %v", n, last, b, err)
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d writes flushed", last)
}

// place is where the victim writes number n.
func place(n uint64) int64 { return int64(n * 7919 % (64 << 20 / 512) * 512) }

// victim writes and flushes until it is killed, going on where the image ends,
// and prints the number of the last flushed write.
func victim(path string) {
	m, err := qcow2.Open(path, qcow2.Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	b := make([]byte, 8)
	n := uint64(1)
	for ; ; n++ {
		if _, err := m.ReadAt(b, place(n)); err != nil || binary.LittleEndian.Uint64(b) != n {
			break
		}
	}
	for ; n < 100000; n++ {
		binary.LittleEndian.PutUint64(b, n)
		if _, err := m.WriteAt(b, place(n)); err != nil {
			break
		}
		if n%5 == 0 {
			if err := m.Flush(); err != nil {
				break
			}
			fmt.Println(n)
		}
	}
	os.Exit(1)
}

// killOnce runs a victim, kills it some time after its first flush, and returns
// the last write that it reported.
func killOnce(t *testing.T, path string, after time.Duration) (last uint64) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
	cmd.Env = append(os.Environ(), killed+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for first := true; lines.Scan(); first = false {
		if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
			t.Errorf("the victim says %q", lines.Text())
		}
		if first {
			time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
	}
	_ = cmd.Wait() // killed
	return last
}

// TestIOHints shows what a guest is told of an image.
func TestIOHints(t *testing.T) {
	for clusterSize, page := range map[int64]int64{512: 512, 4096: 4096, 2 << 20: 4096} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		if err := qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: clusterSize}); err != nil {
			t.Fatal(err)
		}
		m, err := qcow2.Open(path, qcow2.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		physical, least, best := m.IOHints()
		if physical != page || least != 0 || best != clusterSize {
			t.Errorf("clusters of %d: %d, %d, %d", clusterSize, physical, least, best)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/calfvm/calf/qcow2"
)

// check ends the examples at an error, for which programs have something better.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

// inTemp calls f with the path of an image in a directory that goes away.
func inTemp(f func(path string)) {
	dir, err := os.MkdirTemp("", "example-")
	check(err)
	defer func() { check(os.RemoveAll(dir)) }()
	f(filepath.Join(dir, "disk.qcow2"))
}

func Example() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 30}))
		disk, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		_, err = disk.WriteAt([]byte("hello"), 12345)
		check(err)
		check(disk.Flush()) // from here on, it survives a power cut

		b := make([]byte, 7)
		_, err = disk.ReadAt(b, 12344)
		check(err)
		fmt.Printf("%q of %d bytes\n", b, disk.Size())
		check(disk.Close())
	})
	// Output: "\x00hello\x00" of 1073741824 bytes
}

// An overlay takes the writes; what it does not have shows its backing file.
func ExampleCreate_overlay() {
	inTemp(func(base string) {
		check(os.WriteFile(base, bytes.Repeat([]byte("base "), 1<<14), 0o600))
		path := filepath.Join(filepath.Dir(base), "overlay.qcow2")
		check(qcow2.Create(path, qcow2.CreateOptions{
			Size: 5 << 14, BackingFile: filepath.Base(base), BackingFormat: "raw",
		}))
		disk, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		_, err = disk.WriteAt([]byte("over"), 5)
		check(err)
		b := make([]byte, 15)
		_, err = disk.ReadAt(b, 0)
		check(err)
		fmt.Printf("%s\n", b)
		check(disk.Close())
	})
	// Output: base over base
}

func ExampleImage_Map() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}))
		disk, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		cluster := bytes.Repeat([]byte("hello..."), 1<<13)
		for _, off := range []int64{1 << 16, 1 << 18} {
			_, err = disk.WriteAt(cluster, off)
			check(err)
		}
		check(disk.PunchHole(1<<18, 1<<16))
		for part, err := range disk.Map(0, disk.Size()) {
			check(err)
			fmt.Println(part.Offset, part.Length, part.Kind)
		}
		check(disk.Close())
	})
	// Output:
	// 0 65536 unallocated
	// 65536 65536 data
	// 131072 131072 unallocated
	// 262144 65536 zero
	// 327680 720896 unallocated
}

func ExampleImage_Stats() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}))
		disk, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		for range 3 {
			_, err = disk.WriteAt([]byte("hello"), 100000)
			check(err)
		}
		check(disk.Flush())
		s := disk.Stats()
		fmt.Println(s.Allocated, "clusters allocated: an L2 table and one of data")
		fmt.Println(s.Hits, "writes in place")
		fmt.Println(s.Flushes, "flush,", s.Syncs, "barriers")
		check(disk.Close())
	})
	// Output:
	// 2 clusters allocated: an L2 table and one of data
	// 2 writes in place
	// 1 flush, 2 barriers
}

func ExampleCheck() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}))
		result, err := qcow2.Check(context.Background(), path, qcow2.CheckOptions{})
		check(err)
		fmt.Println("clean:", result.Clean())

		// The count of the first cluster, which holds the header, is made 2.
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		check(err)
		_, err = f.WriteAt([]byte{0, 2}, 2<<16)
		check(errors.Join(err, f.Close()))
		result, err = qcow2.Check(context.Background(), path, qcow2.CheckOptions{})
		check(err)
		for _, found := range result.Findings {
			fmt.Printf("%s: %s\n", found.Kind, found.What)
		}
	})
	// Output:
	// clean: true
	// leak: the cluster at 0x0 is counted 2 times and used 1 times
}

// Compressed clusters are made one by one, by as many goroutines as one likes.
func ExampleImage_WriteCompressed() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20, CompressionType: "zstd"}))
		disk, err := qcow2.Open(path, qcow2.Options{CompressionLevel: 9})
		check(err)
		cluster := bytes.Repeat([]byte("calf "), int(disk.ClusterSize()))[:disk.ClusterSize()]
		for off := int64(0); off < disk.Size(); off += disk.ClusterSize() {
			check(disk.WriteCompressed(cluster, off))
		}
		for part, err := range disk.Map(0, disk.Size()) {
			check(err)
			fmt.Println(part.Offset, part.Length, part.Kind)
		}
		fmt.Println("all", 1<<20/disk.ClusterSize(), "in", disk.Stats().Allocated-1, "cluster of the file")
		check(disk.Close())
	})
	// Output:
	// 0 1048576 compressed
	// all 16 in 1 cluster of the file
}

// A throw-away overlay takes all writes and is gone once it is closed.
func ExampleOpenScratch() {
	inTemp(func(path string) {
		check(os.WriteFile(path, bytes.Repeat([]byte("kept "), 1<<12), 0o600))
		disk, err := qcow2.OpenScratch("", path, "raw", qcow2.Options{})
		check(err)
		_, err = disk.WriteAt([]byte("gone"), 0)
		check(err)
		b := make([]byte, 9)
		_, err = disk.ReadAt(b, 0)
		check(err)
		fmt.Printf("%s\n", b)
		check(disk.Close())

		b, err = os.ReadFile(path)
		check(err)
		fmt.Printf("%s\n", b[:9])
	})
	// Output:
	// gone kept
	// kept kept
}

// A snapshot keeps what the disk is, to go back to, or to read beside it.
func ExampleImage_CreateSnapshot() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 30}))
		disk, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		ctx := context.Background()
		_, err = disk.WriteAt([]byte("before"), 0)
		check(err)
		_, err = disk.CreateSnapshot(ctx, "update")
		check(err)
		_, err = disk.WriteAt([]byte("after!"), 0)
		check(err)
		_, err = disk.CreateSnapshot(ctx, "updated")
		check(err)
		check(disk.ApplySnapshot(ctx, "update"))

		b := make([]byte, 6)
		_, err = disk.ReadAt(b, 0)
		check(err)
		fmt.Printf("%s\n", b)
		check(disk.Close())

		saved, err := qcow2.Open(path, qcow2.Options{Snapshot: "updated"})
		check(err)
		_, err = saved.ReadAt(b, 0)
		check(err)
		fmt.Printf("%s\n", b)
		check(saved.Close())
	})
	// Output:
	// before
	// after!
}

// A request through a view ends early once its context is done.
func ExampleImage_WithContext() {
	inTemp(func(path string) {
		check(qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 30}))
		image, err := qcow2.Open(path, qcow2.Options{})
		check(err)
		ctx, cancel := context.WithCancel(context.Background())
		disk := image.WithContext(ctx)
		check(disk.WriteZeroes(0, disk.Size()))
		cancel()
		err = disk.WriteZeroes(0, disk.Size())
		fmt.Println(errors.Is(err, context.Canceled))
		check(image.Close())
	})
	// Output: true
}

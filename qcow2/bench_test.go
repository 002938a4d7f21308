package qcow2

import (
	"fmt"
	"sync"
	"testing"
)

// queues runs do from n goroutines until b.N requests of size bytes are done.
func queues(b *testing.B, size int64, do func(b *testing.B, queue, i int)) {
	for _, n := range []int{1, 2, 4} {
		b.Run(fmt.Sprintf("queues=%d", n), func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			var wg sync.WaitGroup
			for q := range n {
				wg.Go(func() {
					for i := q; i < b.N; i += n {
						do(b, q, i)
					}
				})
			}
			wg.Wait()
		})
	}
}

const (
	benchDisk  = 64 << 20
	benchBlock = 4096
)

// full returns an image whose clusters are all allocated.
func full(b *testing.B) *Image {
	m := open(b, create(b, CreateOptions{Size: benchDisk}), Options{})
	chunk := make([]byte, 1<<20)
	for off := int64(0); off < benchDisk; off += int64(len(chunk)) {
		if _, err := m.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	return m
}

// scatter spreads request i over the disk.
func scatter(i int) int64 {
	return int64(uint64(i)*2654435761%(benchDisk/benchBlock)) * benchBlock
}

func buffers() [4][]byte {
	var p [4][]byte
	for i := range p {
		p[i] = make([]byte, benchBlock)
	}
	return p
}

func BenchmarkRead(b *testing.B) {
	m, p := full(b), buffers()
	queues(b, benchBlock, func(b *testing.B, q, i int) {
		if _, err := m.ReadAt(p[q], scatter(i)); err != nil {
			b.Error(err)
		}
	})
}

// BenchmarkRawRead is the measure for BenchmarkRead: the same preads without an
// image in between.
func BenchmarkRawRead(b *testing.B) {
	m, p := full(b), buffers()
	queues(b, benchBlock, func(b *testing.B, q, i int) {
		if err := readFull(m.file, p[q], scatter(i)); err != nil {
			b.Error(err)
		}
	})
}

func BenchmarkOverwrite(b *testing.B) {
	m, p := full(b), buffers()
	queues(b, benchBlock, func(b *testing.B, q, i int) {
		if _, err := m.WriteAt(p[q], scatter(i)); err != nil {
			b.Error(err)
		}
	})
}

// BenchmarkAllocate makes every write allocate a cluster of its own. It begins
// with a new image whenever one is full.
func BenchmarkAllocate(b *testing.B) {
	const clusters = 1 << 16
	for _, n := range []int{1, 2, 4} {
		b.Run(fmt.Sprintf("queues=%d", n), func(b *testing.B) {
			b.SetBytes(benchBlock)
			b.ReportAllocs()
			p := buffers()
			for done := 0; done < b.N; done += clusters {
				b.StopTimer()
				m := open(b, create(b, CreateOptions{Size: clusters << 16}), Options{})
				b.StartTimer()
				var wg sync.WaitGroup
				for q := range n {
					wg.Go(func() {
						for i := q; i < min(clusters, b.N-done); i += n {
							if _, err := m.WriteAt(p[q], int64(i)<<16); err != nil {
								b.Error(err)
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				closeImage(b, m)
				b.StartTimer()
			}
		})
	}
}

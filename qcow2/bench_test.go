package qcow2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
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

// neighbour is what keeps an image, or the plain file of the same contents, busy
// beside the reader that BenchmarkBeside measures.
type neighbour struct {
	name  string
	image func(m *Image, p []byte, i int) error
	plain func(f file, p []byte, i int) error
}

var neighbours = []neighbour{
	{"nothing", nil, nil},
	{
		"reader",
		func(m *Image, p []byte, i int) error { _, err := m.ReadAt(p, scatter(i)); return err },
		func(f file, p []byte, i int) error { return readFull(f, p, scatter(i)) },
	},
	{
		"flusher",
		func(m *Image, p []byte, i int) error {
			_, err := m.WriteAt(p, scatter(i))
			return errors.Join(err, m.Flush())
		},
		func(f file, p []byte, i int) error {
			return errors.Join(writeFull(f, p, scatter(i)), f.Fdatasync())
		},
	},
	{
		"cold lookups", // of tables that the cache does not hold, whose reads the plain file does too
		func(m *Image, p []byte, i int) error {
			m.lock()
			if id := uint64(1 + i%7); !m.cache.lru.Contains(id) || m.cache.lru.Remove(id) {
				i = int(id << m.sliceBits)
			}
			m.mu.Unlock()
			_, err := m.ReadAt(p, int64(i)<<m.clusterBits)
			return err
		},
		func(f file, p []byte, i int) error {
			return errors.Join(readFull(f, p, scatter(i)), readFull(f, p, scatter(i+1)))
		},
	},
}

// BenchmarkBeside measures hot reads of one goroutine while another does what its
// name says, of an image and of the plain file: what the neighbour costs the reader
// of an image beyond that is the engine's.
func BenchmarkBeside(b *testing.B) {
	m := open(b, create(b, CreateOptions{Size: benchDisk, ClusterSize: 4096}), Options{})
	chunk := make([]byte, 1<<20)
	for off := int64(0); off < benchDisk; off += int64(len(chunk)) {
		if _, err := m.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := m.Flush(); err != nil {
		b.Fatal(err)
	}
	p := buffers()
	hot := func(i int) int64 { return int64(i%256) * benchBlock } // one slice maps it
	for _, n := range neighbours {
		run := func(name string, read, beside func(i int) error) {
			b.Run("neighbour="+n.name+"/of="+name, func(b *testing.B) {
				var stop atomic.Bool
				var wg sync.WaitGroup
				if n.image != nil {
					wg.Go(func() {
						for i := 0; !stop.Load(); i++ {
							if err := beside(i); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				for i := 0; b.Loop(); i++ {
					if err := read(i); err != nil {
						b.Error(err)
					}
				}
				stop.Store(true)
				wg.Wait()
			})
		}
		run("plain", func(i int) error { return readFull(m.file, p[0], hot(i)) }, func(i int) error { return n.plain(m.file, p[1], i) })
		run("image", func(i int) error { _, err := m.ReadAt(p[0], hot(i)); return err }, func(i int) error { return n.image(m, p[1], i) })
	}
}

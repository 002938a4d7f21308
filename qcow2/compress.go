package qcow2

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/klauspost/compress/zstd"

	"github.com/calfvm/calf/qcow2/internal/deflate"
)

// decodedBytes bounds the memory for decompressed clusters of one image, of
// which there are always at least two.
const decodedBytes = 4 << 20

// place is where the data of a compressed cluster lies in the file.
type place struct{ host, size int64 }

// decoder reads the compressed clusters of one image. It keeps those it decoded
// last, so that small reads decode a cluster once, and of readers that want the
// same one at a time one decodes. It has a lock of its own, which is held across
// neither I/O nor decoding.
//
// A place may have other data once its host cluster is reused. By then every
// request that had the old data is over, so forget, called before, is enough.
type decoder struct {
	// slots bounds the clusters in work: as many as threads run.
	slots chan struct{}

	mu      sync.Mutex
	decoded *simplelru.LRU[place, []byte] // its buffers never change
	flights map[place]*decoding
}

// decoding is a cluster in work, on behalf of all who want it.
type decoding struct {
	flight
	data []byte // set before done is closed
}

func newDecoder(clusterSize int64) *decoder {
	c, err := simplelru.NewLRU[place, []byte](int(max(decodedBytes/clusterSize, 2)), nil)
	if err != nil {
		panic("BUG: the size of a cache is not positive")
	}
	return &decoder{slots: make(chan struct{}, runtime.GOMAXPROCS(0)), decoded: c, flights: map[place]*decoding{}}
}

// get returns the cluster at p, from decode unless it is kept or in work. The
// caller has the place pinned, and must not change the result.
func (d *decoder) get(p place, decode func(place) ([]byte, error)) ([]byte, error) {
	d.mu.Lock()
	if data, ok := d.decoded.Get(p); ok {
		d.mu.Unlock()
		return data, nil
	}
	if f := d.flights[p]; f != nil {
		d.mu.Unlock()
		<-f.done
		return f.data, f.err
	}
	f := &decoding{flight: flight{done: make(chan struct{})}}
	d.flights[p] = f
	d.mu.Unlock()

	d.slots <- struct{}{}
	f.data, f.err = decode(p)
	<-d.slots

	d.mu.Lock()
	defer d.mu.Unlock()
	if f.err == nil {
		d.decoded.Add(p, f.data)
	}
	delete(d.flights, p)
	close(f.done)
	return f.data, f.err
}

// forget drops all that is kept.
func (d *decoder) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.decoded.Purge()
}

// readCompressed fills iov from the bytes at in of the compressed cluster at p. The
// caller has it pinned.
func (m *Image) readCompressed(p place, iov [][]byte, in int64) error {
	data, err := m.decoder.get(p, m.decompress)
	if err != nil {
		return err
	}
	for _, b := range iov {
		in += int64(copy(b, data[in:]))
	}
	return nil
}

// decompress reads and decodes the compressed cluster at p. What follows the
// encoded cluster in its last sector belongs to another one and is ignored, as
// are the zeros that the file reads as beyond its end.
func (m *Image) decompress(p place) ([]byte, error) {
	packed := make([]byte, p.size)
	if err := readFull(m.file, packed, p.host); err != nil {
		return nil, err
	}
	data := make([]byte, m.clusterSize)
	inflate := inflateZstd
	if m.zlib {
		inflate = inflateDeflate
	}
	if err := inflate(data, packed); err != nil {
		return nil, fmt.Errorf("decompressing the cluster at %#x: %w", p.host, err)
	}
	return data, nil
}

var (
	deflaters = sync.Pool{New: func() any { return new(deflate.Decoder) }}
	zstdPool  = sync.Pool{New: func() any {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			panic("BUG: " + err.Error())
		}
		return d
	}}
)

// maxZstdWindow bounds what a hostile frame can make the decoder allocate. A
// cluster is at most 2 MiB, but encoders may announce a larger window.
const maxZstdWindow = 8 << 20

// inflateDeflate decodes raw deflate data until dst is full.
func inflateDeflate(dst, src []byte) error {
	d := deflaters.Get().(*deflate.Decoder)
	defer deflaters.Put(d)
	return d.Decode(dst, src)
}

// inflateZstd decodes zstd frames, of which there may be several, until dst is
// full.
func inflateZstd(dst, src []byte) error {
	d := zstdPool.Get().(*zstd.Decoder)
	defer zstdPool.Put(d)
	if err := d.Reset(bytes.NewReader(src)); err != nil {
		return err
	}
	_, err := io.ReadFull(d, dst)
	return err
}

// The levels of compression that Options may ask for.
const (
	minCompression     = deflate.MinLevel // the fastest
	defaultCompression = 6
	maxCompression     = deflate.MaxLevel // the smallest
)

// encoder compresses clusters, one at a time.
type encoder struct {
	deflate *deflate.Encoder // either this
	zstd    *zstd.Encoder    // or that
	padded  []byte           // a whole cluster, for the last one of a disk
	out     []byte
}

// encoders makes and keeps the encoders of an image, one for each goroutine that
// compresses at the time.
type encoders struct {
	geometry *geometry
	zlib     bool
	level    int
	idle     sync.Pool
}

func newEncoders(g *geometry, zlib bool, level int) (*encoders, error) {
	if level == 0 {
		level = defaultCompression
	}
	if level < minCompression || level > maxCompression {
		return nil, invalidOption("a compression level of %d is not one of %d to %d", level, minCompression, maxCompression)
	}
	return &encoders{geometry: g, zlib: zlib, level: level}, nil
}

// get returns an encoder, for the caller to put back into idle.
func (s *encoders) get() (*encoder, error) {
	if e, ok := s.idle.Get().(*encoder); ok {
		return e, nil
	}
	e := &encoder{}
	if s.zlib {
		e.deflate = deflate.New(s.level)
		return e, nil
	}
	var err error
	e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true),
		zstd.WithWindowSize(max(int(s.geometry.clusterSize), zstd.MinWindowSize)), zstd.WithEncoderLevel(zstdLevel(s.level)))
	return e, err
}

// zstdLevel is the level of package zstd, which has four, for one of ours. The
// default makes images no larger than QEMU's, which have libzstd's level 3.
func zstdLevel(level int) zstd.EncoderLevel {
	switch {
	case level < 3:
		return zstd.SpeedFastest
	case level < defaultCompression:
		return zstd.SpeedDefault
	case level < maxCompression:
		return zstd.SpeedBetterCompression
	}
	return zstd.SpeedBestCompression
}

// encode compresses p, one cluster of the given size or the beginning of one
// whose rest is zero. ok is false if the result would be no smaller than the
// cluster. It is valid until the next call.
func (e *encoder) encode(p []byte, clusterSize int64) (packed []byte, ok bool) {
	if int64(len(p)) < clusterSize {
		e.padded = append(append(e.padded[:0], p...), make([]byte, clusterSize-int64(len(p)))...)
		p = e.padded
	}
	if e.zstd != nil {
		e.out = e.zstd.EncodeAll(p, e.out[:0])
		return e.out, int64(len(e.out)) < clusterSize
	}
	e.out, ok = e.deflate.Encode(e.out[:0], p, len(p)-1)
	return e.out, ok
}

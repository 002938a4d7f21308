package qcow2

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"sync"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/klauspost/compress/zstd"
)

// decodedBytes bounds the memory for decompressed clusters of one image, of
// which there are always at least two.
const decodedBytes = 4 << 20

// decodedCache keeps the clusters that were decompressed last, by the offset of
// their compressed data, so that small reads decode a cluster once. Its buffers
// are never changed once they are in it. It has a lock of its own.
type decodedCache = lru.Cache[int64, []byte]

func newDecodedCache(clusterSize int64) *decodedCache {
	c, err := lru.New[int64, []byte](int(max(decodedBytes/clusterSize, 2)))
	if err != nil {
		panic("BUG: the size of a cache is not positive")
	}
	return c
}

// readCompressed fills iov from the bytes at in of the compressed cluster e. The
// caller has e pinned.
func (m *Image) readCompressed(e entry, iov [][]byte, in int64) error {
	data, ok := m.decoded.Get(e.host)
	if !ok {
		var err error
		if data, err = m.decompress(e); err != nil {
			return err
		}
		m.decoded.Add(e.host, data)
	}
	for _, b := range iov {
		in += int64(copy(b, data[in:]))
	}
	return nil
}

// decompress reads and decodes the compressed cluster e. What follows the
// encoded cluster in its last sector belongs to another one and is ignored.
func (m *Image) decompress(e entry) ([]byte, error) {
	packed := make([]byte, e.size)
	if err := readFull(m.file, packed, e.host); err != nil {
		return nil, err
	}
	data := make([]byte, m.clusterSize)
	inflate := inflateZstd
	if m.zlib {
		inflate = inflateDeflate
	}
	if err := inflate(data, packed); err != nil {
		return nil, fmt.Errorf("decompressing the cluster at %#x: %w", e.host, err)
	}
	return data, nil
}

var (
	deflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}
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
	d := deflaters.Get().(io.ReadCloser)
	defer deflaters.Put(d)
	if err := d.(flate.Resetter).Reset(bytes.NewReader(src), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(d, dst)
	return err
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

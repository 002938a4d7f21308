package doctor

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// A kernel with CONFIG_IKCONFIG has its configuration, packed by gzip, after a
// mark.
const (
	configMark = "IKCFG_ST"
	gzipMagic  = "\x1f\x8b"
	zstdMagic  = "\x28\xb5\x2f\xfd"
)

const (
	maxConfig = 4 << 20 // bytes of text; a distribution's has 300 KiB
	maxKernel = 1 << 30 // bytes of an unpacked kernel that are looked through
	maxWindow = 128 << 20
	chunk     = 64 << 10
)

var errNoConfig = errors.New("no kernel configuration")

// readConfig reads a configuration, which may be packed by gzip, as that in /proc
// is.
func readConfig(r *bufio.Reader) (string, error) {
	in := io.Reader(r)
	if magic, err := r.Peek(len(gzipMagic)); err == nil && string(magic) == gzipMagic {
		z, err := gzip.NewReader(r)
		if err != nil {
			return "", err
		}
		z.Multistream(false) // a kernel goes on after it
		in = z
	}
	text, err := io.ReadAll(io.LimitReader(in, maxConfig+1))
	switch {
	case err != nil:
		return "", err
	case len(text) > maxConfig:
		return "", fmt.Errorf("%w: longer than %d bytes", errNoConfig, maxConfig)
	case !bytes.Contains(text, []byte("CONFIG_")):
		return "", errNoConfig
	}
	return string(text), nil
}

// configWithin finds the configuration in a kernel.
func configWithin(f io.ReaderAt, size int64) (string, error) {
	unpacked, err := unpack(f, size)
	if err != nil {
		return "", err
	}
	defer func() { _ = unpacked.Close() }() // only read
	r := bufio.NewReaderSize(io.LimitReader(unpacked, maxKernel), chunk)
	if err := seek(r, []byte(configMark+gzipMagic)); err != nil {
		return "", err
	}
	if _, err := r.Discard(len(configMark)); err != nil {
		return "", err
	}
	return readConfig(r)
}

// seek skips what is before mark.
func seek(r *bufio.Reader, mark []byte) error {
	for {
		window, err := r.Peek(chunk)
		if i := bytes.Index(window, mark); i >= 0 {
			_, err := r.Discard(i)
			return err
		}
		if err != nil {
			return err
		}
		if _, err := r.Discard(len(window) - len(mark) + 1); err != nil {
			return err
		}
	}
}

// unpack returns the kernel in a bzImage (boot.rst: payload_offset,
// payload_length), or an ELF kernel as it is.
func unpack(f io.ReaderAt, size int64) (io.ReadCloser, error) {
	const (
		setupSects    = 0x1F1
		payloadOffset = 0x248
		payloadLength = 0x24C
		sector        = 512
	)
	var hdr [payloadLength + 4]byte
	if _, err := f.ReadAt(hdr[:], 0); err != nil {
		return nil, err
	}
	if string(hdr[:4]) == "\x7fELF" {
		return io.NopCloser(io.NewSectionReader(f, 0, size)), nil
	}
	begin := (int64(hdr[setupSects])+1)*sector + int64(binary.LittleEndian.Uint32(hdr[payloadOffset:]))
	packed := bufio.NewReader(io.NewSectionReader(f, begin, int64(binary.LittleEndian.Uint32(hdr[payloadLength:]))))
	magic, err := packed.Peek(len(zstdMagic))
	if err != nil {
		return nil, err
	}
	switch {
	case strings.HasPrefix(string(magic), gzipMagic):
		return gzip.NewReader(packed)
	case string(magic) == zstdMagic:
		z, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return nil, errors.New("the kernel is packed neither by gzip nor by zstd")
}

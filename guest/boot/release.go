package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"unicode/utf8"
)

// Release returns the release of a kernel as uname -r says it, which a bzImage has in
// its set-up code; empty if the file does not say.
func Release(f File) (string, error) {
	const pointer, maxRelease = 0x20E, 128
	var setup [0x10000 + hdrJump + maxRelease]byte
	n, err := f.ReadAt(setup[:min(int64(len(setup)), f.Size)], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if n < pointer+2 || string(setup[hdrMagic:hdrMagic+4]) != "HdrS" {
		return "", nil
	}
	at := hdrJump + int(binary.LittleEndian.Uint16(setup[pointer:]))
	if at == hdrJump {
		return "", nil
	}
	release := setup[at : at+maxRelease]
	if end := bytes.IndexAny(release, " \x00"); end > 0 && utf8.Valid(release[:end]) {
		return string(release[:end]), nil
	}
	return "", nil
}

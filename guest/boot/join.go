package boot

import (
	"errors"
	"io"
)

// Join returns files one after another, each filled with zeros to a multiple of four
// bytes, which is where the kernel looks for the next of several initial RAM disks.
func Join(files ...File) File {
	var j joined
	for _, f := range files {
		j.files = append(j.files, f)
		j.size += padded(f.Size)
	}
	return File{ReaderAt: &j, Size: j.size}
}

// joined is what Join returns.
type joined struct {
	files []File
	size  int64
}

func padded(n int64) int64 { return (n + 3) &^ 3 }

func (j *joined) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for _, f := range j.files {
		room := padded(f.Size)
		if off >= room {
			off -= room
			continue
		}
		part := p[done:min(int64(len(p)), int64(done)+room-off)]
		clear(part)
		if off < f.Size {
			data := part[:min(int64(len(part)), f.Size-off)]
			if n, err := f.ReadAt(data, off); n < len(data) {
				return done + n, errors.Join(io.ErrUnexpectedEOF, err)
			}
		}
		done, off = done+len(part), 0
		if done == len(p) {
			return done, nil
		}
	}
	return done, io.EOF
}

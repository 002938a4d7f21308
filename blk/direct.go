package blk

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// bounceSize is the most bytes that are moved through a buffer at once. It is a
// multiple of every alignment.
const bounceSize = 1 << 20

// maxDirectAlign bounds what a host may ask of the alignment of direct I/O.
const maxDirectAlign = 64 << 10

// direct is what a file opened with O_DIRECT asks of transfers. The bytes of a
// transfer that do not comply go through a buffer that does.
type direct struct {
	offset int64 // multiple that offsets and lengths are of, in bytes
	memory int64 // multiple that addresses of buffers are of

	// mu is held exclusively while a write that begins or ends inside an aligned
	// unit puts back the rest of it as it has just read it, and shared by
	// whatever else changes the file.
	mu sync.RWMutex

	// bounces recycles aligned buffers of bounceSize bytes.
	bounces sync.Pool
}

func newDirect(offset, memory int64) *direct {
	d := &direct{offset: offset, memory: memory}
	d.bounces.New = func() any {
		b := alignedBuffer(bounceSize, max(d.memory, d.offset))
		return &b
	}
	return d
}

var errNoDirect = errors.New("this file system has no direct I/O: use another cache mode than none")

// measureDirect finds out what direct I/O on fd, whose file is size bytes long,
// asks for.
func measureDirect(fd int, size int64) (*direct, error) {
	d, err := directAlignment(fd)
	switch {
	case err != nil:
		return nil, err
	case d.offset <= 0 || d.memory <= 0 || d.offset > maxDirectAlign || d.memory > maxDirectAlign ||
		d.offset&(d.offset-1) != 0 || d.memory&(d.memory-1) != 0:
		return nil, errNoDirect
	case size%d.offset != 0:
		return nil, fmt.Errorf("direct I/O reaches only whole blocks of %d bytes here, and its %d bytes are no multiple: make it longer, or use another cache mode than none", d.offset, size)
	}
	return d, nil
}

// directAlignment asks the kernel, and where that does not know (before Linux
// 6.1) it tries.
func directAlignment(fd int) (*direct, error) {
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) })
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		return newDirect(max(int64(st.Dio_offset_align), 0), max(int64(st.Dio_mem_align), 0)), nil
	}
	for align := int64(SectorSize); align <= maxDirectAlign; align *= 2 {
		// Aligned to align, and to nothing larger.
		b := alignedBuffer(int(2*align), 2*align)[align:]
		err = retry(func() error {
			_, err := unix.Pread(fd, b, align)
			return err
		})
		if !errors.Is(err, unix.EINVAL) {
			return newDirect(align, align), err
		}
	}
	return nil, errNoDirect
}

// whole reports whether iov can be moved from or to off as it is.
func (d *direct) whole(iov [][]byte, off int64) bool {
	if off%d.offset != 0 {
		return false
	}
	for _, b := range iov {
		if int64(len(b))%d.offset != 0 || !alignedTo(b, d.memory) {
			return false
		}
	}
	return true
}

// transferDirect is transfer for a file opened with O_DIRECT.
func (r *Raw) transferDirect(call uintptr, iov [][]byte, off int64) error {
	d := r.direct
	write := call == unix.SYS_PWRITEV
	if d.whole(iov, off) {
		if write {
			d.mu.RLock()
			defer d.mu.RUnlock()
		}
		return r.move(call, iov, off)
	}
	bounce := d.bounces.Get().(*[]byte)
	defer d.bounces.Put(bounce)
	end := off
	for _, b := range iov {
		end += int64(len(b))
	}
	for done := int64(0); off < end; {
		first := off / d.offset * d.offset
		last := min(first+bounceSize, (end+d.offset-1)/d.offset*d.offset) // of whole units
		stop := min(last, end)
		b := (*bounce)[:last-first]
		part := b[off-first : stop-first]
		var err error
		if write {
			err = r.writeBounced(b, first, part, off, func() { gather(part, iov, done) })
		} else if err = r.move(call, [][]byte{b}, first); err == nil {
			scatter(iov, done, part)
		}
		if err != nil {
			return err
		}
		done += stop - off
		off = stop
	}
	return nil
}

// writeBounced writes b, which is whole units, at first, after fill has put what
// is to be written into part of it, which stands for off.
func (r *Raw) writeBounced(b []byte, first int64, part []byte, off int64, fill func()) error {
	d := r.direct
	head := off != first
	tail := off+int64(len(part)) != first+int64(len(b))
	if !head && !tail {
		d.mu.RLock()
		defer d.mu.RUnlock()
		fill()
		return r.move(unix.SYS_PWRITEV, [][]byte{b}, first)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	unit, last := d.offset, int64(len(b))-d.offset
	if head {
		if err := r.move(unix.SYS_PREADV, [][]byte{b[:unit]}, first); err != nil {
			return err
		}
	}
	if tail && (last > 0 || !head) {
		if err := r.move(unix.SYS_PREADV, [][]byte{b[last:]}, first+last); err != nil {
			return err
		}
	}
	fill()
	return r.move(unix.SYS_PWRITEV, [][]byte{b}, first)
}

// change runs f, a system call that changes the file by other means than a
// transfer.
func (r *Raw) change(f func() error) error {
	if r.direct != nil {
		r.direct.mu.RLock()
		defer r.direct.mu.RUnlock()
	}
	return retry(f)
}

// gather fills p with the bytes of iov from skip on.
func gather(p []byte, iov [][]byte, skip int64) {
	for _, b := range iov {
		if skip >= int64(len(b)) {
			skip -= int64(len(b))
			continue
		}
		p = p[copy(p, b[skip:]):]
		skip = 0
	}
}

// scatter stores p to the bytes of iov from skip on.
func scatter(iov [][]byte, skip int64, p []byte) {
	for _, b := range iov {
		if skip >= int64(len(b)) {
			skip -= int64(len(b))
			continue
		}
		p = p[copy(b[skip:], p):]
		skip = 0
	}
}

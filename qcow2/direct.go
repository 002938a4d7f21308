package qcow2

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// bounceSize is the most bytes that a directFile moves through a buffer at
	// once. It is a multiple of every alignment.
	bounceSize = 1 << 20

	// maxDirectAlign bounds what a host may ask of the alignment of direct I/O.
	maxDirectAlign = 64 << 10
)

// directFile is a file of the host past its page cache (O_DIRECT). Guest data of
// whole clusters in aligned memory is moved as it is; what the host cannot move
// so, such as most metadata, goes through a buffer. The file may end up to one
// unit of alignment later than the engine asked for; that reads as zero.
type directFile struct {
	*osFile
	offset int64 // multiple that offsets and lengths are of, in bytes
	memory int64 // multiple that addresses of buffers are of

	// mu is held exclusively while a write that begins or ends inside an aligned
	// unit puts back the rest of it as it has just read it, and shared by
	// whatever else changes the file. Nothing is called back under it.
	mu sync.RWMutex

	// bounces recycles aligned buffers of bounceSize bytes.
	bounces sync.Pool
}

var _ file = (*directFile)(nil)

// newFile is the file f as opts want it. An error leaves f open.
func newFile(f *os.File, path string, opts Options) (file, error) {
	of := newOSFile(f)
	hf := file(of)
	if opts.Direct {
		d, err := newDirectFile(of)
		if err != nil {
			return nil, &Error{Path: path, Kind: ErrUnsupported, What: "direct I/O is not possible on this file", Mend: "use another cache mode than none", Err: err}
		}
		hf = d
	}
	if opts.Volatile {
		hf = volatileFile{hf}
	}
	return hf, nil
}

func newDirectFile(of *osFile) (*directFile, error) {
	flags, err := unix.FcntlInt(uintptr(of.fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(of.fd), unix.F_SETFL, flags|unix.O_DIRECT)
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	offset, memory, err := directAlignment(of.fd)
	if err != nil {
		return nil, err
	}
	for _, n := range []int64{offset, memory} {
		if n <= 0 || n > maxDirectAlign || n&(n-1) != 0 {
			return nil, fmt.Errorf("the host asks for an alignment of %d bytes", n)
		}
	}
	return &directFile{osFile: of, offset: offset, memory: memory}, nil
}

// directAlignment asks the kernel what direct I/O on fd asks for, and where that
// does not know (before Linux 6.1) it tries.
func directAlignment(fd int) (offset, memory int64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		return int64(st.Dio_offset_align), int64(st.Dio_mem_align), nil
	}
	for align := int64(512); align <= maxDirectAlign; align *= 2 {
		// Aligned to align, and to nothing larger.
		b := alignedBuffer(int(2*align), 2*align)[align:]
		_, err = unix.Pread(fd, b, align)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EINTR) {
			return align, align, os.NewSyscallError("pread", err)
		}
	}
	return 0, 0, os.NewSyscallError("pread", err)
}

// whole reports whether iov can be moved from or to off as it is.
func (d *directFile) whole(iov [][]byte, off int64) bool {
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

// ReadvAt implements file.
func (d *directFile) ReadvAt(iov [][]byte, off int64) error {
	if d.whole(iov, off) {
		return d.osFile.ReadvAt(iov, off)
	}
	return d.bounce(iov, off, func(p piece) error {
		if err := readFull(d.osFile, p.units, p.first); err != nil {
			return err
		}
		copyVector(iov, p.done, p.part, false)
		return nil
	})
}

// WritevAt implements file.
func (d *directFile) WritevAt(iov [][]byte, off int64) error {
	if d.whole(iov, off) {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return d.osFile.WritevAt(iov, off)
	}
	return d.bounce(iov, off, func(p piece) error {
		head, tail := p.off != p.first, p.off+int64(len(p.part)) != p.first+int64(len(p.units))
		if !head && !tail {
			d.mu.RLock()
			defer d.mu.RUnlock()
		} else {
			d.mu.Lock()
			defer d.mu.Unlock()
		}
		last := int64(len(p.units)) - d.offset
		if head {
			if err := readFull(d.osFile, p.units[:d.offset], p.first); err != nil {
				return err
			}
		}
		if tail && (last > 0 || !head) {
			if err := readFull(d.osFile, p.units[last:], p.first+last); err != nil {
				return err
			}
		}
		copyVector(iov, p.done, p.part, true)
		return writeFull(d.osFile, p.units, p.first)
	})
}

// Punch implements file.
func (d *directFile) Punch(off, n int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.osFile.Punch(off, n)
}

// Truncate implements file.
func (d *directFile) Truncate(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.osFile.Truncate(size)
}

// piece is what a directFile moves at once through a buffer.
type piece struct {
	units []byte // whole units of the file
	first int64  // where they lie in it
	part  []byte // the bytes of units that are asked for
	off   int64  // where these lie in the file
	done  int64  // and in the caller's buffers
}

// bounce has each piece of iov at off moved by move.
func (d *directFile) bounce(iov [][]byte, off int64, move func(p piece) error) error {
	buf, ok := d.bounces.Get().(*[]byte)
	if !ok {
		b := alignedBuffer(bounceSize, max(d.memory, d.offset))
		buf = &b
	}
	defer d.bounces.Put(buf)
	end := off + length(iov)
	for done := int64(0); off < end; {
		first := off / d.offset * d.offset
		last := min(first+bounceSize, (end+d.offset-1)/d.offset*d.offset)
		stop := min(last, end)
		b := (*buf)[:last-first]
		if err := move(piece{units: b, first: first, part: b[off-first : stop-first], off: off, done: done}); err != nil {
			return err
		}
		done += stop - off
		off = stop
	}
	return nil
}

// copyVector moves the bytes of p from or to those of iov from skip on.
func copyVector(iov [][]byte, skip int64, p []byte, gather bool) {
	for _, b := range iov {
		if skip >= int64(len(b)) {
			skip -= int64(len(b))
			continue
		}
		n := 0
		if gather {
			n = copy(p, b[skip:])
		} else {
			n = copy(b[skip:], p)
		}
		p = p[n:]
		skip = 0
	}
}

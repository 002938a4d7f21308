package exercise

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/calfvm/calf/qcow2"
)

// piece is the length of the requests in which a long transfer is done, which
// bounds the memory that it takes. It is a multiple of any cluster size.
const piece = 16 << 20

// maxShown is the length of the longest read that -v shows, all of which is kept
// until it has been verified.
const maxShown = 64 << 20

// defaultPattern fills what is written without -P.
const defaultPattern = 0xcd

// transfer is one read or write.
type transfer struct {
	failing string  // what its failure is called
	write   bool    // else it is a read
	off     int64   // on the disk
	sizes   []int64 // of its buffers
	length  int64   // of all of them

	pattern  byte
	verify   bool  // what was read is the pattern,
	from, to int64 // in this part of it
	source   *os.File

	zero, unmap, fast  bool // write zeroes; may free room; without writing them out
	compressed, stable bool

	quiet, machine, verbose bool
	misalign                bool

	started  time.Time
	took     time.Duration
	data     []byte // what was read, if it is to be shown
	mismatch bool
	err      error
}

// memory is how much the transfer needs while it runs.
func (t *transfer) memory() int64 {
	switch {
	case t.zero:
		return 0
	case t.verbose:
		return t.length
	}
	return min(t.length, piece)
}

// buffer returns n bytes.
func (t *transfer) buffer(n int64) []byte {
	const odd = 16
	if t.misalign {
		return make([]byte, n+odd)[odd:]
	}
	return make([]byte, n)
}

// run does the transfer.
func (t *transfer) run(ctx context.Context, d Disk) {
	do := t.receive
	if t.write {
		do = t.send
	}
	if t.zero {
		do = t.zeroes
	}
	if t.err = t.inside(d); t.err == nil {
		t.err = do(ctx, d)
	}
	if t.stable && t.err == nil {
		t.err = d.Flush()
	}
	t.took = time.Since(t.started)
}

// inside returns an error unless the range lies on the disk.
func (t *transfer) inside(d Disk) error {
	if size := d.Size(); t.off > size || t.length > size-t.off {
		return syscall.EIO
	}
	return nil
}

// zeroes makes the range zero.
func (t *transfer) zeroes(_ context.Context, d Disk) error {
	if t.fast && !fastZeroes(d, t.off, t.length) {
		return syscall.EOPNOTSUPP
	}
	if t.unmap {
		return d.PunchHole(t.off, t.length)
	}
	return d.WriteZeroes(t.off, t.length)
}

// fastZeroes reports whether the range can be made zero without writing zeros: it
// consists of whole units, or what lies beside it in a unit is zero already.
func fastZeroes(d Disk, off, n int64) bool {
	unit, end := d.ZeroUnit(), off+n
	if unit == 0 {
		return n == 0
	}
	first := off / unit * unit
	last := min((end+unit-1)/unit*unit, d.Size())
	return readsZero(d, first, off) && readsZero(d, end, last)
}

// readsZero reports whether the image says that [from, to) is zero.
func readsZero(d Disk, from, to int64) bool {
	for m, err := range d.Map(from, to-from) {
		if err != nil || m.Kind != qcow2.MapUnallocated && m.Kind != qcow2.MapZero {
			return false
		}
	}
	return true
}

// send writes the pattern, or what the source has over and over.
func (t *transfer) send(ctx context.Context, d Disk) error {
	put := func(p []byte, off int64) error { return d.WritevAt(t.split(p), off) }
	if t.compressed {
		if err := t.compressible(d); err != nil {
			return err
		}
		put = d.WriteCompressed
	}
	buf := t.buffer(t.memory())
	if len(buf) > 0 {
		buf[0] = t.pattern
		repeat(buf, 1)
	}
	return t.inPieces(ctx, buf, func(p []byte, done int64) error {
		if err := t.load(p, done); err != nil {
			return err
		}
		return put(p, t.off+done)
	})
}

// inPieces calls do for the pieces of the transfer, each in the beginning of buf.
func (t *transfer) inPieces(ctx context.Context, buf []byte, do func(p []byte, done int64) error) error {
	for done := int64(0); done < t.length; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		p := buf[:min(t.length-done, int64(len(buf)))]
		if err := do(p, done); err != nil {
			return err
		}
		done += int64(len(p))
	}
	return nil
}

// compressible returns an error unless the range is of whole clusters, of which
// none has room in the file: QEMU does not compress over that.
func (t *transfer) compressible(d Disk) error {
	unit := d.CompressionUnit()
	switch {
	case unit == 0:
		return syscall.EOPNOTSUPP
	case t.length == 0:
		return nil
	case t.off%unit != 0 || t.length%unit != 0 && t.off+t.length != d.Size():
		return syscall.EINVAL
	}
	for m, err := range d.Map(t.off, t.length) {
		if err != nil {
			return err
		}
		if allocated(m) && (m.HostOffset != qcow2.NoOffset || m.Kind == qcow2.MapCompressed) {
			return syscall.EIO
		}
	}
	return nil
}

// load fills p, which is at off of the transfer, from the source, if there is one.
func (t *transfer) load(p []byte, off int64) error {
	if t.source == nil {
		return nil
	}
	st, err := t.source.Stat()
	if err != nil {
		return err
	}
	once := p[:min(int64(len(p)), st.Size())]
	for n := 0; n < len(once) && err == nil; {
		var read int
		read, err = t.source.ReadAt(once[n:], (off+int64(n))%st.Size())
		if n += read; errors.Is(err, io.EOF) && read > 0 {
			err = nil // it goes on at the beginning
		}
	}
	repeat(p, len(once))
	return err
}

// receive reads the range, verifies it, and keeps it if it is to be shown.
func (t *transfer) receive(ctx context.Context, d Disk) error {
	buf := t.buffer(t.memory())
	if t.verbose {
		t.data = buf
	}
	return t.inPieces(ctx, buf, func(p []byte, done int64) error {
		if err := d.ReadvAt(t.split(p), t.off+done); err != nil {
			return err
		}
		if from, to := max(t.from, done), min(t.to, done+int64(len(p))); t.verify && from < to {
			t.mismatch = t.mismatch || !isAll(p[from-done:to-done], t.pattern)
		}
		return nil
	})
}

// isAll reports whether each byte of p, which has one, is b.
func isAll(p []byte, b byte) bool { return p[0] == b && bytes.Equal(p[1:], p[:len(p)-1]) }

// split cuts p, all of the transfer, into its buffers. A part stays whole.
func (t *transfer) split(p []byte) [][]byte {
	if int64(len(p)) != t.length {
		return [][]byte{p}
	}
	iov := make([][]byte, len(t.sizes))
	for i, n := range t.sizes {
		iov[i], p = p[:n], p[n:]
	}
	return iov
}

// repeat fills p with what its first n bytes are, over and over.
func repeat(p []byte, n int) {
	for n > 0 && n < len(p) {
		n += copy(p[n:], p[:n])
	}
}

// report prints what came of the transfer.
func (s *Session) report(t *transfer) error {
	if t.err != nil {
		return s.failure(t.failing, t.err)
	}
	var failed error
	if t.mismatch {
		s.printf("Pattern verification failed at offset %d, %d bytes\n", t.off+t.from, t.to-t.from)
		failed = errFailed
	}
	if t.quiet {
		return failed
	}
	if t.verbose {
		s.dump(t.data, t.off)
	}
	what := "read"
	if t.write {
		what = "wrote"
	}
	s.statistics(what, t.off, t.length, t.took, t.machine)
	return failed
}

// statistics prints the report of one operation on n bytes.
func (s *Session) statistics(what string, off, n int64, took time.Duration, machine bool) {
	took = max(took, 1)
	bytesPerSecond, perSecond := float64(n)/took.Seconds(), 1/took.Seconds()
	if machine {
		s.printf("%d,1,%s,%.3f,%.3f\n", n, clock(took, true), bytesPerSecond, perSecond)
		return
	}
	s.printf("%s %d/%d bytes at offset %d\n", what, n, n, off)
	s.printf("%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", size(float64(n)), clock(took, false), size(bytesPerSecond), perSecond)
}

// dump prints p, which was read at off, as hexadecimal numbers and characters.
func (s *Session) dump(p []byte, off int64) {
	const hex = "0123456789abcdef"
	for ; len(p) > 0; off += 16 {
		row := p[:min(16, len(p))]
		p = p[len(row):]
		var line [3 * 16]byte
		var shown [16]byte
		for i, b := range row {
			copy(line[3*i:], []byte{hex[b>>4], hex[b&15], ' '})
			shown[i] = '.'
			if b >= '0' && b <= '9' || b|0x20 >= 'a' && b|0x20 <= 'z' {
				shown[i] = b
			}
		}
		s.printf("%08x:  %s %s\n", off, line[:3*len(row)], shown[:len(row)])
	}
}

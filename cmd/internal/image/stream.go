package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stream copies what r has up to its end, and returns the size of the disk that it
// is. Before a write it calls longer with how long the disk is at least, in whole
// grains.
func (c *copying) stream(ctx context.Context, r io.Reader, longer func(size int64) error) (size int64, err error) {
	pace := pacer{rate: c.rate, start: time.Now()}
	unit := max(c.to.grain(), sectorBytes)
	err = c.run(ctx, func(ctx context.Context, emit func(piece) error) error {
		in := interruptible{ctx, r}
		for ended := false; !ended; {
			buf, err := c.buffer(ctx)
			if err != nil {
				return err
			}
			n, err := io.ReadFull(in, buf)
			ended = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
			if err != nil && !ended {
				return fmt.Errorf("reading byte %d of the source: %w", size+int64(n), err)
			}
			end := size + (int64(n)+unit-1)/unit*unit
			clear(buf[n : end-size])
			if err := pace.wait(ctx, int64(n)); err != nil {
				return err
			}
			if err := longer(end); err != nil {
				return err
			}
			if err := emit(piece{task: task{copyAll, size, end}, buf: buf, filled: true}); err != nil {
				return err
			}
			size += (int64(n) + sectorBytes - 1) / sectorBytes * sectorBytes
		}
		return nil
	})
	return size, err
}

// pollMilliseconds is how often a reader that waits looks at its context.
const pollMilliseconds = 200

// interruptible is a reader that stops waiting for input once ctx is done, if that
// comes from a file.
type interruptible struct {
	ctx context.Context
	io.Reader
}

// Read implements io.Reader.
func (r interruptible) Read(p []byte) (int, error) {
	f, ok := r.Reader.(*os.File)
	for ok {
		if r.ctx.Err() != nil {
			return 0, context.Cause(r.ctx)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}, pollMilliseconds) //nolint:gosec // G115: a file descriptor
		ok = n == 0 && err == nil || errors.Is(err, unix.EINTR)
	}
	return r.Reader.Read(p)
}

// streamSink writes to something that takes bytes in order, and zeros for what is
// left out.
type streamSink struct {
	w   io.Writer
	off int64 // how far it is
}

func (*streamSink) grain() int64 { return 1 }

func (s *streamSink) write(p []byte, off int64) error {
	if err := s.zero(s.off, off-s.off); err != nil {
		return err
	}
	n, err := s.w.Write(p)
	s.off += int64(n)
	return err
}

func (s *streamSink) zero(off, n int64) error {
	for end := off + n; s.off < end; {
		k, err := s.w.Write(zeros[:min(end-s.off, int64(len(zeros)))])
		s.off += int64(k)
		if err != nil {
			return err
		}
	}
	return nil
}

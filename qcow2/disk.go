package qcow2

import (
	"context"
	"io"
	"iter"
)

// Disk is a view of an Image whose requests end early when a context is done. Its
// methods are those of the Image, and as safe for concurrent use.
//
// A request is done in pieces, which end at multiples of 4 MiB of the disk. Before
// each it looks at the context, and waits no longer than that for what keeps it
// from beginning: Resize and the like, and for a write the requests that have
// others of its clusters in work. A piece that has begun is finished. So an error
// that wraps the context's comes within the time of one piece, and the pieces
// before it are done.
type Disk struct {
	image *Image
	ctx   context.Context
}

// diskPiece is the length of the pieces. It is a multiple of any cluster size, so
// that requests are cut where clusters end.
const diskPiece = 4 << 20

// WithContext returns a view of the disk whose requests end early once ctx is done.
// It costs nothing to make, so one may be made for each request; closing is up to
// the Image.
func (m *Image) WithContext(ctx context.Context) *Disk { return &Disk{image: m, ctx: ctx} }

// err returns an error that wraps the context's if it is done.
func (d *Disk) err() error {
	if err := d.ctx.Err(); err != nil {
		return &Error{Path: d.image.path, What: "a request was stopped", Err: err}
	}
	return nil
}

// pieces calls do for the pieces of [off, off+n), one after the other, until one
// fails or the context is done. It returns the length of those that were done.
func (d *Disk) pieces(off, n int64, do func(off, n int64) error) (int64, error) {
	var done int64
	for done < n {
		if err := d.admitted(); err != nil {
			return done, err
		}
		at := off + done
		part := min(n-done, diskPiece-at%diskPiece)
		if err := do(at, part); err != nil {
			return done, err
		}
		done += part
	}
	return done, nil
}

// admitted waits while requests are kept out of the image.
func (d *Disk) admitted() error {
	d.image.mu.RLock()
	gate := d.image.gate
	d.image.mu.RUnlock()
	if gate != nil {
		return d.wait(gate)
	}
	return d.err()
}

// wait returns when done is closed, or with an error once the context is done.
func (d *Disk) wait(done <-chan struct{}) error {
	select {
	case <-done:
	case <-d.ctx.Done():
	}
	return d.err()
}

// unclaimed waits for the claims that others have now to guest clusters in
// [off, off+n). A write that meets one made later waits for it as any other does.
func (d *Disk) unclaimed(off, n int64) error {
	m := d.image
	end := m.cluster(off+n-1) + 1
	for c := m.cluster(off); c < end; {
		m.lock()
		other := m.inflight.overlapping(c)
		if other == nil || other.guest >= end {
			m.mu.Unlock()
			return nil
		}
		done := other.wait()
		c = other.end()
		m.mu.Unlock()
		if err := d.wait(done); err != nil {
			return err
		}
	}
	return nil
}

// Size is the length of the disk in bytes.
func (d *Disk) Size() int64 { return d.image.Size() }

// ReadOnly reports whether the image was opened for reading only.
func (d *Disk) ReadOnly() bool { return d.image.readOnly }

// ReadAt implements io.ReaderAt. Stopped early, it returns how many bytes it has
// read.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if size := d.Size(); off >= 0 && off <= size {
		n = min(n, size-off)
	}
	done, err := d.read([][]byte{p[:n]}, off)
	if err == nil && n < int64(len(p)) {
		err = io.EOF
	}
	return int(done), err
}

// WriteAt implements io.WriterAt. Stopped early, it returns how many bytes it has
// written for certain.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	done, err := d.write([][]byte{p}, off)
	return int(done), err
}

// ReadvAt is Image.ReadvAt.
func (d *Disk) ReadvAt(iov [][]byte, off int64) error {
	_, err := d.read(iov, off)
	return err
}

// WritevAt is Image.WritevAt.
func (d *Disk) WritevAt(iov [][]byte, off int64) error {
	_, err := d.write(iov, off)
	return err
}

// read fills iov from off and returns how many bytes it has read.
func (d *Disk) read(iov [][]byte, off int64) (int64, error) {
	n := length(iov)
	if err := d.image.checkRange(off, n); err != nil {
		return 0, err
	}
	r := newRequest(iov)
	defer r.release()
	return d.pieces(off, n, func(off, n int64) error { return d.image.read(r, off, n) })
}

// write writes iov at off and returns how many bytes it has written for certain.
func (d *Disk) write(iov [][]byte, off int64) (int64, error) {
	r := newRequest(iov)
	defer r.release()
	return d.change(off, length(iov), func(off, n int64) error { return d.image.write(r, off, n) })
}

// change is pieces for what changes the disk.
func (d *Disk) change(off, n int64, do func(off, n int64) error) (int64, error) {
	if err := d.image.checkWrite(off, n); err != nil {
		return 0, err
	}
	return d.pieces(off, n, func(off, n int64) error {
		if err := d.unclaimed(off, n); err != nil {
			return err
		}
		return do(off, n)
	})
}

// WriteZeroes is Image.WriteZeroes.
func (d *Disk) WriteZeroes(off, n int64) error { return d.erase(d.image.WriteZeroes, off, n) }

// PunchHole is Image.PunchHole.
func (d *Disk) PunchHole(off, n int64) error { return d.erase(d.image.PunchHole, off, n) }

// Discard is Image.Discard.
func (d *Disk) Discard(off, n int64) error { return d.erase(d.image.Discard, off, n) }

// DiscardGranularity is Image.DiscardGranularity.
func (d *Disk) DiscardGranularity() int64 { return d.image.DiscardGranularity() }

func (d *Disk) erase(do func(off, n int64) error, off, n int64) error {
	_, err := d.change(off, n, do)
	return err
}

// WriteCompressed is Image.WriteCompressed: one piece.
func (d *Disk) WriteCompressed(p []byte, off int64) error {
	_, err := d.change(off, int64(len(p)), func(off, _ int64) error { return d.image.WriteCompressed(p, off) })
	return err
}

// Flush is Image.Flush: one piece, because a commit that has begun has to end.
func (d *Disk) Flush() error {
	if err := d.admitted(); err != nil {
		return err
	}
	return d.image.Flush()
}

// Map is Image.Map. It looks at the context before each mapping that it looks up,
// and ends with an error that wraps the context's once it is done.
func (d *Disk) Map(off, n int64) iter.Seq2[Mapping, error] {
	return d.image.mappings(off, n, d.err)
}

package qcow2

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Image is an open QCOW2 image: a disk of Size bytes. Its methods are safe for
// concurrent use by any number of goroutines. See the package documentation for
// what is ordered with what.
type Image struct {
	geometry
	path     string // for messages
	file     file
	data     file   // where guest data is: file, or the external data file
	dataPath string // of data, for Map
	raw      bool   // data has to read like the disk by itself
	readOnly bool
	size     atomic.Int64 // of the disk, in bytes; changed by exclusively only
	// reach is how far a Resize itself may read and write: to size, and beyond
	// while it prepares what it adds. Only Resize changes it.
	reach     atomic.Int64
	backing   backing
	base      Base // among the backing files; nil if none is open for writing
	baseLayer int
	zlib      bool   // compression type
	features  uint64 // incompatible ones, as in the file at open
	l1Offset  int64

	counts   counters
	refs     *refcounts
	commits  commits
	decoder  *decoder
	encoders *encoders // of a writable image

	// broken is set once, when the image can no longer be written: found to
	// be corrupt, or a flush failed. It stays. Any goroutine may set it.
	broken atomic.Pointer[error]

	// followed is set while there are persistent bitmaps in the file that are
	// said to have followed the disk: open sets it, and the first request that
	// changes the disk clears it, by markBitmaps.
	followed atomic.Bool
	bitmaps  bitmapDirectory // of a writable image
	// bitmapChanges counts the changes of the persistent bitmaps. Only a change
	// of the image as a whole adds to it.
	bitmapChanges uint64

	sparseOnce sync.Once
	isSparse   bool // see sparse

	// unpunchable is set once, by any goroutine, when the host cannot punch
	// holes into the file.
	unpunchable atomic.Bool

	// resizing lets only one goroutine resize the disk, or change the internal
	// snapshots or the persistent bitmaps. It is taken before all other locks.
	resizing sync.Mutex

	// turns lets only one goroutine close the image or run something
	// exclusively. It is taken before all other locks but resizing.
	turns sync.Mutex

	// bitmapsMu lets only one goroutine mark the persistent bitmaps. It is held
	// across that, and with it none but syncMu and mu is taken.
	bitmapsMu sync.Mutex

	// syncMu makes calls of fdatasync take turns. It is held across them, and
	// with it none but mu is taken.
	syncMu sync.Mutex

	// mu is the metadata lock. It is never held across input or output,
	// neither shared nor exclusively, and is the last in the lock order.
	mu     metaLock
	closed bool // guarded by mu, as is all that follows
	// gate is not nil while exclusively keeps requests out, and closed when
	// they may come in again.
	gate   chan struct{}
	l1     []uint64 // as in the file; decoded by decodeL1
	cache  *sliceCache
	loads  map[uint64]*flight // slices being read, by ID
	tables map[uint64]*flight // L2 tables being made, by L1 index
	meta   metaSet
	// covered is the number of host clusters that have a reference count.
	covered  uint64
	inflight inflight
	pool     pool
	packer   packer
	epochs   epochs

	// What the next commit has to make durable, beside the dirty slices:
	dirtyL1 map[uint64]struct{} // changed L1 entries
	grown   []extent            // clusters that gained their first reference
	freed   []uint64            // clusters that lost one, once per reference
	// released lost a reference durably but still count it.
	released []freeBatch
}

var (
	_ io.ReaderAt = (*Image)(nil)
	_ io.WriterAt = (*Image)(nil)
	_ io.Closer   = (*Image)(nil)
)

// Size is the length of the disk in bytes.
func (m *Image) Size() int64 { return m.size.Load() }

// ReadOnly reports whether the image was opened for reading only.
func (m *Image) ReadOnly() bool { return m.readOnly }

// Version is the version of the format, 2 or 3.
func (m *Image) Version() int { return int(m.version) }

// ClusterSize is the unit of allocation in bytes.
func (m *Image) ClusterSize() int64 { return m.clusterSize }

// IOHints tells a guest which requests suit the image, in bytes: the largest unit
// that the host writes without reading it first, a page or a cluster if that is
// less; nothing for the smallest length; and clusters for the best.
func (m *Image) IOHints() (physicalBlock, minIO, optimalIO int64) {
	const page = 4096
	return min(page, m.clusterSize), 0, m.clusterSize
}

// flight is an operation that several goroutines want done and one does.
type flight struct {
	done chan struct{}
	err  error // set before done is closed
}

// requestState is the scratch memory of one request, reused so that a hot
// request allocates nothing.
type requestState struct {
	iov   [][]byte // what is left of the caller's vector
	skip  int      // bytes of iov[0] that are done
	sub   [][]byte // scratch of take
	used  int      // the greatest length of sub so far
	one   [1][]byte
	shard int // of the pins
}

var (
	nextShard atomic.Uint32
	requests  = sync.Pool{New: func() any {
		return &requestState{shard: int(nextShard.Add(1) % pinShards)}
	}}
)

func newRequest(iov [][]byte) *requestState {
	r := requests.Get().(*requestState)
	r.iov, r.skip = iov, 0
	return r
}

// newRequestOf is newRequest for one buffer.
func newRequestOf(p []byte) *requestState {
	r := requests.Get().(*requestState)
	r.one[0] = p
	r.iov, r.skip = r.one[:], 0
	return r
}

// release gives r back, without references to the caller's buffers.
func (r *requestState) release() {
	clear(r.sub[:r.used])
	r.iov, r.one[0], r.used = nil, nil, 0
	requests.Put(r)
}

// take returns the next n bytes of the request's buffers, with prefix before
// them, and moves past them. The result is valid until the next call.
func (r *requestState) take(n int64, prefix ...[]byte) [][]byte {
	r.sub = append(r.sub[:0], prefix...)
	for n > 0 {
		b := r.iov[0][r.skip:]
		if int64(len(b)) > n {
			b = b[:n]
			r.skip += int(n)
		} else {
			r.iov, r.skip = r.iov[1:], 0
		}
		if len(b) > 0 {
			r.sub = append(r.sub, b)
		}
		n -= int64(len(b))
	}
	r.used = max(r.used, len(r.sub))
	return r.sub
}

// length is the sum of the lengths of iov.
func length(iov [][]byte) int64 {
	var n int64
	for _, b := range iov {
		n += int64(len(b))
	}
	return n
}

// checkRange returns an error unless [off, off+n) lies inside the disk.
func (m *Image) checkRange(off, n int64) error { return m.checkInside(off, n, m.Size()) }

// checkReach is checkRange for the pieces of a request, whose range was inside
// the disk when it began, and for what Resize does beyond its end.
func (m *Image) checkReach(off, n int64, shard int) error {
	return m.checkInside(off, n, m.limit(shard))
}

// limit is how far a request of the shard may reach.
func (m *Image) limit(shard int) int64 {
	if shard == growShard {
		return m.reach.Load()
	}
	return m.Size()
}

func (m *Image) checkInside(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return &Error{
			Path: m.path, Kind: ErrRange,
			What: fmt.Sprintf("the range of %d bytes at %d is outside the disk of %d bytes", n, off, size),
		}
	}
	return nil
}

// usable returns the error that ends all writing, nil if there is none.
func (m *Image) usable() error {
	if p := m.broken.Load(); p != nil {
		return *p
	}
	return nil
}

// fail ends all writing with err, which happened while metadata was on its way
// to stable storage. It returns the error that stays.
func (m *Image) fail(err error) error {
	stays := error(&Error{
		Path: m.path, Kind: ErrFlushFailed,
		What: "a flush failed and the image takes no more writes", Err: err,
		Mend: "open it again; what was written since the last flush may be lost",
	})
	m.broken.CompareAndSwap(nil, &stays)
	return m.usable()
}

// datasync makes all that was written durable. After a failure it is unknown
// which pages the kernel dropped, so nothing may be built on them. The kernel
// reports a failure to one caller only; as callers take turns, each later one
// finds it here.
func (m *Image) datasync() error {
	m.syncMu.Lock()
	defer m.syncMu.Unlock()
	if err := m.usable(); err != nil {
		return err
	}
	m.counts.syncs.Add(1)
	err := m.file.Fdatasync()
	if m.external {
		err = errors.Join(err, m.data.Fdatasync())
	}
	if err != nil {
		return m.fail(err)
	}
	return nil
}

// explain turns an internal error into the one that callers see. A corruption of
// the disk found while writing ends all writing and sets the corrupt bit, so that
// nobody makes it worse. mu is not held.
func (m *Image) explain(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[inactiveError](err); ok {
		return inFile(m.path, err)
	}
	err = inFile(m.path, err)
	if errors.Is(err, ErrCorrupt) && !m.readOnly {
		var e *Error
		if errors.As(err, &e) && e.Path == m.path {
			m.markCorrupt(err)
		}
	}
	return err
}

// markCorrupt makes err the fate of all writes and sets the corrupt bit, unless
// the image is being closed.
func (m *Image) markCorrupt(err error) {
	if !m.broken.CompareAndSwap(nil, &err) {
		return
	}
	if p, err := m.hold(0); err == nil {
		m.setCorruptBit()
		p.leave()
	}
}

// setCorruptBit sets the corrupt bit where the version has one. It is best
// effort: whether it succeeds or not, this process writes no more.
func (m *Image) setCorruptBit() {
	if m.version < 3 {
		return
	}
	if err := m.writeFeature(offIncompatible, m.features|1<<incompatCorrupt); err == nil {
		_ = m.file.Fdatasync()
	}
}

// hold pins the present epoch for a request, which keeps the files open until
// the pin is left, and the disk's size from changing. It fails if the image is
// closed. The caller has no other pin; mu is not held.
func (m *Image) hold(shard int) (*pin, error) {
	if err := m.admit(shard); err != nil {
		return nil, err
	}
	defer m.mu.RUnlockShard(shard)
	m.counts.held.Add(1)
	return m.epochs.enter(shard), nil
}

// admit takes the shared side of the metadata lock in a shard, which the caller
// gives back, for a request that has no pin yet. It fails if the image is closed and waits
// while exclusively keeps requests out.
func (m *Image) admit(shard int) error {
	for {
		m.mu.RLockShard(shard)
		gate := m.gate
		if gate == nil && !m.closed {
			return nil
		}
		closed := m.closed
		m.mu.RUnlockShard(shard)
		if closed {
			return m.errClosed()
		}
		<-gate
	}
}

// idlePoll is how often drain looks whether the last request is over.
const idlePoll = time.Millisecond

// drain waits until no request is under way. mu is held exclusively, here and
// there without it, and the caller has seen to it that no request begins.
func (m *Image) drain() {
	for !m.epochs.idle() {
		m.mu.Unlock()
		time.Sleep(idlePoll)
		m.mu.Lock()
	}
}

// exclusively runs f while no request is under way, none begins, and no commit
// runs: for what changes the image as a whole. f may do input and output, and
// calls commit directly if it needs one. The caller has no pin; no lock is held.
func (m *Image) exclusively(f func() error) error {
	m.turns.Lock()
	defer m.turns.Unlock()
	m.lock()
	if m.closed {
		m.mu.Unlock()
		return m.errClosed()
	}
	gate := make(chan struct{})
	m.gate = gate
	m.drain()
	m.sealPacker()
	m.mu.Unlock()
	defer func() {
		m.lock()
		m.gate = nil
		m.mu.Unlock()
		close(gate)
	}()
	m.commits.running.Lock()
	defer m.commits.running.Unlock()
	return f()
}

// Close waits for the requests under way, flushes, and closes the image and its
// backing files, which ends their locks. It returns the error of the flush.
// Requests that begin later fail with ErrClosed. A second Close waits for the
// first and does nothing.
func (m *Image) Close() error {
	m.turns.Lock()
	defer m.turns.Unlock()
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	m.drain()
	m.sealPacker()
	m.mu.Unlock()
	var err error
	if !m.readOnly {
		m.commits.stop()
		err = m.finish()
	}
	if m.backing != nil {
		err = errors.Join(err, m.backing.Close())
	}
	if m.external {
		err = errors.Join(err, m.data.Close())
	}
	return errors.Join(err, m.file.Close())
}

// finish flushes twice: the first makes the removal of pointers durable, the
// second lowers the counts of what they pointed to. A corrupt image is left as
// it is, and the error says so, because writes since the last flush are lost.
func (m *Image) finish() error {
	err := m.commits.run(m.commitAll)
	if err = inFile(m.path, err); errors.Is(err, ErrCorrupt) {
		m.setCorruptBit()
	}
	return err
}

// commitAll commits until nothing is left to do. No request is under way.
func (m *Image) commitAll() error {
	err := m.commit()
	if err == nil && m.owesCounts() {
		err = m.commit()
	}
	return err
}

// owesCounts reports whether a commit has counts to lower now that no request is
// left.
func (m *Image) owesCounts() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.epochs.advance()
	m.epochs.advance()
	return len(m.released) > 0
}

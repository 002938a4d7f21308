package blk

import (
	"encoding/binary"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/calfvm/calf/virtio"
)

// Request types and states (section 5.2.6).
const (
	typeIn          = 0  // VIRTIO_BLK_T_IN
	typeOut         = 1  // VIRTIO_BLK_T_OUT
	typeFlush       = 4  // VIRTIO_BLK_T_FLUSH
	typeGetID       = 8  // VIRTIO_BLK_T_GET_ID
	typeDiscard     = 11 // VIRTIO_BLK_T_DISCARD
	typeWriteZeroes = 13 // VIRTIO_BLK_T_WRITE_ZEROES

	statusOK     = 0 // VIRTIO_BLK_S_OK
	statusIOErr  = 1 // VIRTIO_BLK_S_IOERR
	statusUnsupp = 2 // VIRTIO_BLK_S_UNSUPP

	// noStatus stands for a status where there must be none, because the
	// request is going to be served again (ErrorStop), or the queue stops.
	noStatus = 0xff

	headerSize = 16
)

const (
	// A batch is published at the latest after so many requests, or once it
	// has taken so long: the driver refills the queue meanwhile.
	maxBatch     = 16
	maxBatchTime = 50 * time.Microsecond

	// maxPiece is the most bytes of a request that are moved without looking
	// for a stop. It is a multiple of every block size.
	maxPiece = 4 << 20
)

// worker serves one queue from StartQueue to StopQueue, in a goroutine of its
// own that alone uses all fields but busy, stopping, quit and done.
type worker struct {
	dev   *Device
	disk  Disk
	count *counters
	vq    *virtio.Queue
	base  virtio.QueueStats // of vq when the worker began

	chain  virtio.Chain
	head   [headerSize]byte
	ranges [maxSegments]byteRange // of the request being served

	timer *time.Timer // of pace

	busy sync.Mutex // held while a batch is being served; see Device.Pause

	stopping atomic.Bool
	quit     chan struct{} // closed when stopping becomes true
	done     chan struct{} // closed when the worker has ended
}

func newWorker(d *Device, q *queue, vq *virtio.Queue) *worker {
	return &worker{
		dev:   d,
		disk:  d.cfg.Disk,
		count: &q.counters,
		vq:    vq,
		base:  vq.Stats(),
		timer: stoppedTimer(),
		quit:  make(chan struct{}),
		done:  make(chan struct{}),
	}
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(maxDebt)
	t.Stop()
	return t
}

// stop makes the worker end after the request it is at, or the piece of a long
// one. It does not wait.
func (w *worker) stop() {
	if !w.stopping.Swap(true) {
		close(w.quit)
	}
	w.vq.Kick()
}

// ended is what has happened on the queue since the worker began.
func (w *worker) ended() virtio.QueueStats { return sinceStart(w.vq.Stats(), w.base) }

func (w *worker) run() {
	defer close(w.done)
	for !w.stopping.Load() {
		if w.vq.Wait() != nil {
			return
		}
		w.drain()
	}
}

// drain serves the queue until it is empty and will be kicked again. V17: a
// guest that keeps it full keeps this goroutine busy but nothing else: after
// every batch the worker looks for a stop and offers its thread to others.
func (w *worker) drain() {
	for !w.resting() {
		if w.batch() {
			w.pace()
		} else if w.resting() || !w.vq.Rearm() {
			return
		}
	}
}

// resting reports whether the worker is to leave the queue alone, for good or
// until it is kicked.
func (w *worker) resting() bool {
	return w.stopping.Load() || w.dev.halted.Load() || w.dev.paused.Load() > 0
}

// pace lets others run, and if the disk's rates are used up, for so long that
// they are not, or until the worker is stopped. No request is in hand meanwhile:
// what is waiting is still in the ring, so a stop loses nothing.
func (w *worker) pace() {
	wait := w.dev.rates.wait()
	if wait == 0 {
		runtime.Gosched()
		return
	}
	w.count.throttled.Add(1)
	w.timer.Reset(wait)
	select {
	case <-w.timer.C:
	case <-w.quit:
		w.timer.Stop()
	}
}

// batch serves some requests and publishes them together. It reports whether
// there may be more.
func (w *worker) batch() (more bool) {
	w.busy.Lock()
	defer w.busy.Unlock()
	if w.resting() {
		return true // perhaps
	}
	begin := time.Now()
	before := begin
	for range maxBatch {
		if !w.dev.payFlush() || w.dev.rates.overdrawn() {
			more = true // perhaps; pace comes first
			break
		}
		if more = w.vq.Pop(&w.chain); !more {
			break
		}
		w.dev.rates.spend(1, 0)
		n, took, ok := w.serve(&w.chain)
		if !ok {
			w.vq.Unpop(&w.chain)
			break
		}
		w.vq.Push(&w.chain, n)
		now := time.Now()
		if took != nil {
			took.add(now.Sub(before))
		}
		if w.resting() || now.Sub(begin) > maxBatchTime {
			break
		}
		before = now
	}
	w.vq.Publish()
	return more
}

// serve carries out the request in c and returns how many bytes of it were
// written without a gap from the first writable one (V7): the data and the
// status if the data is complete, else nothing unless the status stands alone.
// took counts how long such requests take, and may be nil. If ok is false, the
// request has no answer and is to be served again.
func (w *worker) serve(c *virtio.Chain) (used uint32, took *histogram, ok bool) {
	// V18: the header is read once, here.
	hasHeader := c.TakeReadable(w.head[:])
	status := c.TakeStatus()
	switch {
	case status == nil:
		w.count.unanswerable.Add(1)
		return 0, nil, true // B10: there is no way to answer
	case !hasHeader:
		w.count.others.Add(1)
		w.count.errors.Add(1)
		status[0] = statusIOErr
		if len(c.Writable) == 0 {
			used = 1 // the status stands alone
		}
		return used, nil, true
	}
	room := virtio.Len(c.Writable)
	var code byte
	var filled uint64
	sector := binary.LittleEndian.Uint64(w.head[8:])
	switch binary.LittleEndian.Uint32(w.head[:]) {
	case typeIn:
		w.count.reads.Add(1)
		took = &w.count.readTime
		code, filled = w.read(c, sector, room)
	case typeOut:
		w.count.writes.Add(1)
		took = &w.count.writeTime
		code = w.write(c, sector, room)
	case typeFlush:
		w.count.flushes.Add(1)
		took = &w.count.flushTime
		code = w.flush()
	case typeDiscard:
		w.count.discards.Add(1)
		took = &w.count.rangeTime
		code = w.discard(c, room)
	case typeWriteZeroes:
		w.count.zeroWrites.Add(1)
		took = &w.count.rangeTime
		code = w.writeZeroes(c, room)
	case typeGetID:
		w.count.others.Add(1)
		code, filled = w.getID(c, room)
	default:
		w.count.others.Add(1)
		code = statusUnsupp // B4
	}
	switch code {
	case noStatus:
		return 0, nil, false
	case statusIOErr:
		w.count.errors.Add(1)
	case statusUnsupp:
		w.count.unsupported.Add(1)
	}
	status[0] = code
	if filled == room {
		filled++ // the status byte follows without a gap
	}
	return uint32(filled), took, true
}

// read carries out an IN request for room bytes.
func (w *worker) read(c *virtio.Chain, sector, room uint64) (code byte, filled uint64) {
	if len(c.Readable) != 0 || !w.dev.inBounds(sector, room) { // B3, B1
		return statusIOErr, 0
	}
	if room == 0 {
		return statusOK, 0 // B2
	}
	w.dev.rates.spend(0, room)
	if code := w.transfer(typeIn, c.Writable, sector); code != statusOK {
		return code, 0
	}
	w.count.bytesRead.Add(room)
	return statusOK, room
}

// write carries out an OUT request. room is the number of writable data bytes,
// of which there must be none.
func (w *worker) write(c *virtio.Chain, sector, room uint64) (code byte) {
	n := virtio.Len(c.Readable)
	if room != 0 || !w.dev.inBounds(sector, n) || w.disk.ReadOnly() { // B3, B1, B5
		return statusIOErr
	}
	if n == 0 {
		return statusOK // B2
	}
	w.dev.rates.spend(0, n)
	if code := w.transfer(typeOut, c.Readable, sector); code != statusOK {
		return code
	}
	w.count.bytesWritten.Add(n)
	return w.settle()
}

// transfer moves bufs from the disk (typeIn) or to it (typeOut), which may be up
// to 4 GiB, in pieces: a stop waits for one of them at most (P23), and leaves the
// request without an answer. It changes the elements of bufs.
func (w *worker) transfer(kind int, bufs [][]byte, sector uint64) (code byte) {
	for len(bufs) > 0 {
		// All pieces but the last have maxPiece bytes.
		n, left := 0, maxPiece
		for n < len(bufs) && len(bufs[n]) <= left {
			left -= len(bufs[n])
			n++
		}
		var rest []byte // of the buffer that the piece ends in
		if n < len(bufs) && left > 0 {
			bufs[n], rest = bufs[n][:left], bufs[n][left:]
			n++
		}
		if code := w.movePiece(kind, bufs[:n], sector); code != statusOK {
			return code
		}
		if rest != nil {
			n--
			bufs[n] = rest
		}
		bufs = bufs[n:]
		sector += maxPiece / SectorSize
		if len(bufs) > 0 && w.stopping.Load() {
			return noStatus
		}
	}
	return statusOK
}

func (w *worker) movePiece(kind int, piece [][]byte, sector uint64) (code byte) {
	off := int64(sector * SectorSize) //nolint:gosec // G115: on the disk
	if kind == typeIn {
		if err := w.disk.ReadvAt(piece, off); err != nil {
			return w.dev.diskFailed("read", sector, err)
		}
		return statusOK
	}
	if err := w.disk.WritevAt(piece, off); err != nil {
		return w.dev.diskFailed("write", sector, err)
	}
	return statusOK
}

// settle ends a request that has changed the disk.
func (w *worker) settle() (code byte) {
	if w.dev.writeThrough.Load() {
		return w.flush() // B11
	}
	return statusOK
}

func (w *worker) flush() (code byte) {
	if err := w.dev.flush(); err != nil {
		return w.dev.diskFailed("flush", 0, err)
	}
	return statusOK
}

// getID carries out a GET_ID request for room bytes (B9).
func (w *worker) getID(c *virtio.Chain, room uint64) (code byte, filled uint64) {
	if room < MaxSerial {
		return statusIOErr, 0
	}
	id := w.dev.serial[:]
	for _, b := range c.Writable {
		id = id[copy(b, id):]
	}
	return statusOK, MaxSerial
}

// inBounds reports whether n bytes from sector are whole blocks on the disk. It
// cannot overflow (B1).
func (d *Device) inBounds(sector, n uint64) bool {
	sectors, capacity := n/SectorSize, d.capacity.Load()
	return n%uint64(d.cfg.BlockSize) == 0 && sector <= capacity && sectors <= capacity-sector
}

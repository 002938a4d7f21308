// Package vsock is the virtio socket device of VIRTIO 1.2, section 5.10: stream
// connections between programs in the guest and the host, without a network.
//
// A Device turns the packets of the driver into Conns: Config.Serve gets those that
// the guest opens, Dial opens others. Both sides say how much they have room for
// (5.10.6.3), so that neither a guest that does not read nor a program on the host
// that does not holds up another connection or takes more than a bounded amount of
// memory.
//
// ServeUnix and ToUnix lead connections to and from Unix sockets of the host, in
// the form that Firecracker uses.
package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/virtio"
)

const (
	deviceID  = 19 // section 5.10.1
	queueSize = 256

	// The queues (5.10.2). Nothing is ever sent on the third.
	queueRX = 0
	queueTX = 1
	queues  = 3

	// maxConns bounds the connections of a device, and with them its memory. What the
	// guest has forgotten counts as long as it is served.
	maxConns = 256
	// maxResets bounds the answers that wait for buffers of the driver. When
	// there are so many, no packet of the driver is looked at (5.10.6.2).
	maxResets = 256
	// maxBatch bounds the packets between two publications (V17).
	maxBatch = 16

	// Dial uses ports of the host from here on.
	firstPort = 1 << 30
)

// MinCID is the smallest context ID that a guest can have (5.10.4).
const MinCID = 3

// ErrNotReady means that the guest has no driver for its device, or not yet.
var ErrNotReady = errors.New("vsock: the guest does not listen to its socket device")

// Config is what a Device is made of.
type Config struct {
	// CID is the context ID of the guest, at least MinCID; 0 means MinCID.
	CID uint32
	// Serve is called, in a goroutine of its own, for each connection that the
	// guest wants to open. It is open once Serve has called Accept; one for
	// which Serve returns without that is refused. It is closed when Serve
	// returns. Without Serve every connection is refused.
	Serve func(*Conn)
}

// Device is a virtio socket device. It is a virtio.Device; a transport drives it.
// Once stopped it can be driven again, by another transport too. Dial and Close
// are safe for concurrent use with all else.
type Device struct {
	cfg     Config
	workers [queues]*virtio.Worker // of queues that are started
	serving sync.WaitGroup         // calls of Config.Serve
	over    context.Context        // done when the device is closed
	end     context.CancelFunc     // of over

	rxChain, txChain virtio.Chain // of the workers

	// mu guards what follows. It is never held together with a Conn's.
	mu       sync.Mutex
	running  bool                  // from Start to Stop
	closed   bool                  // no connection is served any more
	served   int                   // how many calls of Config.Serve there are
	vqs      [queues]*virtio.Queue // that are started
	conns    map[ports]*Conn
	ready    []*Conn // that may have something for the guest; each once
	resets   []header
	nextPort uint32
}

// ports tell the connections of a guest from each other.
type ports struct{ host, guest uint32 }

var _ virtio.Device = (*Device)(nil)

// New returns a device. The caller closes it when its transport is closed.
func New(cfg Config) (*Device, error) {
	if cfg.CID == 0 {
		cfg.CID = MinCID
	}
	if cfg.CID < MinCID || cfg.CID == 1<<32-1 {
		return nil, fmt.Errorf("vsock: a guest cannot have the context ID %d: it is from %d to %d", cfg.CID, MinCID, uint32(1<<32-2))
	}
	d := &Device{cfg: cfg, conns: map[ports]*Conn{}, nextPort: firstPort}
	d.over, d.end = context.WithCancel(context.Background())
	return d, nil
}

// Close ends all connections, and returns when every call of Config.Serve has
// returned.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.reset()
	d.end()
	d.serving.Wait()
	return nil
}

// DeviceID implements virtio.Device.
func (d *Device) DeviceID() uint16 { return deviceID }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return 0 }

// Queues implements virtio.Device.
func (d *Device) Queues() (n int, maxSize uint16) { return queues, queueSize }

// ReadConfig implements virtio.Device: the guest's context ID, 8 bytes.
func (d *Device) ReadConfig(off uint64, p []byte) {
	clear(p)
	var space [8]byte
	binary.LittleEndian.PutUint32(space[:], d.cfg.CID)
	if off < uint64(len(space)) {
		copy(p, space[off:])
	}
}

// WriteConfig implements virtio.Device.
func (d *Device) WriteConfig(uint64, []byte) {}

// Negotiated implements virtio.Device.
func (d *Device) Negotiated(uint64) {}

// Start implements virtio.Device.
func (d *Device) Start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running = true
	return nil
}

// StartQueue implements virtio.Device.
func (d *Device) StartQueue(i int, q *virtio.Queue) {
	d.mu.Lock()
	d.vqs[i] = q
	d.mu.Unlock()
	switch i {
	case queueRX:
		d.workers[i] = virtio.StartWorker(q, d.receive)
	case queueTX:
		d.workers[i] = virtio.StartWorker(q, d.transmit)
	}
	q.Kick() // for what has waited while the queue was stopped
}

// StopQueue implements virtio.Device.
func (d *Device) StopQueue(i int) {
	d.workers[i].Stop()
	d.workers[i] = nil
	d.mu.Lock()
	d.vqs[i] = nil
	d.mu.Unlock()
}

// Stop implements virtio.Device. It ends all connections.
func (d *Device) Stop() {
	for i := range queues {
		d.StopQueue(i)
	}
	d.mu.Lock()
	d.running = false
	d.mu.Unlock()
	d.reset()
}

// reset forgets all connections, whose ends on the host fail.
func (d *Device) reset() {
	d.mu.Lock()
	conns := d.conns
	d.conns, d.ready, d.resets = map[ports]*Conn{}, nil, nil
	d.mu.Unlock()
	for _, c := range conns {
		c.fail(unix.ECONNRESET)
	}
}

// Dial opens a connection to the program that listens at a port of the guest. It
// fails with ErrNotReady, and with ECONNREFUSED if nobody listens.
func (d *Device) Dial(ctx context.Context, port uint32) (*Conn, error) {
	c, err := d.newDial(port)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })()
	if err := c.established(); err != nil {
		d.abort(c)
		return nil, fmt.Errorf("vsock: connecting to port %d of the guest: %w", port, err)
	}
	return c, nil
}

// newDial enters a connection to be opened from a free port of the host.
func (d *Device) newDial(port uint32) (*Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.running || d.closed:
		return nil, ErrNotReady
	case len(d.conns) >= maxConns:
		return nil, fmt.Errorf("vsock: the guest has %d connections, which is as many as there can be", maxConns)
	}
	p := ports{d.nextPort, port}
	for d.conns[p] != nil {
		d.nextPort = max(d.nextPort+1, firstPort)
		p.host = d.nextPort
	}
	d.nextPort = max(d.nextPort+1, firstPort)
	c := newConn(d, p)
	c.dialed, c.announce = true, opRequest
	d.conns[p] = c
	d.readyLocked(c)
	return c, nil
}

// wake lets the worker of the queue for the guest look at c.
func (d *Device) wake(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.readyLocked(c)
}

// readyLocked has the worker woken unless it has been for c, which it does not rest
// before it has looked at.
func (d *Device) readyLocked(c *Conn) {
	if d.enqueueLocked(c) {
		d.kickLocked(queueRX)
	}
}

// enqueueLocked appends c to ready, and reports false if it is there already, or has
// been forgotten.
func (d *Device) enqueueLocked(c *Conn) bool {
	if c.queued || d.conns[c.ports] != c {
		return false
	}
	c.queued = true
	d.ready = append(d.ready, c)
	return true
}

// again lets the worker of the queue for the guest, which calls it, look at c anew
// after the others.
func (d *Device) again(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enqueueLocked(c)
}

func (d *Device) kickLocked(queue int) {
	if q := d.vqs[queue]; q != nil {
		q.Kick()
	}
}

// drop forgets c.
func (d *Device) drop(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conns[c.ports] == c {
		delete(d.conns, c.ports)
	}
}

// abort forgets c and tells the guest that it is gone.
func (d *Device) abort(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conns[c.ports] != c {
		return
	}
	delete(d.conns, c.ports)
	h := c.header(opReset)
	d.resetLocked(h)
}

func (d *Device) resetLocked(h header) {
	d.resets = append(d.resets, h)
	d.kickLocked(queueRX)
}

// refuse answers a packet that no connection takes with a reset.
func (d *Device) refuse(h *header) {
	if h.op == opReset {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resetLocked(header{
		srcCID: h.dstCID, dstCID: uint64(d.cfg.CID), srcPort: h.dstPort, dstPort: h.srcPort,
		kind: h.kind, op: opReset,
	})
}

// receive gives the guest some packets, as the worker of the queue for it.
func (d *Device) receive(q *virtio.Queue) virtio.Next {
	for range maxBatch {
		if !d.anything() {
			return virtio.AwaitKick
		}
		if !q.Pop(&d.rxChain) {
			return virtio.AwaitDriver
		}
		room := virtio.Len(d.rxChain.Writable)
		if room < headerSize {
			q.Push(&d.rxChain, 0) // the driver's fault
			continue
		}
		n := d.next(d.rxChain.Writable, room)
		if n == 0 {
			q.Unpop(&d.rxChain)
			return virtio.AwaitKick
		}
		q.Push(&d.rxChain, n)
	}
	return virtio.Again
}

// anything reports whether there may be something for the guest.
func (d *Device) anything() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.resets) > 0 || len(d.ready) > 0
}

// next writes the next packet for the guest to bufs, which have room for a header
// at least, and returns its length, 0 if there is none.
func (d *Device) next(bufs [][]byte, room uint64) uint32 {
	for {
		reset, c := d.takeNext()
		if reset != nil {
			b := reset.encode()
			scatter(bufs, b[:])
			return headerSize
		}
		if c == nil {
			return 0
		}
		n, more := c.packet(bufs, room)
		if more {
			d.again(c)
		}
		if n > 0 {
			return n
		}
	}
}

// takeNext takes a reset that waits, or else the connection that has waited
// longest.
func (d *Device) takeNext() (*header, *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.resets) > 0 {
		h := d.resets[0]
		d.resets = d.resets[1:]
		if len(d.resets) == maxResets-1 {
			d.kickLocked(queueTX) // which waits for that
		}
		return &h, nil
	}
	if len(d.ready) == 0 {
		return nil, nil
	}
	c := d.ready[0]
	d.ready = d.ready[1:]
	c.queued = false
	return nil, c
}

// transmit takes some packets of the guest, as the worker of the queue from it.
func (d *Device) transmit(q *virtio.Queue) virtio.Next {
	for range maxBatch {
		if d.choked() {
			return virtio.AwaitKick
		}
		if !q.Pop(&d.txChain) {
			return virtio.AwaitDriver
		}
		d.take(&d.txChain)
		q.Push(&d.txChain, 0)
	}
	return virtio.Again
}

func (d *Device) choked() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.resets) >= maxResets
}

// take handles a packet of the guest. One that is shorter than it says is dropped,
// one for nobody answered with a reset.
func (d *Device) take(chain *virtio.Chain) {
	var raw [headerSize]byte
	if !chain.TakeReadable(raw[:]) {
		return
	}
	h := parseHeader(&raw)
	switch {
	case h.srcCID != uint64(d.cfg.CID) || uint64(h.length) > virtio.Len(chain.Readable):
		return
	case h.dstCID != hostCID || h.kind != typeStream:
		d.refuse(&h)
		return
	}
	p := ports{h.dstPort, h.srcPort}
	d.mu.Lock()
	c := d.conns[p]
	if c == nil && h.op == opRequest {
		d.acceptLocked(p, &h)
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	if c == nil {
		d.refuse(&h)
		return
	}
	switch c.take(&h, chain.Readable) {
	case verdictWake:
		d.wake(c)
	case verdictDrop:
		d.drop(c)
	case verdictAbort:
		d.abort(c)
	}
}

// acceptLocked lets Config.Serve decide about a connection that the guest wants.
func (d *Device) acceptLocked(p ports, h *header) {
	if d.cfg.Serve == nil || d.closed || len(d.conns) >= maxConns || d.served >= maxConns {
		c := newConn(d, p)
		d.resetLocked(c.header(opReset))
		return
	}
	c := newConn(d, p)
	c.credit(h)
	d.conns[p] = c
	d.served++
	d.serving.Go(func() {
		d.cfg.Serve(c)
		c.finish()
		d.mu.Lock()
		d.served--
		d.mu.Unlock()
	})
}

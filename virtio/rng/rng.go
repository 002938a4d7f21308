// Package rng is the virtio entropy device of VIRTIO 1.2, section 5.4: one queue,
// whose buffers it fills with the host's random bytes.
package rng

import (
	"crypto/rand"

	"github.com/calfvm/calf/virtio"
)

const (
	deviceID  = 4 // section 5.4.1
	queueSize = 64

	// maxFill bounds the bytes that one buffer gets. A driver takes fewer than
	// its buffer has room for (5.4.6.2), so nothing is lost by it.
	maxFill = 64 << 10
	// maxBatch bounds the buffers between two publications (V17).
	maxBatch = 16
)

// Device is a virtio entropy device. It is a virtio.Device; a transport drives it.
// The zero Device is ready for use.
type Device struct {
	worker *virtio.Worker // nil while the queue is stopped
	chain  virtio.Chain   // of the worker
}

var _ virtio.Device = (*Device)(nil)

// DeviceID implements virtio.Device.
func (d *Device) DeviceID() uint16 { return deviceID }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return 0 }

// Queues implements virtio.Device.
func (d *Device) Queues() (n int, maxSize uint16) { return 1, queueSize }

// ReadConfig implements virtio.Device. There is no configuration space.
func (d *Device) ReadConfig(_ uint64, p []byte) { clear(p) }

// WriteConfig implements virtio.Device.
func (d *Device) WriteConfig(uint64, []byte) {}

// Negotiated implements virtio.Device.
func (d *Device) Negotiated(uint64) {}

// Start implements virtio.Device.
func (d *Device) Start() error { return nil }

// StartQueue implements virtio.Device.
func (d *Device) StartQueue(_ int, q *virtio.Queue) { d.worker = virtio.StartWorker(q, d.batch) }

// StopQueue implements virtio.Device.
func (d *Device) StopQueue(int) {
	d.worker.Stop()
	d.worker = nil
}

// Stop implements virtio.Device.
func (d *Device) Stop() { d.StopQueue(0) }

func (d *Device) batch(q *virtio.Queue) virtio.Next {
	for range maxBatch {
		if !q.Pop(&d.chain) {
			return virtio.AwaitDriver
		}
		q.Push(&d.chain, fill(d.chain.Writable))
	}
	return virtio.Again
}

// fill fills the first maxFill bytes of bufs and returns how many there are.
func fill(bufs [][]byte) uint32 {
	n := 0
	for _, b := range bufs {
		b = b[:min(len(b), maxFill-n)]
		_, _ = rand.Read(b) // it never fails
		n += len(b)
	}
	return uint32(n)
}

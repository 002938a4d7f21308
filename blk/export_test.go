package blk

import "github.com/calfvm/calf/virtio"

// Batch returns a function that serves one batch of vq in the goroutine of the
// caller, as the worker of queue i would in its own.
func (d *Device) Batch(i int, vq *virtio.Queue) func() (more bool) {
	return newWorker(d, &d.queues[i], vq).batch
}

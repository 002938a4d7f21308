package blk

import "github.com/calfvm/calf/virtio"

// Batch returns a function that serves one batch of vq in the goroutine of the
// caller, as the worker of queue i would in its own.
func (d *Device) Batch(i int, vq *virtio.Queue) func() (more bool) {
	return newWorker(d, &d.queues[i], vq).batch
}

// AlignDirect makes direct I/O on r ask for more alignment than the host does.
func AlignDirect(r *Raw, offset, memory int64) { r.direct = newDirect(offset, memory) }

// FD is the descriptor of r's file.
func FD(r *Raw) int { return r.fd }

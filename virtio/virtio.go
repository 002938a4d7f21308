// Package virtio is the device side of VIRTIO 1.2 that no device and no bus
// owns: the split virtqueue (section 2.7), the doorbell a driver rings, and the
// Device interface through which a transport such as package virtio/pci drives
// a device.
//
// Everything a guest can write is read once into a local, checked there, and
// used from there (V18). Rule names such as V5 or P23 in comments are those of
// rules.md beside this file, where each is stated and mapped to its tests.
//
// The package knows nothing of KVM. It builds only for little-endian machines
// whose 32-bit atomics order memory as the ring protocol needs.
package virtio

// Feature bits that belong to the ring and the transport, as bit numbers
// (section 6).
const (
	FeatureIndirectDesc = 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx     = 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1     = 32 // VIRTIO_F_VERSION_1
	FeatureRingReset    = 40 // VIRTIO_F_RING_RESET
)

// Bits of the device status field (section 2.1).
const (
	StatusAcknowledge      = 1
	StatusDriver           = 2
	StatusDriverOK         = 4
	StatusFeaturesOK       = 8
	StatusDeviceNeedsReset = 64
	StatusFailed           = 128
)

// MaxQueueSize is the largest size of a split virtqueue.
const MaxQueueSize = 32768

// Device is a virtio device as a transport drives it. The order of its life is
//
//	Negotiated, Start, {StartQueue, StopQueue} of each queue in any order, Stop
//
// and then Negotiated again or nothing. Between StartQueue and StopQueue (or
// Stop) the device owns the queue; outside it must touch neither the queue nor
// guest memory. A transport pauses a queue by stopping it, and resumes it by
// starting the same Queue again.
//
// A transport calls Negotiated, Start and Stop while it calls no other
// life-cycle method, and StartQueue and StopQueue of one queue one after the
// other; those of different queues may overlap. It calls ReadConfig and
// WriteConfig one at a time but at any time. The other methods are constant.
type Device interface {
	// DeviceID is the virtio device type (section 5): 2 for a block device.
	DeviceID() uint16
	// Features is the mask of the device-specific feature bits offered. The
	// transport adds those of the ring.
	Features() uint64
	// Queues is the number of virtqueues and the largest size of each.
	Queues() (n int, maxSize uint16)
	// ReadConfig fills p from the device configuration space at off. Bytes
	// past its end read as zero.
	ReadConfig(off uint64, p []byte)
	// WriteConfig stores p to the device configuration space at off. What is
	// not writable is left as it is.
	WriteConfig(off uint64, p []byte)
	// Negotiated is called once driver and device agree on features, which is
	// before Start and before the driver may rely on what ReadConfig tells it
	// or write to the configuration space. Stop forgets them.
	Negotiated(features uint64)
	// Start is called when the driver sets DRIVER_OK. An error makes the
	// device need a reset.
	Start() error
	// StartQueue hands queue i to the device, which serves it from now on. It
	// does not block.
	StartQueue(i int, q *Queue)
	// StopQueue takes queue i back. Once it has returned, the device does
	// nothing more in the queue's name: every chain it had popped is either
	// completed and announced, or will never be (P23). Stopping a queue that
	// is not started does nothing.
	StopQueue(i int)
	// Stop stops every queue and forgets the negotiation. It may be called
	// without Start.
	Stop()
}

// QueueEvents is what a queue needs of the transport it belongs to. Its methods
// are called by the goroutine that works the queue; they must neither block nor
// wait for that goroutine.
type QueueEvents interface {
	// UsedBuffers notifies the driver that queue has used buffers.
	UsedBuffers(queue int)
	// QueueBroken reports that queue is damaged beyond use until a reset.
	QueueBroken(queue int, err *GuestError)
}

// GuestError says which rule a guest has broken, and how. It is the guest's
// fault alone: it is counted, turned into a status the driver can see, and
// never ends anything on the host.
type GuestError struct {
	Rule string // the rule's ID, such as "V8"
	Msg  string
}

func (e *GuestError) Error() string { return "guest broke " + e.Rule + ": " + e.Msg }

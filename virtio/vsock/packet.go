package vsock

import "encoding/binary"

// headerSize is the length of struct virtio_vsock_hdr in bytes (5.10.6).
const headerSize = 44

// hostCID is the context ID of the host (5.10.4).
const hostCID = 2

// typeStream is VIRTIO_VSOCK_TYPE_STREAM.
const typeStream = 1

// Operations (5.10.6).
const (
	opRequest       = 1 // VIRTIO_VSOCK_OP_REQUEST
	opResponse      = 2 // VIRTIO_VSOCK_OP_RESPONSE
	opReset         = 3 // VIRTIO_VSOCK_OP_RST
	opShutdown      = 4 // VIRTIO_VSOCK_OP_SHUTDOWN
	opData          = 5 // VIRTIO_VSOCK_OP_RW
	opCreditUpdate  = 6 // VIRTIO_VSOCK_OP_CREDIT_UPDATE
	opCreditRequest = 7 // VIRTIO_VSOCK_OP_CREDIT_REQUEST
)

// Flags of opShutdown (5.10.6.5): what its sender will do no more.
const (
	shutdownReceive = 1 // VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE
	shutdownSend    = 2 // VIRTIO_VSOCK_SHUTDOWN_F_SEND
	shutdownBoth    = shutdownReceive | shutdownSend
)

// header mirrors struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32 // of the data that follows, in bytes
	kind, op         uint16
	flags            uint32
	bufAlloc, fwdCnt uint32 // the sender's room for data, and what it has taken out of it
}

func parseHeader(b *[headerSize]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		length: le.Uint32(b[24:]),
		kind:   le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *header) encode() (b [headerSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.length)
	le.PutUint16(b[28:], h.kind)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
	return b
}

// scatter copies p to the front of bufs and returns what is left of them. There is
// room for it.
func scatter(bufs [][]byte, p []byte) [][]byte {
	for len(p) > 0 {
		n := copy(bufs[0], p)
		p = p[n:]
		if bufs[0] = bufs[0][n:]; len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return bufs
}

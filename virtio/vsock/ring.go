package vsock

// bufferSize is the room for data that has come from one side of a connection and
// has not gone to the other, in bytes. It is a power of 2.
const bufferSize = 256 << 10

// ring is a first-in first-out buffer of bufferSize bytes, which take memory only
// once there is something in it. The zero ring is empty.
type ring struct {
	buf   []byte
	start int // of what is in it
	n     int // how much that is
}

func (r *ring) room() int { return bufferSize - r.n }

// put appends p, for which there is room.
func (r *ring) put(p []byte) {
	if r.buf == nil && len(p) > 0 {
		r.buf = make([]byte, bufferSize)
	}
	for len(p) > 0 {
		n := copy(r.buf[(r.start+r.n)%bufferSize:], p)
		p, r.n = p[n:], r.n+n
	}
}

// take moves the first bytes into p, which is not longer than what is there.
func (r *ring) take(p []byte) {
	for len(p) > 0 {
		n := copy(p, r.buf[r.start:])
		p, r.start, r.n = p[n:], (r.start+n)%bufferSize, r.n-n
	}
}

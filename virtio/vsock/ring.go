package vsock

// bufferSize is the room for data that has come from one side of a connection and
// has not gone to the other, in bytes. It is a power of 2.
const bufferSize = 256 << 10

// ring is a first-in first-out buffer of bufferSize bytes, which take memory only
// once there is something in it. The zero ring is empty.
//
// What free returns is only ever written, and what front returns only read, until
// grow and drop say so: one goroutine may fill the ring while another empties it,
// with a lock around the calls alone.
type ring struct {
	buf   []byte
	start int // of what is in it
	n     int // how much that is
}

func (r *ring) room() int { return bufferSize - r.n }

// free returns the next piece of room. A ring that is empty begins anew, so that
// little data stays in little memory.
func (r *ring) free() []byte {
	if r.buf == nil {
		r.buf = make([]byte, bufferSize)
	}
	if r.n == 0 {
		r.start = 0
	}
	end := (r.start + r.n) % bufferSize
	return r.buf[end:min(bufferSize, end+r.room())]
}

// grow appends the first n bytes of what free has returned.
func (r *ring) grow(n int) { r.n += n }

// front returns the first piece of what is in the ring.
func (r *ring) front() []byte { return r.buf[r.start:min(bufferSize, r.start+r.n)] }

// drop removes the first n bytes of what front has returned.
func (r *ring) drop(n int) { r.start, r.n = (r.start+n)%bufferSize, r.n-n }

// put appends p, for which there is room.
func (r *ring) put(p []byte) {
	for len(p) > 0 {
		n := copy(r.free(), p)
		r.grow(n)
		p = p[n:]
	}
}

// take moves the first bytes into p, which is not longer than what is there.
func (r *ring) take(p []byte) {
	for len(p) > 0 {
		n := copy(p, r.front())
		r.drop(n)
		p = p[n:]
	}
}

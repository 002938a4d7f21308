package blk_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"time"

	vt "github.com/calfvm/calf/virtio/virtiotest"
)

const chunk = 2048 // bytes of one request of a queueDriver

// queueDriver keeps several requests in flight on one queue and checks each
// against its own copy of the sectors it owns.
type queueDriver struct {
	ring    *vt.Ring
	line    *vt.Line
	r       *rand.Rand
	index   int
	stride  int
	model   [][]byte // by chunk owned
	slots   []*slot
	byHead  map[uint16]*slot
	busy    map[int]bool // chunks with a request in flight
	started int
	ended   int
}

// slot is one request that may be in flight.
type slot struct {
	*request
	kind  uint32
	chunk int
	free  bool
}

func newQueueDriver(r *rig, index, stride int, rnd *rand.Rand) *queueDriver {
	d := &queueDriver{
		ring: r.d.Rings[index], line: r.m.Line(lineBase + 1 + uint32(index)), r: rnd,
		index: index, stride: stride,
		byHead: make(map[uint16]*slot), busy: make(map[int]bool),
	}
	for i := index; (i+1)*chunk <= diskSize && len(d.model) < 32; i += stride {
		d.model = append(d.model, make([]byte, chunk))
	}
	for range 12 {
		d.slots = append(d.slots, &slot{request: r.newRequest(tIn, 0, chunk), free: true})
	}
	return d
}

func (d *queueDriver) sector(chunkIndex int) uint64 {
	return uint64((chunkIndex*d.stride + d.index) * chunk / 512)
}

// run writes every chunk once, then does random requests until rounds are done.
func (d *queueDriver) run(rounds int) error {
	for d.ended < rounds {
		added := false
		for _, s := range d.slots {
			if s.free && d.started < rounds && d.r.IntN(4) != 0 {
				added = d.submit(s) || added
			}
		}
		if added && d.ring.Publish() {
			d.ring.Kick()
		}
		if err := d.reap(); err != nil {
			return err
		}
	}
	return nil
}

// submit starts a request in s, unless its chunk is busy.
func (d *queueDriver) submit(s *slot) bool {
	s.kind, s.chunk = tIn, d.r.IntN(len(d.model))
	if d.started < len(d.model) {
		s.kind, s.chunk = tOut, d.started // before anything is read
	} else if n := d.r.IntN(16); n == 0 {
		s.kind, s.chunk = tFlush, -1
	} else if n < 8 {
		s.kind = tOut
	}
	if d.busy[s.chunk] && s.chunk >= 0 {
		return false
	}
	if d.ring.Free() < 3 {
		return false
	}
	s.set(s.kind, 0)
	bufs := s.bufs(s.kind == tIn)
	switch s.kind {
	case tFlush:
		bufs = []vt.Buf{bufs[0], bufs[2]}
	case tOut:
		for i := range s.bytes() {
			s.bytes()[i] = byte(d.r.Uint32())
		}
		copy(d.model[s.chunk], s.bytes())
		fallthrough
	default:
		s.set(s.kind, d.sector(s.chunk))
	}
	add := d.ring.Add
	if d.indirect() {
		add = d.ring.AddIndirect
	}
	head, ok := add(bufs...)
	if !ok {
		return false
	}
	s.free = false
	d.byHead[head] = s
	d.busy[s.chunk] = true
	d.started++
	return true
}

// indirect uses indirect tables for half of the requests where that was agreed,
// which goes with EVENT_IDX in this test.
func (d *queueDriver) indirect() bool { return d.ring.EventIdx && d.r.IntN(2) == 0 }

// reap takes all completions, and waits for one if there is nothing else to do.
func (d *queueDriver) reap() error {
	for n := 0; ; {
		head, used, ok := d.ring.TakeUsed()
		if !ok {
			if n > 0 || d.started == d.ended || d.ring.Arm() {
				return nil
			}
			select {
			case <-d.line.Raised():
				continue
			case <-time.After(10 * time.Second):
				return fmt.Errorf("no interrupt with %d requests in flight", d.started-d.ended)
			}
		}
		n++
		s := d.byHead[head]
		if s == nil {
			return fmt.Errorf("completion of head %d, which is not in flight", head)
		}
		delete(d.byHead, head)
		delete(d.busy, s.chunk)
		s.free = true
		d.ended++
		want := uint32(1)
		if s.kind == tIn {
			want = chunk + 1
			if !bytes.Equal(s.bytes(), d.model[s.chunk]) {
				return fmt.Errorf("chunk %d does not hold what was written last", s.chunk)
			}
		}
		if s.code() != sOK || used != want {
			return fmt.Errorf("type %d: status %d, used length %d", s.kind, s.code(), used)
		}
	}
}

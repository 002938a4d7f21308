package blktest

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/calfvm/calf/blk"
)

// ErrReadOnly is what writing to a read-only Memory returns.
var ErrReadOnly = errors.New("blktest: disk is read-only")

// Memory is a blk.Disk in memory. Reads run side by side, writes one at a time.
// The zero Memory is an empty disk; set the fields before the first use.
type Memory struct {
	Bytes []byte
	RO    bool
	// Fault, if it is set, is asked before every call what error it shall
	// return. op is "read", "write" or "flush", of a Thin also "discard",
	// "write zeroes" or "punch hole".
	Fault func(op string, off int64) error

	mu      sync.RWMutex
	flushes atomic.Uint64
}

var _ blk.Disk = (*Memory)(nil)

// ReadvAt implements blk.Disk.
func (m *Memory) ReadvAt(iov [][]byte, off int64) error {
	if err := m.check("read", iov, off); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, b := range iov {
		off += int64(copy(b, m.Bytes[off:]))
	}
	return nil
}

// WritevAt implements blk.Disk.
func (m *Memory) WritevAt(iov [][]byte, off int64) error {
	if m.RO {
		return ErrReadOnly
	}
	if err := m.check("write", iov, off); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range iov {
		off += int64(copy(m.Bytes[off:], b))
	}
	return nil
}

func (m *Memory) check(op string, iov [][]byte, off int64) error {
	if off < 0 || off > m.Size() {
		return blk.ErrBounds
	}
	left := m.Size() - off
	for _, b := range iov {
		if left -= int64(len(b)); left < 0 {
			return blk.ErrBounds
		}
	}
	return m.fault(op, off)
}

func (m *Memory) fault(op string, off int64) error {
	if m.Fault == nil {
		return nil
	}
	return m.Fault(op, off)
}

// Flush implements blk.Disk.
func (m *Memory) Flush() error {
	m.flushes.Add(1)
	return m.fault("flush", 0)
}

// Flushes returns how often Flush was called.
func (m *Memory) Flushes() uint64 { return m.flushes.Load() }

// Size implements blk.Disk.
func (m *Memory) Size() int64 { return int64(len(m.Bytes)) }

// ReadOnly implements blk.Disk.
func (m *Memory) ReadOnly() bool { return m.RO }

// Thin is a Memory that can also discard and make ranges zero. What is
// discarded reads as noise, since no user may rely on anything else.
type Thin struct {
	Memory
	// Granularity of discards in bytes. 0 means 4096.
	Granularity int64
	// Hints are what IOHints returns: physical block, least and best length.
	Hints [3]int64

	discards, zeroed, punched atomic.Uint64
}

var (
	_ blk.Disk       = (*Thin)(nil)
	_ blk.Discarder  = (*Thin)(nil)
	_ blk.ZeroWriter = (*Thin)(nil)
	_ blk.Hinter     = (*Thin)(nil)
)

// IOHints implements blk.Hinter.
func (m *Thin) IOHints() (physicalBlock, minIO, optimalIO int64) {
	return m.Hints[0], m.Hints[1], m.Hints[2]
}

// DiscardGranularity implements blk.Discarder.
func (m *Thin) DiscardGranularity() int64 {
	if m.Granularity == 0 {
		return 4096
	}
	return m.Granularity
}

// Discard implements blk.Discarder.
func (m *Thin) Discard(off, n int64) error {
	m.discards.Add(1)
	return m.set("discard", off, n, 0xdb)
}

// WriteZeroes implements blk.ZeroWriter.
func (m *Thin) WriteZeroes(off, n int64) error {
	m.zeroed.Add(1)
	return m.set("write zeroes", off, n, 0)
}

// PunchHole implements blk.ZeroWriter.
func (m *Thin) PunchHole(off, n int64) error {
	m.punched.Add(1)
	return m.set("punch hole", off, n, 0)
}

// Calls returns how often Discard, WriteZeroes and PunchHole were called.
func (m *Thin) Calls() (discards, zeroed, punched uint64) {
	return m.discards.Load(), m.zeroed.Load(), m.punched.Load()
}

// set makes n bytes at off read as v.
func (m *Thin) set(op string, off, n int64, v byte) error {
	if m.RO {
		return ErrReadOnly
	}
	if off < 0 || n < 0 || off > m.Size() || n > m.Size()-off {
		return blk.ErrBounds
	}
	if err := m.fault(op, off); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.Bytes[off : off+n]
	for i := range b {
		b[i] = v
	}
	return nil
}

package qcow2

import (
	"sync"
	"syscall"
)

// memFile is a file in memory that records what is done to it and fails on
// demand.
type memFile struct {
	mu   sync.Mutex
	data []byte
	log  []event // if recording
	rec  bool
	// fail, if set, decides before each operation whether it fails. An
	// operation that fails does nothing, or half if it is a write.
	fail func(op string) error
	// noBarrier makes syncs leave no trace: the control of the crash tests.
	noBarrier func(n int) bool
	syncs     int
}

var _ file = (*memFile)(nil)

// maxMemFile is the greatest length of a memFile, in bytes.
const maxMemFile = 64 << 20

type eventKind uint8

const (
	evWrite    eventKind = iota
	evTruncate           // to off bytes
	evSyncBegin
	evSyncEnd
	evMark // of the test; see note
)

type event struct {
	kind eventKind
	off  int64
	data []byte
	note any
	sync int // index in the log of the sync's beginning
}

func (f *memFile) check(op string) error {
	if f.fail == nil {
		return nil
	}
	return f.fail(op)
}

func (f *memFile) ReadvAt(iov [][]byte, off int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check("read"); err != nil {
		return err
	}
	for _, b := range iov {
		n := 0
		if off < int64(len(f.data)) {
			n = copy(b, f.data[off:])
		}
		clear(b[n:])
		off += int64(len(b))
	}
	return nil
}

func (f *memFile) WritevAt(iov [][]byte, off int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.check("write")
	if off+length(iov) > maxMemFile {
		return syscall.EFBIG
	}
	var all []byte
	for _, b := range iov {
		all = append(all, b...)
	}
	if err != nil {
		all = all[:len(all)/2&^511]
	}
	if len(all) > 0 {
		f.data = apply(f.data, all, off)
		if f.rec {
			f.log = append(f.log, event{kind: evWrite, off: off, data: all})
		}
	}
	return err
}

// apply writes b at off into the image and returns it.
func apply(image, b []byte, off int64) []byte {
	if end := int(off) + len(b); end > len(image) {
		image = append(image, make([]byte, end-len(image))...)
	}
	copy(image[off:], b)
	return image
}

// changes reports whether the event changes the file.
func (e event) changes() bool { return e.kind == evWrite || e.kind == evTruncate }

// apply does to the image what the event did to the file, and returns it.
func (e event) apply(image []byte) []byte {
	switch e.kind {
	case evWrite:
		return apply(image, e.data, e.off)
	case evTruncate:
		return truncate(image, e.off)
	}
	return image
}

func (f *memFile) Fdatasync() error {
	f.mu.Lock()
	f.syncs++
	err := f.check("sync")
	traced := f.rec && (f.noBarrier == nil || !f.noBarrier(f.syncs))
	begin := len(f.log)
	if traced {
		f.log = append(f.log, event{kind: evSyncBegin})
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	f.mu.Lock()
	if traced {
		f.log = append(f.log, event{kind: evSyncEnd, sync: begin})
	}
	f.mu.Unlock()
	return nil
}

// mark adds a note to the log and returns its index.
func (f *memFile) mark(note any) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, event{kind: evMark, note: note})
	return len(f.log) - 1
}

// Punch is a write of zeros, of which a power cut may keep any part.
func (f *memFile) Punch(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n = min(n, int64(len(f.data))-off); n <= 0 {
		return f.check("punch")
	}
	err := f.check("punch")
	if err != nil {
		n = n / 2 &^ 511
	}
	f.data = apply(f.data, make([]byte, n), off)
	if f.rec {
		f.log = append(f.log, event{kind: evWrite, off: off, data: make([]byte, n)})
	}
	return err
}

// Allocate has nothing to reserve but may fail.
func (f *memFile) Allocate(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check("allocate"); err != nil {
		return err
	}
	size := max(off+n, int64(len(f.data)))
	if size > maxMemFile {
		return syscall.EFBIG
	}
	f.data = truncate(f.data, size)
	return nil
}

func (f *memFile) Truncate(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check("truncate"); err != nil {
		return err
	}
	if size > maxMemFile {
		return syscall.EFBIG
	}
	f.data = truncate(f.data, size)
	if f.rec {
		f.log = append(f.log, event{kind: evTruncate, off: size})
	}
	return nil
}

// truncate makes the image size bytes long and returns it.
func truncate(image []byte, size int64) []byte {
	if size <= int64(len(image)) {
		return image[:size]
	}
	return append(image, make([]byte, size-int64(len(image)))...)
}

func (f *memFile) Size() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(len(f.data)), f.check("size")
}

func (f *memFile) Close() error { return nil }

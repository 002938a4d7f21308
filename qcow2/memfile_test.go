package qcow2

import (
	"bytes"
	"runtime"
	"strings"
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
	// noBarrier, if set, says which syncs leave no trace, by the place in the
	// code that asked for them: the control of the crash tests.
	noBarrier func(site string) bool
	syncs     int
	// ext is the external data file of the image in this one. What is done to
	// it is in the log of its image.
	ext, image *memFile
	// pause, if set, is called before and after each operation, so that others
	// run meanwhile.
	pause func()
}

var _ file = (*memFile)(nil)

// maxMemFile is the greatest length of a memFile, in bytes.
const maxMemFile = 64 << 20

type eventKind uint8

const (
	evWrite eventKind = iota
	evPunch           // data is zeros
	evTruncate
	evSyncBegin
	evSyncEnd
	evMark // of the test; see note
)

type event struct {
	kind eventKind
	off  int64 // the length, of evTruncate
	data []byte
	note string
	sync int  // index in the log of the sync's beginning
	ext  bool // done to the external data file
}

// changes reports whether the event changes the file, so that a power cut may
// lose it.
func (e *event) changes() bool { return e.kind <= evTruncate }

// apply does to the image what the event did to the file, and returns it.
func (e *event) apply(image []byte) []byte {
	switch e.kind {
	case evWrite, evPunch:
		return apply(image, e.data, e.off)
	case evTruncate:
		return truncate(image, e.off)
	}
	return image
}

// setFail sets fail, also while a commit runs in the background.
func (f *memFile) setFail(fail func(op string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

// check decides whether the operation fails. mu is held.
func (f *memFile) check(op string) error {
	if f.image != nil {
		f.image.mu.Lock()
		defer f.image.mu.Unlock()
		return f.image.check(op)
	}
	if f.fail == nil {
		return nil
	}
	return f.fail(op)
}

// record adds e to the log if f records, and returns its index. mu is held.
func (f *memFile) record(e event) int {
	if f.image != nil {
		f.image.mu.Lock()
		defer f.image.mu.Unlock()
		e.ext = true
		return f.image.record(e)
	}
	if f.rec {
		f.log = append(f.log, e)
	}
	return len(f.log) - 1
}

// barrierLeaves reports whether the sync under way leaves a trace.
func (f *memFile) barrierLeaves() bool {
	if f.image != nil {
		f = f.image
	}
	return f.noBarrier == nil || !f.noBarrier(barrierSite())
}

// withExt gives f the external data file with the given contents, unless they are
// nil, and returns f.
func (f *memFile) withExt(data []byte) *memFile {
	if data != nil {
		f.ext = &memFile{data: data, image: f}
	}
	return f
}

// contents returns copies of the file and of its external data file.
func (f *memFile) contents() (data, ext []byte) {
	f.mu.Lock()
	data = bytes.Clone(f.data)
	f.mu.Unlock()
	if f.ext != nil {
		f.ext.mu.Lock()
		ext = bytes.Clone(f.ext.data)
		f.ext.mu.Unlock()
	}
	return data, ext
}

// paused pauses now, and again when what it returns is called.
func (f *memFile) paused() func() {
	if f.pause == nil {
		return func() {}
	}
	f.pause()
	return f.pause
}

func (f *memFile) ReadvAt(iov [][]byte, off int64) error {
	defer f.paused()()
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
	defer f.paused()()
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.check("write")
	if off+length(iov) > maxMemFile {
		return syscall.EFBIG
	}
	all := make([]byte, 0, length(iov))
	for _, b := range iov {
		all = append(all, b...)
	}
	if err != nil {
		all = all[:len(all)/2&^511]
	}
	if len(all) > 0 {
		f.data = apply(f.data, all, off)
		f.record(event{kind: evWrite, off: off, data: all})
	}
	return err
}

// apply writes b at off into the image and returns it.
func apply(image, b []byte, off int64) []byte {
	if end := off + int64(len(b)); end > int64(len(image)) {
		image = truncate(image, end)
	}
	copy(image[off:], b)
	return image
}

// truncate makes the image size bytes long and returns it.
func truncate(image []byte, size int64) []byte {
	if size <= int64(len(image)) {
		return image[:size]
	}
	return append(image, make([]byte, size-int64(len(image)))...)
}

func (f *memFile) Fdatasync() error {
	defer f.paused()()
	f.mu.Lock()
	f.syncs++
	err := f.check("sync")
	traced, begin := f.barrierLeaves(), 0
	if traced {
		begin = f.record(event{kind: evSyncBegin})
	} else {
		f.record(event{kind: evMark, note: barrierLost})
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	f.mu.Lock()
	if traced {
		f.record(event{kind: evSyncEnd, sync: begin})
	}
	f.mu.Unlock()
	return nil
}

// barrierLost is the note of a sync that leaves no trace.
const barrierLost = "barrier lost"

// barrierSite returns the place, FILE:LINE, of the engine that asks for the sync
// under way: the innermost one that is no mere helper.
func barrierSite() string {
	var pcs [16]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for more := true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		name := frame.Function[strings.LastIndexByte(frame.Function, '.')+1:]
		if name != "barrierLeaves" && name != "Fdatasync" && name != "datasync" {
			return siteOf(frame.File, frame.Line)
		}
	}
	return "?"
}

// mark adds a note to the log, even if it has nothing else, and returns its index.
func (f *memFile) mark(note string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, event{kind: evMark, note: note})
	return len(f.log) - 1
}

// Punch is a write of zeros, of which a power cut may keep any part.
func (f *memFile) Punch(off, n int64) error {
	defer f.paused()()
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.check("punch")
	if n = min(n, int64(len(f.data))-off); n <= 0 {
		return err
	}
	if err != nil {
		n = n / 2 &^ 511
	}
	f.data = apply(f.data, make([]byte, n), off)
	f.record(event{kind: evPunch, off: off, data: make([]byte, n)})
	return err
}

// Allocate has nothing to reserve but may fail.
func (f *memFile) Extent(_, n int64) (hole bool, length int64) { return false, n }

func (f *memFile) Allocate(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check("allocate"); err != nil || off+n <= int64(len(f.data)) {
		return err
	}
	return f.truncate(off + n)
}

func (f *memFile) Truncate(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check("truncate"); err != nil {
		return err
	}
	return f.truncate(size)
}

func (f *memFile) truncate(size int64) error {
	if size > maxMemFile {
		return syscall.EFBIG
	}
	f.data = truncate(f.data, size)
	f.record(event{kind: evTruncate, off: size})
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(len(f.data)), f.check("size")
}

func (f *memFile) Close() error { return nil }

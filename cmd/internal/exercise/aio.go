package exercise

import (
	"context"
	"time"
)

// What may run at once, beyond which the next asynchronous transfer waits.
const (
	maxInflight       = 64
	maxInflightMemory = 64 << 20
)

// inflight are the asynchronous transfers that were begun and not reported. It
// belongs to the session's goroutine.
type inflight struct {
	finished chan *transfer // has room for all of them
	count    int
	memory   int64
}

func newInflight() inflight { return inflight{finished: make(chan *transfer, maxInflight)} }

// begin runs t on a goroutine of its own, once there is room for it.
func (s *Session) begin(ctx context.Context, t *transfer) {
	f := &s.inflight
	for f.count == maxInflight || f.count > 0 && f.memory+t.memory() > maxInflightMemory {
		s.reportNext(<-f.finished)
	}
	f.count++
	f.memory += t.memory()
	t.started = time.Now()
	go func(d Disk) {
		t.run(ctx, d)
		f.finished <- t
	}(s.disk)
}

// reportNext prints the report of a transfer that has finished. Whatever that is, the
// command succeeded when it began.
func (s *Session) reportNext(t *transfer) {
	s.inflight.count--
	s.inflight.memory -= t.memory()
	s.say(s.report(t))
}

// reportFinished prints the reports of those that have finished.
func (s *Session) reportFinished() {
	for {
		select {
		case t := <-s.inflight.finished:
			s.reportNext(t)
		default:
			return
		}
	}
}

// settle waits for all that run.
func (s *Session) settle() {
	for s.inflight.count > 0 {
		s.reportNext(<-s.inflight.finished)
	}
}

// aioFlush is the command aio_flush.
func (s *Session) aioFlush(context.Context, []string) error {
	s.settle()
	return nil
}

// aioRead is the command aio_read.
func (s *Session) aioRead(ctx context.Context, words []string) error {
	t := &transfer{failing: "readv", misalign: s.Misalign}
	return s.asynchronous(ctx, t, words, "CP:iqv", "injecting invalid read request")
}

// aioWrite is the command aio_write.
func (s *Session) aioWrite(ctx context.Context, words []string) error {
	t := &transfer{failing: "aio_write", write: true, pattern: defaultPattern, misalign: s.Misalign}
	return s.asynchronous(ctx, t, words, "CfiP:quz", "injecting invalid write request")
}

// asynchronous begins t, which words describe. With -i, which in QEMU counts as an
// invalid request, it says so instead.
func (s *Session) asynchronous(ctx context.Context, t *transfer, words []string, letters, injecting string) error {
	invalid := false
	rest, err := s.getopt(words, letters, func(letter byte, value string) error {
		invalid = invalid || letter == 'i'
		return t.set(letter, value)
	})
	switch {
	case err != nil:
		return err
	case invalid:
		s.printf("%s\n", injecting)
		return nil
	case len(rest) < 2:
		return errUsage
	case t.zero && len(rest) != 2:
		return answer("-z supports only a single length parameter")
	case t.unmap && !t.zero:
		return answer("-u requires -z to be specified")
	}
	if t.zero {
		err = t.place(rest)
	} else {
		err = t.placeVector(rest)
	}
	if err == nil {
		s.begin(ctx, t)
	}
	return err
}

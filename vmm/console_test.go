package vmm

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"
	"time"
)

// slowWriter passes on one Write each time it is allowed to.
type slowWriter struct {
	allow chan struct{}
	mu    sync.Mutex
	b     bytes.Buffer
}

func (w *slowWriter) Write(p []byte) (int, error) {
	<-w.allow
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

// TestConsoleBackPressure: a writer waits while the far end does not read, is
// let go when the guest is being stopped, and nothing is lost.
func TestConsoleBackPressure(t *testing.T) {
	w := &slowWriter{allow: make(chan struct{})}
	o := newConsoleOutput(w)
	line := bytes.Repeat([]byte("x"), 1000)
	var want bytes.Buffer
	done := make(chan struct{})
	const lines = 300 // well over the buffer
	for range lines {
		want.Write(line)
	}
	go func() {
		defer close(done)
		for range lines {
			o.write(line)
		}
	}()
	select {
	case <-done:
		t.Fatal("the writer never waited")
	case <-time.After(50 * time.Millisecond):
	}
	o.waive(true)
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the writer still waits")
	}
	close(w.allow)
	if err := o.close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.b.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes arrived, want %d", w.b.Len(), want.Len())
	}
}

type brokenWriter struct{}

var errBroken = errors.New("broken")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

// TestConsoleBroken: a console that is gone costs the guest nothing and is
// reported at the end.
func TestConsoleBroken(t *testing.T) {
	o := newConsoleOutput(brokenWriter{})
	for range 1000 {
		o.write(bytes.Repeat([]byte("x"), 1000))
	}
	if err := o.close(); !errors.Is(err, errBroken) {
		t.Errorf("close: %v, want %v", err, errBroken)
	}
}

// TestConsoleInputWaits: input is taken only as fast as the guest reads it.
func TestConsoleInputWaits(t *testing.T) {
	r, w := io.Pipe()
	var in consoleInput
	in.start(r)
	arrived := make(chan struct{}, 10)
	in.attach(func() { arrived <- struct{}{} })
	for _, s := range []string{"ab", "cd"} {
		if _, err := w.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	<-arrived
	for _, want := range "abcd" {
		for !in.ready() {
			<-arrived
		}
		if got := in.next(); got != byte(want) {
			t.Errorf("read %q, want %q", got, want)
		}
	}
	if in.ready() || in.next() != 0 {
		t.Error("there is more input than was written")
	}
	in.close()
	_ = w.Close() // A pipe's Close returns no error.
}

package nbd

import (
	"sync"
	"testing"
)

// TestRefusedIsNotCounted has clients refused again and again beside the one that
// may use the server. None of them is ever counted, else the one that leaves would
// not know that it is the last.
func TestRefusedIsNotCounted(t *testing.T) {
	s := &Server{cfg: Config{MaxConnections: 1}}
	if !s.admit() {
		t.Fatal("there is no room")
	}
	var refused sync.WaitGroup
	done := make(chan struct{})
	refused.Go(func() {
		defer close(done)
		for range 5_000_000 {
			if s.admit() {
				t.Error("admitted beside the only one")
			}
		}
	})
	for over := false; !over; {
		select {
		case <-done:
			over = true
		default:
			if n := s.active.Load(); n != 1 {
				t.Errorf("%d are counted", n)
				over = true
			}
		}
	}
	refused.Wait()
}

package blk

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

// TestFlushesShareErrors lets the first of several flushes at the same time meet
// the error that the kernel tells of once: nobody may be told that all is well
// (B13).
func TestFlushesShareErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := errors.New("pages are lost")
		errs := []error{lost} // what the kernel says, in order
		release := make(chan struct{})
		f := newFlushes()
		var callers sync.WaitGroup
		for range 5 {
			callers.Go(func() {
				err := f.do(func() error {
					var err error
					if len(errs) > 0 {
						err, errs = errs[0], errs[1:]
					}
					<-release
					return err
				})
				if !errors.Is(err, lost) {
					t.Errorf("a flush beside the one that failed returned %v", err)
				}
			})
		}
		synctest.Wait()
		close(release)
		callers.Wait()
	})
}

// TestFlushesGroup counts the flushes that callers share: those who come while
// one is under way are served by the next, and not by that one.
func TestFlushesGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := make(chan struct{})
		calls := 0
		f := newFlushes()
		flush := func() error {
			calls++
			<-turn
			return nil
		}
		var callers sync.WaitGroup
		ended := make(chan struct{}, 5)
		call := func() {
			callers.Go(func() {
				if err := f.do(flush); err != nil {
					t.Error(err)
				}
				ended <- struct{}{}
			})
		}
		call()
		synctest.Wait()
		for range 4 {
			call()
		}
		synctest.Wait()
		turn <- struct{}{}
		synctest.Wait()
		if len(ended) != 1 {
			t.Errorf("the first flush ended %d callers, want the one before it", len(ended))
		}
		turn <- struct{}{}
		callers.Wait()
		if calls != 2 {
			t.Errorf("%d flushes for 1 and then 4 callers, want 2", calls)
		}
	})
}

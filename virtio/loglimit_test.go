package virtio_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/calfvm/calf/virtio"
)

func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l virtio.LogLimit
		for turn := range 3 {
			held := uint64(0)
			if turn > 0 {
				held = 99
			}
			if n, ok := l.Allow(); !ok || n != held {
				t.Errorf("turn %d: got %d, %v; want %d, true", turn, n, ok, held)
			}
			for range 99 {
				if _, ok := l.Allow(); ok {
					t.Error("a second line was let through at once")
				}
			}
			time.Sleep(5 * time.Second)
		}
	})
}

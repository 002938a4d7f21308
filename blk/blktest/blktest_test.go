package blktest_test

import (
	"testing"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

func TestMemory(t *testing.T) {
	blktest.All(t, func(testing.TB) blk.Disk {
		return &blktest.Memory{Bytes: make([]byte, 2<<20)}
	})
}

func TestThin(t *testing.T) {
	blktest.All(t, func(testing.TB) blk.Disk {
		return &blktest.Thin{Memory: blktest.Memory{Bytes: make([]byte, 2<<20)}}
	})
}

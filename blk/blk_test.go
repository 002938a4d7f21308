package blk_test

import (
	"bytes"
	"testing"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/blk/blktest"
)

func TestReadWrite(t *testing.T) {
	disk := &blktest.Memory{Bytes: make([]byte, 1<<20)}
	r := newRig(t, blk.Config{Disk: disk, Serial: "root"})
	r.start(allFeatures, 1, 256)
	want := bytes.Repeat([]byte("calf"), 1024)
	if code, used, _ := r.do(tOut, 8, want); code != sOK || used != 1 {
		t.Fatalf("write: status %d, used %d", code, used)
	}
	if !bytes.Equal(disk.Bytes[4096:8192], want) {
		t.Fatal("the disk does not hold what was written")
	}
	code, used, got := r.do(tIn, 8, make([]byte, 4096))
	if code != sOK || used != 4097 || !bytes.Equal(got, want) {
		t.Fatalf("read: status %d, used %d", code, used)
	}
}

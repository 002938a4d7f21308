package blk

import "testing"

// TestDirectWhole checks which transfers go past the buffer: an offset, a length
// or an address that does not comply must not reach the kernel, whatever this
// host's would make of it.
func TestDirectWhole(t *testing.T) {
	d := newDirect(4096, 512)
	b := alignedBuffer(16<<10, 4096)
	for _, c := range []struct {
		name string
		iov  [][]byte
		off  int64
		want bool
	}{
		{"all aligned", [][]byte{b[:4096], b[4096:12288]}, 8192, true},
		{"address aligned enough", [][]byte{b[512:4608]}, 0, true},
		{"offset", [][]byte{b[:4096]}, 512, false},
		{"length", [][]byte{b[:512]}, 0, false},
		{"lengths that add up", [][]byte{b[:512], b[512:4096]}, 0, false},
		{"address", [][]byte{b[:4096], b[256:4352]}, 0, false},
	} {
		if got := d.whole(c.iov, c.off); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

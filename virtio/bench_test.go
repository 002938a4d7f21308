package virtio_test

import (
	"testing"

	"github.com/calfvm/calf/virtio/virtiotest"
)

// BenchmarkRing measures what the ring itself costs a request: Pop, Push, and a
// share of Publish and Rearm, for chains of three buffers in an indirect table as
// Linux sends them, and for such chains in the ring.
func BenchmarkRing(b *testing.B) {
	for name, in := range map[string]bool{"indirect": true, "direct": false} {
		b.Run("chain="+name, func(b *testing.B) {
			const size, depth = 256, 32
			r := newRig(b, size, indirect|eventIdx)
			for i := range depth {
				bufs := []virtiotest.Buf{r.buf(16, false), r.buf(4096, true), r.buf(1, true)}
				if in {
					table := r.m.Alloc(64, 16)
					r.Table(table, bufs...)
					r.SetDesc(i, table, 48, virtiotest.Indirect, 0)
					continue
				}
				at := uint16(depth + 2*i)
				r.SetDesc(i, bufs[0].Addr, 16, virtiotest.Next, at)
				r.SetDesc(int(at), bufs[1].Addr, 4096, virtiotest.Next|virtiotest.Write, at+1)
				r.SetDesc(int(at)+1, bufs[2].Addr, 1, virtiotest.Write, 0)
			}
			idx := uint16(0)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; n < b.N; n += depth {
				for i := range uint16(depth) {
					r.SetHead(idx+i, i)
				}
				idx += depth
				r.SetUsedEvent(idx - 1)
				r.SetAvailIdx(idx)
				for r.q.Pop(&r.c) {
					r.q.Push(&r.c, 4097)
				}
				r.q.Publish()
				r.q.Rearm()
			}
			if r.UsedIdx() != idx {
				b.Fatal("chains are left over")
			}
		})
	}
}

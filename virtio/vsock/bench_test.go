package vsock_test

import (
	"io"
	"testing"

	"github.com/calfvm/calf/virtio/virtiotest"
	"github.com/calfvm/calf/virtio/vsock"
)

// BenchmarkStream has a guest send packets of the size that Linux sends, as long as it
// has credit, to a host that drops what it gets: what the device itself costs a stream.
// The guest copies nothing.
func BenchmarkStream(b *testing.B) {
	const size = 64 << 10
	done := make(chan int64, 1)
	g := start(b, vsock.Config{Serve: func(c *vsock.Conn) {
		c.Accept()
		n, _ := io.Copy(io.Discard, c)
		done <- n
	}}, 32, 4096)
	p := g.packet(request, 5, 80)
	g.send(p.encode())
	g.expect(response)
	p.op, p.data = data, make([]byte, size)
	raw := p.encode()
	copy(g.m.Bytes(g.txBuf, uint64(len(raw))), raw)
	interrupts := g.m.Line(lineBase+1).Count() + g.m.Line(lineBase+2).Count()
	kicks, sent, taken := 0, uint32(0), uint32(0)
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		for ownRoom-(sent-taken) < size {
			taken = g.expect(update).fwdCnt
		}
		for {
			if _, ok := g.tx.Add(virtiotest.Buf{Addr: g.txBuf, Len: 44}, virtiotest.Buf{Addr: g.txBuf + 44, Len: size}); ok {
				break
			}
			if _, _, ok := g.tx.Wait(g.m.Line(lineBase+2), patience); !ok {
				b.Fatal("a packet is not taken")
			}
		}
		if g.tx.Publish() {
			g.tx.Kick()
			kicks++
		}
		sent += size
	}
	for g.tx.Free() < g.tx.Size {
		if _, _, ok := g.tx.Wait(g.m.Line(lineBase+2), patience); !ok {
			b.Fatal("a packet is not taken")
		}
	}
	p.op, p.data, p.flags = shutdown, nil, 2
	g.send(p.encode())
	if n := <-done; n != int64(b.N)*size {
		b.Fatalf("%d bytes came of %d", n, int64(b.N)*size)
	}
	b.StopTimer()
	mib := float64(b.N) * size / (1 << 20)
	interrupts = g.m.Line(lineBase+1).Count() + g.m.Line(lineBase+2).Count() - interrupts
	b.ReportMetric(float64(kicks)/mib, "kicks/MiB")
	b.ReportMetric(float64(interrupts)/mib, "interrupts/MiB")
}

// BenchmarkCopy copies as much as a packet of BenchmarkStream has once, which is the
// least that a stream can cost.
func BenchmarkCopy(b *testing.B) {
	from, to := make([]byte, 64<<10), make([]byte, 64<<10)
	b.SetBytes(64 << 10)
	for b.Loop() {
		copy(to, from)
	}
}

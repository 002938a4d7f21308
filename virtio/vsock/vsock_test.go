package vsock_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/guest"
	"github.com/calfvm/calf/virtio/pci"
	"github.com/calfvm/calf/virtio/virtiotest"
	"github.com/calfvm/calf/virtio/vsock"
)

const (
	lineBase = 0x40
	cid      = 7
	patience = 10 * time.Second

	// What the tests' guest has room for, unless it says otherwise.
	guestRoom = 256 << 10
	ownRoom   = 256 << 10 // the device's

	request, response, reset, shutdown, data, update, ask = 1, 2, 3, 4, 5, 6, 7
)

// packet is one of the protocol, by the names of the specification.
type packet struct {
	src, dst                uint64
	from, to                uint32
	kind, op                uint16
	flags, bufAlloc, fwdCnt uint32
	data                    []byte
}

func (p packet) String() string {
	return fmt.Sprintf("op %d, %d:%d to %d:%d, flags %d, %d bytes", p.op, p.src, p.from, p.dst, p.to, p.flags, len(p.data))
}

func (p packet) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, p.src)
	b = le.AppendUint64(b, p.dst)
	for _, v := range []uint32{p.from, p.to, uint32(len(p.data))} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint16(b, p.kind)
	b = le.AppendUint16(b, p.op)
	for _, v := range []uint32{p.flags, p.bufAlloc, p.fwdCnt} {
		b = le.AppendUint32(b, v)
	}
	return append(b, p.data...)
}

func decode(t testing.TB, b []byte) packet {
	t.Helper()
	if len(b) < 44 {
		t.Fatalf("a packet of %d bytes", len(b))
	}
	le := binary.LittleEndian
	p := packet{
		src: le.Uint64(b), dst: le.Uint64(b[8:]), from: le.Uint32(b[16:]), to: le.Uint32(b[20:]),
		kind: le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags: le.Uint32(b[32:]), bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]), data: bytes.Clone(b[44:]),
	}
	if n := le.Uint32(b[24:]); int(n) != len(p.data) {
		t.Fatalf("%v says that it has %d bytes", p, n)
	}
	return p
}

// driver is the guest's driver of a device.
type driver struct {
	t   testing.TB
	m   *virtiotest.Machine
	d   *virtiotest.Driver
	dev *vsock.Device

	rx, tx *virtiotest.Ring
	txBuf  guest.GPA
	size   uint32               // of buffers for packets
	bufs   map[uint16]guest.GPA // by head
}

// start returns a device whose driver is ready, with n buffers of size bytes for
// packets.
func start(t testing.TB, cfg vsock.Config, n int, size uint32) *driver {
	t.Helper()
	cfg.CID = cid
	dev, err := vsock.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m := virtiotest.NewMachine()
	fn, err := pci.New(m, m.Memory, dev, pci.Options{Line: noLine{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(fn.Close(), dev.Close()); err != nil {
			t.Error(err)
		}
	})
	d, err := virtiotest.Probe(m, fn, virtiotest.Window)
	if err != nil {
		t.Fatal(err)
	}
	g := &driver{t: t, m: m, d: d, dev: dev, txBuf: m.Alloc(1<<20, 4), size: size}
	g.start(n)
	return g
}

type noLine struct{}

func (noLine) Set(bool) {}

func (g *driver) start(n int) {
	g.t.Helper()
	if err := g.d.Start(^uint64(0), 3, 64, lineBase); err != nil {
		g.t.Fatal(err)
	}
	g.rx, g.tx, g.bufs = g.d.Rings[0], g.d.Rings[1], map[uint16]guest.GPA{}
	for range n {
		g.give(g.m.Alloc(uint64(g.size), 4))
	}
	g.rx.Publish()
	g.rx.Kick()
}

// give gives the device a buffer for a packet.
func (g *driver) give(at guest.GPA) {
	head, ok := g.rx.Add(virtiotest.Buf{Addr: at, Len: 44, Write: true}, virtiotest.Buf{Addr: at + 44, Len: g.size - 44, Write: true})
	if !ok {
		g.t.Fatal("the ring is full")
	}
	g.bufs[head] = at
}

// send sends the bytes of a packet.
func (g *driver) send(b []byte) {
	g.t.Helper()
	copy(g.m.Bytes(g.txBuf, uint64(len(b))), b)
	g.tx.Add(virtiotest.Buf{Addr: g.txBuf, Len: uint32(len(b))})
	g.tx.Publish()
	g.tx.Kick()
	if _, _, ok := g.tx.Wait(g.m.Line(lineBase+2), patience); !ok {
		g.t.Fatal("a packet is not taken")
	}
}

// receive returns the next packet, none if there is none in time.
func (g *driver) receive(timeout time.Duration) (packet, bool) {
	g.t.Helper()
	head, n, ok := g.rx.Wait(g.m.Line(lineBase+1), timeout)
	if !ok {
		return packet{}, false
	}
	at := g.bufs[head]
	p := decode(g.t, g.m.Bytes(at, uint64(n)))
	if p.src != 2 && p.op != reset || p.dst != cid {
		g.t.Fatalf("got %v", p)
	}
	g.give(at)
	g.rx.Publish()
	g.rx.Kick()
	return p, true
}

// expect returns the next packet, which has the given operation.
func (g *driver) expect(op uint16) packet {
	g.t.Helper()
	p, ok := g.receive(patience)
	if !ok {
		g.t.Fatalf("no packet came, want operation %d", op)
	}
	if p.op != op {
		g.t.Fatalf("got %v, want operation %d", p, op)
	}
	return p
}

// quiet makes sure that nothing comes.
func (g *driver) quiet() {
	g.t.Helper()
	if p, ok := g.receive(50 * time.Millisecond); ok {
		g.t.Fatalf("got %v, want nothing", p)
	}
}

// packet is one to a port of the host.
func (g *driver) packet(op uint16, from, to uint32) packet {
	return packet{src: cid, dst: 2, from: from, to: to, kind: 1, op: op, bufAlloc: guestRoom}
}

// connected returns a connection that the host has opened to port 5 of the guest,
// and a packet from there to it.
func (g *driver) connected(room uint32) (*vsock.Conn, packet) {
	g.t.Helper()
	type result struct {
		c   *vsock.Conn
		err error
	}
	done := make(chan result)
	go func() {
		c, err := g.dev.Dial(context.Background(), 5)
		done <- result{c, err}
	}()
	p, ok := g.receive(patience)
	for ok && p.op != request { // of connections before
		p, ok = g.receive(patience)
	}
	if !ok || p.to != 5 || p.bufAlloc != ownRoom || p.kind != 1 {
		g.t.Fatalf("got %v", p)
	}
	back := g.packet(response, p.to, p.from)
	back.bufAlloc = room
	g.send(back.encode())
	r := <-done
	if r.err != nil {
		g.t.Fatal(r.err)
	}
	return r.c, back
}

func (g *driver) op(p packet, op uint16) packet {
	p.op = op
	return p
}

// TestStream moves data both ways, ends one direction and then the other.
func TestStream(t *testing.T) {
	g := start(t, vsock.Config{}, 8, 4096)
	c, back := g.connected(guestRoom)
	if _, err := c.Write(bytes.Repeat([]byte("calf"), 2000)); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for len(got) < 8000 {
		p := g.expect(data)
		if len(p.data) > 4096-44 {
			t.Fatalf("got %v", p)
		}
		got = append(got, p.data...)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte("calf"), 2000)) {
		t.Error("the guest got something else")
	}
	out := g.op(back, data)
	out.data = bytes.Repeat([]byte("guest"), 100)
	g.send(out.encode())
	in := make([]byte, 1000)
	if n, err := c.Read(in); err != nil || string(in[:n]) != string(out.data) {
		t.Errorf("read %q, %v", in[:n], err)
	}

	end := g.op(back, shutdown)
	end.flags = 2 // it sends no more
	g.send(out.encode())
	g.send(end.encode())
	if all, err := io.ReadAll(c); err != nil || !bytes.Equal(all, out.data) {
		t.Errorf("read %q, %v", all, err)
	}
	if _, err := c.Write([]byte("last")); err != nil {
		t.Error(err)
	}
	if p := g.expect(data); string(p.data) != "last" {
		t.Errorf("got %v", p)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if p := g.expect(shutdown); p.flags != 3 {
		t.Errorf("got %v", p)
	}
	g.send(g.op(back, reset).encode())
	g.quiet()
	g.send(out.encode()) // nobody knows of that connection now
	g.expect(reset)
}

// TestCredit makes sure that neither side gets more than it has room for.
func TestCredit(t *testing.T) {
	g := start(t, vsock.Config{}, 8, 4096)
	c, back := g.connected(1000)
	go func() { _, _ = c.Write(make([]byte, 5000)) }()
	got := 0
	for {
		p, ok := g.receive(patience)
		if !ok {
			t.Fatal("no packet came")
		}
		if p.op == ask {
			break
		}
		got += len(p.data)
	}
	if got != 1000 {
		t.Fatalf("got %d bytes, has room for 1000", got)
	}
	g.quiet()
	more := g.op(back, update)
	more.bufAlloc, more.fwdCnt = 1500, 900 // 1400 are free: 500 more, and 900 taken
	g.send(more.encode())
	for got < 2400 {
		got += len(g.expect(data).data)
	}
	g.expect(ask)
	if got != 2400 {
		t.Errorf("got %d bytes, has room for 2400", got)
	}
	less := more
	less.bufAlloc = 10 // less than what is under way
	g.send(less.encode())
	g.quiet() // it has been asked, and would answer for ever

	c2, back2 := g.connected(guestRoom)
	full := g.op(back2, data)
	full.data = make([]byte, ownRoom/4)
	for range 4 {
		g.send(full.encode())
	}
	g.quiet()
	if _, err := io.ReadFull(c2, make([]byte, ownRoom/2-1)); err != nil {
		t.Fatal(err)
	}
	g.quiet() // not yet worth a packet
	if _, err := io.ReadFull(c2, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if p := g.expect(update); p.fwdCnt != ownRoom/2 || p.bufAlloc != ownRoom {
		t.Errorf("got %v, which has taken %d of %d", p, p.fwdCnt, p.bufAlloc)
	}
	g.send(full.encode())
	g.send(full.encode())
	g.quiet()
	full.data = full.data[:1] // one byte more than there is room for
	g.send(full.encode())
	g.expect(reset)
	if _, err := io.Copy(io.Discard, c2); !errors.Is(err, unix.EPROTO) {
		t.Errorf("the host's end says %v", err)
	}
}

// TestStrangePackets sends what no connection takes.
func TestStrangePackets(t *testing.T) {
	g := start(t, vsock.Config{}, 8, 4096)
	_, back := g.connected(guestRoom)
	for _, c := range []struct {
		name  string
		make  func(p *packet)
		reset bool
	}{
		{"a request where nobody serves", func(p *packet) { p.op, p.to = request, 80 }, true},
		{"data for no connection", func(p *packet) { p.op, p.to = data, 80 }, true},
		{"a response to nothing", func(p *packet) { p.op, p.to = response, 80 }, true},
		{"a reset of nothing", func(p *packet) { p.op, p.to = reset, 80 }, false},
		{"another kind", func(p *packet) { p.kind = 2 }, true},
		{"another host", func(p *packet) { p.dst = 1 }, true},
		{"another guest", func(p *packet) { p.src = 8 }, false},
		{"an unknown operation", func(p *packet) { p.op = 99; p.to = 80 }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g.t = t
			p := g.op(back, update)
			c.make(&p)
			g.send(p.encode())
			if c.reset {
				if got := g.expect(reset); got.to != p.from || got.from != p.to || got.src != p.dst {
					t.Errorf("got %v in answer to %v", got, p)
				}
			}
			g.quiet()
		})
	}
	g.t = t
	short := g.op(back, data)
	short.data = make([]byte, 100)
	g.send(short.encode()[:100]) // less than it says
	g.send(short.encode()[:20])  // less than a header
	g.quiet()
	for _, op := range []uint16{request, response, 99} { // what breaks a connection
		c, back := g.connected(guestRoom)
		g.send(g.op(back, op).encode())
		g.expect(reset)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.EPROTO) {
			t.Errorf("operation %d: %v", op, err)
		}
	}
}

// TestRefused dials where nobody listens, too late, and before there is a driver.
func TestRefused(t *testing.T) {
	dev, err := vsock.New(vsock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dev.Dial(context.Background(), 5); !errors.Is(err, vsock.ErrNotReady) {
		t.Errorf("without a driver: %v", err)
	}
	if _, err := vsock.New(vsock.Config{CID: 2}); err == nil {
		t.Error("the guest can be the host")
	}

	g := start(t, vsock.Config{}, 8, 4096)
	done := make(chan error)
	dial := func(ctx context.Context) {
		go func() {
			_, err := g.dev.Dial(ctx, 5)
			done <- err
		}()
	}
	dial(context.Background())
	p := g.expect(request)
	g.send(g.packet(reset, p.to, p.from).encode())
	if err := <-done; !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	dial(ctx)
	g.expect(request)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	g.expect(reset)
	dial(context.Background())
	g.expect(request)
	if err := g.d.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a reset of the device: %v", err)
	}
}

// TestDeviceReset ends connections, and starts the device anew.
func TestDeviceReset(t *testing.T) {
	g := start(t, vsock.Config{}, 8, 4096)
	c, _ := g.connected(10)
	wrote := make(chan error)
	go func() {
		_, err := c.Write(make([]byte, 1<<20))
		wrote <- err
	}()
	g.expect(data)
	if err := g.d.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a writer: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a reader: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	g.start(8)
	c, back := g.connected(guestRoom)
	g.send(g.op(back, reset).encode())
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a reset of the connection: %v", err)
	}
}

// TestUnix goes from Unix sockets to the guest and back.
func TestUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.sock")
	g := start(t, vsock.Config{Serve: vsock.ToUnix(path)}, 8, 4096)
	g.send(g.packet(request, 9, 80).encode())
	g.expect(reset) // nobody listens there
	to, err := net.Listen("unix", path+"_80")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	g.send(g.packet(request, 9, 80).encode())
	g.expect(response)
	u, err := to.Accept()
	if err != nil {
		t.Fatal(err)
	}
	out := g.packet(data, 9, 80)
	out.data = []byte("from the guest")
	g.send(out.encode())
	end := g.packet(shutdown, 9, 80)
	end.flags = 2
	g.send(end.encode())
	if b, err := io.ReadAll(u); err != nil || string(b) != "from the guest" {
		t.Errorf("the host got %q, %v", b, err)
	}
	if _, err := u.Write([]byte("from the host")); err != nil {
		t.Error(err)
	}
	if p := g.expect(data); string(p.data) != "from the host" {
		t.Errorf("the guest got %v", p)
	}
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	if p := g.expect(shutdown); p.flags&2 == 0 {
		t.Errorf("the guest got %v", p)
	}

	from, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- g.dev.ServeUnix(ctx, from) }()
	for _, bad := range []string{"HELLO\n", "CONNECT x\n", "CONNECT 5000000000\n", string(make([]byte, 1000))} {
		u := dialUnix(t, path)
		_, _ = u.Write([]byte(bad))
		if b, err := io.ReadAll(u); len(b) > 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%q: got %q, %v", bad, b, err)
		}
	}
	u = dialUnix(t, path)
	if _, err := u.Write([]byte("CONNECT 5\nat once")); err != nil {
		t.Fatal(err)
	}
	for { // of the connection before only an end may still come
		p, ok := g.receive(patience)
		if !ok {
			t.Fatal("no packet came")
		}
		if p.op == request {
			g.send(g.packet(response, p.to, p.from).encode())
			line := make([]byte, len(fmt.Sprintf("OK %d\n", p.from)))
			if _, err := io.ReadFull(u, line); err != nil || string(line) != fmt.Sprintf("OK %d\n", p.from) {
				t.Errorf("the program read %q, %v", line, err)
			}
			break
		}
	}
	if p := g.expect(data); string(p.data) != "at once" {
		t.Errorf("the guest got %v", p)
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Errorf("ServeUnix returned %v", err)
	}
}

// TestForgotten has a guest open connections that it forgets at once, while those who
// serve them are not done. They are bounded, and there is room again when they are.
func TestForgotten(t *testing.T) {
	const most = 256
	done, ended := make(chan struct{}), make(chan struct{}, 2*most)
	finish := sync.OnceFunc(func() { close(done) })
	defer finish()
	g := start(t, vsock.Config{Serve: func(*vsock.Conn) {
		<-done
		ended <- struct{}{}
	}}, 8, 4096)
	for i := range uint32(most) {
		g.send(g.packet(request, 1000+i, 80).encode())
		g.send(g.packet(reset, 1000+i, 80).encode())
	}
	g.quiet()
	g.send(g.packet(request, 9, 80).encode())
	g.expect(reset)
	finish()
	for range most {
		<-ended
	}
	for range 1000 {
		g.send(g.packet(request, 9, 80).encode())
		g.expect(reset) // of who is refused because there is no room, or by Serve
		select {
		case <-ended:
			return
		default:
		}
	}
	t.Error("nobody is served any more")
}

// TestUnixStuck closes a device while a program on the host does not read what the guest
// has sent.
func TestUnixStuck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.sock")
	g := start(t, vsock.Config{Serve: vsock.ToUnix(path)}, 8, 4096)
	to, err := net.Listen("unix", path+"_80")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	g.send(g.packet(request, 9, 80).encode())
	g.expect(response)
	u, err := to.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	out := g.packet(data, 9, 80)
	out.data = make([]byte, 64<<10)
	room := uint32(ownRoom)
	for sent := uint32(0); ; { // until neither the socket nor the device takes more
		for ; sent < room; sent += uint32(len(out.data)) {
			g.send(out.encode())
		}
		p, ok := g.receive(200 * time.Millisecond)
		if !ok {
			break
		}
		room = (p.fwdCnt + ownRoom) &^ (64<<10 - 1)
	}
	closed := make(chan error, 1)
	go func() { closed <- g.dev.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the device waits for a program that does not read")
	}
}

func dialUnix(t *testing.T, path string) net.Conn {
	t.Helper()
	u, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u
}

// TestMany has many connections at a time, each of which sends a random number of
// bytes that the guest sends back, while buffers of the guest are few.
func TestMany(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	g := start(t, vsock.Config{}, 3, 1500)
	stop := make(chan struct{})
	var echo, conns sync.WaitGroup
	echo.Go(func() { g.echo(stop) })
	for i := range 20 {
		conns.Go(func() {
			if err := roundTrip(g.dev, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	conns.Wait()
	close(stop)
	echo.Wait()
}

// roundTrip sends random bytes to the guest, ends its direction, and compares what
// comes back.
func roundTrip(dev *vsock.Device, random *rand.Rand) error {
	c, err := dev.Dial(context.Background(), 5)
	if err != nil {
		return err
	}
	n := random.IntN(1 << 19)
	source := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)})
	wrote := make(chan [32]byte)
	go func() {
		sum := sha256.New()
		for left := n; left > 0; {
			b := make([]byte, min(left, 1+random.IntN(50000)))
			_, _ = source.Read(b)
			sum.Write(b)
			if _, err := c.Write(b); err != nil {
				break
			}
			left -= len(b)
		}
		_ = c.CloseWrite()
		wrote <- [32]byte(sum.Sum(nil))
	}()
	sum := sha256.New()
	got, err := io.Copy(sum, c)
	want := <-wrote
	if err == nil && (got != int64(n) || [32]byte(sum.Sum(nil)) != want) {
		err = fmt.Errorf("%d of %d bytes came back, or others", got, n)
	}
	return errors.Join(err, c.Close())
}

// echo is a guest that sends back what comes, as far as there is room for it.
func (g *driver) echo(stop <-chan struct{}) {
	type peer struct {
		packet         // to it
		waiting        []byte
		sent           uint32
		alloc, taken   uint32 // the device's
		ended, endTold bool
	}
	peers := map[uint32]*peer{}
	for {
		select {
		case <-stop:
			return
		default:
		}
		p, ok := g.receive(10 * time.Millisecond)
		if !ok {
			continue
		}
		e := peers[p.from]
		if p.op == request {
			e = &peer{packet: g.packet(response, p.to, p.from)}
			e.bufAlloc = 64 << 10
			peers[p.from] = e
			g.send(e.encode())
		}
		if e == nil {
			continue
		}
		e.alloc, e.taken = p.bufAlloc, p.fwdCnt
		e.waiting = append(e.waiting, p.data...)
		e.fwdCnt += uint32(len(p.data))
		e.ended = e.ended || p.op == shutdown
		for len(e.waiting) > 0 && e.alloc > e.sent-e.taken {
			n := min(len(e.waiting), int(e.alloc-(e.sent-e.taken)), 5000)
			out := g.op(e.packet, data)
			out.data = e.waiting[:n]
			e.waiting, e.sent = e.waiting[n:], e.sent+uint32(n)
			g.send(out.encode())
		}
		switch {
		case e.ended && !e.endTold && len(e.waiting) == 0:
			e.endTold = true
			end := g.op(e.packet, shutdown)
			end.flags = 3
			g.send(end.encode())
			delete(peers, p.from)
		case p.op == ask || p.op == data:
			g.send(g.op(e.packet, update).encode())
		}
	}
}

// TestChoked has a guest send a thousand packets that are to be answered, without
// a buffer for any answer: the device takes as many as it can keep in mind, and the
// rest once there are buffers.
func TestChoked(t *testing.T) {
	const many = 1000
	g := start(t, vsock.Config{}, 0, 4096)
	b := g.packet(request, 9, 80).encode()
	copy(g.m.Bytes(g.txBuf, uint64(len(b))), b)
	sent, taken, answered := 0, 0, 0
	transmit := func() {
		for sent < many {
			if _, ok := g.tx.Add(virtiotest.Buf{Addr: g.txBuf, Len: uint32(len(b))}); !ok {
				break
			}
			sent++
		}
		g.tx.Publish()
		g.tx.Kick()
		for {
			if _, _, ok := g.tx.Wait(g.m.Line(lineBase+2), 50*time.Millisecond); !ok {
				return
			}
			taken++
		}
	}
	for before := -1; before != taken; {
		before = taken
		transmit()
	}
	if taken > 300 || taken < 100 {
		t.Errorf("%d packets were taken without a way to answer them", taken)
	}
	for range 8 {
		g.give(g.m.Alloc(4096, 4))
	}
	g.rx.Publish()
	g.rx.Kick()
	for answered < many {
		if _, ok := g.receive(50 * time.Millisecond); ok {
			answered++
			continue
		}
		if sent == many && taken == many {
			break
		}
		transmit()
	}
	if answered != many {
		t.Errorf("%d of %d packets were answered", answered, many)
	}
}

// FuzzPackets lets a guest send any bytes as packets, to a device with an open
// connection and a server that reads and writes.
func FuzzPackets(f *testing.F) {
	good := packet{src: cid, dst: 2, from: 5, to: 1 << 30, kind: 1, bufAlloc: 100}
	var seeds []byte
	for op := range uint16(8) {
		p := good
		p.op, p.data = op, make([]byte, op)
		b := p.encode()
		seeds = append(append(seeds, byte(len(b))), b...)
	}
	f.Add(seeds)
	f.Fuzz(fuzzPackets)
}

func fuzzPackets(t *testing.T, b []byte) {
	g := start(t, vsock.Config{Serve: func(c *vsock.Conn) {
		c.Accept()
		_, _ = io.CopyN(c, c, 1<<20)
	}}, 8, 200)
	g.connected(100)
	for range 64 {
		if len(b) == 0 {
			break
		}
		n := min(int(b[0]), len(b)-1)
		if n > 0 {
			g.send(b[1 : 1+n])
		}
		b = b[1+n:]
		for {
			if _, ok := g.receive(0); !ok {
				break
			}
		}
	}
	c, back := g.connected(100) // the device still works
	g.send(g.op(back, reset).encode())
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection afterwards: %v", err)
	}
}

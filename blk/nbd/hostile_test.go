package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk/nbd"
)

// stall fills a connection with requests whose replies are never read, until the
// server takes no more.
func (c *client) stall(requests []byte) {
	c.t.Helper()
	for {
		if err := c.nc.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			c.t.Fatal(err)
		}
		if _, err := c.nc.Write(requests); err != nil {
			return
		}
	}
}

// TestStalledClients serves an honest client while all others do nothing but keep
// hold of what they can get, and forgets them when the server stops.
func TestStalledClients(t *testing.T) {
	disk := thin(8 * mib)
	want := bytes.Clone(disk.Bytes)
	cfg := export(disk)
	cfg.MaxConnections = 8
	cfg.DrainTimeout = 300 * time.Millisecond
	s := serve(t, cfg)
	var stalled sync.WaitGroup
	for i := range 7 {
		c := s.enter(i%2 == 0)
		stalled.Go(func() {
			switch i {
			case 0: // reads, by pieces
				c.stall(encode(request, uint16(0), read, uint64(1), uint64(0), uint32(8*mib)))
			case 1, 2: // reads, whole
				c.stall(encode(request, df*uint16(1-i%2), read, uint64(1), uint64(0), uint32(8*mib)))
			case 3: // a write without its end
				c.request(0, write, 1, 0, 8*mib, want[:mib])
			case 4: // block status
				c.stall(encode(request, uint16(0), status, uint64(1), uint64(0), uint32(8*mib)))
			case 5: // half a request
				c.send(request, uint16(0))
			case 6: // refused requests
				c.stall(encode(request, uint16(0), uint16(99), uint64(1), uint64(0), uint32(8*mib)))
			}
		})
	}
	stalled.Wait()
	honest := s.enter(true)
	for i := range uint64(20) {
		off := i * 300 * kib
		honest.request(fua, write, i, off, 256*kib, want[off:][:256*kib])
		honest.ok(i)
		honest.request(0, read, i, off, 300*kib)
		if got, _ := honest.collect(i, int(off), 300*kib); !bytes.Equal(got, want[off:][:300*kib]) {
			t.Fatalf("the data at %d differs", off)
		}
	}
	begin := time.Now()
	s.stop()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("the server takes %v to stop", took)
	}
}

// TestMemory bounds what clients can make a server use: as many connections as
// there may be, all with as much under way as they can get.
func TestMemory(t *testing.T) {
	requests := encode(
		request, uint16(0), read, uint64(1), uint64(1), uint32(32*mib),
		request, uint16(0), zeroes, uint64(1), uint64(1), uint32(1<<32-1),
		request, uint16(0), cache, uint64(1), uint64(1), uint32(1<<32-1),
		request, uint16(0), write, uint64(1), uint64(1), uint32(mib), make([]byte, mib),
	)
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for _, connections := range []int{4, 16, 64, nbd.MaxConnections} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			cfg := export(vastDisk{delay: time.Millisecond})
			cfg.MaxConnections = connections
			cfg.DrainTimeout = 10 * time.Millisecond
			s := serve(t, cfg)
			var greedy sync.WaitGroup
			for i := range connections {
				c := s.enter(i%2 == 0)
				greedy.Go(func() { c.stall(requests) })
			}
			greedy.Wait()
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			if used := int64(now.HeapInuse+now.StackInuse) - int64(before.HeapInuse+before.StackInuse); used > 160*mib {
				t.Errorf("%d MiB are in use", used/mib)
			} else {
				t.Logf("%d MiB are in use", used/mib)
			}
		})
	}
}

// TestKilledClients leaves nothing of clients that go away in the middle.
func TestKilledClients(t *testing.T) {
	r := seeded(t)
	cfg := export(vastDisk{delay: 100 * time.Microsecond})
	cfg.UntilIdle = true
	s := serve(t, cfg)
	last := s.enter(true) // keeps the server going
	for range 60 {
		c := s.enter(r.IntN(2) == 0)
		if err := c.nc.SetDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		for range r.IntN(6) { // None of this need succeed.
			command := []uint16{read, write, zeroes, cache, flush}[r.IntN(5)]
			_, _ = c.nc.Write(encode(request, uint16(0), command, uint64(1), r.Uint64N(mib), uint32(r.IntN(mib))))
			if r.IntN(2) == 0 {
				_, _ = c.nc.Write(make([]byte, r.IntN(mib)))
			}
			if r.IntN(3) == 0 {
				_, _ = io.ReadFull(c.nc, make([]byte, r.IntN(100*kib)))
			}
		}
		_ = c.nc.Close()
	}
	last.request(0, flush, 1, 0, 0)
	last.ok(1)
	last.request(0, disc, 0, 0, 0)
	last.gone()
	if err := s.wait(); err != nil { // as nobody is left
		t.Error(err)
	}
}

// TestHastyClients go away before they are told that they may come in, and take no
// room from others.
func TestHastyClients(t *testing.T) {
	cfg := export(thin(4096))
	cfg.MaxConnections = 2
	s := serve(t, cfg)
	for i := range 40 {
		c := s.dial()
		c.send(uint32(3), [][]byte{option(1, "disk"), option(7, str(""), uint16(0))}[i%2])
		_ = c.nc.Close()
	}
	for n := 0; ; n++ {
		c := s.dial()
		c.send(uint32(3), option(7, str(""), uint16(0)))
		c.skip(replyMagic, uint32(7))
		if binary.BigEndian.Uint32(c.get(4)) == 3 {
			return
		}
		_ = c.nc.Close()
		if n > 200 {
			t.Fatal("there is no room for a client")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestDisconnect answers what is under way before it hangs up.
func TestDisconnect(t *testing.T) {
	c := serve(t, export(vastDisk{delay: 50 * time.Millisecond})).enter(false)
	for i := range uint64(10) {
		c.request(0, write, i, 0, 1, "x")
	}
	c.request(0, disc, 0, 0, 0)
	var seen [10]bool
	for range seen {
		c.want(simple, uint32(0))
		seen[c.get(8)[7]] = true
	}
	if seen != [10]bool{true, true, true, true, true, true, true, true, true, true} {
		t.Errorf("answered are %v", seen)
	}
	c.gone()
}

// TestStop answers what is under way when the server stops, but for long requests,
// flushes, and lets nobody in.
func TestStop(t *testing.T) {
	disk := &slowDisk{flushingDisk: newFlushing(mib), delay: 100 * time.Millisecond}
	s := serve(t, nbd.Config{Exports: []nbd.Export{{Name: "a", Disk: disk}, {Name: "vast", Disk: vastDisk{delay: time.Millisecond}}}})
	enter := func(name string) *client {
		c := s.dial()
		c.send(uint32(3), option(1, name))
		c.get(10)
		return c
	}
	a, long, idle := enter("a"), enter("vast"), enter("a")
	half := s.dial() // has not chosen yet
	a.request(0, write, 1, 0, 5, "hello")
	a.request(0, read, 2, 100, 512)
	long.request(0, zeroes, 3, 0, 1<<32-1)
	time.Sleep(50 * time.Millisecond)
	s.stop()

	for range 2 {
		a.want(simple, uint32(0))
		if a.get(8)[7] == 2 {
			a.want(disk.Bytes[100:612])
		}
	}
	a.gone()
	long.want(simple, eshutdown, uint64(3))
	long.gone()
	idle.gone()
	half.gone()
	if err := s.wait(); err != nil {
		t.Error(err)
	}
	if got := disk.stableAt(0, 5); string(got) != "hello" {
		t.Errorf("after the stop %q is stable", got)
	}
	if nc, err := net.Dial("unix", s.path); err == nil {
		t.Error("it still listens", nc.Close())
	}
}

// slowDisk takes its time for everything but flushes.
type slowDisk struct {
	*flushingDisk
	delay time.Duration
}

func (d *slowDisk) ReadvAt(iov [][]byte, off int64) error {
	time.Sleep(d.delay)
	return d.flushingDisk.ReadvAt(iov, off)
}

func (d *slowDisk) WritevAt(iov [][]byte, off int64) error {
	time.Sleep(d.delay)
	return d.flushingDisk.WritevAt(iov, off)
}

// TestManyClients has several connections write, make zero, read and flush ranges
// of their own at random, with as many requests under way as it likes, and compares
// every byte that is read, and after a flush by another what is stable.
func TestManyClients(t *testing.T) {
	const clients, region, steps = 6, 512 * kib, 60
	r := seeded(t)
	disk := newFlushing(clients * region)
	s := serve(t, export(disk))
	var wg sync.WaitGroup
	for i := range clients {
		c, base, seed := s.enter(i%2 == 0), i*region, r.Uint64()
		model := bytes.Clone(disk.Bytes[base:][:region])
		wg.Go(func() { exercise(c, i%2 == 0, base, model, steps, seed) })
	}
	wg.Wait()
	c := s.enter(false)
	c.request(0, flush, 1, 0, 0)
	c.ok(1)
	c.request(0, read, 2, 0, clients*region)
	c.want(simple, uint32(0), uint64(2), disk.stableAt(0, clients*region))
}

// exercise sends random requests for the region at base, all of which have to be
// answered as the model says. Those under way at a time do not overlap.
func exercise(c *client, structured bool, base int, model []byte, steps int, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	for range steps {
		const parallel = 8
		part := len(model) / parallel
		type pending struct {
			command uint16
			off, n  int
		}
		var sent [parallel]pending
		for i := range sent {
			p := pending{[]uint16{read, read, write, zeroes, cache}[r.IntN(5)], i*part + r.IntN(part/2), 1 + r.IntN(part/2)}
			sent[i] = p
			var payload []byte
			if p.command == write {
				payload = bytes.Repeat([]byte{byte(r.Uint32() | 1)}, p.n)
				copy(model[p.off:], payload)
			}
			if p.command == zeroes {
				clear(model[p.off:][:p.n])
			}
			c.request(fua*uint16(r.IntN(8)/7), p.command, uint64(i), uint64(base+p.off), uint32(p.n), payload)
		}
		for range sent {
			magic := binary.BigEndian.Uint32(c.get(4))
			if magic == simple {
				if code := binary.BigEndian.Uint32(c.get(4)); code != 0 {
					c.t.Errorf("error %d", code)
					return
				}
				i := binary.BigEndian.Uint64(c.get(8))
				if p := sent[i]; p.command == read && !bytes.Equal(c.get(p.n), model[p.off:][:p.n]) {
					c.t.Errorf("%d bytes at %d differ", p.n, base+p.off)
				}
				continue
			}
			h := c.get(16)
			p := sent[binary.BigEndian.Uint64(h[4:])]
			got := make([]byte, p.n)
			if kind := binary.BigEndian.Uint16(h[2:]); h[1] != 1 || p.n > 256*kib || !structured {
				c.t.Errorf("a chunk of type %d with flags %d", kind, h[1])
				return
			}
			payload := c.get(int(binary.BigEndian.Uint32(h[12:])))
			if h[3] == 1 {
				copy(got, payload[8:])
			}
			if !bytes.Equal(got, model[p.off:][:p.n]) {
				c.t.Errorf("%d bytes at %d differ", p.n, base+p.off)
			}
		}
	}
}

// sickListener fails as it is told to.
type sickListener struct {
	net.Listener
	errs chan error
}

func (l sickListener) Accept() (net.Conn, error) {
	select {
	case err := <-l.errs:
		return nil, &net.OpError{Op: "accept", Err: err}
	default:
		return l.Listener.Accept()
	}
}

// TestAcceptErrors goes on after those that pass, and ends with any other.
func TestAcceptErrors(t *testing.T) {
	srv, err := nbd.New(export(thin(4096)))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, srv: srv, path: path, done: make(chan error, 1)}
	sick := sickListener{ln, make(chan error, 2)}
	sick.errs <- unix.EMFILE
	sick.errs <- unix.ECONNABORTED
	go func() { s.done <- srv.Serve(t.Context(), sick) }()
	c := s.enter(false)
	sick.errs <- unix.EINVAL
	if nc, err := net.Dial("unix", path); err == nil { // wakes it
		_ = nc.Close()
	}
	if err := s.wait(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Serve ends with %v", err)
	}
	c.gone()
	noneLeft(t)
}

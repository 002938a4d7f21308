// Package nbd serves disks over the Network Block Device protocol, to qemu,
// libnbd, the Linux kernel and whoever else speaks it
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
//
// The handshake is fixed newstyle, without TLS. Structured replies, block status
// in any number of metadata contexts, multi-connection, and all commands that do
// not resize are there; extended headers are not, which a client learns when it
// asks for them.
//
// # Goroutines and memory
//
// A connection has a goroutine that reads its requests, and a number of slots,
// each a goroutine while it serves one and a buffer of at most 256 KiB. Larger
// requests are served in pieces of that size, as many at a time as there are
// slots. All slots of a server together hold at most 64 MiB, divided evenly among
// the connections that it admits: a client that stalls, or asks for too much,
// keeps nothing from any other. Nothing is allocated by a length that a client
// has sent before that was bounded.
//
// # What is durable when
//
// All connections to an export share its Disk, so that a flush on one of them, and
// a write with the flag FUA, which is followed by a flush, cover every write that
// was answered on any.
package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/blk"
	"github.com/calfvm/calf/virtio"
)

const (
	// pieceSize is the size in bytes of the pieces in which large requests are
	// served. They end at multiples of it.
	pieceSize = 256 << 10
	// allSlots is how many pieces are in work at a time, in all connections.
	allSlots = 256
	// maxSlots bounds those of one connection.
	maxSlots = 16
	// maxHandshakes bounds the connections that have not chosen an export.
	maxHandshakes = 64

	// MaxConnections is the most that Config.MaxConnections may be.
	MaxConnections = allSlots
	// DefaultConnections is what it is if it is not set.
	DefaultConnections = 16

	defaultHandshakeTimeout = 10 * time.Second
	defaultDrainTimeout     = 5 * time.Second
	// acceptPause follows a failure to accept a connection that may pass.
	acceptPause = 100 * time.Millisecond
)

// Config describes a server.
type Config struct {
	// Exports are the disks to serve, at least one, with different names. The
	// caller closes them after Serve has returned.
	Exports []Export
	// MaxConnections is how many clients may use exports at a time; 0 means
	// DefaultConnections. It divides the memory for requests under way, so that
	// more connections mean fewer requests of each. A server for one connection
	// does not offer multi-connection.
	MaxConnections int
	// UntilIdle ends Serve once the last client that has used an export is gone.
	UntilIdle bool
	// HandshakeTimeout is how long a client may take to choose an export; 0
	// means 10 seconds.
	HandshakeTimeout time.Duration
	// DrainTimeout is how long a client may take, once the server stops, to
	// receive the replies to its last requests; 0 means 5 seconds.
	DrainTimeout time.Duration
	// Log gets errors of disks and of clients. It may be nil.
	Log *slog.Logger
}

// Export is a disk that clients may choose by its name.
type Export struct {
	// Name and Description have at most 4096 bytes of UTF-8. A client that gives
	// no name gets the export without one, or the only export.
	Name, Description string
	// Disk is served. If it is a blk.Discarder, a blk.ZeroWriter, a blk.Hinter or
	// a Mapper, clients have the use of it.
	Disk blk.Disk
	// ReadOnly refuses all that would change the disk.
	ReadOnly bool
	// NoDiscard keeps the room of what clients trim or make zero.
	NoDiscard bool
	// Contexts are metadata contexts beside base:allocation.
	Contexts []Context
}

// Stats say what a server has done since it was made.
type Stats struct {
	// Connections that have chosen an export.
	Connections uint64
	// Requests that were answered, and those of them that were with an error.
	Requests, Errors uint64
	// BytesRead and BytesWritten are the data of successful requests.
	BytesRead, BytesWritten uint64
	// Flushes that clients asked for, including by the flag FUA.
	Flushes uint64
}

// Server serves disks. Its methods are safe for concurrent use.
type Server struct {
	cfg     Config
	exports map[string]*export
	order   []*export // as in cfg
	slots   int       // of a connection
	log     *slog.Logger
	limit   virtio.LogLimit

	// active is the number of connections that have chosen an export. Each adds
	// and removes itself.
	active atomic.Int64
	// stats are counted by every connection.
	stats struct {
		connections, requests, errors, read, written, flushes atomic.Uint64
	}
}

// New returns a server, or an error that says what is wrong with cfg.
func New(cfg Config) (*Server, error) {
	switch {
	case len(cfg.Exports) == 0:
		return nil, errors.New("nbd: there is nothing to serve")
	case cfg.MaxConnections < 0 || cfg.MaxConnections > MaxConnections:
		return nil, fmt.Errorf("nbd: the number of connections is from 1 to %d, not %d", MaxConnections, cfg.MaxConnections)
	case cfg.MaxConnections == 0:
		cfg.MaxConnections = DefaultConnections
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = defaultHandshakeTimeout
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = defaultDrainTimeout
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		cfg: cfg, exports: make(map[string]*export), log: cfg.Log,
		slots: min(allSlots/cfg.MaxConnections, maxSlots),
	}
	for _, e := range cfg.Exports {
		if err := checkNames(e); err != nil {
			return nil, fmt.Errorf("nbd: export %q: %w", e.Name, err)
		}
		if s.exports[e.Name] != nil {
			return nil, fmt.Errorf("nbd: there are two exports with the name %q", e.Name)
		}
		x := newExport(e, cfg.MaxConnections > 1)
		s.exports[e.Name] = x
		s.order = append(s.order, x)
	}
	return s, nil
}

// checkNames is the error for strings that the protocol does not allow.
func checkNames(e Export) error {
	names := []string{e.Name, e.Description}
	for _, c := range e.Contexts {
		if space, leaf, _ := strings.Cut(c.Name, ":"); space == "" || leaf == "" || c.Name == baseAllocation {
			return fmt.Errorf("%q is no name for a metadata context beside %s", c.Name, baseAllocation)
		}
		names = append(names, c.Name)
	}
	for _, s := range names {
		if len(s) > maxString || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return fmt.Errorf("a name or description has to be UTF-8 without NUL, of at most %d bytes", maxString)
		}
	}
	return nil
}

// find returns the export that a client names.
func (s *Server) find(name string) *export {
	if name == "" && len(s.order) == 1 {
		return s.order[0]
	}
	return s.exports[name]
}

// Stats returns what the server has done so far.
func (s *Server) Stats() Stats {
	return Stats{
		Connections: s.stats.connections.Load(),
		Requests:    s.stats.requests.Load(), Errors: s.stats.errors.Load(),
		BytesRead: s.stats.read.Load(), BytesWritten: s.stats.written.Load(),
		Flushes: s.stats.flushes.Load(),
	}
}

// Serve accepts connections from ln until ctx is done, and closes ln. The requests
// under way are answered then, but for the rest of those that were to change or
// cache more than 32 MiB, and the disks are flushed. It returns the error of the
// listener or of the flush, if there was one; no goroutine of it is left.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	ctx, stop := context.WithCancel(ctx)
	closed := make(chan error, 1)
	context.AfterFunc(ctx, func() { closed <- ln.Close() })

	var conns sync.WaitGroup
	err := s.accept(ctx, ln, func(nc net.Conn, handshakeOver func()) {
		conns.Go(func() { s.serve(ctx, nc, handshakeOver, stop) })
	})
	stop()
	conns.Wait()
	return errors.Join(err, <-closed, s.flush())
}

// accept has every connection served until ctx is done. serve must not block, and
// see to it that handshakeOver is called once.
func (s *Server) accept(ctx context.Context, ln net.Listener, serve func(nc net.Conn, handshakeOver func())) error {
	room := make(chan struct{}, maxHandshakes)
	for {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		nc, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = nc.Close() // It has not been told anything.
			}
			return nil
		case err == nil:
			serve(nc, func() { <-room })
		case passing(err):
			s.log.Warn("cannot accept a connection", "err", err)
			<-room
			time.Sleep(acceptPause)
		default:
			return fmt.Errorf("nbd: accept connections: %w", err)
		}
	}
}

// passing reports whether an error of accept concerns one connection only, or goes
// away when others close their files.
func passing(err error) bool {
	for _, e := range []unix.Errno{unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serve serves one connection from beginning to end.
func (s *Server) serve(ctx context.Context, nc net.Conn, handshakeOver, stop func()) {
	c := newConn(s, nc)
	defer c.close()
	undo := context.AfterFunc(ctx, c.drain)
	defer undo()

	err := c.limit(ctx, time.Now().Add(s.cfg.HandshakeTimeout))
	if err == nil {
		err = c.negotiate()
	}
	handshakeOver()
	if c.export == nil {
		s.log.Debug("a client has chosen no export", "client", c.name(), "err", err)
		return
	}
	defer func() {
		if s.active.Add(-1) == 0 && s.cfg.UntilIdle {
			stop()
		}
	}()
	s.stats.connections.Add(1)
	s.log.Debug("a client has come", "client", c.name(), "export", c.export.Name)
	if err == nil {
		err = c.limit(ctx, time.Time{})
	}
	if err == nil {
		err = c.transmit()
	}
	s.log.Debug("a client has gone", "client", c.name(), "export", c.export.Name, "err", err)
}

// admit makes room for a connection in the transmission phase, if there is any.
func (s *Server) admit() bool {
	for n := s.active.Load(); n < int64(s.cfg.MaxConnections); n = s.active.Load() {
		if s.active.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false // without having been counted, so that the last to go knows that it is
}

// flush flushes all disks that clients may have changed.
func (s *Server) flush() error {
	var errs []error
	for _, e := range s.order {
		if e.readOnly {
			continue
		}
		if err := e.Disk.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("nbd: export %q: %w", e.Name, err))
		}
	}
	return errors.Join(errs...)
}

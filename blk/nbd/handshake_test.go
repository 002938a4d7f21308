package nbd_test

import (
	"strings"
	"testing"
	"time"

	"github.com/calfvm/calf/blk/blktest"
	"github.com/calfvm/calf/blk/nbd"
)

// What an export can do, and what it can beside that with structured replies.
const (
	readWriteFlags = uint16(1 | 4 | 8 | 1<<5 | 1<<6 | 1<<8 | 1<<10 | 1<<11)
	readOnlyFlags  = uint16(1 | 2 | 4 | 8 | 1<<8 | 1<<10)
	dfFlag         = uint16(1 << 7)
)

// two are exports of a writable and a read-only disk.
func two() nbd.Config {
	return nbd.Config{Exports: []nbd.Export{
		{
			Name: "a", Description: "first", Disk: thin(1 << 20),
			Contexts: []nbd.Context{{Name: "x-test:one"}, {Name: "x-test:two"}},
		},
		{Name: "b", Disk: thin(4096), ReadOnly: true},
	}}
}

// reply is an answer to an option.
func reply(opt, kind uint32, data ...any) []byte {
	b := encode(data...)
	return encode(replyMagic, opt, kind, uint32(len(b)), b)
}

// option is an option.
func option(opt uint32, data ...any) []byte {
	b := encode(data...)
	return encode(optionMagic, opt, uint32(len(b)), b)
}

// TestHandshake sends options and compares the answers, byte by byte.
func TestHandshake(t *testing.T) {
	structured, structuredAck := option(8), reply(8, ack)
	aInfo := encode(uint16(0), uint64(1<<20), readWriteFlags)
	for _, c := range []struct {
		name   string
		send   []byte
		want   []byte
		hangUp bool // afterwards
	}{
		{"list", option(3), encode(reply(3, 2, str("a"), "first"), reply(3, 2, str("b")), reply(3, ack)), false},
		{"list with data", option(3, "x"), reply(3, errInvalid, "this option has no data"), false},
		{"abort", option(2), reply(2, ack), true},
		{"abort with data", option(2, "bye"), reply(2, ack), true},
		{"TLS", option(5), reply(5, errPolicy, "there is no TLS: this server is for clients on its own host"), false},
		{"unknown option", option(4711, "?"), reply(4711, errUnsup, "the option is not known"), false},
		{"extended headers", option(11), reply(11, errUnsup, "the option is not known"), false},
		{"long option", option(4711, strings.Repeat("x", 1<<16)), reply(4711, errTooBig, "an option may have 32768 bytes"), false},
		{"structured with data", option(8, "x"), reply(8, errInvalid, "this option has no data"), false},
		{"wrong magic", encode(optionMagic+1, uint32(3), uint32(0)), nil, true},

		{"info", option(6, str("a"), uint16(0)), encode(reply(6, 3, aInfo), reply(6, ack)), false},
		{
			"all info", option(6, str("a"), uint16(5), uint16(3), uint16(2), uint16(1), uint16(0), uint16(99)),
			encode(
				reply(6, 3, aInfo), reply(6, 3, uint16(1), "a"), reply(6, 3, uint16(2), "first"),
				reply(6, 3, uint16(3), uint32(1), uint32(4096), uint32(32<<20)), reply(6, ack),
			), false,
		},
		{
			"read-only, structured", encode(structured, option(6, str("b"), uint16(1), uint16(2))),
			encode(structuredAck, reply(6, 3, uint16(0), uint64(4096), readOnlyFlags|dfFlag), reply(6, ack)), false,
		},
		{"no such export", option(7, str("c"), uint16(0)), reply(7, errUnknown, "there is no export of this name"), false},
		{"no default", option(7, str(""), uint16(0)), reply(7, errUnknown, "there is no export of this name"), false},
		{"info without count", option(6, str("a")), reply(6, errInvalid, "the option is malformed"), false},
		{"info too short", option(6, str("a"), uint16(2), uint16(3)), reply(6, errInvalid, "the option is malformed"), false},
		{"info too long", option(6, str("a"), uint16(0), "x"), reply(6, errInvalid, "the option is malformed"), false},
		{"name beyond the data", option(6, uint32(1<<32-1), "a"), reply(6, errInvalid, "the option is malformed"), false},
		{"name too long", option(6, str(strings.Repeat("n", 4097)), uint16(0)), reply(6, errInvalid, "the option is malformed"), false},
		{"name not UTF-8", option(6, str("\xff"), uint16(0)), reply(6, errInvalid, "the option is malformed"), false},

		{"contexts too early", option(9, str("a"), uint32(0)), reply(9, errInvalid, "structured replies come first"), false},
		{
			"list contexts", encode(structured, option(9, str("a"), uint32(0))), encode(structuredAck,
				reply(9, 4, uint32(0), "base:allocation"), reply(9, 4, uint32(0), "x-test:one"),
				reply(9, 4, uint32(0), "x-test:two"), reply(9, ack)), false,
		},
		{
			"list by namespace", encode(structured, option(9, str("a"), uint32(2), str("x-test:"), str("nobody:"))),
			encode(structuredAck, reply(9, 4, uint32(0), "x-test:one"), reply(9, 4, uint32(0), "x-test:two"), reply(9, ack)), false,
		},
		{
			"set contexts", encode(structured, option(10, str("a"), uint32(3), str("x-test:two"), str("x-test:"), str("base:allocation"))),
			encode(structuredAck, reply(10, 4, uint32(0), "base:allocation"), reply(10, 4, uint32(1), "x-test:two"), reply(10, ack)), false,
		},
		{"set none", encode(structured, option(10, str("a"), uint32(0))), encode(structuredAck, reply(10, ack)), false},
		{"set unknown", encode(structured, option(10, str("a"), uint32(1), str("base:x"))), encode(structuredAck, reply(10, ack)), false},
		{"set of no export", encode(structured, option(10, str("c"), uint32(0))), encode(structuredAck, reply(10, errUnknown, "there is no export of this name")), false},
		{"queries beyond the data", encode(structured, option(9, str("a"), uint32(1<<32-1), str("base:"))), encode(structuredAck, reply(9, errInvalid, "the option is malformed")), false},

		{"export by name", option(1, "a"), encode(uint64(1<<20), readWriteFlags), false},
		{"no export by name", option(1, "c"), nil, true},
		{"long name", option(1, strings.Repeat("c", 40000)), nil, true},
		{"go", option(7, str("b"), uint16(0)), encode(reply(7, 3, uint16(0), uint64(4096), readOnlyFlags), reply(7, ack)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, two())
			cl := s.dial()
			cl.send(uint32(3), c.send)
			cl.want(c.want)
			if c.hangUp {
				cl.gone()
			}
		})
	}
}

// TestHandshakeFlags are clients that take less, or more, than is offered.
func TestHandshakeFlags(t *testing.T) {
	s := serve(t, two())
	c := s.dial()
	c.send(uint32(0), option(1, "b"))
	c.want(uint64(4096), readOnlyFlags, make([]byte, 124))
	c.request(0, flush, 1, 0, 0)
	c.ok(1)

	c = s.dial()
	c.send(uint32(0), option(3))
	c.gone() // only fixed newstyle has options

	c = s.dial()
	c.send(uint32(7))
	c.gone()
}

// TestDefaultExport gives a client that names none the only export, or the one
// without a name.
func TestDefaultExport(t *testing.T) {
	for _, names := range [][]string{{"only"}, {"x", ""}} {
		var cfg nbd.Config
		for i, name := range names {
			cfg.Exports = append(cfg.Exports, nbd.Export{Name: name, Disk: thin(512 * (i + 1))})
		}
		c := serve(t, cfg).dial()
		c.send(uint32(3), option(6, str(""), uint16(1), uint16(1)))
		name := names[len(names)-1]
		c.want(reply(6, 3, uint16(0), uint64(512*len(names)), readWriteFlags), reply(6, 3, uint16(1), name), reply(6, ack))
	}
}

// TestContextsOfAnotherExport are lost when the client goes to a different one.
func TestContextsOfAnotherExport(t *testing.T) {
	c := serve(t, two()).dial()
	c.send(uint32(3), option(8), option(10, str("a"), uint32(1), str("base:allocation")), option(7, str("b"), uint16(0)))
	c.skip(reply(8, ack), reply(10, 4, uint32(0), "base:allocation"), reply(10, ack), reply(7, 3, make([]byte, 12)), reply(7, ack))
	c.request(0, status, 9, 0, 512)
	c.fault(9, einval)
}

// TestFailedSetContexts takes back what was selected before.
func TestFailedSetContexts(t *testing.T) {
	c := serve(t, two()).dial()
	c.send(uint32(3), option(8), option(10, str("a"), uint32(1), str("base:allocation")), option(10, "?"), option(7, str("a"), uint16(0)))
	c.skip(reply(8, ack), reply(10, 4, uint32(0), "base:allocation"), reply(10, ack), reply(10, errInvalid, "the option is malformed"))
	c.skip(reply(7, 3, make([]byte, 12)), reply(7, ack))
	c.request(0, status, 9, 0, 512)
	c.fault(9, einval)
}

// TestHandshakeTimeout hangs up on clients that say nothing, or too little, and
// serves others meanwhile, however many of them there are.
func TestHandshakeTimeout(t *testing.T) {
	cfg := export(thin(4096))
	cfg.HandshakeTimeout = 300 * time.Millisecond
	s := serve(t, cfg)
	var silent []*client
	for i := range 60 {
		c := s.dial()
		c.send([]any{"", uint16(0), uint32(3), encode(uint32(3), optionMagic, uint32(3), uint32(1<<31))}[i%4])
		silent = append(silent, c)
	}
	c := s.enter(false)
	for _, c := range silent {
		c.gone()
	}
	time.Sleep(cfg.HandshakeTimeout) // is over for who has made it
	c.request(0, read, 5, 0, 16)
	c.want(simple, uint32(0), uint64(5), thin(4096).Bytes[:16])
}

// TestConnections refuses more clients than there may be, and takes new ones when
// old ones have gone.
func TestConnections(t *testing.T) {
	cfg := export(thin(4096))
	cfg.MaxConnections = 2
	s := serve(t, cfg)
	a, b := s.enter(true), s.enter(false)
	c := s.dial()
	c.send(uint32(3), option(7, str(""), uint16(0)))
	c.want(reply(7, errPolicy, "there are as many connections as there may be"))
	c.send(option(6, str(""), uint16(0))) // may still be asked
	c.skip(reply(6, 3, make([]byte, 12)), reply(6, ack))
	d := s.dial()
	d.send(uint32(3), option(1, "disk"))
	d.gone()

	a.request(0, disc, 0, 0, 0)
	a.gone()
	_ = b.nc.Close()
	for n := 0; s.srv.Stats().Connections < 4; n++ {
		if n > 1000 {
			t.Fatal("there is no room for new clients")
		}
		c := s.dial()
		c.send(uint32(3), option(1, "disk"))
		time.Sleep(time.Millisecond)
	}
}

// TestOneConnection does not let a client believe that it may have two.
func TestOneConnection(t *testing.T) {
	cfg := export(thin(4096))
	cfg.MaxConnections = 1
	c := serve(t, cfg).dial()
	c.send(uint32(3), option(6, str("disk"), uint16(0)))
	c.want(reply(6, 3, uint16(0), uint64(4096), readWriteFlags&^(1<<8)), reply(6, ack))
}

// TestFlags are those of disks that can do less.
func TestFlags(t *testing.T) {
	hinted := thin(1 << 20)
	hinted.Hints = [3]int64{8192, 0, 1<<16 + 1}
	for _, c := range []struct {
		name   string
		export nbd.Export
		flags  uint16
		block  uint32
	}{
		{"plain", nbd.Export{Disk: &blktest.Memory{Bytes: make([]byte, 512)}}, readWriteFlags &^ (1 << 5), 4096},
		{"no discard", nbd.Export{Disk: thin(512), NoDiscard: true}, readWriteFlags &^ (1 << 5), 4096},
		{"read-only disk", nbd.Export{Disk: &blktest.Memory{RO: true}}, readOnlyFlags, 4096},
		{"hints", nbd.Export{Disk: hinted}, readWriteFlags, 1 << 16},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := serve(t, nbd.Config{Exports: []nbd.Export{c.export}}).dial()
			cl.send(uint32(3), option(6, str(""), uint16(1), uint16(3)))
			cl.want(
				reply(6, 3, uint16(0), uint64(c.export.Disk.Size()), c.flags),
				reply(6, 3, uint16(3), uint32(1), c.block, uint32(32<<20)), reply(6, ack),
			)
		})
	}
}

// TestNewRefuses configurations that cannot be served.
func TestNewRefuses(t *testing.T) {
	disk := thin(512)
	for name, cfg := range map[string]nbd.Config{
		"nothing":      {},
		"twice":        {Exports: []nbd.Export{{Name: "a", Disk: disk}, {Name: "a", Disk: disk}}},
		"long name":    {Exports: []nbd.Export{{Name: strings.Repeat("x", 4097), Disk: disk}}},
		"NUL":          {Exports: []nbd.Export{{Name: "a\x00", Disk: disk}}},
		"not UTF-8":    {Exports: []nbd.Export{{Description: "\xff", Disk: disk}}},
		"context":      {Exports: []nbd.Export{{Disk: disk, Contexts: []nbd.Context{{Name: "x"}}}}},
		"base":         {Exports: []nbd.Export{{Disk: disk, Contexts: []nbd.Context{{Name: "base:allocation"}}}}},
		"connections":  {Exports: []nbd.Export{{Disk: disk}}, MaxConnections: nbd.MaxConnections + 1},
		"connections-": {Exports: []nbd.Export{{Disk: disk}}, MaxConnections: -1},
	} {
		if s, err := nbd.New(cfg); err == nil || s != nil {
			t.Errorf("%s: %v, %v", name, s, err)
		} else if !strings.HasPrefix(err.Error(), "nbd: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

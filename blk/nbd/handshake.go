package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// errProtocol is wrapped by the error for a client that breaks the protocol in a
// way that leaves nothing to say to it.
var errProtocol = errors.New("nbd: the client breaks the protocol")

// handshake is what a connection has agreed on so far.
type handshake struct {
	fixed      bool // the client may use other options than NBD_OPT_EXPORT_NAME
	noZeroes   bool
	structured bool
	// The contexts were selected for the export of this name.
	contextsOf string
	contexts   []int // in export.contexts; the index is the ID

	out []byte // what has not been sent yet
}

// negotiate does the handshake. Afterwards c.export is what the client has chosen,
// nil if it wants nothing.
func (c *conn) negotiate() error {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(b); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.in, flags[:]); err != nil {
		return err
	}
	taken := binary.BigEndian.Uint32(flags[:])
	if taken&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("%w: it takes what was not offered: %#x", errProtocol, taken)
	}
	c.fixed, c.noZeroes = taken&flagFixedNewstyle != 0, taken&flagNoZeroes != 0
	for {
		done, err := c.haggle()
		if _, sent := c.nc.Write(c.out); err == nil {
			err = sent
		}
		c.out = c.out[:0]
		if done || err != nil {
			return err
		}
	}
}

// haggle takes an option and answers it, and reports whether it was the last one.
func (c *conn) haggle() (done bool, err error) {
	var head [optionHeader]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return false, err
	}
	if magic := binary.BigEndian.Uint64(head[:]); magic != magicOption {
		return false, fmt.Errorf("%w: an option begins with %#x", errProtocol, magic)
	}
	opt, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
	switch {
	case !c.fixed && opt != optExportName:
		return false, fmt.Errorf("%w: option %d without fixed newstyle", errProtocol, opt)
	case n > maxOption && opt == optExportName:
		return false, fmt.Errorf("%w: the name of an export has %d bytes", errProtocol, n)
	case n > maxOption:
		if _, err := io.CopyN(io.Discard, c.in, int64(n)); err != nil {
			return false, err
		}
		c.refuse(opt, repErrTooBig, fmt.Sprintf("an option may have %d bytes", maxOption))
		return false, nil
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.in, data); err != nil {
		return false, err
	}
	return c.option(opt, data)
}

// option answers an option.
func (c *conn) option(opt uint32, data []byte) (done bool, err error) {
	switch opt {
	case optExportName:
		return true, c.exportName(string(data))
	case optAbort:
		c.reply(opt, repAck)
		return true, nil
	case optInfo, optGo:
		return c.info(opt, data), nil
	case optListContexts, optSetContexts:
		c.metaContexts(opt, data)
	case optList, optStructuredReply:
		if len(data) > 0 {
			c.refuse(opt, repErrInvalid, "this option has no data")
			break
		}
		if opt == optList {
			c.list()
		}
		c.structured = c.structured || opt == optStructuredReply
		c.reply(opt, repAck)
	case optStartTLS:
		c.refuse(opt, repErrPolicy, "there is no TLS: this server is for clients on its own host")
	default:
		c.refuse(opt, repErrUnsupported, "the option is not known")
	}
	return false, nil
}

// reply answers an option.
func (c *conn) reply(opt, kind uint32, data ...byte) {
	b := binary.BigEndian.AppendUint64(c.out, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data))) //nolint:gosec // G115: data is some strings
	c.out = append(b, data...)
}

// refuse answers an option with an error and the reason.
func (c *conn) refuse(opt, kind uint32, why string) { c.reply(opt, kind, []byte(why)...) }

func (c *conn) list() {
	for _, e := range c.srv.order {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name))) //nolint:gosec // G115: at most maxString
		b = append(b, e.Name...)
		c.reply(optList, repServer, append(b, e.Description...)...)
	}
}

// exportName answers the one option that cannot be refused but by hanging up.
func (c *conn) exportName(name string) error {
	e := c.srv.find(name)
	switch {
	case e == nil:
		return fmt.Errorf("nbd: the client wants an export %.64q, which is not there", name)
	case !c.srv.admit():
		return errors.New("nbd: there are as many connections as there may be")
	}
	c.choose(e, e.Disk.Size())
	c.out = binary.BigEndian.AppendUint64(c.out, uint64(c.size)) //nolint:gosec // G115: not negative
	c.out = binary.BigEndian.AppendUint16(c.out, e.transmission(c.structured))
	if !c.noZeroes {
		c.out = append(c.out, make([]byte, oldPadding)...)
	}
	return nil
}

// choose makes the client one of e, which is so many bytes long for as long as it
// stays.
func (c *conn) choose(e *export, size int64) {
	c.export, c.size = e, size
	if c.srv.find(c.contextsOf) != e {
		c.contexts = nil
	}
}

// info answers NBD_OPT_INFO and NBD_OPT_GO, and reports whether the client has
// chosen an export by the latter.
func (c *conn) info(opt uint32, data []byte) (done bool) {
	f := fields{b: data}
	name := f.str()
	wanted := make(map[uint16]bool)
	for n := f.u16(); n > 0 && !f.short; n-- {
		wanted[f.u16()] = true
	}
	if !f.whole() {
		c.refuse(opt, repErrInvalid, "the option is malformed")
		return false
	}
	e := c.srv.find(name)
	if e == nil {
		c.refuse(opt, repErrUnknown, "there is no export of this name")
		return false
	}
	if opt == optGo && !c.srv.admit() {
		c.refuse(opt, repErrPolicy, "there are as many connections as there may be")
		return false
	}
	size := e.Disk.Size()
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(size)) //nolint:gosec // G115: not negative
	c.reply(opt, repInfo, binary.BigEndian.AppendUint16(b, e.transmission(c.structured))...)
	if wanted[infoName] {
		c.reply(opt, repInfo, append([]byte{0, infoName}, e.Name...)...)
	}
	if wanted[infoDescription] && e.Description != "" {
		c.reply(opt, repInfo, append([]byte{0, infoDescription}, e.Description...)...)
	}
	if wanted[infoBlockSize] {
		b := binary.BigEndian.AppendUint32([]byte{0, infoBlockSize}, 1)
		b = binary.BigEndian.AppendUint32(b, e.preferredBlock())
		c.reply(opt, repInfo, binary.BigEndian.AppendUint32(b, maxPayload)...)
	}
	c.reply(opt, repAck)
	if opt == optGo {
		c.choose(e, size)
	}
	return opt == optGo
}

// metaContexts answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT. The
// latter replaces what was selected before, even if it fails.
func (c *conn) metaContexts(opt uint32, data []byte) {
	set := opt == optSetContexts
	if set {
		c.contexts = nil
	}
	f := fields{b: data}
	name := f.str()
	var queries []string
	for n := f.u32(); n > 0 && !f.short; n-- {
		queries = append(queries, f.str())
	}
	e := c.srv.find(name)
	switch {
	case !f.whole():
		c.refuse(opt, repErrInvalid, "the option is malformed")
		return
	case !c.structured:
		c.refuse(opt, repErrInvalid, "structured replies come first")
		return
	case e == nil:
		c.refuse(opt, repErrUnknown, "there is no export of this name")
		return
	}
	for i, context := range e.contexts {
		if !matches(context.Name, queries, set) {
			continue
		}
		id := uint32(0)
		if set {
			id = uint32(len(c.contexts)) //nolint:gosec // G115: few
			c.contexts = append(c.contexts, i)
			c.contextsOf = name
		}
		c.reply(opt, repContext, append(binary.BigEndian.AppendUint32(nil, id), context.Name...)...)
	}
	c.reply(opt, repAck)
}

// matches reports whether queries ask for the metadata context of this name. To
// list contexts, a query that ends with a colon is for all that begin with it, and
// none at all is for all.
func matches(context string, queries []string, set bool) bool {
	if len(queries) == 0 {
		return !set
	}
	return slices.ContainsFunc(queries, func(q string) bool {
		return q == context || !set && strings.HasSuffix(q, ":") && strings.HasPrefix(context, q)
	})
}

// fields takes the data of an option apart. Once it is too short for what is asked,
// it yields nothing but zeros.
type fields struct {
	b     []byte
	short bool
}

// whole reports whether the data was just long enough.
func (f *fields) whole() bool { return !f.short && len(f.b) == 0 }

func (f *fields) take(n uint32) []byte {
	if uint64(n) > uint64(len(f.b)) {
		f.b, f.short = nil, true
		return nil
	}
	b := f.b[:n]
	f.b = f.b[n:]
	return b
}

func (f *fields) u16() uint16 {
	if b := f.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (f *fields) u32() uint32 {
	if b := f.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// str is a string after its length.
func (f *fields) str() string {
	n := f.u32()
	if n > maxString {
		f.b, f.short = nil, true
		return ""
	}
	s := string(f.take(n))
	if !utf8.ValidString(s) {
		f.short = true
	}
	return s
}

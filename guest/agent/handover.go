package agent

import (
	"bufio"
	"fmt"
	"time"

	"github.com/calfvm/calf/guest/agent/internal/wire"
)

// HandOver is the host's side of the agents that let the image's init take over: one
// for each boot of a guest. Serve may be called for several connections at a time.
type HandOver struct {
	// Hostname is what the guest is called until its init says otherwise; empty:
	// nothing.
	Hostname string
	// Up is called when the guest has its root in place, with the release of its
	// kernel.
	Up func(kernel string)
}

// Serve takes a connection of the guest to Port, and returns when it is of no more
// use.
func (h *HandOver) Serve(c Conn) {
	defer func() { _ = c.Close() }()
	in, o, err := accept(c)
	if err != nil || o != (wire.Opening{Stream: wire.Control}) {
		return
	}
	late := time.AfterFunc(maxIdle, func() { _ = c.Close() })
	defer late.Stop()
	var m wire.ToHost
	if err := wire.Read(in.r, &m); err != nil || m.Hello == nil {
		return
	}
	h.Up(printable(m.Hello.Kernel))
	if err := wire.Write(c, wire.ToGuest{Start: &wire.Start{Time: time.Now().UnixNano(), Hostname: h.Hostname}}); err != nil {
		return
	}
	_, _ = in.Read(make([]byte, 1)) // until the guest has it
}

// accept lets the guest use a connection, and reads what it is for.
func accept(c Conn) (in *opened, o wire.Opening, err error) {
	c.Accept()
	late := time.AfterFunc(maxIdle, func() { _ = c.Close() })
	in = &opened{Conn: c, r: bufio.NewReaderSize(c, wire.MaxLine)}
	err = wire.Read(in.r, &o)
	if !late.Stop() && err == nil {
		err = fmt.Errorf("the guest has said nothing for %v", maxIdle)
	}
	return in, o, err
}

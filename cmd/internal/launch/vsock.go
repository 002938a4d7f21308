package launch

import (
	"context"
	"errors"
	"fmt"

	"github.com/calfvm/calf/cmd/internal/socket"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/guest/agent"
	"github.com/calfvm/calf/virtio/vsock"
)

// vsockHost is the host's side of a guest's socket device. A nil one is of a guest
// without.
type vsockHost struct {
	dev    *vsock.Device
	cancel context.CancelFunc
	served chan error // nil without Unix sockets
}

// errVsockClosed is why a vsockHost ends that has been closed.
var errVsockClosed = errors.New("the run is over")

// openVsock makes the socket device that cfg asks for, or that the agent of a command
// needs, and serves the Unix sockets that lead to it; nil if there is no need. command
// is nil or takes the connections of an agent.
func openVsock(cfg config.Vsock, command func(agent.Conn)) (*vsockHost, error) {
	if cfg.Path == "" && command == nil {
		return nil, nil
	}
	dev, err := vsock.New(vsock.Config{CID: uint32(cfg.CID), Serve: func(c *vsock.Conn) { //nolint:gosec // G115: the rules bound it
		switch {
		case command != nil && c.Port() == agent.Port:
			command(c)
		case cfg.Path != "":
			vsock.ToUnix(cfg.Path)(c)
		}
	}})
	if err != nil {
		return nil, err
	}
	h := &vsockHost{dev: dev}
	if cfg.Path == "" {
		return h, nil
	}
	l, err := socket.Listen(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	h.cancel, h.served = func() { cancel(errVsockClosed) }, make(chan error, 1)
	go func() { h.served <- dev.ServeUnix(ctx, l) }()
	return h, nil
}

// device is the guest's device, or nil.
func (h *vsockHost) device() *vsock.Device {
	if h == nil {
		return nil
	}
	return h.dev
}

// close ends all connections and removes the socket.
func (h *vsockHost) close() error {
	if h == nil {
		return nil
	}
	var err error
	if h.served != nil {
		h.cancel()
		if err = <-h.served; errors.Is(err, errVsockClosed) {
			err = nil
		}
	}
	return errors.Join(err, h.dev.Close())
}

package launch

import (
	"context"
	"errors"
	"fmt"

	"github.com/calfvm/calf/cmd/internal/socket"
	"github.com/calfvm/calf/config"
	"github.com/calfvm/calf/virtio/vsock"
)

// vsockHost is the host's side of a guest's socket device. A nil one is of a guest
// without.
type vsockHost struct {
	dev    *vsock.Device
	cancel context.CancelFunc
	served chan error
}

// errVsockClosed is why a vsockHost ends that has been closed.
var errVsockClosed = errors.New("the run is over")

// openVsock makes the socket device that cfg asks for, nil if it asks for none, and
// serves the Unix sockets that lead to it.
func openVsock(cfg config.Vsock) (*vsockHost, error) {
	if cfg.Path == "" {
		return nil, nil
	}
	dev, err := vsock.New(vsock.Config{CID: uint32(cfg.CID), Serve: vsock.ToUnix(cfg.Path)}) //nolint:gosec // G115: the rules bound it
	if err != nil {
		return nil, err
	}
	l, err := socket.Listen(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	h := &vsockHost{dev: dev, cancel: func() { cancel(errVsockClosed) }, served: make(chan error, 1)}
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
	h.cancel()
	err := <-h.served
	if errors.Is(err, errVsockClosed) {
		err = nil
	}
	return errors.Join(err, h.dev.Close())
}

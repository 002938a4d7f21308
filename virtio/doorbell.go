package virtio

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Doorbell is an eventfd that wakes the goroutine which works a queue. The
// kernel rings it directly where a machine binds FD to a guest address; the
// waiter parks in the Go network poller and holds no thread (K5).
//
// Rings are not counted: any number of them before a Wait make it return once.
// All methods but Wait are safe for concurrent use; Wait is for one goroutine.
type Doorbell struct {
	fd   int
	file *os.File
	buf  [8]byte // of Wait, so that reading does not allocate
}

var ringValue = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// NewDoorbell returns a doorbell that has not been rung.
func NewDoorbell() (*Doorbell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("virtio: create an eventfd: %w", err)
	}
	return &Doorbell{fd: fd, file: os.NewFile(uintptr(fd), "doorbell")}, nil
}

// FD is the eventfd, valid until Close.
func (d *Doorbell) FD() int { return d.fd }

// Ring makes the current Wait, or else the next one, return.
func (d *Doorbell) Ring() {
	// The only failure is a closed doorbell, which wakes the waiter as well.
	_, _ = d.file.Write(ringValue)
}

// Wait returns when the doorbell has been rung since the last Wait. Its error
// is os.ErrClosed once the doorbell is closed.
func (d *Doorbell) Wait() error {
	_, err := d.file.Read(d.buf[:])
	return err
}

// Close wakes the waiter and frees the eventfd.
func (d *Doorbell) Close() error { return d.file.Close() }

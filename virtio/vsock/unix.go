package vsock

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// greeting is how long a program has to say which port it wants.
	greeting = 10 * time.Second
	// maxGreeting bounds the line that says it.
	maxGreeting = 64
	// farewell is how long a program may take for what is left when the device closes.
	farewell = time.Second
)

// ToUnix returns what Config.Serve can be: a connection that the guest opens to
// port N goes to the Unix socket path_N of the host, and is refused if nobody
// listens there.
func ToUnix(path string) func(*Conn) {
	return func(c *Conn) {
		u, err := net.Dial("unix", path+"_"+strconv.FormatUint(uint64(c.Port()), 10))
		if err != nil {
			return // which refuses it
		}
		c.Accept()
		// A program that does not read must not keep the device from closing.
		defer context.AfterFunc(c.dev.over, func() { _ = u.SetWriteDeadline(time.Now().Add(farewell)) })()
		relay(c, u.(*net.UnixConn), u)
	}
}

// ServeUnix lets programs on the host open connections to the guest by way of l, a
// listener on a Unix socket, until ctx ends; then it closes l, ends the connections,
// and returns the cause. A program writes "CONNECT N\n" for port N of the guest,
// and reads "OK P\n", where P is the port of the host, once the connection is open,
// or the end of file.
func (d *Device) ServeUnix(ctx context.Context, l net.Listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })() // Accept reports it
	for {
		u, err := l.Accept()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return errors.Join(err, closeOnce(l))
		}
		serving.Go(func() {
			defer func() { _ = u.Close() }() // twice, mostly
			defer context.AfterFunc(ctx, func() { _ = u.Close() })()
			if c, r, err := d.greet(ctx, u); err == nil {
				relay(c, u.(*net.UnixConn), r)
			}
		})
	}
}

// closeOnce closes l, which may be closed already.
func closeOnce(l net.Listener) error {
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// greet opens the connection that the program behind u asks for. What it sends
// comes from r.
func (d *Device) greet(ctx context.Context, u net.Conn) (c *Conn, r io.Reader, err error) {
	ctx, cancel := context.WithTimeout(ctx, greeting)
	defer cancel()
	if err := u.SetReadDeadline(time.Now().Add(greeting)); err != nil {
		return nil, nil, err
	}
	in := bufio.NewReaderSize(u, maxGreeting)
	line, err := in.ReadSlice('\n')
	if err != nil {
		return nil, nil, err
	}
	word, number, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	port, err := strconv.ParseUint(number, 10, 32)
	if err != nil || word != "CONNECT" {
		return nil, nil, fmt.Errorf("vsock: a program asked for %q, not CONNECT and a port", line)
	}
	if c, err = d.Dial(ctx, uint32(port)); err != nil {
		return nil, nil, err
	}
	if _, err = fmt.Fprintf(u, "OK %d\n", c.Port()); err == nil {
		err = u.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c, in, nil
}

// relay moves data between c and u, from which r reads, until both directions have
// ended or one has failed, and closes both.
func relay(c *Conn, u *net.UnixConn, r io.Reader) {
	var out sync.WaitGroup
	out.Go(func() {
		if _, err := io.Copy(c, r); err != nil {
			_ = c.Close() // the other direction ends by it
			return
		}
		_ = c.CloseWrite()
	})
	if _, err := io.Copy(u, c); err != nil {
		_ = u.Close() // likewise
	} else {
		_ = u.CloseWrite()
	}
	out.Wait()
	_, _ = c.Close(), u.Close()
}

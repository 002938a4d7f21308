package image

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the length in bytes of the longest path of a Unix socket.
const maxSocketPath = 107

// listen opens the socket that a server listens on.
func (o ServeOptions) listen() (net.Listener, error) {
	if o.Socket != "" {
		return listenUnix(o.Socket)
	}
	addr, err := loopback(o.Bind)
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", netip.AddrPortFrom(addr, o.Port).String())
	if err != nil {
		return nil, err
	}
	return &onceListener{Listener: ln, gone: func() error { return nil }}, nil
}

// loopback is the address that bind names. Others are refused: NBD knows neither
// users nor encryption.
func loopback(bind string) (netip.Addr, error) {
	if bind == "" || bind == "localhost" {
		bind = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(bind)
	if err != nil || !addr.IsLoopback() {
		return addr, fmt.Errorf("refused to listen on %s: NBD has no protection, so only a loopback address can be served, such as 127.0.0.1 or ::1; from elsewhere go through a tunnel, such as ssh -L", bind)
	}
	return addr, nil
}

// listenUnix listens on a Unix socket at path. One that is left from a server which
// is gone makes way.
func listenUnix(path string) (net.Listener, error) {
	if strings.HasPrefix(path, "@") {
		path = "./" + path // which package net takes for the name of something else
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("%s: the path of a socket has at most %d bytes", path, maxSocketPath)
	}
	ln, err := net.Listen("unix", path)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, err
		}
		ln, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ours, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return &onceListener{Listener: ln, gone: func() error { return removeSame(path, ours) }}, nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there already, and is no socket", path)
	}
	nc, err := net.Dial("unix", path)
	switch {
	case err == nil:
		return errors.Join(fmt.Errorf("%s: another server listens there", path), nc.Close())
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	return removeSame(path, st)
}

// removeSame removes the file at path if it is still the one that st was taken of.
func removeSame(path string, st fs.FileInfo) error {
	now, err := os.Lstat(path)
	if err != nil || !os.SameFile(now, st) {
		return nil // somebody else has removed or replaced it
	}
	return os.Remove(path)
}

// onceListener is a listener that may be closed more than once. gone removes what
// it leaves.
type onceListener struct {
	net.Listener
	gone  func() error
	close sync.Once
}

// Close implements net.Listener.
func (l *onceListener) Close() (err error) {
	l.close.Do(func() { err = errors.Join(l.gone(), l.Listener.Close()) })
	return err
}

// uris are the addresses of the exports of a server that listens on addr.
func (o ServeOptions) uris(addr net.Addr) []string {
	uris := make([]string, 0, len(o.Exports))
	for _, e := range o.Exports {
		u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + e.Name}
		if o.Socket != "" {
			path, err := filepath.Abs(o.Socket)
			if err != nil {
				path = o.Socket
			}
			u.Scheme, u.Host = "nbd+unix", ""
			u.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
		}
		uris = append(uris, u.String())
	}
	return uris
}

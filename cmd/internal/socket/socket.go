// Package socket makes Unix sockets that programs of the host find by their path.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxPath is the length in bytes of the longest path of a Unix socket.
const maxPath = 107

// Listen listens on a Unix socket at path. One that is left from a program which is
// gone makes way; nothing else does. Closing the listener removes the socket, unless
// it is another one by then, and may be done twice.
func Listen(path string) (net.Listener, error) {
	if strings.HasPrefix(path, "@") {
		path = "./" + path // which package net takes for the name of something else
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("%s: the path of a socket has at most %d bytes", path, maxPath)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	ours, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &listener{Listener: l, path: path, ours: ours}, nil
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
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		return errors.Join(fmt.Errorf("%s: another program listens there", path), c.Close())
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

// listener is a listener that removes its socket.
type listener struct {
	net.Listener
	path  string
	ours  fs.FileInfo
	close sync.Once
}

// Close implements net.Listener.
func (l *listener) Close() (err error) {
	l.close.Do(func() { err = errors.Join(removeSame(l.path, l.ours), l.Listener.Close()) })
	return err
}

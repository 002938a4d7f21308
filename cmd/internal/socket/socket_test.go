package socket

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestListen listens where there was nothing, where a program that is gone has left
// a socket, where another listens, and where a socket cannot be.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	listen := func() net.Listener {
		t.Helper()
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := listen()
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another program listens") {
		t.Errorf("where another listens: %v", err)
	}
	if err := l.(*listener).Listener.Close(); err != nil { // and leaves the socket
		t.Fatal(err)
	}
	l = listen()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}

	l = listen()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("where a file is: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file has %q, %v", b, err)
	}
	if _, err := Listen(dir + "/" + strings.Repeat("x", 108)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a long path: %v", err)
	}
	if _, err := Listen(dir + "/none/s"); err == nil {
		t.Error("a socket is made where there is no directory")
	}
}

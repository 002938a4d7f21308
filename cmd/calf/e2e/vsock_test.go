package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/calfvm/calf/cmd/internal/lab"
)

// asVsockGuest in the environment makes the test binary the guest's program of
// TestVsock.
const asVsockGuest = "CALF_TEST_AS_VSOCK_GUEST"

const (
	vsockToGuest = 1234 // a port of the guest, which sends back what comes
	vsockToHost  = 80   // a port of the host, which answers with a hash
	vsockNobody  = 81   // a port of the host where nobody listens
	vsockBytes   = 8 << 20
	vsockStreams = 4
)

// TestVsock has a stock guest and its host open connections to each other, several
// at a time, and move megabytes through each of them.
func TestVsock(t *testing.T) {
	im := newImages(t)
	root := im.path("root.raw")
	lab.Need(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.GuestRoot(root, 256, nil, self); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "vsock") // whose path is short, as that of a socket has to be
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "v.sock")
	l, err := net.Listen("unix", fmt.Sprintf("%s_%d", path, vsockToHost))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serveHashes(l)

	script := fmt.Sprintf(chroot, asVsockGuest+"=1 /bin/"+filepath.Base(self)+"\npoweroff -f")
	vm := guest{
		kernel: newestKernel(t), cpus: 2, disks: []string{root + ",format=raw,snapshot"}, cmdline: "noroot",
		flags: []string{"--vsock", path}, script: script,
	}.start(t)
	vm.waitFor("refused=ok\n")
	vm.waitFor("hashes=ok\n")
	vm.waitFor("listening\n")
	var streams sync.WaitGroup
	for i := range vsockStreams {
		streams.Go(func() {
			if err := echoThrough(path, uint64(i)); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	streams.Wait()
	vm.exits(0)
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// serveHashes answers every connection with the hash of what it sends.
func serveHashes(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			sum := sha256.New()
			if _, err := io.Copy(sum, c); err == nil {
				_, _ = c.Write(sum.Sum(nil)) // the guest notices
			}
		}()
	}
}

// noise is n bytes, the same ones for the same seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(b) // it never fails
	return b
}

// echoThrough sends noise to the guest by way of the socket at path, and compares
// what comes back.
func echoThrough(path string, seed uint64) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", vsockToGuest); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil {
		return fmt.Errorf("the answer is %q: %w", line, err)
	}
	data := noise(seed, vsockBytes)
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		wrote <- errors.Join(err, c.(*net.UnixConn).CloseWrite())
	}()
	got, err := io.ReadAll(r)
	if err = errors.Join(err, <-wrote); err == nil && !bytes.Equal(got, data) {
		err = fmt.Errorf("%d bytes came back, which are not the %d that were sent", len(got), len(data))
	}
	return err
}

// vsockGuest is what runs in the guest.
func vsockGuest() {
	step := func(name string, do func() error) {
		if err := do(); err != nil {
			fmt.Printf("%s: %v\n", name, err)
			os.Exit(1)
		}
		fmt.Printf("%s=ok\n", name)
	}
	step("refused", func() error {
		if _, err := dialHost(vsockNobody); !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("where nobody listens: %w", err)
		}
		return nil
	})
	step("hashes", func() error { return together(func(i int) error { return hashThrough(uint64(i)) }) })
	step("echo", func() error {
		l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: vsockToGuest}), unix.Listen(l, vsockStreams)); err != nil {
			return err
		}
		fmt.Println("listening")
		return together(func(int) error {
			fd, _, err := unix.Accept(l)
			if err != nil {
				return err
			}
			c := os.NewFile(uintptr(fd), "vsock")
			defer c.Close()
			_, err = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			return errors.Join(err, unix.Shutdown(fd, unix.SHUT_WR))
		})
	})
}

// together does the same for every stream at a time.
func together(do func(i int) error) error {
	errs := make(chan error)
	for i := range vsockStreams {
		go func() { errs <- do(i) }()
	}
	var all error
	for range vsockStreams {
		all = errors.Join(all, <-errs)
	}
	return all
}

func dialHost(port uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

// hashThrough sends noise to the host, and compares the hash that comes back.
func hashThrough(seed uint64) error {
	c, err := dialHost(vsockToHost)
	if err != nil {
		return err
	}
	defer c.Close()
	data := noise(seed, vsockBytes)
	if _, err := c.Write(data); err != nil {
		return err
	}
	if err := unix.Shutdown(int(c.Fd()), unix.SHUT_WR); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if want := sha256.Sum256(data); err == nil && !bytes.Equal(got, want[:]) {
		err = fmt.Errorf("the host got something else: its hash is %x", got)
	}
	return err
}
